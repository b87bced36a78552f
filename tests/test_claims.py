"""Every number quoted in README.md or in a notebook's prose stands in a table that was computed."""

import json
import re
from decimal import Decimal

import pytest
from conftest import ROOT

from experiments import tables

NUMBER = re.compile(r"(?<![\w.])\d[\d,]*(?:\.\d+)?")
NO_RESULTS = [  # what prose may quote without a table
    r"```.*?```|`[^`]*`|<[^>]*>",  # code, HTML and generated parts' marks
    r"\]\([^)]*\)|https?://\S+",  # links, arXiv numbers among them
    r"[A-Za-z]+-?\d[\w.]*|\d+x\d+",  # C1, H100, CIFAR-10, float16, 3x3
    r"\b(19|20)\d\d\b|Python 3\.\d+",  # years, versions
    r"#+ \d+\.|sections? \d+( and \d+)?",
    r"5,000 held-out|50,000 (images|parameters)|below 50,000|below 74%|under 74%",  # settings
    r"(batches of|stays at) \d+|scaled by 128|65,504|\d+ epochs",
    r"fewer than 90%|1,000 test images|[Tt]est image \d+|\d+ Exercises|[Aa]bout 51 people",
    r"147,456 parameters in this network instead of 432",  # counted in tests/test_models.py
]


def numbers(text):
    return {Decimal(number.replace(",", "")) for number in NUMBER.findall(text)}


def computed(notebook):
    """Numbers in the outputs of an executed notebook, but for the sentences of its claims."""
    found = set()
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        for output in cell.get("outputs", []):
            html = "".join(output.get("data", {}).get("text/html", ""))
            lines = "".join(output.get("text", "")).splitlines()
            found |= numbers(re.sub(r"<[^>]*>", " ", html) + " ".join(line for line in lines if line[:1] != "✓"))
    return found


def without_a_table(path, notebooks):
    """Numbers in the prose of a Markdown file or a notebook that no table of the notebooks holds."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        text = "\n\n".join(
            "".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown"
        )
    for pattern in NO_RESULTS:
        text = re.sub(pattern, " ", text, flags=re.DOTALL)
    return numbers(text) - set().union(*map(computed, notebooks))


TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
FINDINGS = ROOT / "experiments" / "findings.ipynb"


@pytest.mark.parametrize("path", [ROOT / "README.md", ROOT / "s8.ipynb", FINDINGS], ids=lambda path: path.stem)
def test_quoted_numbers_are_computed(path):
    assert without_a_table(path, [ROOT / "s8.ipynb", FINDINGS]) == set()


def test_a_number_that_is_not_computed_is_found(tmp_path):
    prose = tmp_path / "prose.md"
    prose.write_text("Batch norm leads by 0.67 and 8,642.19 points, in `1.23` and [2](x/4.56), on an H100, in 2018.")
    assert without_a_table(prose, [FINDINGS]) == {Decimal("8642.19")}


def test_a_claim_does_not_count_as_a_table(tmp_path):
    cell = {"outputs": [{"text": ["✓ it leads by 8,642.19\n", "parameters: 48,042\n"]}]}
    notebook = tmp_path / "notebook.ipynb"
    notebook.write_text(json.dumps({"cells": [cell]}))
    assert computed(notebook) == {Decimal(48042)}


def test_readme_shows_the_results():
    table = tables.readme_table(tables.read_results())
    assert f"<!-- results -->\n{table}\n<!-- end -->" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_is_a_door():
    text = re.sub(r"```.*?```|<!--.*?-->", "", TEXT, flags=re.DOTALL)
    assert len(TEXT.splitlines()) <= 130
    assert len(TEXT.encode()) <= 8_000
    assert len(text.split()) <= 900
    prose = re.sub(r"^[|#].*$|!\[[^\]]*\]\([^)]*\)|<[^>]+>", "", text, flags=re.MULTILINE)
    sentences = re.split(r"(?<=[.!?:])\s+|\n\s*[-*]\s|\n\n", prose)
    assert max(len(sentence.split()) for sentence in sentences) <= 30
    commands = re.findall(r"```sh\n(.*?)```", TEXT, flags=re.DOTALL)
    assert len(commands) == 2
    assert all(len(line) < 100 for command in commands for line in command.splitlines())
