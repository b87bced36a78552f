"""What may be published: ten whole runs of one clean commit, and of the notebook what a reader would see."""

import base64
import contextlib
import copy
import io
import os
import shutil
import signal
import subprocess
import zlib
from dataclasses import asdict
from pathlib import Path

import nbformat
import numpy as np
import papermill
import pytest
import torch
from conftest import ROOT, child, first_images
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

import hubconf
import models
import utils
from engine import files, hashes, records
from experiments import notebook as notebooks
from experiments import publish
from experiments.notebook import Refused, check_notebook
from experiments.sweeps import read_texts

FILES = [f"img/{norm}.png" for norm in ("batch", "layer", "group")]
FILES += [f"weights/{net}.pt" for net in ("NetA", "NetB", "NetC")]
FILES += [f"results/{name}.csv" for name in ("history", "mistakes", "inside")]
SOURCES = [*FILES, "results/predictions.npz", "s8.ipynb", "results/runs.csv"]  # of which the predictions stay there
PUBLISHED = [*FILES, "results/right.csv"]  # beside the notebook and the rows
EPOCH = "0.5,0.5,99.97,0.5,0.5,0.5"
INSIDE = [
    f"{net},{images},{layer},0.22986"
    for net, images in (("NetA", 2), ("NetA", 10), ("NetA", 50), ("NetA", 250), ("NetB", 1), ("NetC", 1))
    for layer in ("C1", "C2", "C4", "C5", "C6", "C8", "C9", "C10")
]
COMMIT = "1a2b3c4"
PARAMETERS = {"seeds": 10, "source": "cifar10"}


def executed(*cells):
    """A small notebook as papermill leaves it, with these code cells between a heading and the rest."""
    heading, parameters = new_markdown_cell("# Title"), new_code_cell("seeds = None", metadata={"tags": ["parameters"]})
    metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return new_notebook(cells=[heading, parameters, *map(new_code_cell, cells)], metadata=metadata)


@pytest.fixture(scope="module")
def run_by_papermill(tmp_path_factory):
    """Function: execute code cells by papermill with a parameter; the notebook that it writes, failed or not."""
    folder = tmp_path_factory.mktemp("papermill")

    def execute(*cells):
        nbformat.write(executed(*cells), folder / "in.ipynb")
        options = {"kernel_name": "python3", "progress_bar": False}
        with contextlib.suppress(papermill.PapermillExecutionError):
            papermill.execute_notebook(str(folder / "in.ipynb"), str(folder / "out.ipynb"), PARAMETERS, **options)
        return nbformat.read(folder / "out.ipynb", as_version=4)

    return execute


@pytest.fixture(scope="module")
def notebook(run_by_papermill):
    bar = r"print('epoch 1\repoch 2', end='\r'); print('epoch 3\ndone', flush=True); print('after')"
    return run_by_papermill(bar, "seeds")


def write(folder, table, *lines):
    """Write a table as another system may: what is copied keeps its line ends."""
    (folder / "results" / f"{table}.csv").write_bytes("".join(f"{line}\r\n" for line in lines).encode())


def with_tables(folder, notebook):
    """Return a copy of an executed notebook that shows the tables of a run's rows at its end."""
    run = records.read_rows(folder / "results" / "runs.csv")
    tables = [table._repr_html_() for table in (utils.summarize(run), utils.compare(run))]
    shown = [new_output("display_data", {"text/html": table}) for table in tables]
    notebook = copy.deepcopy(notebook)
    notebook.cells.append(new_code_cell("the tables", execution_count=99, outputs=shown))
    return notebook


def put(folder, root, notebook):
    """Put an executed notebook into the folder of a run, and what it was executed from into the checkout."""
    notebook = with_tables(folder, notebook)
    nbformat.write(notebook, folder / "s8.ipynb")
    original = nbformat.from_dict(notebook)
    original.cells = [cell for cell in original.cells if "injected-parameters" not in cell.metadata.get("tags", [])]
    nbformat.write(original, root / "s8.ipynb")


@pytest.fixture(autouse=True)
def without_data(monkeypatch):
    def load_data(*arguments):
        raise OSError("CIFAR-10 is not in data/ and can't be fetched")

    monkeypatch.setattr(publish, "load_data", load_data)


def predict(folder, **changes):
    """Write predictions of ten seeds that are wrong for the first three images, with arrays in place of theirs."""
    labels = np.full(10_000, 3, np.uint8)
    wrong = np.where(np.arange(10_000) < 3, 5, labels).astype(np.uint8)
    arrays = {"labels": labels, "data": np.array("0123456789abcdef")}
    arrays |= {f"{net} seeds": np.arange(10) for net in utils.NETS}
    arrays |= {net: np.tile(wrong, (10, 1)) for net in utils.NETS} | changes
    np.savez_compressed(folder / "results" / "predictions.npz", **{k: v for k, v in arrays.items() if v is not None})


@pytest.fixture
def finished(tmp_path, notebook):
    """A folder as a run of ten seeds leaves it, and a checkout to publish it to."""
    folder, root = tmp_path / "out", tmp_path / "checkout"
    for place in (folder, root):
        for name in ("img", "weights", "results"):
            (place / name).mkdir(parents=True)
    for norm in ("batch", "layer", "group"):
        Image.new("RGB", (1760, 8)).save(folder / "img" / f"{norm}.png")
    for net in utils.NETS:
        torch.save(getattr(models, net)().state_dict(), folder / "weights" / f"{net}.pt")
    predict(folder)
    epochs = [f"{net},{seed},{1 + i},{EPOCH}" for net in utils.NETS for seed in range(10) for i in range(20)]
    write(folder, "history", ",".join(["net", "seed", *records.HISTORY]), *epochs)
    mistakes = [f"{net},{index},cat,dog,0.1234567890123456789" for net in utils.NETS for index in range(3)]
    write(folder, "mistakes", "net,index,true,predicted,confidence", *mistakes)
    write(folder, "inside", "net,images,layer,spread", *INSIDE)
    shutil.copy(ROOT / "results" / "runs.csv", root / "results")
    rows = read_texts()
    rows = rows[(rows["study"] == "main") & rows["net"].isin(["NetA", "NetB", "NetC"])]
    assert len(rows) == 30
    rows = rows.assign(**{name: str(value) for name, value in asdict(utils.Settings()).items() if name != "seed"})
    rows = rows.assign(commit=COMMIT)
    records.upsert(folder / "results" / "runs.csv", rows.assign(test_accuracy="99.97", seconds="0.5"))
    put(folder, root, notebook)
    return folder, root


