"""Rows of results, predictions, and what a row names: device and commit.

A problem is one line that names the file: OSError when it can't be written, ValueError when its content won't do.
"""

import csv
import functools
import io
import itertools
import math
import os
import re
import subprocess
from decimal import Decimal
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from engine import files
from engine.files import ROOT, read_bytes, replacement
from engine.hashes import test_hash

# Read now: a process computes with what it loaded, whatever is edited later.
LOADED = [ROOT / f"{name}.py" for name in ("models", "utils", "hubconf")]
LOADED += [path for folder in ("engine", "experiments") for path in sorted((ROOT / folder).glob("*.py"))]
LOADED = {path: path.read_bytes() for path in LOADED if path.is_file()}
HISTORY = ("epoch", "loss", "train_accuracy", "test_accuracy", "learning_rate", "seconds", "elapsed")  # of each epoch
# The columns of results/runs.csv that a run measures or notes; all others are its settings and tell rows apart.
NON_KEY_COLUMNS = {"parameters", "train_accuracy", "test_accuracy", "validation_accuracy", "test_loss", "seconds"}
NON_KEY_COLUMNS |= {"device", "torch", "commit", "status", "precision", "step"}
# Columns whose values are texts, whatever they look like: a study "1.10" is not "1.1", and 1234e56 is a commit.
TEXTS = ("study", "dataset", "net", "norm", "commit", "true", "predicted")
_commit = None  # see set_commit


def upsert(path, rows, key=None):
    """Upsert rows (dicts, one dict or a DataFrame) into a CSV file: they replace those there with the same key.

    key  column or columns that every new row has, by default all but NON_KEY_COLUMNS. An old row without one counts as
         having "" there. A dict, {column: value}, replaces the old rows that have these values, even by none

    Values are written as given, so round floats first; None and nan as ""; a named index of a DataFrame as a column.
    Several processes may write at a time.
    ValueError, which leaves the file, for rows that would not be read as they are given.
    """
    key = [key] if isinstance(key, str) else key
    if isinstance(rows, pd.DataFrame):  # not to_dict: it makes 0.5899999737739563 of float32 0.59
        for name in rows.columns[rows.columns.duplicated()]:
            raise ValueError(f"{path}: new rows have two columns {name!r}; give each once")
        rows = rows.reset_index([name for name in rows.index.names if name is not None])
        columns = [rows[name].to_numpy() for name in rows]
        rows = [dict(zip(rows, row, strict=True)) for row in zip(*columns, strict=True)]
    rows = [rows] if isinstance(rows, dict) else rows
    new = [{name: _text(value) for name, value in row.items()} for row in rows]
    if not new and not (isinstance(key, dict) and read_bytes(path)):
        return
    with replacement(path) as (target, temporary):
        content = read_bytes(target)
        header, *old = [[]] if content is None else _table(path, content)
        old = [dict(zip(header, row, strict=True)) for row in old]
        columns = list(dict.fromkeys([*header, *(name for row in new for name in row)]))
        unique = key is None  # a key that is named may be that of many rows
        named = [{name: _text(value) for name, value in key.items()}] if isinstance(key, dict) else []
        key = list(key or [name for name in columns if name not in NON_KEY_COLUMNS]) or ["seed"]
        for name in (name for row in new for name in key if name not in row):
            raise ValueError(f"{path}: a new row has no {name!r}, which tells rows apart; give it a value")
        replaced = {_key_of(row, key) for row in new + named}
        if unique and len(replaced) < len(new):
            raise ValueError(f"{path}: two new rows are of the same run; give each run once")
        kept = [row for row in old if _key_of(row, key) not in replaced]
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            table = [columns, *([row.get(name, "") for name in columns] for row in kept + new)]
            csv.writer(file, lineterminator="\n").writerows(table)
        found = itertools.chain(*_table(path, read_bytes(temporary)))
        for field, there in zip(itertools.chain(*table), found, strict=True):
            if field != there:
                raise ValueError(f"{path}: {field!r} would be read as {there!r}; give a text without line ends")


