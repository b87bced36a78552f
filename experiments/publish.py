"""Run s8.ipynb with ten seeds, check what came out, and only then publish it.

    python -m experiments.publish                 empty out/published, run into it, check, copy
    python -m experiments.publish --no-run        check and copy what is in out/published
    python -m experiments.publish --no-run --commit 1a2b3c4    the same for a run where there was no git

Copies the executed notebook, the grids in img/, the weights, and the rows of results/. For a run on another machine:

    papermill s8.ipynb out/published/s8.ipynb -p folder out/published -p seeds 10 -p source cifar10
"""

import argparse
import ast
import base64
import contextlib
import io
import itertools
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import nbformat
import pandas as pd
import torch
from PIL import Image

import models
import utils
from engine import files, records
from experiments import ROOT
from experiments.sweeps import read_texts

SEEDS = 10
FOLDER = ROOT / "out" / "published"  # emptied before each run, so that it holds nothing else
NORMS = ("batch", "layer", "group")


class Refused(Exception):
    """What came out may not be published; the message, one line, says why."""


@contextlib.contextmanager
def naming(path):
    """Yield `path`; whatever is raised inside becomes Refused, in one line that names it."""
    try:
        yield path
    except Exception as error:  # of many kinds: cut off, altered, of another format
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise Refused(reason if reason.startswith(str(path)) else f"{path}: {reason}") from None


def prepare(path):
    """Return the folder to run into, resolved and empty. Refused for one with files, unless it is FOLDER."""
    folder = files.output_folder(path)
    if folder == ROOT.resolve() / FOLDER.relative_to(ROOT):
        shutil.rmtree(folder)
        files.output_folder(folder)
    elif any(one.is_file() for one in folder.rglob("*")):
        raise Refused(f"{folder} holds files, which would mix with the run's; name a new folder")
    return folder


def execute(folder):
    """Run the notebook into `folder` by papermill, with ten seeds of 20 epochs of CIFAR-10."""
    settings = {"seeds": SEEDS, "epochs": utils.MAX_EPOCHS, "source": "cifar10", "folder": str(folder)}
    parameters = [word for name, value in settings.items() for word in ("-p", name, str(value))]
    command = [sys.executable, "-m", "papermill", "s8.ipynb", str(folder / "s8.ipynb"), *parameters]
    subprocess.run(command, cwd=ROOT, check=True)


def read_table(path, columns):
    """Return the rows of a CSV file as texts. Refused unless it is whole and has these columns and a row."""
    if records.read_rows(path).empty:  # ValueError unless the file is whole
        raise Refused("there is no row")
    table = read_texts(path)
    for name in columns:
        if name not in table:
            raise Refused(f"there is no column {name!r}")
    return table


def check_rows(rows, commit):
    """Return the rows to publish, which name their commit; Refused unless all are there and of one clean commit."""
    rows = rows.assign(commit=rows["commit"].where(rows["commit"] != "unknown", commit or "unknown"))
    for net in dict.fromkeys((*utils.NETS, *rows["net"])):
        if net not in utils.NETS:
            raise Refused(f"a row has net {net!r}; {', '.join(utils.NETS)} are published")
        seeds = sorted(map(int, rows["seed"][rows["net"] == net]))
        if seeds != list(range(SEEDS)):
            raise Refused(f"{net} has the seeds {seeds}; 0 to {SEEDS - 1} are published")
    wanted = {
        "study": "main",
        "dataset": "CIFAR-10",
        "split": "test",
        "status": "done",
        "epochs": str(utils.MAX_EPOCHS),
    }
    for net, own in rows.groupby("net"):
        settings = asdict(utils.Settings(learning_rate=utils.LEARNING_RATES[net]))
        settings = {name: value for name, value in settings.items() if name not in ("seed", "epochs")}
        for column, value in (wanted | settings).items():
            found = own[column] if isinstance(value, str) else pd.to_numeric(own[column], errors="coerce")
            for text in own[column][found != value]:
                raise Refused(f"a row of {net} has {column} {text!r}; {value!r} is published")
    for text in rows["test_accuracy"][~pd.to_numeric(rows["test_accuracy"], errors="coerce").between(0, 100)]:
        raise Refused(f"a row has test_accuracy {text!r}; a number from 0 to 100 is published")
    for text in rows["device"]:
        if not text or text.startswith("cpu"):
            raise Refused(f"a row has device {text!r}; runs on a GPU are published")
    commits = set(rows["commit"])
    if len(commits) > 1 or not all(re.fullmatch("[0-9a-f]{7,40}", one) for one in commits):
        raise Refused(f"the rows name the commit {', '.join(sorted(commits))}; one clean commit is published")
    return rows