def change(folder, **values):
    """Change the last row of a run."""
    rows = read_texts(folder / "results" / "runs.csv")
    for name, value in values.items():
        rows.loc[rows.index[-1], name] = value
    rows.to_csv(folder / "results" / "runs.csv", index=False)


def contents(folder):
    paths = folder.rglob("*")
    return {path.relative_to(folder): path.read_bytes() for path in paths if path.is_file() and path.suffix != ".lock"}


def refuse(finished, message, commit=None):
    """See that nothing is published, and why."""
    folder, root = finished
    before = contents(root)
    with pytest.raises(Refused, match=rf"^[^\n]*{message}[^\n]*$"):
        publish.publish(folder, commit, root)
    assert contents(root) == before, "something was copied"


def test_what_was_there_is_published(finished):
    folder, root = finished
    before = read_texts(root / "results" / "runs.csv")
    publish.publish(folder, root=root)
    assert all((root / file).read_bytes() == (folder / file).read_bytes() for file in FILES)
    rows, new = read_texts(root / "results" / "runs.csv"), read_texts(folder / "results" / "runs.csv")
    main = rows["study"] == "main"
    assert rows[main].reset_index(drop=True).equals(new), "the texts are others"
    others = before[before["study"] != "main"].reset_index(drop=True)
    assert rows[~main].reset_index(drop=True).equals(others), "other rows changed"
    assert not (root / "results" / "predictions.npz").exists(), "it holds labels"
    right = records.read_right(root / "results" / "right.csv")
    assert list(right) == list(utils.NETS)
    assert all((own == (np.arange(10_000) > 2)).all() and own.shape == (10, 10_000) for own in right.values())
    cells = nbformat.read(root / "s8.ipynb", as_version=4).cells
    assert [cell.source for cell in cells][:2] == ["# Title", "seeds = None"]


def test_other_nets_and_data_sets_of_the_study_stay(finished):
    folder, root = finished
    rows = read_texts(root / "results" / "runs.csv")
    own = rows[(rows["study"] == "main") & (rows["net"] == "NetB")]
    others = [own.assign(dataset="CIFAR-100"), own.assign(net="Net", norm="none", groups="", layer_variant="")]
    for other in others:
        records.upsert(root / "results" / "runs.csv", other)
    publish.publish(folder, root=root)
    found = read_texts(root / "results" / "runs.csv")
    assert len(found) == len(rows) + 20


def test_a_notebook_of_another_run_is_refused(finished):
    folder, _root = finished
    text = (folder / "s8.ipynb").read_text()
    (folder / "s8.ipynb").write_text(text.replace("<td>99.97</td>", "<td>99.98</td>"))
    refuse(finished, "s8.ipynb: it doesn't show batch, 20, 48042, 99.97, 0.0, 10, .* and the rest of what the run's")


def test_rows_at_other_settings_are_replaced(finished):
    folder, root = finished
    rows = read_texts(root / "results" / "runs.csv")
    rows.loc[rows["study"] == "main", ["learning_rate", "weight_decay"]] = "0.07", "0.25"
    rows.to_csv(root / "results" / "runs.csv", index=False)
    publish.publish(folder, root=root)
    published = read_texts(root / "results" / "runs.csv")
    assert (published["study"] == "main").sum() == 30
    assert set(published["weight_decay"][published["study"] == "main"]) == {"0.167"}


def test_nine_seeds_are_refused(finished):
    rows = read_texts(finished[0] / "results" / "runs.csv")
    rows.iloc[:-1].to_csv(finished[0] / "results" / "runs.csv", index=False)
    net = rows["net"].iloc[-1]
    refuse(finished, rf"{net} has the seeds \[0, 1, 2, 3, 4, 5, 6, 7, 8\]; 0 to 9 are published")


def test_a_net_without_rows_is_refused(finished):
    rows = read_texts(finished[0] / "results" / "runs.csv")
    rows[rows["net"] != "NetB"].to_csv(finished[0] / "results" / "runs.csv", index=False)
    refuse(finished, r"NetB has the seeds \[\]; 0 to 9 are published")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epochs": "5"}, "a row of NetC has epochs '5'; '20' is published"),
        ({"study": "short", "epochs": "5"}, "a row of NetC has study 'short'; 'main' is published"),
        ({"study": "synthetic"}, "a row of NetC has study 'synthetic'; 'main' is published"),
        ({"split": "validation"}, "a row of NetC has split 'validation'; 'test' is published"),
        ({"status": "diverged"}, "a row of NetC has status 'diverged'; 'done' is published"),
        ({"dataset": "CIFAR-100"}, "a row of NetC has dataset 'CIFAR-100'; 'CIFAR-10' is published"),
        ({"net": "Net"}, r"NetC has the seeds \[0, 1, 2, 3, 4, 5, 6, 7, 8\]; 0 to 9 are published"),
        ({"seed": "first"}, "runs.csv: invalid literal .*'first'"),
        ({"device": "cpu"}, "a row has device 'cpu'; runs on a GPU are published"),
        ({"device": "cpu Intel Xeon"}, "a row has device 'cpu Intel Xeon'; runs on a GPU are published"),
        ({"device": ""}, "a row has device ''; runs on a GPU are published"),
        *(
            ({"test_accuracy": text}, f"a row has test_accuracy '{text}'; a number from 0 to 100 is published")
            for text in ("", "nan", "inf", "-0.01", "100.01", "most")
        ),
        ({"seed": "09"}, r"has the seeds \[0, 1, .*, 09\]; 0 to 9 are published"),
        ({"seed": "10"}, "has the seeds .*10.*; 0 to 9 are published"),
        ({"seed": "0"}, r"has the seeds \[0, 0, 1.*; 0 to 9 are published"),
        ({"commit": "1a2b3c4+"}, r"the rows name the commit 1a2b3c4, 1a2b3c4\+; one clean commit is published"),
        ({"commit": "9d8e7f6"}, "the rows name the commit 1a2b3c4, 9d8e7f6; one clean commit is published"),
        ({"commit": "unknown"}, "the rows name the commit 1a2b3c4, unknown; one clean commit is published"),
    ],
)
def test_a_row_of_another_kind_is_refused(finished, values, message):
    change(finished[0], **values)
    refuse(finished, message)