def _text(value):
    if isinstance(value, torch.Tensor):
        value = (value.float() if value.dtype == torch.bfloat16 else value).numpy(force=True)
    value = value[()] if isinstance(value, np.ndarray) else value
    if isinstance(value, np.ndarray | list | tuple | set | dict):
        raise ValueError(f"a row's value is {' '.join(repr(value).split())[:90]}; give a number or a text")
    return "" if pd.api.types.is_scalar(value) and pd.isna(value) else str(value)


def _key_of(row, key):
    return tuple(row.get(name, "") if name in TEXTS else _number(row.get(name, "")) for name in key)


@functools.lru_cache(2**16)
def _number(text):
    """Return a text of a number as that number: a spreadsheet writes 3E-05 and 0.10 for 3e-05 and 0.1."""
    return Decimal(text) if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,4})?", text) else text


@functools.lru_cache(2**16)
def number_text(text, kind):
    """Return a text of a number as str(kind) writes it, int or float; any other text as it is."""
    number = _number(text)
    whole = isinstance(number, Decimal) and (kind is float or number == number.to_integral_value())
    return str(kind(number)) if whole else text


def check_writable(path, columns=()):
    """Raise what `upsert` would, OSError for the place or ValueError for what is in the file; change nothing.

    columns  those of the new rows; without, the file's are not compared with them
    """
    files.check_writable(path)
    if (content := read_bytes(path)) is not None:
        header = _table(path, content)[0]
        for name in set(header) - {*columns, *NON_KEY_COLUMNS} if columns else ():
            raise ValueError(f"{path} has a column {name!r}, which tells rows apart and new rows lack; delete it")


def save_predictions(path, net, seeds, predictions, labels, data):
    """Save the classes that a net's runs predict, (seeds, N), beside those of other nets and the true ones, (N,).

    Replaces what is there of this net. ValueError when the file is of other labels or data (their `test_hash`), or is
    damaged.
    """
    with replacement(path) as (target, temporary):
        arrays = read_predictions(target, labels, data) | {"labels": labels, net: predictions, f"{net} seeds": seeds}
        arrays["data"] = np.array(data)
        for name, value in arrays.items():
            # Bytes, up to 256 classes; an image's seeds side by side compress well.
            if name != "data" and not name.endswith(" seeds"):
                arrays[name] = np.asfortranarray(value, np.min_scalar_type(value.max()))
        with open(temporary, "wb") as file:
            np.savez_compressed(file, **arrays)


def read_predictions(path, labels=None, data=None):
    """Return the arrays of `save_predictions` by name, none when absent. ValueError as there; None allows any."""
    if (content := read_bytes(path)) is None:
        return {}
    try:
        found = dict(np.load(io.BytesIO(content), allow_pickle=False))
        images, other = len(found["labels"]), labels is not None and not np.array_equal(found["labels"], labels)
        there = str(found.get("data", data))  # files of earlier versions lack it
    except Exception:  # of many kinds
        raise ValueError(f"{path} is no whole file of predictions; delete this folder's results") from None
    if other:
        raise ValueError(f"{path} holds predictions for {images} images with other labels; name another folder")
    if data is not None and there != data:
        raise ValueError(f"{path} holds predictions for {images} other images; name another folder")
    return found


def right_rows(predictions):
    """Return which images each seed of each net got right, as rows of a table: no label can be read from them.

    predictions  arrays of `read_predictions`
    right        hexadecimal digits, a bit for each of so many images, the first one's the highest
    """
    labels = predictions["labels"]
    nets = [name for name in predictions if f"{name} seeds" in predictions]
    return [
        {"net": net, "seed": int(seed), "images": len(labels), "right": np.packbits(found == labels).tobytes().hex()}
        for net in nets
        for seed, found in zip(predictions[f"{net} seeds"], predictions[net], strict=True)
    ]