def check_history(history):
    """Refused unless each net and seed has the epochs 1 to 20, and there are no others."""
    wanted = {
        (net, str(seed)): [str(epoch) for epoch in range(1, utils.MAX_EPOCHS + 1)]
        for net in utils.NETS
        for seed in range(SEEDS)
    }
    found = history.groupby(["net", "seed"], sort=False)["epoch"].agg(list).to_dict()
    for net, seed in wanted | found:
        if (epochs := found.get((net, seed), [])) != wanted.get((net, seed)):
            raise Refused(f"{net}, seed {seed} has the epochs {' '.join(epochs)}; 1 to 20 of each run are published")


def check_mistakes(mistakes, rows):
    """Refused unless each net has as many as the test accuracy of its seed 0 says, of 10,000 images."""
    first = rows[rows["seed"].astype(int) == 0].set_index("net")["test_accuracy"].astype(float)
    for net in dict.fromkeys((*utils.NETS, *mistakes["net"])):
        found, wanted = (mistakes["net"] == net).sum(), round(100 * (100 - first.get(net, 100)))
        if found != wanted:
            raise Refused(f"{net} has {found} mistakes; the test accuracy of its seed 0 says {wanted}")


def check_files(folder):
    """Refused unless the grids are PNG files and the weights load into their nets."""
    for norm in NORMS:
        with naming(folder / "img" / f"{norm}.png") as path, Image.open(path, formats=["PNG"]) as image:
            image.verify()
    for net in utils.NETS:
        with naming(folder / "weights" / f"{net}.pt") as path:
            weights = torch.load(path, map_location="cpu", weights_only=True)
            getattr(models, net)().load_state_dict(weights, strict=True)


def committed(root):
    """Return the notebook s8.ipynb of the checkout's last commit; of the file, where there is no git."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}  # of a hook
    command = ["git", "-C", root, "show", "HEAD:./s8.ipynb"]
    try:
        content = subprocess.run(command, env=environment, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        content = (root / "s8.ipynb").read_bytes()
    return nbformat.reads(content.decode(), as_version=4)


def check_source(notebook, original):
    """Refused unless a notebook that papermill executed is the original, with the published parameters."""
    injected = [cell for cell in notebook.cells if "injected-parameters" in cell.metadata.get("tags", [])]
    if len(injected) != 1:
        raise Refused(f"{len(injected)} cells hold papermill's parameters; one is published")
    try:
        lines = ast.parse(injected[0].source).body
        found = {target.id: ast.literal_eval(line.value) for line in lines for target in line.targets}
    except (SyntaxError, AttributeError, TypeError, ValueError):
        raise Refused("papermill's parameters are no plain values") from None
    wanted = {"seeds": SEEDS, "source": "cifar10", "epochs": found.get("epochs") and utils.MAX_EPOCHS}
    for name in (wanted | found).keys() - {"folder"}:
        if found.get(name) != wanted.get(name):
            raise Refused(f"papermill set {name} to {found.get(name)!r}; {wanted.get(name)!r} is published")
    cells = [
        [(cell.cell_type, cell.source) for cell in one.cells if cell not in injected] for one in (notebook, original)
    ]
    for number, (cell, own) in enumerate(itertools.zip_longest(*cells)):
        if cell != own:
            raise Refused(f"cell {number} is not that of the committed s8.ipynb")


def check_notebook(notebook):
    """Return the executed notebook to publish, without papermill's marks; Refused if a cell failed or did not run."""
    notebook.cells = [cell for cell in notebook.cells if "injected-parameters" not in cell.metadata.get("tags", [])]
    for name in ("kernelspec", "language_info"):
        if name not in notebook.metadata:
            raise Refused(f"its metadata has no {name}")
    notebook.metadata = {name: notebook.metadata[name] for name in ("kernelspec", "language_info")}
    count = 0
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        cell.metadata = {name: value for name, value in cell.metadata.items() if name == "tags" and value}
        if cell.cell_type != "code":
            continue
        if cell.execution_count is None:
            raise Refused(f"cell {number} was not executed")
        count += 1
        cell.execution_count = count
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = count
            if output.output_type == "error" or output.get("name") == "stderr":
                text = output.get("text") or f"{output['ename']}: {output['evalue']}"
                raise Refused(f"cell {number} ended in an error or a warning: {text.strip().rpartition(chr(10))[2]}")
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = compress(output.data["image/png"])
        cell.outputs = join_streams(cell.outputs)
    return notebook


