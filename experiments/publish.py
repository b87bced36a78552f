"""Run s8.ipynb with ten seeds, check what came out, and only then publish it.

    python -m experiments.publish                 empty out/published, run into it, check, copy
    python -m experiments.publish --no-run        check and copy what is in out/published
    python -m experiments.publish --no-run --commit 1a2b3c4    the same for a run where there was no git

Copies the executed notebook, the grids in img/, the weights and rows, and writes which test images each seed got
right. The predictions stay where they are, since they hold the data set's labels. For a run on another machine:

    mkdir -p out/published
    papermill s8.ipynb out/published/s8.ipynb -p folder out/published -p seeds 10 -p source cifar10
"""

import argparse
import contextlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import nbformat
import pandas as pd
from PIL import Image

import models
import utils
from engine import checkpoints, files, hashes, records
from engine.data import CIFAR10_CLASSES, load_data
from experiments import ROOT
from experiments.notebook import Refused, check_notebook, check_shown, check_source, committed

SEEDS, IMAGES = 10, 10_000
FOLDER = ROOT.resolve() / "out" / "published"  # emptied before each run, so that it holds nothing else
TABLES = {  # the columns that their checks need
    # And `published_columns`.
    "runs": ["net", "seed", "train_accuracy", "test_accuracy", "test_loss", "seconds", "device", "torch", "commit"],
    "history": ["net", "seed", *records.HISTORY],
    "mistakes": ["net", "index", "true", "predicted", "confidence"],
    "inside": ["net", "images", "layer", "spread"],
}
HIGHEST = {"train_accuracy": 100, "test_accuracy": 100, "test_loss": 1000, "seconds": 10**6}  # the lowest is 0
HIGHEST |= {"loss": 1000, "learning_rate": 10, "elapsed": 10**6, "confidence": 1, "spread": 1000}
WIDTH = 1760  # pixels of a picture
ROUNDING = 0.001  # by which a loss or a confidence may differ on another device
NOTEBOOK, ROWS = "s8.ipynb", "results/runs.csv"
COPIES = [f"img/{norm}.png" for norm in ("batch", "layer", "group")] + [f"weights/{net}.pt" for net in utils.NETS]
COPIES += [f"results/{name}.csv" for name in TABLES if name != "runs"]
PREDICTIONS, RIGHT = "results/predictions.npz", "results/right.csv"  # what is checked, and what is published of it


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
    folder = files.output_folder(path, create=False)
    if folder == FOLDER and folder.exists():
        shutil.rmtree(folder)
    elif any(one.is_file() for one in folder.rglob("*")):
        raise Refused(f"{folder} holds files, which would mix with the run's; name a new folder")
    return files.output_folder(folder)


def execute(folder):
    """Run the notebook into `folder` by papermill, with ten seeds of 20 epochs of CIFAR-10."""
    settings = {"seeds": SEEDS, "epochs": utils.MAX_EPOCHS, "source": "cifar10", "folder": str(folder)}
    parameters = [word for name, value in settings.items() for word in ("-p", name, str(value))]
    command = [sys.executable, "-m", "papermill", "s8.ipynb", str(folder / "s8.ipynb"), *parameters]
    subprocess.run(command, cwd=ROOT, check=True)


def read_table(path, columns):
    """Return the rows of a CSV file as texts. Refused unless it is whole and has these columns and a row."""
    if records.read_rows(path).empty:  # ValueError unless it is whole
        raise Refused("it has no row")
    table = records.read_rows(path, texts=True)
    if missing := [name for name in columns if name not in table]:
        raise Refused(f"it has no column {missing[0]!r}")
    return table


def check_numbers(table, empty=()):
    """Refused unless the columns of a table that HIGHEST names hold numbers in their range; those in `empty`, or ""."""
    for name in (name for name in HIGHEST if name in table):
        right = pd.to_numeric(table[name], errors="coerce").between(0, HIGHEST[name])
        for found in table[name][~right & ((table[name] != "") | (name not in empty))]:
            raise Refused(f"a row has {name} {found!r}; a number from 0 to {HIGHEST[name]} is published")