def read_right(path):
    """Return what rows of `right_rows` hold, as {net: bool of (seeds, N)}. ValueError when they are damaged."""
    found, table = {}, read_rows(path, texts=True)
    for row in table.to_dict("records"):
        try:
            bits, images = np.unpackbits(np.frombuffer(bytes.fromhex(row["right"]), np.uint8)), int(row["images"])
            if len(bits) != 8 * math.ceil(images / 8) or table.duplicated(["net", "seed"]).any():
                raise ValueError("a row has more or fewer digits than images, or a seed is there twice")
            found.setdefault(row["net"], []).append(bits[:images].astype(bool))
        except (KeyError, ValueError) as error:
            raise ValueError(f"{path} holds no images that were right: {error}") from None
    return {net: np.stack(seeds) for net, seeds in found.items()}


def check_folder(folder, row, data):
    """Raise what saving runs with this row's settings on `data` in `folder` would; change nothing."""
    files.output_folder(folder, create=False)
    results = folder / "results"
    check_writable(results / "runs.csv", row)
    check_writable(results / "history.csv")
    check_writable(results / "mistakes.csv")
    for path in (results / "predictions.npz", folder / "weights" / f"{row['net']}.pt"):
        files.check_writable(path)
    read_predictions(results / "predictions.npz", data.test_labels.cpu().numpy(), test_hash(data))
    rows = read_rows(results / "runs.csv", texts=True)  # there may be no predictions
    for name in set(rows.get("dataset", ())) - {str(row["dataset"])}:
        raise ValueError(f"{results / 'runs.csv'} holds runs of {name!r}, not {row['dataset']!r}; name another folder")


def check_runs(runs, data):
    """Raise ValueError unless the runs are of one net and setting, each seed once, and tested on `data`."""
    nets, seeds = ([one.row[column] for one in runs] for column in ("net", "seed"))
    if len(set(nets)) != 1 or len(set(seeds)) < len(seeds):
        raise ValueError(f"runs are of {nets} with seeds {seeds}; give runs of one net, each seed once")
    if mixed := mixed_settings(pd.DataFrame([one.row for one in runs])):
        raise ValueError(f"runs differ in {', '.join(mixed)}; give runs of one setting")
    for one in runs:
        check_tested(one, data)


def check_tested(run, data):
    """Raise ValueError unless a `utils.Run` was tested on the test images and labels of `data`."""
    labels, found = data.test_labels.cpu(), run.scores.predictions
    same = len(found) == len(labels) and run.images in ("", test_hash(data))
    same = same and (run.row.get("dataset", data.name), run.row.get("split", data.split)) == (data.name, data.split)
    if not same or abs(100 * (found == labels).float().mean() - run.scores.accuracy) > 1e-3:
        raise ValueError(f"data are not what {run.name} was tested on, but {data.name}, {data.split} split")


def net_columns(net, batch_size):
    """Return the columns of results/runs.csv that describe a published net."""
    return {
        "norm": net.norm,
        **statistics_columns(net.norm, net.groups, batch_size),
        "widths": " ".join(map(str, net.widths)),
        "activation": type(net.C1.activation).__name__ if hasattr(net.C1, "activation") else "",
        "initial_weights": "",
        "convolution": "",
    }


def statistics_columns(norm, groups, batch_size):
    """Return the columns of results/runs.csv that say over what a published net's norm takes its statistics."""
    return {
        "layer_variant": "C,H,W" if norm == "layer" else "",
        "groups": {"layer": 1, "group": groups}.get(norm, ""),
        "statistics_batch": batch_size if norm == "batch" else "",
    }


def table_of(rows):
    """Return rows of results/runs.csv as a DataFrame; ValueError when there is none."""
    if (table := pd.DataFrame(rows).replace("", np.nan)).empty:  # as in rows that were read
        raise ValueError("rows are empty; give rows of results/runs.csv")
    return table


def history_table(runs):
    """Tabulate the runs' histories, a line per epoch: 5 decimals, of learning rates 5 significant digits."""
    epochs = [{"net": one.row["net"], "seed": one.row["seed"]} | epoch for one in runs for epoch in one.history]
    rates = [float(f"{epoch['learning_rate']:.5g}") for epoch in epochs]
    return pd.DataFrame(epochs).round(5).assign(**{"learning_rate": rates} if epochs else {})


