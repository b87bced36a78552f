"""Check the executed s8.ipynb against the committed one, and ready it for publication; see experiments.publish."""

import ast
import base64
import io
import itertools
import re
import subprocess

import nbformat
from PIL import Image

import utils
from engine import records


class Refused(Exception):
    """What came out may not be published; the message, one line, says why."""


def committed(root):
    """Return s8.ipynb as the checkout's last commit has it, or, where there is no git, as it is.

    Refused when the sources of its cells were edited since, since publishing would overwrite that.
    """
    there = nbformat.read(root / "s8.ipynb", as_version=4)
    try:
        original = nbformat.reads(records.git(root, "show", "HEAD:./s8.ipynb"), as_version=4)
    except (OSError, subprocess.CalledProcessError):
        return there
    first, second = ([(cell.cell_type, cell.source) for cell in of.cells] for of in (there, original))
    if first != second:
        raise Refused("its cells differ from the committed ones, and would be overwritten; commit or undo that")
    return original


def check_source(notebook, original, seeds):
    """Refused unless `notebook` is what papermill makes of the original with so many seeds of the published length."""
    injected = [cell for cell in notebook.cells if "injected-parameters" in cell.metadata.get("tags", [])]
    lines = [line for cell in injected for line in ast.parse(cell.source).body]
    found = {target.id: ast.literal_eval(line.value) for line in lines for target in line.targets}  # plain values
    found.pop("folder", None)
    wanted = {"seeds": seeds, "source": "cifar10"}
    if found not in (wanted, wanted | {"epochs": None}, wanted | {"epochs": utils.MAX_EPOCHS}):
        raise Refused(f"papermill set {found}; {wanted} is published")
    both = ([cell for cell in of.cells if cell not in injected] for of in (notebook, original))
    for number, (ran, wanted) in enumerate(itertools.zip_longest(*both)):
        if not ran or not wanted or (ran.cell_type, ran.source) != (wanted.cell_type, wanted.source):
            raise Refused(f"cell {number} is not that of the committed s8.ipynb")
        if shows(wanted) and not shows(ran):
            raise Refused(f"cell {number} shows nothing; that of the committed s8.ipynb does")


def shows(cell):
    """Return whether a cell has a picture, a table or another value below it; what it prints may come and go."""
    return any(output.output_type in ("display_data", "execute_result") for output in cell.get("outputs", ()))


def check_shown(notebook, table):
    """Refused unless an executed notebook shows this DataFrame."""
    shown = [
        output.data.get("text/html", "")
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if "data" in output
    ]
    if cells_of(table.to_html()) not in map(cells_of, shown):
        raise Refused(f"it doesn't show {', '.join(map(str, table.iloc[0]))} and the rest of what the run's rows give")


def cells_of(html):
    return re.findall("<td>(.*?)</td>", html)


def check_notebook(notebook):
    """Return the executed notebook to publish, without papermill's marks; Refused if a cell failed or did not run."""
    notebook.cells = [cell for cell in notebook.cells if "injected-parameters" not in cell.metadata.get("tags", [])]
    if not {"kernelspec", "language_info"} <= notebook.metadata.keys():
        raise Refused("its metadata has no kernelspec or no language_info")
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