def published_columns(net):
    """Return what all published rows of a net have in common, as texts: its settings and how it is computed."""
    settings, model = utils.Settings(), getattr(models, net)()
    columns = {"study": "main", "dataset": "CIFAR-10", "split": "test", "status": "done", "train_images": 50_000}
    columns |= {"validation_accuracy": ""}
    columns |= {"precision": "float16", "step": "fused", "parameters": sum(p.numel() for p in model.parameters())}
    columns |= asdict(settings) | records.net_columns(model, settings.batch_size)
    return {name: str(value) for name, value in columns.items() if name != "seed"}


def check_rows(rows, commit):
    """Return the rows to publish, which name their commit; Refused unless all are there and of one clean commit."""
    rows = rows.assign(commit=rows["commit"].where(rows["commit"] != "unknown", commit or "unknown"))
    for net in dict.fromkeys((*utils.NETS, *rows["net"])):
        seeds = sorted(rows["seed"][rows["net"] == net], key=int)
        if net not in utils.NETS:
            raise Refused(f"a row has net {net!r}; {', '.join(utils.NETS)} are published")
        if seeds != list(map(str, range(SEEDS))):
            raise Refused(f"{net} has the seeds [{', '.join(seeds)}]; 0 to {SEEDS - 1} are published")
    for net, own in rows.groupby("net"):
        columns = published_columns(net)
        for column, value in columns.items():
            for found in set(own[column]) - {value}:
                raise Refused(f"a row of {net} has {column} {found!r}; {value!r} is published")
        for name in set(rows) - {"net", "seed", *columns, *records.NON_KEY_COLUMNS}:
            raise Refused(f"it has a column {name!r}, which is not published")
    check_numbers(rows)
    for found in rows["device"][rows["device"].str.match("cpu|mps|$")]:
        raise Refused(f"a row has device {found!r}; runs on a GPU are published")
    for name in ("device", "torch"):
        if rows[name].nunique() > 1:
            raise Refused(f"the rows have several {name}s: {', '.join(sorted(set(rows[name])))}; one is published")
    commits = set(rows["commit"])
    if len(commits) > 1 or not all(re.fullmatch("[0-9a-f]{7,40}", one) for one in commits):
        raise Refused(f"the rows name the commit {', '.join(sorted(commits))}; one clean commit is published")
    return rows


def check_file(path, rows, predictions):
    """Refused unless a picture is whole, weights load into their net, or a table has what `rows` ask for."""
    if path.suffix == ".png":
        with Image.open(path, formats=["PNG"]) as image:
            image.verify()  # its check sums; the image is then closed
        with Image.open(path, formats=["PNG"]) as image:
            image.load()
            if image.width != WIDTH:
                raise Refused(f"it is {image.width} pixels wide; {WIDTH} are published")
            return
    if path.suffix == ".pt":
        return load(path)
    if path.suffix == ".npz":
        return check_predictions(predictions, rows)
    table = read_table(path, TABLES[path.stem])
    for name in set(table) - set(TABLES[path.stem]):
        raise Refused(f"it has a column {name!r}, which is not published")
    if path.stem == "history":
        found = list(zip(table["net"], table["seed"], table["epoch"], strict=True))
        runs = list(zip(rows["net"], rows["seed"], strict=True))
        wanted = [(*run, str(epoch)) for run in runs for epoch in range(1, utils.MAX_EPOCHS + 1)]
        for net, seed, epoch in differences(found, wanted):
            raise Refused(f"{net}, seed {seed}, epoch {epoch} is missing, there twice or not published")
        last = table[table["epoch"] == str(utils.MAX_EPOCHS)].merge(rows, on=["net", "seed"], suffixes=("_there", ""))
        for name, there in (("test_accuracy", "test_accuracy_there"), ("seconds", "elapsed")):
            apart = (pd.to_numeric(last[there], errors="coerce") - last[name].astype(float)).abs()
            same = (last[there] == "") | (apart < 0.006)  # "": not tested each epoch; both are rounded
            for net, seed, value in last.loc[~same, ["net", "seed", name]].to_numpy():
                raise Refused(f"{net}, seed {seed} ends at another {name} than its row's, {value}")
    check_numbers(table, empty=["test_accuracy"] if path.stem == "history" else [])
    if path.stem == "inside":
        sizes = {net: (1,) for net in utils.NETS} | {"NetA": (2, 10, 50, 250)}  # images that share their statistics
        layers = [name for name in models.CONVOLUTIONS if name.startswith("C")]
        wanted = [(net, str(size), layer) for net in utils.NETS for size in sizes[net] for layer in layers]
        for net, images, layer in differences(map(tuple, table[["net", "images", "layer"]].to_numpy()), wanted):
            raise Refused(f"{net}, {images} images, layer {layer} is missing, there twice or not published")
    if path.stem == "mistakes":
        labels, wanted = predictions["labels"], []
        for net in utils.NETS:
            for index in (predictions[net][0] != labels).nonzero()[0]:
                classes = (CIFAR10_CLASSES[of[index]] for of in (labels, predictions[net][0]))
                wanted.append((net, str(index), *classes))
        found = map(tuple, table[["net", "index", "true", "predicted"]].to_numpy())
        for net, index, true, predicted in differences(found, wanted):
            raise Refused(f"{net}, image {index}, {true} as {predicted}: not once both here and in predictions.npz")