@pytest.mark.parametrize("name", [name for name in asdict(utils.Settings()) if name not in ("seed", "epochs")])
@pytest.mark.parametrize("value", ["0.07", ""])
def test_a_row_at_another_setting_is_refused(finished, name, value):
    change(finished[0], **{name: value})
    refuse(finished, f"runs.csv: a row of NetC has {name} '{value}'; '.+' is published")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("norm", "layer"),
        ("groups", "8"),
        ("layer_variant", "C"),
        ("statistics_batch", "50"),
        ("widths", "8 8 8 8 8 8 8 8 8 8"),
        ("activation", "ReLU"),
        ("initial_weights", "he"),
        ("parameters", "48043"),
        ("train_images", "45000"),
        ("precision", "float32"),
        ("step", "PyTorch"),
    ],
)
def test_a_row_of_another_net_or_computation_is_refused(finished, name, value):
    change(finished[0], **{name: value})
    refuse(finished, f"runs.csv: a row of NetC has {name} '{value}'; '.*' is published")


NO_NUMBERS = [
    (name, value) for name in ("train_accuracy", "test_loss", "seconds") for value in ("high", "", "-1", "inf")
]


@pytest.mark.parametrize(("name", "value"), [*NO_NUMBERS, ("train_accuracy", "120"), ("train_accuracy", "nan")])
def test_a_row_without_numbers_is_refused(finished, name, value):
    change(finished[0], **{name: value})
    refuse(finished, f"runs.csv: a row has {name} '{value}'; a number from 0 to .* is published")


def test_a_validation_accuracy_is_refused(finished):
    change(finished[0], validation_accuracy="55")
    refuse(finished, "runs.csv: a row of NetC has validation_accuracy '55'; '' is published")


def test_no_other_seed_of_the_study_stays(finished):
    table = finished[1] / "results" / "runs.csv"
    rows = read_texts(table)
    records.upsert(table, rows[rows["study"] == "main"].iloc[:1].assign(seed="10"))
    publish.publish(finished[0], root=finished[1])
    assert (read_texts(table)["study"] == "main").sum() == 30


def test_a_column_that_is_not_published_is_refused(finished):
    rows = read_texts(finished[0] / "results" / "runs.csv")
    rows.assign(note="").to_csv(finished[0] / "results" / "runs.csv", index=False)
    refuse(finished, "runs.csv: it has a column 'note', which is not published")


@pytest.mark.parametrize("table", ["history", "mistakes", "inside"])
def test_a_column_of_another_table_that_is_not_published_is_refused(finished, table):
    path = finished[0] / "results" / f"{table}.csv"
    read_texts(path).assign(note="").to_csv(path, index=False)
    refuse(finished, f"{table}.csv: it has a column 'note', which is not published")


def test_another_learning_rate_than_the_recipes_is_refused(finished):
    change(finished[0], learning_rate="0.06")
    refuse(finished, "a row of NetC has learning_rate '0.06'; '0.03' is published")


def test_rows_of_another_net_are_refused(finished):
    rows = read_texts(finished[0] / "results" / "runs.csv")
    records.upsert(finished[0] / "results" / "runs.csv", rows[rows["net"] == "NetC"].assign(net="Net"))
    refuse(finished, "a row has net 'Net'; NetA, NetB, NetC are published")


@pytest.mark.parametrize("commit", ["1a2b3c4+", "unknown", "", "main"])
def test_rows_that_name_no_clean_commit_are_refused(finished, commit):
    table = finished[0] / "results" / "runs.csv"
    read_texts(table).assign(commit=commit).to_csv(table, index=False)
    refuse(finished, "; one clean commit is published")


def test_an_unknown_commit_has_to_be_named(finished):
    folder, root = finished
    table = folder / "results" / "runs.csv"
    read_texts(table).assign(commit="unknown").to_csv(table, index=False)
    refuse(finished, "the rows name the commit unknown")
    refuse(finished, r"the rows name the commit 9d8e7f6\+", commit="9d8e7f6+")
    refuse(finished, "the rows name the commit latest", commit="latest")
    publish.publish(folder, "9d8e7f6", root)
    published = read_texts(root / "results" / "runs.csv")
    assert set(published["commit"][published["study"] == "main"]) == {"9d8e7f6"}


def test_a_commit_that_is_known_is_not_renamed(finished):
    publish.publish(finished[0], "9d8e7f6", finished[1])
    published = read_texts(finished[1] / "results" / "runs.csv")
    assert set(published["commit"][published["study"] == "main"]) == {COMMIT}


@pytest.mark.parametrize("file", SOURCES)
def test_a_missing_file_is_refused(finished, file):
    (finished[0] / file).unlink()
    refuse(finished, f"{file} is not there")


@pytest.mark.parametrize("file", SOURCES)
def test_a_symbolic_link_is_refused(finished, file):
    (finished[0] / file).rename(finished[0] / "elsewhere")
    (finished[0] / file).symlink_to(finished[0] / "elsewhere")
    refuse(finished, f"{file} is a symbolic link, or in one")


def test_a_folder_that_is_a_symbolic_link_is_refused(finished):
    (finished[0] / "img").rename(finished[0] / "elsewhere")
    (finished[0] / "img").symlink_to(finished[0] / "elsewhere")
    refuse(finished, "batch.png is a symbolic link, or in one")


@pytest.mark.parametrize("content", [b"", b"no picture", b"GIF"])
def test_a_grid_that_is_no_whole_png_is_refused(finished, content):
    path = finished[0] / FILES[1]
    if content == b"GIF":
        Image.new("RGB", (8, 8)).save(path, "gif")
    else:
        path.write_bytes(content or path.read_bytes()[:-20])
    refuse(finished, f"{FILES[1]}: ")


