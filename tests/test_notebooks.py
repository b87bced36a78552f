"""The notebooks are saved as executed, and say the same when they are executed again."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
FINDINGS = ROOT / "experiments" / "findings.ipynb"


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def said(notebook):
    """What each code cell prints and the tables it shows, as one text; pictures aside."""
    return [
        "".join(output.get("text") or output.get("data", {}).get("text/html", "") for output in cell.outputs)
        for cell in code_cells(notebook)
    ]


def test_findings_say_the_same_when_executed_anew():
    """Every claim still holds, or the cell would raise, and every table is the saved one."""
    saved = nbformat.read(FINDINGS, as_version=4)
    anew = nbformat.read(FINDINGS, as_version=4)
    NotebookClient(anew, timeout=300, resources={"metadata": {"path": FINDINGS.parent}}).execute()
    assert said(anew) == said(saved)


@pytest.mark.parametrize("path", [FINDINGS], ids=["findings"])
def test_a_notebook_is_saved_as_executed(path):
    notebook = nbformat.read(path, as_version=4)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 6
    assert set(notebook.metadata) <= {"kernelspec", "language_info"}
    assert not [cell.metadata for cell in notebook.cells if set(cell.metadata) - {"tags"}]
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"/(home|root|tmp|Users)/\w", text)
    assert str(ROOT) not in text
    assert len(text) < 1_000_000
