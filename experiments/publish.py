"""Run s8.ipynb with ten seeds, check what came out, and only then publish it.

    python -m experiments.publish                 run it into out/, check, copy
    python -m experiments.publish --no-run        check and copy what an earlier run left in out/
    python -m experiments.publish --no-run --commit 1a2b3c4    the same for a run where there was no git

Copies the executed notebook, the grids in img/, the weights, and the rows of results/.
"""

import argparse
import base64
import io
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
from PIL import Image

import utils
from engine import files, records
from experiments import ROOT
from experiments.sweeps import read_texts

SEEDS = 10


class Refused(Exception):
    """What came out may not be published; the message says why."""


def execute(folder):
    """Run the notebook into `folder` by papermill, with ten seeds of 20 epochs of CIFAR-10."""
    settings = {"seeds": SEEDS, "epochs": utils.MAX_EPOCHS, "source": "cifar10", "folder": str(folder)}
    parameters = [word for name, value in settings.items() for word in ("-p", name, str(value))]
    command = [sys.executable, "-m", "papermill", "s8.ipynb", str(folder / "s8.ipynb"), *parameters]
    subprocess.run(command, cwd=ROOT, check=True)


def check_rows(rows, commit):
    """Return the rows to publish, which name their commit; Refused unless all are there and of one clean commit."""
    rows = rows.assign(commit=rows["commit"].where(rows["commit"] != "unknown", commit or "unknown"))
    for net in utils.NETS:
        seeds = sorted(map(int, rows["seed"][rows["net"] == net]))
        if seeds != list(range(SEEDS)):
            raise Refused(f"{net} has the seeds {seeds}; 0 to {SEEDS - 1} are published")
    wanted = {"study": "main", "split": "test", "status": "done", "epochs": str(utils.MAX_EPOCHS)}
    for column, value in wanted.items():
        for found in set(rows[column]) - {value}:
            raise Refused(f"a row has {column} {found!r}; {value!r} is published")
    commits = set(rows["commit"])
    if len(commits) > 1 or not all(re.fullmatch("[0-9a-f]{7,40}", one) for one in commits):
        raise Refused(f"the rows name the commit {', '.join(sorted(commits))}; one clean commit is published")
    return rows


def check_notebook(notebook):
    """Return the executed notebook to publish, without papermill's marks; Refused if a cell failed or did not run."""
    notebook.cells = [cell for cell in notebook.cells if "injected-parameters" not in cell.metadata.get("tags", [])]
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
    copies = [Path("img") / f"{norm}.png" for norm in ("batch", "layer", "group")]
    copies += [Path("weights") / f"{net}.pt" for net in utils.NETS]
    copies += [Path("results") / f"{name}.csv" for name in ("history", "mistakes", "inside")]
    notebook, table = Path("s8.ipynb"), Path("results") / "runs.csv"
    for file in (*copies, notebook, table):
        if not (folder / file).is_file():
            raise Refused(f"{folder / file} is not there")
    rows = check_rows(read_texts(folder / table), commit)
    executed = check_notebook(nbformat.read(folder / notebook, as_version=4))
    for file in copies:
        files.save(root / file, lambda temporary, file=file: shutil.copyfile(folder / file, temporary))
    files.save(root / notebook, lambda temporary: nbformat.write(executed, temporary))
    records.upsert(root / table, rows, key=["study", "net", "seed"])  # in place of all that was published before


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "out", help="where the run is, or goes")
    parser.add_argument("--no-run", action="store_true", help="check and copy what is there already")
    parser.add_argument("--commit", help="the commit that ran, where there was no git")
    options = parser.parse_args(arguments)
    if not options.no_run:
        commit = records.code_commit()
        if commit == "unknown" or "+" in commit:
            raise SystemExit(f"the code's commit is {commit!r}; commit first, since the rows name it")
    try:
        if not options.no_run:
            execute(files.output_folder(options.folder))
        publish(options.folder, options.commit)
    except (Refused, OSError, ValueError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"not published: {error}") from None


if __name__ == "__main__":
    main()
