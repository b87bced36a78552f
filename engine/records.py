"""Rows of results, checkpoints, and the fingerprint of a run.

A problem is one line that names the file: OSError when it can't be written, ValueError when its content won't do.
"""

import contextlib
import csv
import dis
import enum
import functools
import hashlib
import io
import itertools
import math
import operator
import os
import re
import subprocess
import sys
import types
import weakref
import zipfile
from dataclasses import asdict
from decimal import Decimal
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from engine import files
from engine.files import ROOT, check_path, read_bytes, replacement, save_tensors

# Read now: a process computes with what it loaded, whatever is edited later.
LOADED = [ROOT / f"{name}.py" for name in ("models", "utils", "hubconf")]
LOADED += [path for folder in ("engine", "experiments") for path in sorted((ROOT / folder).glob("*.py"))]
LOADED = {path: path.read_bytes() for path in LOADED if path.is_file()}
NOT_COMPUTING = ("__init__", "download", "figures", "files", "probe", "records", "statistics", "tune")  # in engine/
COMPUTED = [path for path in LOADED if path.parent.name == "engine" and path.stem not in NOT_COMPUTING]
COMPUTED = {path: LOADED[path] for path in [*COMPUTED, ROOT / "models.py", ROOT / "utils.py"] if path in LOADED}
HISTORY = ("epoch", "loss", "train_accuracy", "test_accuracy", "learning_rate", "seconds", "elapsed")  # of each epoch
# The columns of results/runs.csv that a run measures or notes; all others are its settings and tell rows apart.
NON_KEY_COLUMNS = {"parameters", "train_accuracy", "test_accuracy", "validation_accuracy", "test_loss", "seconds"}
NON_KEY_COLUMNS |= {"device", "torch", "commit", "status", "precision", "step"}
# Columns whose values are texts, whatever they look like: a study "1.10" is not "1.1", and 1234e56 is a commit.
TEXTS = ("study", "dataset", "net", "norm", "commit", "true", "predicted")
OF_ALL_MODULES = set(vars(torch.nn.Module()))
PLAIN = bool | int | float | complex | str | bytes | slice | range | types.NoneType | types.EllipsisType
PLAIN |= torch.dtype | torch.device | torch.layout | torch.memory_format
CODE_PARTS = ("co_code", "co_consts", "co_names", "co_varnames", "co_freevars", "co_exceptiontable", "co_flags")
CODE_PARTS += ("co_argcount", "co_posonlyargcount", "co_kwonlyargcount")  # of a code object, see `_Description`
ATTRIBUTE = ("LOAD_ATTR", "LOAD_METHOD")  # instructions that read one, see `_globals`
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


def test_hash(data):
    """Return a hash of the test images and labels, which tells data sets apart whatever they are called."""
    return data_hash(data.test_images, data.test_labels)


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


