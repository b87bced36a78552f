"""What may be published: ten whole runs of one clean commit, and of the notebook what a reader would see."""

import base64
import contextlib
import io
import shutil
import subprocess

import nbformat
import numpy as np
import papermill
import pytest
from conftest import ROOT
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from engine import records
from experiments import publish
from experiments.publish import Refused, check_notebook
from experiments.sweeps import read_texts

FILES = [f"img/{norm}.png" for norm in ("batch", "layer", "group")]
FILES += [f"weights/{net}.pt" for net in ("NetA", "NetB", "NetC")]
FILES += [f"results/{name}.csv" for name in ("history", "mistakes", "inside")]
COMMIT = "1a2b3c4"


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
            papermill.execute_notebook(str(folder / "in.ipynb"), str(folder / "out.ipynb"), {"seeds": 10}, **options)
        return nbformat.read(folder / "out.ipynb", as_version=4)

    return execute


@pytest.fixture(scope="module")
def notebook(run_by_papermill):
    bar = r"print('epoch 1\repoch 2', end='\r'); print('epoch 3\ndone', flush=True); print('after')"
    return run_by_papermill(bar, "seeds")


@pytest.fixture
def finished(tmp_path, notebook):
    """A folder as a run of ten seeds leaves it, and a checkout to publish it to."""
    folder, root = tmp_path / "out", tmp_path / "checkout"
    for place in (folder, root):
        for name in ("img", "weights", "results"):
            (place / name).mkdir(parents=True)
    for number, file in enumerate(FILES):
        (folder / file).write_bytes(b"new\r\n 0.1234567890123456789 \0" + bytes([number]))
    nbformat.write(notebook, folder / "s8.ipynb")
    shutil.copy(ROOT / "results" / "runs.csv", root / "results")
    rows = read_texts()
    rows = rows[(rows["study"] == "main") & rows["net"].isin(["NetA", "NetB", "NetC"])]
    assert len(rows) == 30
    records.upsert(folder / "results" / "runs.csv", rows.assign(commit=COMMIT, test_accuracy="12.345"))
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
    cells = nbformat.read(root / "s8.ipynb", as_version=4).cells
    assert [cell.source for cell in cells][:2] == ["# Title", "seeds = None"]


def test_rows_at_other_settings_are_replaced(finished):
    folder, root = finished
    rows = read_texts(folder / "results" / "runs.csv").assign(learning_rate="0.07", weight_decay="0.25")
    rows.to_csv(folder / "results" / "runs.csv", index=False)
    publish.publish(folder, root=root)
    published = read_texts(root / "results" / "runs.csv")
    assert set(published["learning_rate"][published["study"] == "main"]) == {"0.07"}


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
        ({"epochs": "5"}, "a row has epochs '5'; '20' is published"),
        ({"study": "short", "epochs": "5"}, "a row has study 'short'; 'main' is published"),
        ({"study": "synthetic"}, "a row has study 'synthetic'; 'main' is published"),
        ({"split": "validation"}, "a row has split 'validation'; 'test' is published"),
        ({"status": "diverged"}, "a row has status 'diverged'; 'done' is published"),
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


@pytest.mark.parametrize("file", [*FILES, "s8.ipynb", "results/runs.csv"])
def test_a_missing_file_is_refused(finished, file):
    (finished[0] / file).unlink()
    refuse(finished, f"{file} is not there")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("raise ValueError('first\\nlast')", r"cell \d ended in an error or a warning: last"),
        ("assert False", r"cell \d ended in an error or a warning: AssertionError:"),
        ("import warnings; warnings.warn('no good')", r"cell \d ended in an error or a warning: .*"),
    ],
)
def test_a_cell_that_failed_or_warned_is_refused(finished, run_by_papermill, code, message):
    nbformat.write(run_by_papermill(code), finished[0] / "s8.ipynb")
    refuse(finished, message)


def test_a_cell_that_did_not_run_is_refused(finished, notebook):
    cells = nbformat.from_dict(notebook)
    cells.cells.append(new_code_cell("1 + 1"))
    nbformat.write(cells, finished[0] / "s8.ipynb")
    refuse(finished, "cell 4 was not executed")


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
    found = publish.join_streams([*parts, shown, new_output("stream", name="stdout", text="c\n")])
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


def test_what_is_refused_ends_in_one_line(finished, monkeypatch):
    folder, root = finished
    monkeypatch.setattr(publish, "execute", lambda folder: pytest.fail("it ran"))
    monkeypatch.setattr(publish.publish, "__defaults__", (None, root))
    (folder / FILES[0]).unlink()
    with pytest.raises(SystemExit, match=r"^not published: [^\n]*batch.png is not there$"):
        publish.main(["--folder", str(folder), "--no-run"])
    (folder / FILES[0]).write_bytes(b"new")
    publish.main(["--folder", str(folder), "--no-run"])
    assert (root / FILES[0]).read_bytes() == b"new"