def test_weights_of_another_net_are_refused(finished):
    path = finished[0] / "weights" / "NetB.pt"
    weights = models.NetB().state_dict()
    torch.save(models.NetA().state_dict(), path)
    refuse(finished, "NetB.pt: .*Unexpected key")
    torch.save(dict(list(weights.items())[1:]), path)
    refuse(finished, "NetB.pt: .*Missing key")
    torch.save(models.NetB(classes=100).state_dict(), path)
    refuse(finished, "NetB.pt: .*size mismatch")


def test_a_grid_of_another_width_or_without_its_pixels_is_refused(finished):
    path = finished[0] / FILES[1]
    Image.new("RGB", (1, 1)).save(path)
    refuse(finished, f"{FILES[1]}: it is 1 pixels wide; 1760 are published")
    Image.new("RGB", (1760, 8)).save(path)
    content, pixels = path.read_bytes(), zlib.compress(b"\0" * 10)
    start = content.index(b"IDAT") - 4
    end = start + 12 + int.from_bytes(content[start : start + 4], "big")
    chunk = len(pixels).to_bytes(4, "big") + b"IDAT" + pixels + zlib.crc32(b"IDAT" + pixels).to_bytes(4, "big")
    path.write_bytes(content[:start] + chunk + content[end:])
    refuse(finished, f"{FILES[1]}: ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda value: value.double(), "torch.float64 in 2560 bytes; torch.float32 in 1280 is published"),
        (lambda value: torch.zeros(10**5)[: value.numel()].view_as(value), "torch.float32 in 400000 bytes; "),
        (lambda value: value * torch.nan, "holds what is not finite"),
    ],
)
def test_weights_of_another_form_are_refused(finished, change, message):
    path = finished[0] / "weights" / "NetC.pt"
    weights = models.NetC().state_dict()
    torch.save(weights | {"c11.weight": change(weights["c11.weight"])}, path)
    refuse(finished, f"NetC.pt: c11.weight (is )?{message}")


def test_weights_with_another_check_sum_are_refused(finished):
    """One bit of one weight is another: the score would hardly tell."""
    path = finished[0] / "weights" / "NetC.pt"
    content, weights = bytearray(path.read_bytes()), torch.load(path, weights_only=True)["c11.weight"]
    content[content.index(weights.numpy().tobytes()) + 1] ^= 1
    path.write_bytes(content)
    refuse(finished, "NetC.pt: its check sum is wrong")


def test_weights_that_are_no_weights_are_refused(finished):
    path = finished[0] / "weights" / "NetC.pt"
    path.write_bytes(b"no weights")
    refuse(finished, "NetC.pt: ")
    torch.save([1, 2], path)
    refuse(finished, "NetC.pt: ")
    torch.save(models.NetC(), path)  # would run code
    refuse(finished, "NetC.pt: .*[Ww]eights")


@pytest.mark.parametrize("table", ["history", "mistakes", "inside", "runs"])
def test_a_damaged_table_is_refused(finished, table):
    path = finished[0] / "results" / f"{table}.csv"
    whole = path.read_bytes()
    header, rows = whole.split(b"\n", 1)
    for content, message in (
        (b"", "is empty"),
        (whole.rstrip(), "ends within a line"),
        (whole + b"NetA\n", r"line \d+ is not \d+ fields"),
        (whole + b"\xff\n", "is no CSV file in UTF-8"),
        (header + b"\n", "it has no row"),
        (header.replace(b"net", b"web") + b"\n" + rows, "it has no column 'net'"),
    ):
        path.write_bytes(content)
        refuse(finished, rf"results/{table}.csv:? {message}")


@pytest.mark.parametrize("column", ["dataset", "warmup", "seed", "test_accuracy", "device", "commit", "status"])
def test_rows_without_a_column_are_refused(finished, column):
    table = finished[0] / "results" / "runs.csv"
    read_texts(table).drop(columns=column).to_csv(table, index=False)
    refuse(finished, f"runs.csv: it has no column '{column}'")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("NetB,3,20,", "NetB,3,21,"),
        ("NetB,3,20,", "NetB,3,19,"),
        ("NetB,3,20,", "NetB,10,20,"),
        ("NetB,3,20,", "Net,3,20,"),
        (f"NetB,3,20,{EPOCH}\r\n", ""),
        ("NetB,3,20,", f"NetA,0,1,{EPOCH}\r\nNetB,3,20,"),
    ],
)
def test_a_history_of_other_epochs_is_refused(finished, old, new):
    path = finished[0] / "results" / "history.csv"
    text = path.read_bytes().decode()
    assert text.count(old) == 1
    path.write_bytes(text.replace(old, new).encode())
    refuse(finished, r"history.csv: \w+, seed \d+, epoch \d+ is missing, there twice or not published")


@pytest.mark.parametrize(
    ("new", "name", "value"),
    [
        (EPOCH.replace("99.97", "99.96"), "test_accuracy", "99.97"),
        (EPOCH.replace("99.97", "nan"), "test_accuracy", "99.97"),
        (EPOCH[:-3] + "0.52", "seconds", "0.5"),
    ],
)
def test_a_history_that_ends_elsewhere_than_its_row_is_refused(finished, new, name, value):
    path = finished[0] / "results" / "history.csv"
    path.write_bytes(path.read_bytes().replace(f"NetB,3,20,{EPOCH}".encode(), f"NetB,3,20,{new}".encode()))
    refuse(finished, f"history.csv: NetB, seed 3 ends at another {name} than its row's, {value}")


@pytest.mark.parametrize(
    ("number", "name", "value"),
    [(0, "loss", "high"), (1, "train_accuracy", "-7"), (2, "test_accuracy", "500"), (3, "learning_rate", "")],
)
def test_a_history_without_numbers_is_refused(finished, number, name, value):
    values = EPOCH.split(",")
    values[number] = value
    path = finished[0] / "results" / "history.csv"
    path.write_bytes(path.read_bytes().replace(f"NetB,3,5,{EPOCH}".encode(), f"NetB,3,5,{','.join(values)}".encode()))
    refuse(finished, f"history.csv: a row has {name} '{value}'; a number from 0 to .* is published")