def differences(found, wanted):
    """List what is in one of two lists more often than in the other."""
    found, wanted = Counter(found), Counter(wanted)
    return sorted((found - wanted) | (wanted - found))


def load(path):
    """Return the net that a file in weights/ is named for, with its weights."""
    net, weights = getattr(models, path.stem)(), checkpoints.load_tensors(path.read_bytes())
    wanted = {name: (value.dtype, value.nbytes) for name, value in net.state_dict().items()}
    net.load_state_dict(weights, strict=True)
    for name, value in weights.items():
        found = value.dtype, value.untyped_storage().nbytes()
        if found != wanted[name]:
            raise Refused("{} is {} in {} bytes; {} in {} is published".format(name, *found, *wanted[name]))
        if not value.isfinite().all():
            raise Refused(f"{name} holds what is not finite")
    return net


def check_predictions(predictions, rows):
    """Refused unless the predictions are those of ten seeds, and as often right as the rows say."""
    names = {"data", "labels", *(f"{net}{end}" for net in utils.NETS for end in ("", " seeds"))}
    if predictions.keys() != names:
        raise Refused(f"it holds {', '.join(predictions)}; {', '.join(sorted(names))} are published")
    for net in utils.NETS:
        found, seeds = predictions[net], predictions[f"{net} seeds"].tolist()
        form = f"{found.dtype} of {found.shape} for the seeds {seeds}"
        if form != (wanted := f"uint8 of {(SEEDS, IMAGES)} for the seeds {list(range(SEEDS))}"):
            raise Refused(f"{net} has {form}; {wanted} is published")
        accuracies = rows[rows["net"] == net].set_index("seed")["test_accuracy"]
        for seed, right in enumerate(found == predictions["labels"]):
            accuracy, wanted = round(100 * right.mean(), 3), accuracies[str(seed)]
            if accuracy != float(wanted):
                raise Refused(f"{net}, seed {seed} is right for {accuracy}%, its row says {wanted}%")


def check_weights(folder, predictions, rows, data):
    """Refused unless each net's weights predict what its first seed did, as confidently and at the same loss.

    Ten images may be decided by rounding.
    """
    with naming(folder / PREDICTIONS):
        if predictions["labels"].tolist() != data.test_labels.tolist():
            raise Refused("its labels are not those of CIFAR-10's test images")
        if predictions["data"] != hashes.test_hash(data):
            raise Refused("it is of other images than CIFAR-10's test images")
    mistakes = records.read_rows(folder / "results" / "mistakes.csv", texts=True)
    for net in utils.NETS:
        with naming(folder / "weights" / f"{net}.pt") as path:
            scores = utils.test(load(path).to(data.images.device), data.test_images, data.test_labels)
            count = (scores.predictions.numpy() != predictions[net][0]).sum()
            if count > 10:
                raise Refused(f"it predicts another class than its seed 0 did for {count} of {IMAGES} test images")
            [loss] = rows["test_loss"][(rows["net"] == net) & (rows["seed"] == "0")]
            if abs(scores.loss - float(loss)) > ROUNDING:
                raise Refused(f"its test_loss is {scores.loss:.5f}, its seed 0's row says {loss}")
            own = mistakes[mistakes["net"] == net]
            for index, there in zip(own["index"].astype(int), own["confidence"], strict=True):
                if abs((found := scores.confidences[index].item()) - float(there)) > ROUNDING:
                    raise Refused(f"image {index} has the confidence {found:.4f}, results/mistakes.csv says {there}")