def numbers(rows, name):
    """Return a column of rows as numbers; nan where it is empty, as the accuracy of a run that diverged.

    ValueError for a text that is no number.
    """
    try:
        return pd.to_numeric(rows[name].replace("", None))
    except ValueError as error:
        raise ValueError(f"{name} holds a text that is no number: {error}; mend it") from None


def mixed_settings(rows, by="net"):
    """List the columns of settings, without the seed, in which rows of results/runs.csv of one net or norm differ."""
    settings = rows.columns.difference(NON_KEY_COLUMNS | {"seed", "net"}, sort=False)
    return [name for name in settings if rows.groupby(by)[name].nunique(dropna=False).max() > 1]


def read_rows(path, texts=False):
    """Return the rows of a CSV file as a DataFrame, without any when it is absent.

    texts  all values as they are written, "" where there is none; those of TEXTS are texts in any case
    """
    return parse_rows(path, read_bytes(path), texts)


def parse_rows(path, content, texts=False):
    """Return `read_rows` of a file that was read: its bytes, or None."""
    if content is None:
        return pd.DataFrame(columns=["study", "net", "split"])
    _table(path, content)
    dtype, missing = (str, []) if texts else (dict.fromkeys(TEXTS, str), [""])  # None may be a name
    return pd.read_csv(io.BytesIO(content), dtype=dtype, keep_default_na=False, na_values=missing, low_memory=False)


def _table(path, content):
    """Return the lines of a CSV file as lists of texts, the header first; ValueError unless they are whole."""
    try:
        text = content.decode("utf-8-sig")
        table = [row for row in csv.reader(io.StringIO(text, newline=""), strict=True) if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is no CSV file in UTF-8 ({error}); mend or delete it") from None
    if not table or not text.endswith("\n"):
        raise ValueError(f"{path} {'ends within a line' if table else 'is empty'}; mend or delete it")
    for name in table[0]:
        if not re.fullmatch(r"\w+([ -]\w+)*", name) or table[0].count(name) > 1:
            raise ValueError(f"{path} has a column {name!r}; use letters, digits and _, once each, and plain commas")
    for number, row in enumerate(table, 1):
        if len(row) != len(table[0]) or any(field != field.strip() for field in row):
            raise ValueError(f"{path}: line {number} is not {len(table[0])} fields, without space around them; mend it")
    return table


def device_name(device):
    """Return the name of the GPU, or "cpu" with its processor's name where it is known."""
    cpu = f"{device.type} {torch.cpu.get_capabilities().get('cpu_name', '')}".strip()
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu


def set_commit(text):
    """Set what `code_commit` returns from now on, for code that was copied without its repository."""
    global _commit
    if not re.fullmatch(r"[0-9a-f]{7,40}\+?", str(text)):
        raise ValueError(f"commit is {text!r}; give 7 to 40 hexadecimal digits, with + when the code differs from it")
    _commit = text
    code_commit.cache_clear()


def git(folder, *arguments):
    """Return what a git command prints in a folder; OSError or CalledProcessError where it fails."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}  # of a hook
    command = ["git", "--no-optional-locks", "-C", folder, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", check=True)
    return done.stdout.strip()


@functools.cache  # what runs is what was there at the first run, whatever is written later
def code_commit(default="unknown"):
    """Return the short hash of this repository's commit, with + when tracked code differs; else `default`."""
    try:
        # Fails for copies in another's repository.
        git(ROOT, "ls-files", "--error-unmatch", "models.py", "engine/records.py")
        ours = Path(git(ROOT, "rev-parse", "--show-toplevel")).samefile(ROOT)
        changed = git(ROOT, "status", "--porcelain", "--untracked-files=no", "--", "*.py")
        changed = changed or any(not path.is_file() or path.read_bytes() != LOADED[path] for path in LOADED)
        commit = git(ROOT, "rev-parse", "--short=7", "HEAD") + ("+" if changed else "") if ours else default
    except (OSError, subprocess.CalledProcessError):
        commit = default
    return _commit or commit