@pytest.mark.parametrize("confidence", ["7.5", "high", ""])
def test_mistakes_without_a_confidence_are_refused(finished, confidence):
    path = finished[0] / "results" / "mistakes.csv"
    path.write_bytes(path.read_bytes().replace(b"0.1234567890123456789", confidence.encode(), 1))
    refuse(finished, f"mistakes.csv: a row has confidence '{confidence}'; a number from 0 to 1 is published")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["NetZ,-2,Q9,1", *INSIDE], "NetZ, -2 images, layer Q9 is missing, there twice or not published"),
        (INSIDE[:8], "NetA, 10 images, layer C1 is missing, there twice or not published"),
        ([*INSIDE, INSIDE[0]], "NetA, 2 images, layer C1 is missing, there twice or not published"),
        ([*INSIDE[:-1], "NetC,1,C10,much"], "a row has spread 'much'; a number from 0 to 1000 is published"),
    ],
)
def test_other_spreads_are_refused(finished, rows, message):
    write(finished[0], "inside", "net,images,layer,spread", *rows)
    refuse(finished, f"inside.csv: {message}")


def test_a_history_without_tests_is_published(finished):
    path = finished[0] / "results" / "history.csv"
    path.write_bytes(path.read_bytes().replace(EPOCH.encode(), EPOCH.replace("99.97", "").encode()))
    publish.publish(*finished[:1], root=finished[1])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"NetB,1,cat,dog", b"NetB,3,cat,dog"),
        (b"NetB,1,cat,dog", b"NetB,1,cat,frog"),
        (b"NetB,1,cat,dog", b"NetB,1,frog,dog"),
        (b"NetB,1,cat,dog", b"Net,1,cat,dog"),
        (b"NetB,1,cat,dog,0.1234567890123456789\r\n", b""),
        (b"NetB,1,cat,dog", b"NetB,0,cat,dog,0.9\r\nNetB,1,cat,dog"),
        (b"NetB,", b"NetC,"),
    ],
)
def test_mistakes_that_are_not_the_first_seeds_are_refused(finished, old, new):
    path = finished[0] / "results" / "mistakes.csv"
    path.write_bytes(path.read_bytes().replace(old, new))
    refuse(finished, r"mistakes.csv: Net\w?, image \d, \w+ as \w+: not once both here and in predictions.npz")


def test_mistakes_are_those_of_the_first_seed(finished, notebook):
    arrays = dict(np.load(finished[0] / "results" / "predictions.npz"))
    for net in utils.NETS:
        arrays[net][1:] = arrays["labels"]
    predict(finished[0], **arrays)
    rows = read_texts(finished[0] / "results" / "runs.csv")
    rows["test_accuracy"] = rows["test_accuracy"].where(rows["seed"] == "0", "100.0")
    rows.to_csv(finished[0] / "results" / "runs.csv", index=False)
    path = finished[0] / "results" / "history.csv"
    path.write_bytes(path.read_bytes().replace(b",99.97,", b",,"))
    put(*finished, notebook)
    publish.publish(finished[0], root=finished[1])


RIGHT = np.full((10, 10_000), 3, np.uint8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"NetB": None}, "it holds labels, .*; NetA, .*, labels are published"),
        ({"NetB seeds": None}, "it holds labels, .*; NetA, .*, labels are published"),
        ({"Net": RIGHT}, "it holds labels, .*Net; NetA, .*, labels are published"),
        ({"NetB": RIGHT}, "NetB, seed 0 is right for 100.0%, its row says 99.97%"),
        ({"labels": np.full(10_000, 4, np.uint8)}, "NetA, seed 0 is right for 0.0%, its row says 99.97%"),
        (
            {"NetB": RIGHT[:9]},
            r"NetB has uint8 of \(9, 10000\) for .*; uint8 of \(10, 10000\) for .*, 9\] is published",
        ),
        ({"NetB": RIGHT[:, :100]}, r"NetB has uint8 of \(10, 100\) for the seeds"),
        ({"NetB": RIGHT.astype(int)}, r"NetB has int64 of \(10, 10000\) for the seeds"),
        ({"NetB seeds": np.arange(10)[::-1]}, r"NetB has uint8 of \(10, 10000\) for the seeds \[9, "),
        ({"labels": RIGHT[0, :100]}, ""),
    ],
)
def test_predictions_that_are_not_the_rows_are_refused(finished, changes, message):
    predict(finished[0], **changes)
    refuse(finished, f"predictions.npz: {message}")


def test_predictions_that_are_no_archive_are_refused(finished):
    (finished[0] / "results" / "predictions.npz").write_bytes(b"none")
    refuse(finished, "predictions.npz is no whole file of predictions; delete this folder's results")


def test_weights_are_said_not_to_be_scored_where_there_is_no_data(finished, capsys):
    publish.publish(finished[0], root=finished[1])
    assert capsys.readouterr().out == "weights are not scored: CIFAR-10 is not in data/ and can't be fetched\n"


@pytest.mark.parametrize("there", ["cifar-10-batches-py", "cifar-10-python.tar.gz"])
def test_weights_that_damaged_data_can_not_score_are_refused(finished, there):
    (finished[1] / "data" / there).mkdir(parents=True)
    refuse(finished, "weights can't be scored: CIFAR-10 is not in")


