"""The list of mutations fits the code and the tests; tests/slow/mutations.py runs them."""

import ast

import pandas as pd
import pytest
from conftest import ROOT
from slow.mutations import MUTATIONS


def test_each_guard_is_listed_once():
    guards = [guard for guard, *_ in MUTATIONS]
    assert len(set(guards)) == len(guards)


@pytest.mark.parametrize(("guard", "file", "old", "new", "test"), MUTATIONS, ids=[guard for guard, *_ in MUTATIONS])
def test_each_mutation_has_its_text_and_its_test(guard, file, old, new, test):
    content = (ROOT / file).read_text(encoding="utf-8")
    assert content.count(old) == 1
    ast.parse(content.replace(old, new))
    file, name = test.split("[")[0].split("::")
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_published_rows_are_those_of_the_list():
    rows = pd.read_csv(ROOT / "results" / "mutations.csv")
    assert rows.to_dict("records") == [{"guard": guard, "test": test} for guard, *_, test in MUTATIONS]