def data_hash(*tensors):
    """Return a hash of the tensors' values, types and shapes, in order, the same on every device.

    It guards against mistakes, not attackers: a sum of 32-bit words, each times 64-bit numbers of its place, modulo
    2^64. It is computed where they are, a few MB at a time: only what is not contiguous is copied.
    """
    block, found = 4096, []  # words
    for tensor in tensors:
        flat, sums = tensor.detach().contiguous().flatten(), []
        for part in flat.split((2**22 if flat.is_cuda else 2**19) // flat.element_size()):
            part = (part.cpu() if part.device.type == "mps" else part).view(torch.uint8)
            if len(part) % (4 * block) or part.storage_offset() % 4:
                part = torch.cat([part, part.new_zeros(-len(part) % (4 * block))])
            words = part.view(torch.int32).view(-1, block)
            sums.append(torch.stack([(words * row).sum(1) for row in _multipliers(block, 0, part.device)]))
        sums = torch.cat(sums, 1)
        totals = (sums * _multipliers(sums.shape[1], 1, sums.device)).sum(1)
        found.append((tensor.dtype, tuple(tensor.shape), totals.tolist()))
    return _digest(found)


@functools.lru_cache(64)
def _multipliers(count, seed, device):
    numbers = torch.randint(-(2**63), 2**63 - 1, (2, count), generator=torch.Generator().manual_seed(seed))
    return (numbers | 1).to(device)


def _digest(value):
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


def weights_hash(state_dict):
    """Return a hash of a state dict's names and values."""
    return _digest((list(state_dict), data_hash(*state_dict.values())))


def fingerprint(net, data, settings, track, precision=None, optimizer=None):
    """Return, as numbers and texts, what must be the same for a run to be the same; `net` is not yet trained.

    precision  a text: the number type of training, and whose step
    optimizer  the function that makes it, of `engine.trainer.OPTIMIZERS`

    Of this project's own modules it takes the files, and can't see what is swapped in them at run time. ValueError for
    a buffer that a checkpoint would not hold, and what `attributes` raises.
    """
    device, weights = data.images.device, net.state_dict()
    for name in (name for name, _ in net.named_buffers() if name not in weights):
        advice = "register it with persistent=True, or train without a checkpoint"
        raise ValueError(f"the net's buffer {name} would not be in the checkpoint; {advice}")
    described = {  # each of two words, which no setting can be called
        "torch version": str(torch.__version__),
        "device name": device_name(device),
        "number format": str(precision),
        "thread count": torch.get_num_threads() if device.type == "cpu" else None,
        "training code": _digest([*COMPUTED.values(), *_imported_code()]),
        "net's attributes": "\n".join(attributes(net, optimizer)),
        "data name": f"{data.name}, {data.split}",
        "training images": data_hash(data.images),
        "training labels": data_hash(data.labels),
        "test images": data_hash(data.test_images),
        "test labels": data_hash(data.test_labels),
        "each epoch tested": bool(track),
        "initial weights": weights_hash(weights),
    }
    return _plain(asdict(settings)) | described


def _imported_code():
    """Return the contents of the files outside this project that those in COMPUTED import, and that these import."""
    sources, found = [*COMPUTED.values()], {}
    for source in sources:
        for name in _imports(source):
            path = _file_of(sys.modules[name]) if _is_own_module(sys.modules.get(name)) else None
            known = path is None or path in COMPUTED or (path.parent.name == "engine" and path.stem in NOT_COMPUTING)
            if not known and path not in found and path.is_file():
                found[path] = path.read_bytes()
                sources.append(found[path])
    return [found[path] for path in sorted(found)]


def _imports(source):
    """List the modules that Python source may import, by name. By its lines: to parse 3,000 of them takes .3 s."""
    form = r"^[ \t]*(?:from[ \t]+([\w.]+)[ \t]+import[ \t]+(\([^)]*\)|[^\n#]*)|import[ \t]+([^\n#]*))"
    names = set()
    for module, parts, modules in re.findall(form, source.decode(), re.MULTILINE):
        names |= {module, *(f"{module}.{part}" for part in re.findall(r"\w+", parts)), *re.findall(r"[\w.]+", modules)}
    return sorted(names - {""})


def attributes(net, optimizer=None):
    """List what each module, and each class of one that is not torch's, has as attributes, as lines of text.

    Also the globals that are read, by functions of one's own code, and what `optimizer`, a function, is. ValueError for
    what can't be told.
    """
    told = _Description(net)
    modules = dict(net.named_modules())
    classes = dict.fromkeys(cls for module in modules.values() for cls in type(module).__mro__)
    classes = [cls for cls in classes if not _is_library(cls)]
    for cls in classes:
        told.give_name(cls)
    for path, module in modules.items():
        own = {name: value for name, value in vars(module).items() if name not in OF_ALL_MODULES}
        own |= {"__class__": type(module), "_modules": module._modules, "forward": module.forward}
        for name, value in sorted(own.items()):
            told.tell(f"{path}.{name}", value)
    for cls in classes:
        for name, value in _members(cls):
            if name != "__init__":  # what it made is there to see
                told.tell(f"{cls.__qualname__}.{name}", value)
    told.tell("the optimizer", optimizer)
    return told.lines


def _members(cls):
    """List what a class has, as pairs of name and value, without what describes it."""
    members = [(name, value) for name, value in vars(cls).items() if name[:2] != "__" or callable(value)]
    return sorted([("__mro__", cls.__mro__[1:]), *(pair for pair in members if pair[0] != "_abc_impl")])


def _is_library(cls):
    """Return whether a class is torch's, NumPy's or Python's own, which the version of torch stands for."""
    made_by_exec = cls.__module__ == "builtins" and cls.__flags__ & 1 << 9  # made by Python code
    return _is_library_module(cls.__module__) and not made_by_exec


def _is_library_module(name):
    return str(name).partition(".")[0] in {"torch", "numpy", *sys.stdlib_module_names} - {"__main__"}


class _Description:
    """Tells what values are, in lines that are the same in each process: without addresses and the order of sets."""

    def __init__(self, net):
        parts = [*net.named_buffers(), *net.named_parameters(), *net.named_modules()]
        self.names = {id(part): (part, f"the net's {name}") for name, part in parts}  # and of what was told
        self.lines = []

    def give_name(self, value):
        self.names[id(value)] = value, f"{value.__qualname__} {len(self.names)}"

    def tell(self, name, value):
        """Add a line. ValueError for what may compute from more than can be told, as an object of one's own class."""
        try:
            self.lines.append(f"{name} {self.of(value)!r}")
        except (RuntimeError, TypeError) as error:  # RuntimeError: a tensor without values
            reason = str(error).partition("\n")[0]
            advice = "use numbers, texts, tensors, functions, and lists or dicts of them, or train without one"
            raise ValueError(f"a checkpoint can't tell what {name} is ({reason}); {advice}") from None

    def of(self, value):
        """Return what a value is, as texts, numbers and lists or tuples of them; TypeError as in `tell`."""
        kind = type(value).__name__
        if id(value) in self.names:
            return self.names[id(value)][1]
        if isinstance(value, enum.Enum):
            return kind, value.name, self.of(value.value)
        if not _is_library(type(value)):
            raise TypeError(f"a {type(value).__qualname__}")
        if isinstance(value, PLAIN):
            return value
        if isinstance(value, tuple | list):
            return kind, [*map(self.of, value)]
        if isinstance(value, dict):
            items = [(self.of(key), self.of(item)) for key, item in value.items()]
            return kind, items, self.of(getattr(value, "default_factory", None))
        if isinstance(value, set | frozenset):
            return sorted(repr(self.of(item)) for item in value)
        if isinstance(value, torch.Tensor):
            return data_hash(value.to_dense())
        if isinstance(value, np.ndarray | np.generic):
            return kind, str(value.dtype), _digest(self.of(value.tolist())) if value.ndim else repr(value.item())
        if isinstance(value, functools.partial | functools.partialmethod):
            return self.of((value.func, value.args, value.keywords))
        if isinstance(value, staticmethod | classmethod):
            return kind, self.of(value.__func__)
        if isinstance(value, types.MethodType):
            return self.of((value.__func__, value.__self__))
        if isinstance(value, functools.cached_property):
            return self.of(value.func)
        if isinstance(value, functools._lru_cache_wrapper):
            return self.of(value.__wrapped__)
        if isinstance(value, weakref.ref):
            return self.of(value())
        if isinstance(value, property):
            return self.of((value.fget, value.fset))
        if isinstance(value, types.CodeType):
            return [self.of(getattr(value, name)) for name in CODE_PARTS]
        if isinstance(value, types.FunctionType):
            self.give_name(value)
            empty = types.CellType()
            cells = [cell.cell_contents for cell in value.__closure__ or () if cell != empty]
            for name, found in _globals(value):
                self.tell(f"{value.__qualname__}: {name}", found)
            parts = value.__code__, value.__defaults__, value.__kwdefaults__, cells, vars(value)
            return value.__qualname__, _digest(self.of(parts))
        if isinstance(value, operator.methodcaller | operator.itemgetter | operator.attrgetter):
            return self.of(value.__reduce__())
        if isinstance(value, types.BuiltinFunctionType):
            return value.__qualname__, self.of(value.__self__)
        if isinstance(value, types.MethodDescriptorType | types.WrapperDescriptorType):
            return value.__qualname__, self.of(value.__objclass__)
        if isinstance(value, torch._ops.OpOverloadPacket | torch._ops.OpOverload):
            return str(value)
        if isinstance(value, torch.no_grad | torch.enable_grad):  # in a decorated function
            return kind
        if isinstance(value, type) and not _is_library(value):
            self.give_name(value)
            return value.__qualname__, _digest([(name, self.of(member)) for name, member in _members(value)])
        if _is_own_module(value) and _file_of(value).is_file():
            values = {name: one for name, one in vars(value).items() if name[:2] != "__" and isinstance(one, PLAIN)}
            return value.__name__, _digest([_file_of(value).read_bytes(), self.of(values)])
        if isinstance(value, type | types.ModuleType | np.ufunc):
            return kind, getattr(value, "__module__", ""), value.__name__
        raise TypeError(f"a {type(value).__qualname__}")


def _file_of(module):
    """Return the path of a module's file, or of the folder of a package without one; None for one without either."""
    found = getattr(module, "__file__", None) or next(iter(getattr(module, "__path__", ())), None)
    return Path(os.path.realpath(found)) if isinstance(found, str) else None


def _is_own_module(value):
    is_module = isinstance(value, types.ModuleType) and not _is_library_module(value.__name__)
    return is_module and bool(path := _file_of(value)) and not _is_installed(path)


def _is_installed(path):
    return bool({"site-packages", "dist-packages"} & set(path.parts))


def _globals(function):
    """List the globals that a function of one's own code reads, also by code within it, as pairs of name and value.

    None of an installed package's function, and of one in COMPUTED. Of a module of one's own, the attributes read.
    """
    path = Path(os.path.realpath(function.__code__.co_filename))
    if _is_library_module(function.__globals__.get("__name__")) or _is_installed(path) or path in COMPUTED:
        return []
    codes, found = [function.__code__], {}
    for code in codes:
        codes += [part for part in code.co_consts if isinstance(part, types.CodeType)]
        steps = [step for step in dis.get_instructions(code) if step.opname != "EXTENDED_ARG"]
        for place, step in enumerate(steps):
            if step.opname == "LOAD_GLOBAL" and step.argval in function.__globals__:
                name, value = step.argval, function.__globals__[step.argval]
                for then in steps[place + 1 :]:
                    if not (_is_own_module(value) and then.opname in ATTRIBUTE and hasattr(value, then.argval)):
                        break
                    name, value = f"{name}.{then.argval}", getattr(value, then.argval)
                found[name] = value
    return sorted(found.items(), key=lambda pair: pair[0])


def _plain(value):
    """Return a value in the types that a checkpoint can hold."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    value = value.item() if isinstance(value, np.generic) else value
    return value if value is None or isinstance(value, bool | int | float | str) else repr(value)


def write_checkpoint(path, fingerprint, history, state):
    """Save what a run resumes from: its fingerprint, its history and its state, a nested dict of tensors."""
    save_tensors(path, {"fingerprint": fingerprint, "history": _plain(history), "state": state})


def read_checkpoint(path, fingerprint, steps_per_epoch, like):
    """Return what `write_checkpoint` saved, a dict of fingerprint, history and state; None when absent.

    like  a state of the same run at any step: the saved one must have its keys, shapes and types

    The net may hold the initial weights or the saved ones; the fingerprint that is returned is of the initial ones.
    ValueError, which leaves the file, when it is another run's or damaged; what `check_path` raises for `path`.
    """
    check_path(path)
    advice = "delete it to start anew, or name another file"
    try:
        if (content := read_bytes(path)) is None:
            return None
        saved = load_tensors(content)
        found, history, state = map(saved.get, ("fingerprint", "history", "state"))
        differing = [name for name in {**fingerprint, **found} if found.get(name) != fingerprint.get(name)]
        if differing == ["initial weights"] and weights_hash(state["net"]) == fingerprint["initial weights"]:
            differing = []  # the net that the run left behind
        if not differing:
            _check_progress(found, history, state, steps_per_epoch)
            _check_form(state, like, "state")
            torch.Generator(like["global_step"].device).set_state(state["generator"])  # a dry run
    except Exception as error:  # of many kinds: cut off, altered, not a checkpoint at all
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"{path} can't be read as a checkpoint ({reason[0]}); {advice}") from None
    for name in differing:
        pair = [str(run.get(name)) for run in (found, fingerprint)]
        lines = itertools.zip_longest(*(text.splitlines() for text in pair), fillvalue="")
        pair = next((line for line in lines if line[0] != line[1]), pair)  # the first lines that differ
        common = "".join(a for a, _ in itertools.takewhile(lambda two: two[0] == two[1], zip(*pair, strict=False)))
        start = max(len(common) - len(common.lstrip()), len(common) - 60)
        old, new = ("..." * (len(common) > 60) + text[start:][:90] for text in pair)
        raise ValueError(f"{path} is a checkpoint with {name} {old}, not {new}; {advice}")
    return saved


def load_tensors(content):
    """Load the bytes of a file of `torch.save` onto the CPU; running no code. Raises whatever its damage causes."""
    if zipfile.ZipFile(io.BytesIO(content)).testzip():  # torch.load does not look at the check sums
        raise ValueError("its check sum is wrong")
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def remove_checkpoint(path, history):
    """Remove the checkpoint of the finished run with this history; leave another run's, whose seconds differ."""
    try:
        saved = load_tensors(read_bytes(path))["history"]
    except Exception:  # of many kinds: absent, or as in `read_checkpoint`
        return
    if history and str(saved) == str(_plain(history)):  # as texts, since nan is not nan
        Path(path).unlink(missing_ok=True)


def _check_progress(fingerprint, history, state, steps_per_epoch):
    epochs, step = len(history), int(state["global_step"])
    limit = fingerprint.get("epochs", epochs)
    for number, epoch in enumerate(history, 1):
        numeric = epoch.keys() == set(HISTORY) and all(type(value) in (int, float) for value in epoch.values())
        if not numeric or epoch["epoch"] != number or number > limit:
            raise ValueError(f"epoch {number} of its history is not one of {limit}, with {', '.join(HISTORY)}")
    if not isinstance(history, list) or step != epochs * steps_per_epoch:
        raise ValueError(f"its history has {epochs} epochs, its state is after {step} steps")
    if epochs == 0 and weights_hash(state["net"]) != fingerprint["initial weights"]:
        raise ValueError("its history is empty, its weights are not the initial ones")


def _check_form(value, like, name):
    if isinstance(value, torch.Tensor) and isinstance(like, torch.Tensor):
        form, wanted = ((tuple(x.shape), x.dtype, x.layout, x.is_meta, x.requires_grad) for x in (value, like))
    elif isinstance(value, dict) and isinstance(like, dict):
        form, wanted = list(value), list(like)
    else:
        form, wanted = type(value), type(like)
    if form != wanted:
        raise ValueError(f"its {name} is {form}, not {wanted}")
    for key in like if isinstance(like, dict) else ():
        _check_form(value[key], like[key], f"{name}[{key!r}]")


@contextlib.contextmanager
def restored_on_error(net):
    """Put the net's weights, gradients and modes back when anything is raised inside, KeyboardInterrupt too.

    ValueError for what `state_dict` has beside plain tensors, since it could be neither put back nor saved.
    """
    for name, value in net.state_dict().items():
        plain = isinstance(value, torch.Tensor) and value.layout == torch.strided
        plain = plain and not (value.is_conj() or value.is_neg())
        # A stride of 0 is that of an expanded tensor.
        if not plain or any(size > 1 and step == 0 for size, step in zip(value.shape, value.stride(), strict=True)):
            raise ValueError(f"the net's {name} is no plain tensor, as a checkpoint holds; train without a checkpoint")
    before = {name: value.clone() for name, value in net.state_dict().items()}
    gradients = [(parameter, parameter.grad) for parameter in net.parameters()]
    modes = [(module, module.training) for module in net.modules()]
    try:
        yield
    except BaseException:
        for device in {value.device for value in net.state_dict().values() if value.is_cuda}:
            torch.cuda.synchronize(device)  # enqueued steps would write after us
        for module, mode in modes:
            module.training = mode
        net.load_state_dict(before)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        raise


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