def test_swapped_weights_are_refused(finished, notebook, real, monkeypatch):
    """Also weights of another seed, or none that were trained; and labels that are not CIFAR-10's.

    Of the first 1000 test images, which are scored in a tenth of the time.
    """
    folder, _ = finished
    monkeypatch.setattr(publish, "load_data", lambda *arguments: real)
    refuse(finished, "predictions.npz: its labels are not those of CIFAR-10's test images")
    few = first_images(real, 1000, 1000)
    monkeypatch.setattr(publish, "load_data", lambda *arguments: few)
    monkeypatch.setattr(publish, "IMAGES", 1000)
    rows, arrays, mistakes = (
        read_texts(folder / "results" / "runs.csv"),
        {"labels": few.test_labels.byte().numpy(), "data": np.array(hashes.test_hash(few))},
        [],
    )
    for net in utils.NETS:
        shutil.copy(ROOT / "weights" / f"{net}.pt", folder / "weights")
        scores = utils.test(getattr(hubconf, net)(pretrained=True), few.test_images, few.test_labels)
        arrays[net] = np.tile(scores.predictions.byte().numpy(), (10, 1))
        values = str(round(scores.accuracy, 3)), str(round(scores.loss, 5))
        rows.loc[rows["net"] == net, ["test_accuracy", "test_loss"]] = values
        table = utils.mistakes_table(utils.Run(None, [], scores, {"net": net}), few)
        mistakes += [",".join(map(str, row)) for row in table.to_numpy()]
    predict(folder, **arrays)
    rows.to_csv(folder / "results" / "runs.csv", index=False)
    put(*finished, notebook)
    write(folder, "mistakes", "net,index,true,predicted,confidence", *mistakes)
    path = folder / "results" / "history.csv"
    path.write_bytes(path.read_bytes().replace(b",99.97,", b",,"))
    for net, other in (("NetB", "NetC"), ("NetC", "NetB")):
        shutil.copy(ROOT / "weights" / f"{other}.pt", folder / "weights" / f"{net}.pt")
        refuse(finished, rf"{net}.pt: it predicts another class than its seed 0 did for \d{{3}} of 1000 test images")
        shutil.copy(ROOT / "weights" / f"{net}.pt", folder / "weights")
    predict(folder, **arrays | {"data": np.array("0123456789abcdef")})
    refuse(finished, "predictions.npz: it is of other images than CIFAR-10's test images")
    predict(folder, **arrays)
    forged = [*mistakes[:-1], mistakes[-1].rpartition(",")[0] + ",0.0001"]
    write(folder, "mistakes", "net,index,true,predicted,confidence", *forged)
    refuse(finished, r"NetC.pt: image \d+ has the confidence 0.\d+, results/mistakes.csv says 0.0001")
    write(folder, "mistakes", "net,index,true,predicted,confidence", *mistakes)
    rows.assign(test_loss="0.6").to_csv(folder / "results" / "runs.csv", index=False)
    refuse(finished, r"NetA.pt: its test_loss is \d.\d{5}, its seed 0's row says 0.6")
    rows.to_csv(folder / "results" / "runs.csv", index=False)
    publish.publish(folder, root=finished[1])


@pytest.mark.parametrize("error", [OSError("No space left"), KeyboardInterrupt()])
@pytest.mark.parametrize("number", [0, 1, 5, len(PUBLISHED), len(PUBLISHED) + 1])
def test_a_failure_while_files_are_replaced_leaves_all_as_they_were(finished, monkeypatch, number, error):
    """Of files that are there, and of those that are not yet there."""
    folder, root = finished
    for file in PUBLISHED[::2]:
        (root / file).write_bytes(b"published before")
    before, replace, calls = contents(root), os.replace, []

    def failing(*paths):
        calls.append(paths)
        if len(calls) == number + 1:
            raise error
        replace(*paths)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(Refused if isinstance(error, OSError) else KeyboardInterrupt):
        publish.publish(folder, root=root)
    assert contents(root) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("call", [1, 5, len(PUBLISHED) + 2])
def test_signals_wait_until_all_files_are_replaced(finished, number, call):
    folder, root = finished
    for file in PUBLISHED:
        (root / file).write_bytes(b"published before")
    replace, calls = os.replace, []

    def interrupted(*paths):
        replace(*paths)
        calls.append(paths)
        if len(calls) == call:
            os.kill(os.getpid(), number)

    def publishing():
        signal.signal(number, signal.SIG_DFL)  # which who runs the tests may have ignored
        os.replace = interrupted
        publish.publish(folder, root=root)

    assert os.waitstatus_to_exitcode(os.waitpid(child(publishing), 0)[1]) == -number
    assert all((root / file).read_bytes() == (folder / file).read_bytes() for file in FILES)
    assert {COMMIT} == set(read_texts(root / "results" / "runs.csv").query("study == 'main'")["commit"])
    assert not list(root.rglob(".*.part*"))


def test_signals_wait_until_all_files_are_put_back(finished, monkeypatch):
    folder, root = finished
    for file in PUBLISHED:
        (root / file).write_bytes(b"published before")
    before, save = contents(root), files.save

    def interrupted(*arguments):
        signal.raise_signal(signal.SIGINT)
        save(*arguments)

    def failing(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "save", interrupted)
    monkeypatch.setattr(records, "upsert", failing)
    with pytest.raises(KeyboardInterrupt):
        publish.publish(folder, root=root)
    assert contents(root) == before
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_what_is_published_is_what_was_checked(finished, monkeypatch):
    folder, root = finished
    before, rollback = (folder / "weights" / "NetA.pt").read_bytes(), files.rollback_on_error

    def swapped(paths):
        (folder / "weights" / "NetA.pt").write_bytes(b"others")
        return rollback(paths)

    monkeypatch.setattr(files, "rollback_on_error", swapped)
    publish.publish(folder, root=root)
    assert (root / "weights" / "NetA.pt").read_bytes() == before


@pytest.mark.parametrize("file", ["img/batch.png", "results/inside.csv", "s8.ipynb", "results/runs.csv"])
def test_nothing_is_copied_unless_all_files_can_be_written(finished, file):
    (finished[1] / file).touch()
    (finished[1] / file).chmod(0o444)
    refuse(finished, f"{finished[1] / file} can't be written: .* is read-only")


@pytest.mark.parametrize("folder", ["img", "weights", "results"])
def test_nothing_is_copied_unless_all_folders_can_be_written(finished, folder):
    (finished[1] / folder).chmod(0o555)
    try:
        refuse(finished, f"{finished[1] / folder}/.* can't be written: {finished[1] / folder} is read-only")
    finally:
        (finished[1] / folder).chmod(0o755)


def test_nothing_is_copied_over_a_folder(finished):
    (finished[1] / FILES[-1]).mkdir()
    refuse(finished, f"{FILES[-1]} can't be written: it is no regular file")


def test_damaged_rows_of_the_checkout_are_refused(finished):
    table = finished[1] / "results" / "runs.csv"
    table.write_bytes(table.read_bytes()[:-3])
    refuse(finished, rf"{table} ends within a line; mend or delete it")