def compress(png):
    """Reduce a picture (PNG in base64) to 256 colors, so that the notebook stays under 1 MB."""
    image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB").quantize(256)
    content = io.BytesIO()
    image.save(content, "png", optimize=True)
    return base64.b64encode(content.getvalue()).decode()


def join_streams(outputs):
    """Join what a cell printed, and of lines that overwrite each other (carriage returns) keep the last."""
    joined = []
    for output in outputs:
        if joined and output.output_type == "stream" == joined[-1].output_type:
            joined[-1].text += output.text
        else:
            joined.append(output)
    for output in joined:
        if output.output_type == "stream":
            output.text = re.sub(r"[^\n]*\r(?!\n)", "", output.text)
    return joined


def publish(folder, commit=None, root=ROOT):
    """Check what a run left in `folder`, then copy it to the checkout `root`; nothing is copied unless all is right."""
    folder = folder.resolve()
    copies = [Path("img") / f"{norm}.png" for norm in NORMS]
    copies += [Path("weights") / f"{net}.pt" for net in utils.NETS]
    copies += [Path("results") / f"{name}.csv" for name in ("history", "mistakes", "inside")]
    notebook, table = Path("s8.ipynb"), Path("results") / "runs.csv"
    for file in (*copies, notebook, table):
        if not (folder / file).is_file():
            raise Refused(f"{folder / file} is not there")
        if (folder / file).resolve() != folder / file:
            raise Refused(f"{folder / file} is a symbolic link, or within one")
    with naming(folder / table) as path:
        columns = ("study", "dataset", "net", "split", "test_accuracy", "device", "commit", "status")
        rows = check_rows(read_table(path, (*columns, *asdict(utils.Settings()))), commit)
    with naming(folder / "results" / "history.csv") as path:
        check_history(read_table(path, ("net", "seed", *utils.HISTORY)))
    with naming(folder / "results" / "mistakes.csv") as path:
        check_mistakes(read_table(path, ("net", "index", "true", "predicted", "confidence")), rows)
    with naming(folder / "results" / "inside.csv") as path:
        read_table(path, ("net", "images", "layer", "spread"))
    check_files(folder)
    with naming(root / notebook):
        original = committed(root)
    with naming(folder / notebook) as path:
        executed = nbformat.read(path, as_version=4)
        check_source(executed, original)
        content = f"{nbformat.writes(check_notebook(executed))}\n".encode()
    with naming(root / table) as path:
        records.read_rows(path)
    with contextlib.ExitStack() as stack:  # the files move into place together, on leaving
        for file in (*copies, notebook):
            with naming(root / file) as path:
                _, temporary = stack.enter_context(files.replacement(path))
                temporary.write_bytes(content if file == notebook else (folder / file).read_bytes())
        with naming(root / table) as path:
            records.upsert(path, rows, key=["study", "net", "seed"])  # in place of all that was published before


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the run is, or goes: then a new folder")
    parser.add_argument("--no-run", action="store_true", help="check and copy what is there already")
    parser.add_argument("--commit", help="the commit that ran, where there was no git")
    options = parser.parse_args(arguments)
    if not options.no_run:
        commit = records.code_commit()
        if commit == "unknown" or "+" in commit:
            raise SystemExit(f"the code's commit is {commit!r}; commit first, since the rows name it")
    try:
        if not options.no_run:
            execute(prepare(options.folder))
        publish(options.folder, options.commit)
    except (Refused, OSError, ValueError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"not published: {error}") from None


if __name__ == "__main__":
    main()