def publish(folder, commit=None, root=ROOT):
    """Check what a run left in `folder`, then copy it to the checkout `root`; nothing is copied unless all is right."""
    folder = folder.resolve()
    with tempfile.TemporaryDirectory() as snapshot:  # so that what is published is what was checked
        for file in (*COPIES, PREDICTIONS, NOTEBOOK, ROWS):
            if not (folder / file).is_file():
                raise Refused(f"{folder / file} is not there")
            if (folder / file).resolve() != folder / file:
                raise Refused(f"{folder / file} is a symbolic link, or in one")
            with naming(folder / file):
                Path(snapshot, file).parent.mkdir(exist_ok=True)
                Path(snapshot, file).write_bytes((folder / file).read_bytes())
        try:
            publish_snapshot(Path(snapshot), commit, root)
        except Refused as error:
            raise Refused(str(error).replace(snapshot, str(folder))) from None


def publish_snapshot(folder, commit, root):
    """Do `publish` of files that nobody else writes."""
    with naming(folder / ROWS) as path:
        rows = check_rows(read_table(path, [*TABLES["runs"], *published_columns("NetA")]), commit)
    with naming(folder / PREDICTIONS) as path:
        predictions = records.read_predictions(path)
    for file in (PREDICTIONS, *COPIES):
        with naming(folder / file) as path:
            check_file(path, rows, predictions)
    with naming(root / NOTEBOOK):
        original = committed(root)
    with naming(folder / NOTEBOOK) as path:
        executed = nbformat.read(path, as_version=4)
        check_source(executed, original, SEEDS)
        made = {NOTEBOOK: f"{nbformat.writes(check_notebook(executed))}\n".encode()}
        run = records.read_rows(folder / ROWS)
        for table in (utils.summarize(run), utils.compare(run)):
            check_shown(executed, table)
    made[RIGHT] = pd.DataFrame(records.right_rows(predictions)).to_csv(index=False).encode()
    try:
        check_weights(folder, predictions, rows, load_data(utils.pick_device(), "cifar10", root / "data"))
    except OSError as error:
        if any((root / "data").glob("cifar-10-*")):
            raise Refused(f"weights can't be scored: {error}") from None
        print(f"weights are not scored: {error}")
    replaced = [root / file for file in (*COPIES, *made, ROWS)]
    with naming(root), contextlib.ExitStack() as signals, files.rollback_on_error(replaced):
        with contextlib.ExitStack() as targets:  # which are replaced on leaving, unless writing one failed
            for file in (*COPIES, *made):
                _, temporary = targets.enter_context(files.replacement(root / file))
                temporary.write_bytes(made[file] if file in made else (folder / file).read_bytes())
            signals.enter_context(files.signals_deferred())  # until all are replaced, or all are as they were
        records.upsert(root / ROWS, rows, key=["study", "dataset", "net"])  # in place of all that was published before


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the run is, or goes: then a new folder")
    parser.add_argument("--no-run", action="store_true", help="check and copy what is there already")
    parser.add_argument("--commit", help="the commit that ran, where there was no git")
    options = parser.parse_args(arguments)
    if not str(options.folder).isprintable():
        parser.error(f"--folder is {str(options.folder)!r}; give a path in one line")
    if not options.no_run:
        commit = records.code_commit()
        if commit == "unknown" or "+" in commit:
            raise SystemExit(f"the code's commit is {commit!r}; commit first, since the rows name it")
    try:
        if not options.no_run:
            options.folder = prepare(options.folder)
            execute(options.folder)
        publish(options.folder, options.commit)
    except (Refused, OSError, ValueError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"not published: {error}") from None


if __name__ == "__main__":
    main()