def test_edits_of_the_notebook_that_are_not_committed_are_not_overwritten(finished):
    root = finished[1]
    git = ["git", "-C", root, "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "s8.ipynb"], ["commit", "-qm", "Add"]):
        subprocess.run([*git, *command], check=True)
    edited = nbformat.read(root / "s8.ipynb", as_version=4)
    edited.cells[0].source += " edited"
    nbformat.write(edited, root / "s8.ipynb")
    refuse(finished, "s8.ipynb: its cells differ from the committed ones, and would be overwritten; commit or undo")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("no JSON\nat all", "Notebook does not appear to be JSON"),
        ("[]", ""),
        ("{}", ""),
        ('{"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": 3}', ""),
    ],
)
@pytest.mark.parametrize("place", [0, 1])
def test_what_is_no_notebook_is_refused(finished, content, message, place):
    (finished[place] / "s8.ipynb").write_text(content)
    refuse(finished, f"s8.ipynb: {message}")


@pytest.mark.parametrize("name", ["kernelspec", "language_info"])
def test_a_notebook_without_its_language_is_refused(finished, notebook, name):
    notebook = with_tables(finished[0], notebook)
    del notebook.metadata[name]
    nbformat.write(notebook, finished[0] / "s8.ipynb")
    refuse(finished, "s8.ipynb: its metadata has no kernelspec or no language_info")


def inject(folder, notebook, source):
    """Change what papermill injected."""
    notebook = with_tables(folder, notebook)
    notebook.cells[2].source = source
    nbformat.write(notebook, folder / "s8.ipynb")


@pytest.mark.parametrize(
    "source",
    [
        'seeds = 3\nsource = "cifar10"',
        'seeds = 10\nsource = "auto"',
        'seeds = 10\nsource = "cifar10"\nepochs = 5',
        'seeds = 10\nsource = "cifar10"\nepochs = 0',
        'seeds = 10\nsource = "cifar10"\nutils = None',
        "seeds = 10",
        "",
    ],
)
def test_other_parameters_are_refused(finished, notebook, source):
    inject(finished[0], notebook, source)
    refuse(finished, r"s8.ipynb: papermill set \{.*\}; \{'seeds': 10, 'source': 'cifar10'\} is published")


@pytest.mark.parametrize("line", ["import os", "folder = print()", "utils.MAX_EPOCHS = 30", "seeds ="])
def test_code_among_the_parameters_is_refused(finished, notebook, line):
    inject(finished[0], notebook, f'seeds = 10\nsource = "cifar10"\n{line}')
    refuse(finished, "s8.ipynb: ")


@pytest.mark.parametrize("line", ["", "epochs = 20", "epochs = None", 'folder = "out/published"'])
def test_the_published_parameters_may_be_named(finished, notebook, line):
    inject(finished[0], notebook, f'# Parameters\nseeds = 10\nsource = "cifar10"\n{line}\n')
    publish.publish(finished[0], root=finished[1])


def test_a_notebook_that_papermill_did_not_run_is_refused(finished):
    shutil.copy(finished[1] / "s8.ipynb", finished[0])
    refuse(finished, r"s8.ipynb: papermill set \{\}; ")


def edit(path, number, **values):
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[number].update(values)
    nbformat.write(notebook, path)


@pytest.mark.parametrize("number", [0, 1, 3])
def test_other_source_is_refused(finished, number):
    edit(finished[0] / "s8.ipynb", number, source="seeds = 1")
    refuse(finished, f"s8.ipynb: cell {min(number, 2)} is not that of the committed s8.ipynb")


def test_other_cells_are_refused(finished, notebook):
    original = nbformat.read(finished[1] / "s8.ipynb", as_version=4)
    original.cells.append(new_markdown_cell("The end"))
    nbformat.write(original, finished[1] / "s8.ipynb")
    refuse(finished, "s8.ipynb: cell 5 is not that of the committed s8.ipynb")
    original.cells = original.cells[:3]
    nbformat.write(original, finished[1] / "s8.ipynb")
    refuse(finished, "s8.ipynb: cell 3 is not that of the committed s8.ipynb")


def test_the_source_is_compared_with_the_last_commit(finished, monkeypatch):
    folder, root = finished
    names = {f"GIT_{who}_{what}": "a@b" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")} | names
    for command in (["init", "-q"], ["add", "s8.ipynb"], ["commit", "-q", "-m", "s8"]):
        subprocess.run(["git", *command], cwd=root, env=environment, check=True)
    monkeypatch.setenv("GIT_DIR", str(root / "of a hook"))
    publish.publish(folder, root=root)
    edit(folder / "s8.ipynb", 0, source="# Other")
    refuse(finished, "s8.ipynb: cell 0 is not that of the committed s8.ipynb")
    edit(root / "s8.ipynb", 0, source="# Other")
    refuse(finished, "its cells differ from the committed ones")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("raise ValueError('first\\nlast')", r"cell \d ended in an error or a warning: last"),
        ("assert False", r"cell \d ended in an error or a warning: AssertionError:"),
        ("import warnings; warnings.warn('no good')", r"cell \d ended in an error or a warning: .*"),
    ],
)
def test_a_cell_that_failed_or_warned_is_refused(finished, run_by_papermill, code, message):
    put(*finished, run_by_papermill(code))
    refuse(finished, message)


def test_a_cell_that_did_not_run_is_refused(finished, notebook):
    cells = nbformat.from_dict(notebook)
    cells.cells.append(new_code_cell("1 + 1"))
    put(*finished, cells)
    refuse(finished, "cell 4 was not executed")


def test_a_cell_whose_output_was_cleared_is_refused(finished):
    edit(finished[0] / "s8.ipynb", -1, outputs=[])
    refuse(finished, "s8.ipynb: cell 4 shows nothing; that of the committed s8.ipynb does")


def test_papermills_marks_are_stripped(notebook):
    assert [cell.metadata.get("tags") for cell in notebook.cells][1:3] == [["parameters"], ["injected-parameters"]]
    found = check_notebook(nbformat.from_dict(notebook))
    assert [cell.source for cell in found.cells] == [
        cell.source for cell in notebook.cells if "injected-parameters" not in cell.metadata.get("tags", [])
    ]
    assert [dict(cell.metadata) for cell in found.cells] == [{}, {"tags": ["parameters"]}, {}, {}]
    assert set(found.metadata) == {"kernelspec", "language_info"}
    assert "papermill" not in nbformat.writes(found)
    nbformat.validate(found)


def test_cells_are_counted_from_one(notebook):
    found = check_notebook(nbformat.from_dict(notebook))
    assert [cell.execution_count for cell in found.cells if cell.cell_type == "code"] == [1, 2, 3]
    assert [output.execution_count for output in found.cells[-1].outputs] == [3]
    assert found.cells[-1].outputs[0].data["text/plain"] == "10", "the parameters were not those that papermill set"
    assert len({cell.id for cell in found.cells}) == len(found.cells)


def test_of_lines_that_overwrite_each_other_the_last_is_kept(notebook):
    [output] = check_notebook(nbformat.from_dict(notebook)).cells[2].outputs
    assert output.text == "epoch 3\ndone\nafter\n"


def test_printed_parts_are_joined_up_to_another_output():
    parts = [new_output("stream", name="stdout", text=text) for text in ("a 1", "\ra 2", "\r\n", "b\n")]
    shown = new_output("display_data", data={"text/plain": "picture"})
    found = notebooks.join_streams([*parts, shown, new_output("stream", name="stdout", text="c\n")])
    assert [output.get("text") for output in found] == ["a 2\r\nb\n", None, "c\n"]


def test_pictures_are_reduced_to_256_colors():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(noise).save(content, "png")
    shown = new_output("display_data", data={"image/png": base64.b64encode(content.getvalue()).decode()})
    notebook = executed()
    notebook.metadata["language_info"] = {"name": "python"}
    notebook.cells[1].update(execution_count=1, outputs=[shown])
    [found] = check_notebook(notebook).cells[1].outputs
    picture = base64.b64decode(found.data["image/png"])
    assert len(picture) < len(content.getvalue())
    with Image.open(io.BytesIO(picture)) as image:
        assert image.size == (64, 64)
        assert image.mode == "P"
        assert np.abs(np.asarray(image.convert("RGB")).astype(int) - noise).mean() < 30


@pytest.mark.parametrize("commit", ["unknown", "1a2b3c4+"])
def test_nothing_is_run_before_the_code_is_committed(monkeypatch, commit):
    monkeypatch.setattr(records, "code_commit", lambda: commit)
    monkeypatch.setattr(publish, "execute", lambda folder: pytest.fail("it ran"))
    with pytest.raises(SystemExit, match=r"commit first, since the rows name it"):
        publish.main([])


def test_the_notebook_is_run_with_the_published_settings(monkeypatch, tmp_path):
    """In the folder that was named, relative to where one is; the checkout's own notebook is not written over."""
    calls = []
    monkeypatch.setattr(records, "code_commit", lambda: COMMIT)
    monkeypatch.setattr(subprocess, "run", lambda command, **options: calls.append((command, options)))
    monkeypatch.setattr(publish, "publish", lambda folder, commit: calls.append((folder, commit)))
    monkeypatch.chdir(tmp_path)
    publish.main(["--folder", "new"])
    (command, options), _ = calls
    assert command[2:5] == ["papermill", "s8.ipynb", str(tmp_path / "new" / "s8.ipynb")]
    settings = {command[i + 1]: command[i + 2] for i, word in enumerate(command) if word == "-p"}
    assert settings == {"seeds": "10", "epochs": "20", "source": "cifar10", "folder": str(tmp_path / "new")}
    assert options == {"cwd": ROOT, "check": True}
    assert (tmp_path / "new").is_dir()
    with pytest.raises(SystemExit, match=r"^not published: [^\n]* can't be the output folder: [^\n]*$"):
        publish.main(["--folder", str(ROOT)])


def test_a_folder_of_two_lines_is_refused_in_one(capsys):
    with pytest.raises(SystemExit):
        publish.main(["--folder", "a\nb", "--no-run"])
    assert capsys.readouterr().err.splitlines()[-1].endswith(r"error: --folder is 'a\nb'; give a path in one line")


def test_what_is_refused_ends_in_one_line(finished, monkeypatch):
    folder, root = finished
    monkeypatch.setattr(publish, "execute", lambda folder: pytest.fail("it ran"))
    monkeypatch.setattr(publish.publish, "__defaults__", (None, root))
    content = (folder / FILES[0]).read_bytes()
    (folder / FILES[0]).unlink()
    with pytest.raises(SystemExit, match=r"^not published: [^\n]*batch.png is not there$"):
        publish.main(["--folder", str(folder), "--no-run"])
    (folder / FILES[0]).write_bytes(content)
    publish.main(["--folder", str(folder), "--no-run"])
    assert (root / FILES[0]).read_bytes() == content


@pytest.fixture
def ran(monkeypatch, tmp_path):
    """Put the folder of runs into tmp_path and run nothing; the list of folders that were run into."""
    found = []
    monkeypatch.setattr(publish, "FOLDER", tmp_path / "out" / "published")
    monkeypatch.setattr(records, "code_commit", lambda: COMMIT)
    monkeypatch.setattr(publish, "execute", found.append)
    monkeypatch.setattr(publish, "publish", lambda folder, commit: None)
    return found


def test_the_own_folder_is_emptied_before_a_run(ran, tmp_path):
    folder = tmp_path / "out" / "published"
    assert folder.parts[-2:] == (ROOT / "out" / "published").parts[-2:]
    for name in ("results/runs.csv", "checkpoints/NetA-0.pt", "s8.ipynb"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("of an earlier run")
    (tmp_path / "out" / "kept").touch()
    publish.main([])
    assert ran == [folder]
    assert contents(tmp_path / "out") == {Path("kept"): b""}
    publish.main(["--no-run"])
    assert len(ran) == 1


def test_another_folder_is_not_emptied(ran, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis").touch()
    with pytest.raises(SystemExit, match=r"^not published: [^\n]*mine holds files, which would mix with the run's"):
        publish.main(["--folder", str(tmp_path / "mine")])
    assert [one.name for one in (tmp_path / "mine").iterdir()] == ["thesis"]
    assert not ran


def test_what_is_read_without_a_run_is_left_there(ran, tmp_path):
    (tmp_path / "out" / "published").mkdir(parents=True)
    (tmp_path / "out" / "published" / "s8.ipynb").touch()
    publish.main(["--no-run"])
    assert (tmp_path / "out" / "published" / "s8.ipynb").exists()


def test_the_way_on_another_machine_is_told():
    command = "papermill s8.ipynb out/published/s8.ipynb -p folder out/published -p seeds 10 -p source cifar10"
    assert command in publish.__doc__
    assert ROOT.resolve() / "out" / "published" == publish.FOLDER
