"""Rows, checkpoints and fingerprints: nothing is lost, nothing of another run is taken, nothing damaged is read."""

import abc
import cmath
import collections
import csv
import enum
import errno
import functools
import importlib
import io
import itertools
import math
import operator
import os
import pickle
import random
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, Evil, child, refused, run_together, same
from torch import nn

import utils
from engine import fast, files, records
from engine.data import Data
from engine.trainer import OPTIMIZERS, Trainer
from experiments import variants

SETTINGS = utils.Settings(epochs=3, batch_size=20, augment="flip+crop")
GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.randint(0, 256, (80, 32, 32, 3), dtype=torch.uint8, generator=GENERATOR)
LABELS = torch.arange(80) % 10
DATA = Data(IMAGES[:60], LABELS[:60], IMAGES[60:], LABELS[60:])


def wait(*pids):
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids] == [0] * len(pids)


# ---------------------------------------------------------------------------------------------------------------------
# Rows
# ---------------------------------------------------------------------------------------------------------------------

ROW = {"study": "main", "net": "NetA", "seed": 0, "test_accuracy": 70.5}


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def path(tmp_path):
    """A table of two rows."""
    path = tmp_path / "runs.csv"
    path.write_text("study,net,seed,test_accuracy\nmain,NetA,0,70.50\nmain,NetA,1,71.0\n")
    return path


def test_a_row_replaces_the_one_with_its_settings_and_no_other(path):
    records.upsert(path, [ROW | {"test_accuracy": 72.25}, ROW | {"seed": 2}])
    assert path.read_text().splitlines()[1:] == ["main,NetA,1,71.0", "main,NetA,0,72.25", "main,NetA,2,70.5"]
    records.upsert(path, [ROW | {"seed": 7}], key=["net"])
    assert [row["seed"] for row in rows_of(path)] == ["7"]


def test_one_row_may_be_given_alone(path):
    records.upsert(path, ROW | {"seed": 2})
    assert [row["seed"] for row in rows_of(path)] == ["0", "1", "2"]


def test_commits_and_names_are_read_as_text(path):
    rows = [{"net": "NA", "dataset": "None", "seed": 0, "commit": "1234e56", "test_accuracy": 70.5}]
    records.upsert(path.with_name("new.csv"), [*rows, {"net": "null", "seed": 1, "dataset": ""}])
    found = records.read_rows(path.with_name("new.csv"))
    assert found.to_dict("records")[0] == rows[0]
    assert found["test_accuracy"].dtype == float
    assert found["net"][1] == "null"
    assert found.loc[1, ["dataset", "commit", "test_accuracy"]].isna().all()


def test_rows_of_a_key_with_values_are_replaced_by_none(path):
    records.upsert(path, [ROW | {"net": "NetB"}], key={"net": "NetB"})
    records.upsert(path, [], key={"net": "NetA"})
    assert [row["net"] for row in rows_of(path)] == ["NetB"]
    records.upsert(path.with_name("new.csv"), [], key={"net": "NetA"})
    assert not path.with_name("new.csv").exists()


def test_old_rows_stay_as_they_are_written(path):
    path.write_text('study,net,seed,note\nmain,NetA,0,"a, ""b""\nc"\nmain,NetB,007,0.50\n')
    records.upsert(path, [{"study": "main", "net": "NetA", "seed": 1, "note": ""}])
    assert path.read_text() == 'study,net,seed,note\nmain,NetA,0,"a, ""b""\nc"\nmain,NetB,007,0.50\nmain,NetA,1,\n'


def test_a_row_without_a_column_that_tells_rows_apart_is_refused(path):
    before = path.read_bytes()
    for name in ("study", "net", "seed"):
        row = {key: value for key, value in ROW.items() if key != name}
        refused(lambda row=row: records.upsert(path, [ROW, row]), ValueError, path, repr(name))
    refused(lambda: records.upsert(path, [{"seed": 1}], key=["net"]), ValueError, path, "'net'")
    assert path.read_bytes() == before
    records.upsert(path, [{"study": "main", "net": "NetA", "seed": 5}])  # what is measured may be absent
    assert rows_of(path)[-1]["test_accuracy"] == ""


def test_a_new_column_leaves_old_rows(path):
    records.upsert(path, [ROW | {"augment": "flip"}])
    assert [(row["seed"], row["augment"]) for row in rows_of(path)] == [("0", ""), ("1", ""), ("0", "flip")]
    records.upsert(path, [ROW | {"augment": "", "test_accuracy": 1}])
    assert [row["test_accuracy"] for row in rows_of(path)] == ["71.0", "70.5", "1"]


def test_a_row_from_before_a_column_is_replaced(path):
    """Absent counts as empty."""
    records.upsert(path, [ROW | {"augment": "", "test_accuracy": 1}])
    assert [(row["seed"], row["test_accuracy"]) for row in rows_of(path)] == [("1", "71.0"), ("0", "1")]


def test_whole_numbers_are_one_key_however_they_are_written(path):
    for seed in (0, 0.0, "0", np.int64(0), np.float64(0), torch.tensor(0), torch.tensor(0.0)):
        records.upsert(path, [ROW | {"seed": seed}])
        assert len(rows_of(path)) == 2


def test_which_images_were_right_is_read_as_it_was_written(tmp_path):
    path, random = tmp_path / "right.csv", np.random.default_rng(0)
    labels = random.integers(0, 10, 13)  # no whole number of bytes
    predictions = {
        "labels": labels,
        "data": np.array("0"),
        "NetA": random.integers(0, 10, (2, 13)),
        "NetA seeds": [0, 3],
    }
    predictions["NetA"][1] = labels
    rows = records.right_rows(predictions)
    assert [(row["net"], row["seed"], row["images"]) for row in rows] == [("NetA", 0, 13), ("NetA", 3, 13)]
    records.upsert(path, rows)
    found = records.read_right(path)
    assert list(found) == ["NetA"]
    assert found["NetA"].tolist() == (predictions["NetA"] == labels).tolist()
    path.write_text(path.read_text().replace(rows[0]["right"], "none"))
    with pytest.raises(ValueError, match=r"right.csv holds no images that were right: [^\n]+$"):
        records.read_right(path)


@pytest.mark.parametrize(("right", "seed"), [("ff", 1), ("ffffff", 1), ("ffff", 0)])
def test_rows_of_right_images_that_are_cut_or_there_twice_are_refused(tmp_path, right, seed):
    rows = [{"net": "NetA", "seed": 0, "images": 12, "right": "ffff"}]
    records.upsert(tmp_path / "right.csv", rows)
    assert records.read_right(tmp_path / "right.csv")["NetA"].shape == (1, 12)
    (tmp_path / "right.csv").write_text(f"net,seed,images,right\nNetA,0,12,ffff\nNetA,{seed},12,{right}\n")
    with pytest.raises(ValueError, match=r"right.csv holds no images that were right: a row has more or fewer digits"):
        records.read_right(tmp_path / "right.csv")


@pytest.mark.parametrize("column", ["study", "dataset", "net", "norm"])
def test_names_that_look_like_numbers_are_texts(path, column):
    for name in ("1.1", "1.10", "01", "1"):
        row = {"study": "s", "dataset": "d", "net": "n", "norm": "m", "seed": 0, column: name}
        records.upsert(path.with_name("names.csv"), [row])
    for texts in (False, True):
        found = records.read_rows(path.with_name("names.csv"), texts)
        assert found[column].tolist() == ["1.1", "1.10", "01", "1"]


@pytest.mark.parametrize(("old", "new"), [("3E-05", 3e-5), ("0.10", 0.1), (".1", 0.1), ("+1.", 1), ("-0.0", 0.0)])
def test_numbers_are_one_key_as_a_spreadsheet_writes_them(path, old, new):
    path.write_text(f"net,learning_rate,seconds\nNetA,{old},1\n")
    records.upsert(path, [{"net": "NetA", "learning_rate": new, "seconds": 2}])
    assert [row["seconds"] for row in rows_of(path)] == ["2"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n\n",
        b"study;net;seed\nmain;NetA;0\n",
        b"study, net, seed\nmain, NetA, 0\n",
        b"study,net,seed\nmain, NetA,0\n",
        b"study\tnet\tseed\nmain\tNetA\t0\n",
        b"study,net,seed\nmain,NetA,0\nmain,Ne",
        b"study,net,seed\nmain,NetA,0\nmain,NetA\n",
        b"study,net,seed\nmain,NetA,0\nmain,NetA,1",
        b"study,net,seed\nmain,NetA,0,1\n",
        b'study,net,seed\nmain,"NetA,0\n',
        b'study,net,seed\nmain,"Net"A,0\n',
        b"study,net,net\nmain,NetA,0\n",
        b"study,net,\nmain,NetA,0\n",
        b"study,net,seed\nmain,Net\xe4,0\n",
        "study,net,seed\nmain,NetA,0\n".encode("utf-16"),
        b"study,net,seed\nmain,NetA,0\n\0\0\0\0\n",
        b"PK\x03\x04\n",
        b"<<<<<<< HEAD\nstudy,net,seed\n",
        b"study,net,seed\n<<<<<<< HEAD\nmain,NetA,0\n",
    ],
)
@pytest.mark.parametrize("call", [lambda path: records.upsert(path, [ROW]), records.read_rows, records.check_writable])
def test_a_file_that_is_no_whole_table_is_refused_and_kept(tmp_path, content, call):
    path = tmp_path / "runs.csv"
    path.write_bytes(content)
    refused(lambda: call(path), ValueError, path)
    assert path.read_bytes() == content
    assert {file.name for file in tmp_path.iterdir()} <= {"runs.csv", ".runs.csv.lock"}


@pytest.mark.parametrize(
    "row",
    [
        *({"a;b": 1}, {"a,b": 1}, {" a": 1}, {"": 1}, {"a\n": 1}, {0: 1, "0": 2}),
        *({"net": " NetA"}, {"net": "NetA\n"}, {"study": "\r"}, {"study": "\rmain"}, {"last": "a\r"}),
    ],
)
def test_rows_that_could_not_be_read_again_are_refused(path, row):
    before = path.read_bytes()
    refused(lambda: records.upsert(path, [ROW | row]), ValueError, path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("value", [np.arange(3), torch.ones(2), [1, "a"], {"a": 1}])
def test_a_value_that_is_none_alone_is_refused(path, value):
    before = path.read_bytes()
    refused(lambda: records.upsert(path, ROW | {"note": value}), ValueError, "a row's value is ", "give a number or a")
    assert path.read_bytes() == before


def test_a_column_that_is_there_twice_is_refused(path):
    table = pd.DataFrame([["main", "NetA", 0, 1]], columns=["study", "net", "seed", "seed"])
    refused(
        lambda: records.upsert(path, table), ValueError, f"{path}: new rows have two columns 'seed'; give each once"
    )


def test_a_key_may_be_one_column(path):
    records.upsert(path, ROW | {"test_accuracy": torch.tensor(0.5, dtype=torch.bfloat16)}, key="net")
    assert [row["test_accuracy"] for row in rows_of(path)] == ["0.5"]


@pytest.mark.parametrize("value", ["a,b", 'a "b"', "a\nb", "a\r\nb", "ä→", "=1+1", "x" * 200_000, "\0", "#", "'"])
def test_texts_come_back_as_they_went(path, value):
    for _ in range(2):
        records.upsert(path, [ROW | {"net": value}])
    with open(path, newline="", encoding="utf-8") as file:
        csv.field_size_limit(10**6)
        assert list(csv.DictReader(file))[-1]["net"] == value
    assert len(records._table(path, path.read_bytes())) == 4


@pytest.mark.parametrize(
    "content", [b"\xef\xbb\xbfstudy,net,seed\nmain,NetA,0\n", b"study,net,seed\r\nmain,NetA,0\r\n"]
)
def test_what_spreadsheets_write_is_read(tmp_path, content):
    path = tmp_path / "runs.csv"
    path.write_bytes(content)
    records.upsert(path, [ROW])
    assert [next(iter(row)) for row in rows_of(path)] == ["study"]
    assert len(records.read_rows(path)) == 1


def test_a_row_names_the_activation_of_its_net():
    net = utils.build("NetA", SETTINGS)
    assert records.net_columns(net, 250)["activation"] == "SiLU"
    net.C1.activation = nn.ReLU()
    assert records.net_columns(net, 250)["activation"] == "ReLU"
    net.C1 = nn.Conv2d(3, 16, 3, padding=1)
    assert records.net_columns(net, 250)["activation"] == ""


def test_a_named_index_is_written_as_columns(tmp_path):
    path = tmp_path / "rows.csv"
    records.upsert(path, pd.DataFrame({"seed": [1, 1, 2], "value": [1, 3, 5]}).groupby("seed").mean())
    assert records.read_rows(path).to_dict("list") == {"seed": [1, 2], "value": [2.0, 5.0]}


def test_numbers_are_written_short(tmp_path):
    """0.59 of float32 is 0.5899999737739563 in float64."""
    values = torch.tensor([0.59, 0.1])
    frame = pd.DataFrame({"seed": [1, 2], "value": values.numpy(), "flag": [True, False], "empty": [None, np.nan]})
    records.upsert(tmp_path / "a.csv", frame)
    rows = [{"seed": 1 + i, "value": value, "flag": not i, "empty": pd.NA} for i, value in enumerate(values)]
    records.upsert(tmp_path / "b.csv", rows)
    for name in ("a.csv", "b.csv"):
        assert (tmp_path / name).read_text() == "seed,value,flag,empty\n1,0.59,True,\n2,0.1,False,\n"


def test_nothing_new_writes_nothing(tmp_path):
    for rows in ([], pd.DataFrame(columns=["net"]), iter(())):
        records.upsert(tmp_path / "runs.csv", rows)
    assert not list(tmp_path.iterdir())
    assert list(records.read_rows(tmp_path / "runs.csv").columns) == ["study", "net", "split"]


def test_rows_are_written_through_links_and_not_into_what_is_read_only(path, tmp_path):
    (tmp_path / "link.csv").symlink_to("runs.csv")
    records.upsert(tmp_path / "link.csv", [ROW | {"seed": 2}])
    assert (tmp_path / "link.csv").is_symlink()
    assert len(rows_of(path)) == 3
    path.chmod(0o444)
    for name in ("link.csv", "runs.csv"):
        refused(lambda name=name: records.upsert(tmp_path / name, [ROW]), OSError, tmp_path / name, "read-only")
    assert len(rows_of(path)) == 3


def test_rows_are_read_as_texts_where_that_is_asked_for(path):
    path.write_text("net,seed,accuracy,note\nNetA,007,70.50,\nNetB,1,nan,None\n")
    found = records.read_rows(path, texts=True)
    assert found.to_numpy().tolist() == [["NetA", "007", "70.50", ""], ["NetB", "1", "nan", "None"]]
    assert list(found.columns) == ["net", "seed", "accuracy", "note"]
    absent = records.read_rows(path.parent / "absent.csv", texts=True)
    assert (list(absent.columns), len(absent)) == (["study", "net", "split"], 0)


def test_a_table_that_can_be_written_is_left_as_it_is(path, tmp_path):
    (tmp_path / "link.csv").symlink_to("runs.csv")

    def state():  # all but when it was last read
        return {place: (*place.lstat()[:7], *place.lstat()[8:]) for place in tmp_path.rglob("*")}

    before = state()
    for name in ("runs.csv", "link.csv", "new.csv", "new/folder/runs.csv"):
        records.check_writable(tmp_path / name)
    assert state() == before


@pytest.mark.parametrize("problem", ["read-only", "closed folder", "folder", "in a file", "lock"])
def test_a_table_that_cannot_be_written_is_refused_before_there_are_rows(path, tmp_path, problem):
    place = {"closed folder": tmp_path / "closed" / "new" / "runs.csv", "in a file": path / "runs.csv"}.get(
        problem, path
    )
    if problem == "read-only":
        path.chmod(0o444)
    if problem == "closed folder":
        (tmp_path / "closed").mkdir(mode=0o555)
    if problem == "folder":
        path.unlink()
        path.mkdir()
    if problem == "lock":
        (tmp_path / ".runs.csv.lock").touch(mode=0o444)
    names = sorted(tmp_path.rglob("*"))
    for call in (lambda: records.check_writable(place), lambda: records.upsert(place, [ROW])):
        refused(call, OSError, f"{place} can't be written: ")
        assert sorted(tmp_path.rglob("*")) == names


def test_a_column_that_new_rows_would_lack_is_refused_before_there_are_rows(path):
    path.write_text("study,net,seed,note,test_accuracy\nmain,NetA,0,,70.5\n")
    records.check_writable(path, [*ROW, "note"])
    records.check_writable(path)
    before = path.read_bytes()
    refused(lambda: records.check_writable(path, ROW), ValueError, path, "column 'note'", "delete it")
    assert path.read_bytes() == before


LABELS_OF_100 = np.arange(100) % 10
HASH = "0123456789abcdef"


def test_predictions_of_other_nets_stay(tmp_path):
    path, random = tmp_path / "results" / "predictions.npz", np.random.default_rng(0)
    assert records.read_predictions(path) == {}
    saved = {}
    for net, seeds in (("NetA", [0, 1]), ("NetB", [2]), ("NetA", [1, 5, 7])):
        saved[net] = random.integers(0, 10, (len(seeds), 100))
        saved[f"{net} seeds"] = seeds
        records.save_predictions(path, net, seeds, saved[net], LABELS_OF_100, HASH)
    found = dict(np.load(path, allow_pickle=False))
    assert set(found) == {*saved, "labels", "data"}
    assert found["data"] == HASH
    assert all(np.array_equal(found[name], value) for name, value in (saved | {"labels": LABELS_OF_100}).items())
    assert {found[name].dtype for name in ("NetA", "NetB", "labels")} == {np.dtype(np.uint8)}
    assert list(records.read_predictions(path, LABELS_OF_100)) == list(found)


def test_more_classes_than_a_byte_holds_are_kept(tmp_path):
    path = tmp_path / "predictions.npz"
    for largest in (255, 256):
        records.save_predictions(path, "NetA", [0], np.array([[0, largest]]), np.array([0, 1]), HASH)
        assert records.read_predictions(path)["NetA"].tolist() == [[0, largest]]


def test_predictions_of_thirty_runs_are_small(tmp_path):
    """Ten seeds of three nets; of 10,000 images a seventh are wrong, most of them for several seeds."""
    random = np.random.default_rng(0)
    labels = random.integers(0, 10, 10_000)
    hard = random.random(10_000) < 0.25
    for net in utils.NETS:
        wrong = hard & (random.random((10, 10_000)) < 0.55)
        predictions = np.where(wrong, random.integers(0, 10, (10, 10_000)), labels)
        records.save_predictions(tmp_path / "predictions.npz", net, range(10), predictions, labels, HASH)
    assert (tmp_path / "predictions.npz").stat().st_size < 150_000


def test_predictions_beside_other_labels_are_refused(tmp_path):
    path = tmp_path / "predictions.npz"
    records.save_predictions(path, "NetA", [0], LABELS_OF_100[None], LABELS_OF_100, HASH)
    before = path.read_bytes()
    for labels in (LABELS_OF_100[::-1], LABELS_OF_100[:50]):
        for call in (
            lambda labels=labels: records.save_predictions(path, "NetB", [0], labels[None], labels, HASH),
            lambda labels=labels: records.read_predictions(path, labels),
        ):
            refused(call, ValueError, f"{path} holds predictions for 100 images with other labels; name another folder")
    assert path.read_bytes() == before


def test_predictions_beside_other_images_are_refused(tmp_path):
    """A file of an earlier version does not tell; it is given the hash when predictions are added."""
    path = tmp_path / "predictions.npz"
    np.savez_compressed(path, labels=LABELS_OF_100)
    assert list(records.read_predictions(path, LABELS_OF_100, HASH)) == ["labels"]
    records.save_predictions(path, "NetA", [0], LABELS_OF_100[None], LABELS_OF_100, HASH)
    before = path.read_bytes()
    for call in (
        lambda: records.save_predictions(path, "NetB", [0], LABELS_OF_100[None], LABELS_OF_100, HASH[::-1]),
        lambda: records.read_predictions(path, LABELS_OF_100, HASH[::-1]),
    ):
        refused(call, ValueError, f"{path} holds predictions for 100 other images; name another folder")
    assert path.read_bytes() == before


def test_damaged_predictions_are_refused_and_kept(tmp_path):
    path = tmp_path / "predictions.npz"
    records.save_predictions(path, "NetA", [0], LABELS_OF_100[None], LABELS_OF_100, HASH)
    whole, npy, objects = path.read_bytes(), io.BytesIO(), io.BytesIO()
    np.save(npy, LABELS_OF_100)
    np.savez(objects, labels=np.array([{}], dtype=object))
    middle = whole.index(b"labels.npy") + 60
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    for content in (b"", b"damaged", whole[:-30], flipped, npy.getvalue(), objects.getvalue()):
        path.write_bytes(content)
        for call in (
            lambda: records.read_predictions(path),
            lambda: records.save_predictions(path, "NetB", [0], LABELS_OF_100[None], LABELS_OF_100, HASH),
        ):
            refused(call, ValueError, f"{path} is no whole file of predictions; delete this folder's results")
        assert path.read_bytes() == content


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_no_table_is_waited_for(tmp_path, make):
    make(tmp_path / "runs.csv")
    for call in (lambda path: records.upsert(path, [ROW]), records.read_rows):
        refused(lambda call=call: call(tmp_path / "runs.csv"), OSError, tmp_path / "runs.csv")


def test_no_row_of_several_writers_is_lost(tmp_path):
    path, writers, count = tmp_path / "new" / "runs.csv", 8, 10

    def write(writer):
        for number in range(count):
            records.upsert(path, [ROW | {"net": f"Net{writer}", "seed": number}])

    wait(*[child(lambda writer=writer: write(writer)) for writer in range(writers)])
    found = {(row["net"], row["seed"]) for row in rows_of(path)}
    assert found == {(f"Net{writer}", str(number)) for writer in range(writers) for number in range(count)}
    assert len(rows_of(path)) == writers * count


def test_no_row_is_lost_to_kills(tmp_path):
    path, generator, written = tmp_path / "runs.csv", random.Random(0), tmp_path / "written"

    def write(number):
        for seed in itertools.count():
            records.upsert(path, [ROW | {"net": f"Net{number}", "seed": seed}])
            with open(written, "a") as file:
                file.write(f"Net{number} {seed}\n")

    for number in range(20):
        pid = child(lambda number=number: write(number))
        time.sleep(generator.uniform(0.03, 0.06))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        found = {f"{row['net']} {row['seed']}" for row in rows_of(path)} if path.exists() else set()
        assert set(written.read_text().splitlines() if written.exists() else ()) <= found
    assert len(found) > 20


def test_two_notebooks_share_an_output_folder(tmp_path):
    """The same run and other runs, saved at the same time."""
    folder = files.output_folder(tmp_path / "out")

    def notebook(seeds):
        torch.set_num_threads(1)
        for seed in seeds:
            settings = replace(SETTINGS, epochs=1, seed=seed)
            one = utils.run("NetA", DATA, settings, track=False)
            utils.save_runs([one], DATA, folder)

    wait(child(lambda: notebook((0, 1, 2))), child(lambda: notebook((0, 3, 4))))
    assert sorted(row["seed"] for row in rows_of(folder / "results" / "runs.csv")) == list("01234")
    torch.load(folder / "weights" / "NetA.pt", weights_only=True)
    for name in ("history", "mistakes"):
        records.read_rows(folder / "results" / f"{name}.csv")
    assert not list(tmp_path.rglob(".*.part*"))


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints of another run
# ---------------------------------------------------------------------------------------------------------------------


def trained(path=None, net=None, data=DATA, settings=SETTINGS, **options):
    net = net or utils.build("NetA", settings)
    history = utils.train(net, data, settings, checkpoint=path, **options)
    return net.state_dict(), history


class Interrupted:
    """Inside, training stops with KeyboardInterrupt at a step counted from 1."""

    def __init__(self, monkeypatch, step):
        self.context, self.left, self.step = monkeypatch.context(), step, Trainer.step

    def __enter__(self):
        def count(trainer):
            self.step(trainer)
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt

        self.context.__enter__().setattr(Trainer, "step", count)

    def __exit__(self, *error):
        self.context.__exit__(*error)
        assert error[0] is KeyboardInterrupt
        return True


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The checkpoint of a finished run of NetA."""
    path = tmp_path_factory.mktemp("finished") / "run.pt"
    trained(path)
    return path


def swap(tensor, *places):
    """Return a copy with two rows swapped."""
    order = list(range(len(tensor)))
    for place, other in zip(places, reversed(places), strict=True):
        order[place] = other
    return tensor[order]


def reordered(order):
    return replace(DATA, images=DATA.images[order], labels=DATA.labels[order])


def altered(name, *place, by=1):
    tensor = getattr(DATA, name).clone()
    tensor[place] += by
    return replace(DATA, **{name: tensor})


OTHER_DATA = {
    "another order": (reordered(torch.arange(60).flip(0)), "training images"),
    "two images swapped within a class": (replace(DATA, images=swap(DATA.images, 3, 13)), "training images"),
    "two images swapped with their labels": (reordered(swap(torch.arange(60), 3, 4)), "training images"),
    "one pixel": (altered("images", 59, 31, 31, 2), "training images"),
    "mirrored": (replace(DATA, images=DATA.images.flip(2)), "training images"),
    "two labels swapped": (replace(DATA, labels=swap(DATA.labels, 3, 4)), "training labels"),
    "fewer": (replace(DATA, images=DATA.images[:40], labels=DATA.labels[:40]), "training images"),
    "another test split": (replace(DATA, test_images=255 - DATA.test_images), "test images"),
    "test images in another order": (replace(DATA, test_images=swap(DATA.test_images, 0, 10)), "test images"),
    "test labels": (replace(DATA, test_labels=swap(DATA.test_labels, 0, 1)), "test labels"),
    "name": (replace(DATA, name="SYNTHETIC"), "data name"),
    "split": (replace(DATA, split="validation"), "data name"),
}


@pytest.mark.parametrize("change", OTHER_DATA)
def test_a_checkpoint_of_other_data_is_refused_and_kept(finished, change):
    data, difference = OTHER_DATA[change]
    before = finished.read_bytes()
    refused(lambda: trained(finished, data=data), ValueError, finished, f"is a checkpoint with {difference} ", "delete")
    assert finished.read_bytes() == before


def altered_net(name, alter, settings=SETTINGS):
    net = utils.build(name, settings)
    for block in net:
        if isinstance(block, nn.Sequential):
            alter(block)
    return net


def set_norm(make):
    return lambda block: block.set_submodule("norm", make(block.conv.out_channels))


class Doubled(nn.SiLU):
    """By its repr, SiLU."""

    state_in_buffers = True

    def forward(self, x):
        return 2 * super().forward(x)

    def _get_name(self):
        return "SiLU"


def kaiming(net):
    variants.kaiming_init(net, 0)
    return net


def same_but(block):
    block.norm.eps = 1e-3


NETS = {
    "layer norm": lambda: utils.build("NetB", SETTINGS),
    "no norm": lambda: utils.build("Net", SETTINGS),
    "per-pixel layer norm": lambda: altered_net("NetA", set_norm(variants.LayerNorm2d)),
    "ghost batch norm": lambda: altered_net("NetA", set_norm(lambda n: variants.GhostBatchNorm(n, 10))),
    "ghost batch norm of another size": lambda: altered_net("NetA", set_norm(lambda n: variants.GhostBatchNorm(n, 5))),
    "ReLU": lambda: altered_net("NetA", lambda block: block.set_submodule("activation", nn.ReLU())),
    "another forward": lambda: altered_net("NetA", lambda block: block.set_submodule("activation", Doubled())),
    "another epsilon": lambda: altered_net("NetA", same_but),
    "Kaiming weights": lambda: kaiming(utils.build("NetA", SETTINGS)),
    "another seed's weights": lambda: utils.build("NetA", replace(SETTINGS, seed=1)),
    "other widths": lambda: utils.build("NetA", SETTINGS, widths=(16,) * 10),
}


@pytest.mark.parametrize("change", NETS)
def test_a_checkpoint_of_another_net_is_refused_and_kept(finished, change):
    net, before = NETS[change](), finished.read_bytes()
    weights = {name: value.clone() for name, value in net.state_dict().items()}
    refused(lambda: trained(finished, net), ValueError, finished, "is a checkpoint with ", "delete it to start anew")
    assert finished.read_bytes() == before
    assert same(net.state_dict(), weights)


@pytest.mark.parametrize(
    ("name", "alter"),
    [
        ("NetB", set_norm(variants.LayerNorm2d)),
        ("NetB", set_norm(lambda n: nn.GroupNorm(4, n))),
        ("NetC", set_norm(lambda n: nn.GroupNorm(2, n))),
        ("NetA", set_norm(lambda n: variants.GhostBatchNorm(n, 10))),
        ("NetA", set_norm(lambda n: nn.BatchNorm2d(n, momentum=0.2))),
        ("NetA", lambda block: block.set_submodule("activation", nn.GELU())),
        ("NetA", lambda block: block.set_submodule("activation", Doubled())),
    ],
)
def test_nets_of_equal_weights_are_told_apart(name, alter):
    """They have the published nets' parameters, names and initial values."""
    first, second = utils.build(name, SETTINGS), altered_net(name, alter)
    assert same(first.state_dict(), second.state_dict())
    prints = [records.fingerprint(net, DATA, SETTINGS, True) for net in (first, second)]
    assert prints[0] != prints[1]


def test_modules_of_one_name_that_compute_something_else_are_told_apart():
    prints = []
    for forward in (lambda self, x: 2 * x, lambda self, x: 3 * x, lambda self, x: x.abs(), lambda self, x: x.exp()):
        activation = type("Activation", (nn.Module,), {"forward": forward})
        net = altered_net("NetA", lambda block, make=activation: block.set_submodule("activation", make()))
        prints.append(records.fingerprint(net, DATA, SETTINGS, True))
    assert len({one["net's attributes"] for one in prints}) == 4


class Block(nn.Module):
    """An activation of which the tests below alter one thing."""

    state_in_buffers = True

    def __init__(self):
        super().__init__()
        self.factor, self.shape = 2.0, (1, 2)

    def curve(self, x, power=1):
        return x**power

    def forward(self, x):
        return self.curve(x)[:, :] * (1 if "a" in {"a", "b", "c"} else 0)


def fingerprint_of(block):
    net = utils.build("NetA", SETTINGS)
    net.C1.activation = block
    assert not fast.reason_against_copy(net), "it takes no checkpoint"
    return records.fingerprint(net, DATA, SETTINGS, True)


def subclass(base=Block, **members):
    return type("Block", (base,), {"state_in_buffers": True} | members)()


def with_attribute(name, value):
    block = Block()
    setattr(block, name, value)
    return block


def scaled(factor):
    return lambda self, x: factor * x


def decorated(forward):
    @functools.wraps(forward)
    def call(self, x):
        return forward(self, x)

    return call


def in_order(path, name=None):
    """A block whose dict names its layers, or a parameter of each, in another order."""
    torch.manual_seed(0)
    block = Block()
    block.layers = nn.ModuleList(nn.GroupNorm(2, 4) for _ in range(2))
    layers = [block.layers[number] for number in path]
    block.used = {"path": [getattr(layer, name) if name else layer for layer in layers]}
    return block


def keyed_by(number):
    block = in_order((0, 1))
    block.used = {block.layers[number]: 2}
    return block


def shared(places):
    """A block in which two modules without parameters are in several places."""
    block, parts = Block(), [Block(), with_attribute("factor", 3.0)]
    block.parts = nn.ModuleList([*parts, *(parts[number] for number in places)])
    return block


def written(text, **names):
    """The function `curve` of a text, as of a notebook's cell, where these names are globals."""
    scope = names | {"__name__": "cell"}
    exec(text, scope)
    return scope["curve"]


def marked(gain):
    def curve(self, x):
        return self.curve.gain * x

    curve.gain = gain
    return curve


class Mode(enum.Enum):
    FAST, SLOW = 1, 2


def caught_early(self, x):
    try:
        y = int(x)
    except ValueError:
        return 0
    return y + 1


def caught_late(self, x):
    try:
        y = int(x)
        return y + 1
    except ValueError:
        return 0


SEEN = {  # pairs of blocks, with the same weights and repr, that compute something else
    "a constant tuple": [
        subclass(forward=lambda self, x: x.permute((0, 1, 2, 3))),
        subclass(forward=lambda self, x: x.permute((0, 1, 3, 2))),
    ],
    "an index": [subclass(forward=lambda self, x: x[..., None]), subclass(forward=lambda self, x: x[None, None])],
    "nested code": [
        subclass(forward=lambda self, x: max(2 * y for y in x)),
        subclass(forward=lambda self, x: max(3 * y for y in x)),
    ],
    "a default": [subclass(curve=lambda self, x, power=1: x), subclass(curve=lambda self, x, power=2: x)],
    "a default of a keyword": [subclass(curve=lambda self, *, p=1: p), subclass(curve=lambda self, *, p=2: p)],
    "another method": [subclass(curve=lambda self, x: 2 * x), subclass(curve=lambda self, x: 3 * x)],
    "a static method": [subclass(curve=staticmethod(lambda x: 2 * x)), subclass(curve=staticmethod(lambda x: 3 * x))],
    "a property": [subclass(curve=property(lambda self: 2)), subclass(curve=property(lambda self: 3))],
    "a cached property": [subclass(curve=functools.cached_property(f)) for f in (lambda self: 2, lambda self: 3)],
    "a cached method": [subclass(curve=functools.cache(f)) for f in (lambda self: 2, lambda self: 3)],
    "a cached static method": [subclass(curve=staticmethod(functools.cache(f))) for f in (lambda: 2, lambda: 3)],
    "a partial method": [subclass(curve=functools.partialmethod(Block.curve, power=n)) for n in (2, 3)],
    "a decorated method": [
        subclass(curve=decorated(lambda self, x: 2 * x)),
        subclass(curve=decorated(lambda self, x: 3 * x)),
    ],
    "a closure": [subclass(curve=scaled(2)), subclass(curve=scaled(3))],
    "an attribute of the class": [subclass(power=2), subclass(power=3)],
    "a class between": [subclass(), subclass(type(subclass(curve=lambda self, x: x)))],
    "a method of tensors": [with_attribute("f", f) for f in (torch.Tensor.tanh, torch.Tensor.relu)],
    "a method of tensors in a dict": [with_attribute("f", {"f": f}) for f in (torch.Tensor.tanh, torch.Tensor.relu)],
    "a method of tensors of the class": [subclass(f=f) for f in (torch.Tensor.tanh, torch.Tensor.relu)],
    "another method of a tensor": [with_attribute("f", [getattr(torch.ones(1), f)]) for f in ("tanh", "relu")],
    "a method of a tensor": [with_attribute("f", [torch.tensor(n).add]) for n in (1, 2)],
    "what an error is caught by": [subclass(curve=f) for f in (caught_early, caught_late)],
    "a class attribute with a class of torch": [subclass(make=cls) for cls in (nn.ReLU, nn.SiLU)],
    "which place has which of two modules": [shared((0, 1)), shared((1, 1))],
    "the default of a dict": [with_attribute("f", collections.defaultdict(f)) for f in (int, float)],
    "an attribute of a function": [subclass(curve=marked(gain)) for gain in (1, 2)],
    "the order of arguments": [subclass(curve=lambda old, new: old - new), subclass(curve=lambda new, old: new - old)],
    "a star": [subclass(curve=lambda self, *x: x), subclass(curve=lambda self, x: x)],
    "a static method or not": [subclass(curve=staticmethod(marked(1))), subclass(curve=marked(1))],
    "a member of an Enum": [with_attribute("f", Mode.FAST), with_attribute("f", Mode.SLOW)],
    "a member of an Enum in code": [
        subclass(curve=written(f"def curve(self, x): return x if self is Mode.{name} else -x", Mode=Mode))
        for name in ("FAST", "SLOW")
    ],
    "a class": [with_attribute("f", type("Own", (), {"gain": gain})) for gain in (1, 2)],
    "a class above it": [with_attribute("f", type("Own", (type("Base", (), {"gain": gain}),), {})) for gain in (1, 2)],
    "a class in the class": [subclass(Own=type("Own", (), {"gain": gain})) for gain in (1, 2)],
    "a module of one's own": [subclass(f=utils), subclass(f=variants)],
    "a module of Python": [subclass(f=math), subclass(f=cmath)],
    "a function of a package": [subclass(f=pd.isna), subclass(f=pd.notna)],
    "a text or a function": [with_attribute("f", "tanh"), with_attribute("f", [np.tanh])],
    "a global": [subclass(curve=written("def curve(self, x): return GAIN * x", GAIN=gain)) for gain in (1, 2)],
    "a global in nested code": [
        subclass(curve=written("def curve(self, x): return max(GAIN * y for y in x)", GAIN=gain)) for gain in (1, 2)
    ],
    "a helper above it": [
        subclass(curve=written(f"def helper(x): return {gain} * x\ndef curve(self, x): return helper(x)"))
        for gain in (1, 2)
    ],
    "what a class above it makes": [
        subclass(
            curve=written(
                f"class Own:\n  def __init__(self): self.gain = {gain}\ndef curve(self, x): return Own().gain * x"
            )
        )
        for gain in (1, 2)
    ],
    "a helper that wraps one of torch": [
        subclass(curve=functools.wraps(F.silu)(written("def curve(self, x): return GAIN * x", GAIN=gain)))
        for gain in (1, 2)
    ],
    "a class above it that a method reads": [
        subclass(curve=written(f"class Own: gain = {gain}\ndef curve(self, x): return Own.gain * x")) for gain in (1, 2)
    ],
    "a device": [with_attribute("device", torch.device(name)) for name in ("cpu", "meta")],
    "a range": [with_attribute("steps", range(n)) for n in (2, 3)],
    "a set": [with_attribute("steps", {n}) for n in (2, 3)],
    "an operator of torch": [with_attribute("f", [f]) for f in (torch.ops.aten.tanh, torch.ops.aten.relu)],
    "a method by name": [with_attribute("f", [operator.methodcaller(name)]) for name in ("tanh", "relu")],
    "a function of NumPy": [with_attribute("f", [f]) for f in (np.tanh, np.sinh)],
    "a dict with its layers as keys": [keyed_by(number) for number in (0, 1)],
    "another order of its layers": [in_order(path) for path in ((0, 1), (1, 0))],
    "another order of its parameters": [in_order(path, "weight") for path in ((0, 1), (1, 0))],
    "a number": [Block(), with_attribute("factor", 3.0)],
    "a text": [with_attribute("mode", "a"), with_attribute("mode", "b")],
    "a switch": [with_attribute("mode", True), with_attribute("mode", 1)],
    "a number type": [with_attribute("mode", torch.float16), with_attribute("mode", torch.float32)],
    "a tensor": [with_attribute("slope", torch.tensor(0.5)), with_attribute("slope", torch.tensor(0.9))],
    "a sparse tensor": [with_attribute("slope", torch.eye(2).to_sparse() * n) for n in (1, 2)],
    "a tensor in a tuple": [with_attribute("shape", (torch.ones(2),)), with_attribute("shape", (torch.zeros(2),))],
    "a private number": [with_attribute("_slope", 0.5), with_attribute("_slope", 0.9)],
    "a float32 of NumPy": [with_attribute("slope", np.float32(0.5)), with_attribute("slope", np.float32(0.9))],
    "a whole number of NumPy": [with_attribute("power", np.int64(2)), with_attribute("power", np.int64(3))],
    "a long number of NumPy": [with_attribute("slope", np.longdouble(n)) for n in (1, 2)],
    "an array of NumPy": [with_attribute("slope", np.zeros(2)), with_attribute("slope", np.ones(2))],
    "a partial": [with_attribute("function", functools.partial(torch.mul, other=n)) for n in (0.5, 0.9)],
    "a partial of another function": [with_attribute("function", functools.partial(f, 2)) for f in (max, min)],
    "a tuple": [Block(), with_attribute("shape", (1, 3))],
    "a list": [with_attribute("shape", [1, 2]), with_attribute("shape", [1, 3])],
    "a dict": [with_attribute("shape", {"a": 1}), with_attribute("shape", {"a": 2})],
    "a tensor that is None at first": [with_attribute("slope", None), with_attribute("slope", torch.ones(1))],
    "a private function": [with_attribute("_function", torch.relu), with_attribute("_function", torch.sigmoid)],
    "a function": [with_attribute("function", torch.relu), with_attribute("function", torch.sigmoid)],
}


@pytest.mark.parametrize("difference", SEEN)
def test_blocks_that_compute_something_else_are_told_apart(difference):
    first, second = SEEN[difference]
    assert repr(first) == repr(second)
    assert fingerprint_of(first) != fingerprint_of(second)
    assert fingerprint_of(first) == fingerprint_of(first)


class Own:
    """An object that isn't in the net."""

    factor = 2

    def __call__(self, x):
        return self.factor * x


OWN = Own()


def own_optimizer(share):
    def make(groups, lr, momentum, dtype):
        return OPTIMIZERS["sgd"](groups, lr, share * momentum, dtype)

    return make


class Items(list):
    pass


def cell(value):
    return lambda self, x: value(x)


NOT_SEEN = {  # what computes from more than can be told
    "an object": (lambda: with_attribute("f", Own()), "C1.activation.f", "a Own"),
    "an object in lists": (lambda: with_attribute("f", [{"a": (Own(),)}]), "C1.activation.f", "a Own"),
    "its method": (lambda: with_attribute("f", Own().__call__), "C1.activation.f", "a Own"),
    "a namespace": (lambda: with_attribute("f", SimpleNamespace(a=1)), "C1.activation.f", "a SimpleNamespace"),
    "a list of its own class": (lambda: with_attribute("f", Items([1])), "C1.activation.f", "a Items"),
    "objects in an array": (lambda: with_attribute("f", np.array([Own()])), "C1.activation.f", "a Own"),
    "a tensor without values": (lambda: with_attribute("f", torch.ones(2, device="meta")), "C1.activation.f", ""),
    "an object in a closure": (lambda: subclass(curve=cell(Own())), "Block.curve", "a Own"),
    "an object as a default": (lambda: subclass(curve=lambda self, x, f=OWN: x), "Block.curve", "a Own"),
    "an object above it": (
        lambda: subclass(curve=written("def curve(self, x): return own(x)", own=OWN)),
        "curve: own",
        "a Own",
    ),
    "an object of the class": (lambda: subclass(f=Own()), "Block.f", "a Own"),
    "a dispatched method": (lambda: subclass(f=functools.singledispatchmethod(len)), "Block.f", "a singledispatch"),
}


@pytest.mark.parametrize("kind", NOT_SEEN)
def test_a_net_with_attributes_that_a_fingerprint_cannot_tell_takes_no_checkpoint(tmp_path, kind):
    make, name, reason = NOT_SEEN[kind]
    net = utils.build("NetA", SETTINGS)
    net.C1.activation = make()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    message = f"a checkpoint can't tell what {name} is ({reason}"
    refused(lambda: trained(tmp_path / "run.pt", net), ValueError, message, "use numbers, texts, tensors, functions")
    assert same(net.state_dict(), before)
    assert not list(tmp_path.iterdir())
    trained(None, net, settings=replace(SETTINGS, epochs=1))
    assert not same(net.state_dict(), before)


def test_all_modules_of_torch_have_a_fingerprint():
    """Those that are built by one or two numbers, and are not lazy."""
    torch.manual_seed(0)
    for name, cls in sorted(vars(nn).items()):
        lazy = name.startswith("Lazy") or name in ("Container", "NLLLoss2d")
        if lazy or not isinstance(cls, type) or not issubclass(cls, nn.Module):
            continue
        for arguments in ((), (4,), (4, 4), (4, 4, 3), (2, 4), (4, (2, 2))):
            try:
                module = cls(*arguments)
            except (TypeError, ValueError, AssertionError):
                continue
            assert records.attributes(module)
            break


def test_an_optimizer_of_ones_own_is_told_apart(tmp_path, monkeypatch):
    settings = replace(SETTINGS, epochs=1)
    monkeypatch.setitem(OPTIMIZERS, "own", own_optimizer(1.0))
    settings = replace(settings, optimizer="own")
    trained(tmp_path / "run.pt", settings=settings)
    monkeypatch.setitem(OPTIMIZERS, "own", own_optimizer(0.5))
    refused(lambda: trained(tmp_path / "run.pt", settings=settings), ValueError, "with net's attributes the optimizer")


def test_a_module_of_ones_own_counts_as_it_is_in_memory(tmp_path, monkeypatch):
    """Not as its file: of each it takes what the net's functions read."""
    path = tmp_path / "own_module.py"
    path.write_text("SLOPE = 0.1\nOTHER = 1\ndef act(x):\n    return SLOPE * x\n")
    monkeypatch.syspath_prepend(tmp_path)
    own_module = importlib.import_module("own_module")
    blocks = [
        subclass(curve=written(f"def curve(self, x): return {text} * x", own_module=own_module))
        for text in ("own_module.SLOPE", "own_module.act(x)")
    ]
    before = [fingerprint_of(block) for block in blocks]
    path.write_text("SLOPE = 0.6\n")  # edited, but not loaded
    own_module.OTHER = 2
    assert [fingerprint_of(block) for block in blocks] == before
    own_module.SLOPE = 0.5
    for block, print_before in zip(blocks, before, strict=True):
        assert fingerprint_of(block) != print_before


def test_a_global_that_differs_is_named(tmp_path):
    for gain in (1.5, 2.5):
        net = utils.build("NetA", SETTINGS)
        net.C1.activation = subclass(curve=written("def curve(self, x): return GAIN * x", GAIN=gain))
        if gain == 1.5:
            trained(tmp_path / "run.pt", net)
    message = "is a checkpoint with net's attributes curve: GAIN 1.5, not curve: GAIN 2.5"
    refused(lambda: trained(tmp_path / "run.pt", net), ValueError, message)


def test_neither_training_nor_building_again_changes_a_fingerprint():
    net = altered_net("NetA", lambda block: block.set_submodule("activation", Block()))
    before = records.fingerprint(net, DATA, SETTINGS, True)
    again = altered_net("NetA", lambda block: block.set_submodule("activation", Block()))
    assert records.fingerprint(again.eval(), DATA, SETTINGS, True) == before
    trained(net=net)
    after = records.fingerprint(net, DATA, SETTINGS, True)
    assert {name for name in before if before[name] != after[name]} == {"initial weights"}


def test_a_finished_run_of_a_custom_net_is_resumed_by_its_own_net(tmp_path):
    net = altered_net("NetA", lambda block: block.set_submodule("activation", Block()))
    _, history = trained(tmp_path / "run.pt", net)
    assert trained(tmp_path / "run.pt", net)[1] == history


def test_a_net_with_code_of_its_own_takes_no_checkpoint(tmp_path):
    net = utils.build("NetA", SETTINGS)
    net.C5.activation = type("Own", (nn.SiLU,), {})()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    message = "C5.activation is a Own, which does not say state_in_buffers = True; train without a checkpoint, or see"
    refused(lambda: trained(tmp_path / "run.pt", net), ValueError, message)
    assert same(net.state_dict(), before)
    assert not list(tmp_path.iterdir())
    trained(None, net, settings=replace(SETTINGS, epochs=1))
    assert not same(net.state_dict(), before)


def test_a_buffer_that_a_checkpoint_would_not_hold_is_refused_at_the_start(tmp_path):
    net = utils.build("NetA", SETTINGS)
    net.C5.norm.register_buffer("steps", torch.zeros(()), persistent=False)
    message = "the net's buffer C5.norm.steps would not be in the checkpoint; register it with persistent=True"
    refused(lambda: trained(tmp_path / "run.pt", net), ValueError, message)
    assert not list(tmp_path.iterdir())
    trained(None, net, settings=replace(SETTINGS, epochs=1))


class Extra(nn.SiLU):
    state_in_buffers = True

    def get_extra_state(self):
        return {"version": 1}

    def set_extra_state(self, state):
        pass


@pytest.mark.parametrize(
    "value",
    [torch.eye(3).to_sparse(), torch.ones(1).expand(5), torch.ones(3, dtype=torch.cfloat).conj(), "extra state"],
    ids=["sparse", "expanded", "conjugate", "extra state"],
)
def test_what_is_no_plain_tensor_is_refused_at_the_start(tmp_path, value):
    net, name = utils.build("NetA", SETTINGS), "C5.activation._extra_state"
    if isinstance(value, torch.Tensor):
        net.C5.norm.register_buffer("other", value)
        name = "C5.norm.other"
    else:
        net.C5.activation = Extra()
    message = f"the net's {name} is no plain tensor, as a checkpoint holds; train without a checkpoint"
    refused(lambda: trained(tmp_path / "run.pt", net), ValueError, message)
    assert not list(tmp_path.iterdir())


def test_attributes_of_the_net_and_of_a_part_called_net_are_told_apart():
    found = []
    for factor in (1, 2):
        net = utils.build("NetA", SETTINGS)
        net.net = nn.Identity()
        net.factor, net.net.factor = factor, 3
        found.append(records.fingerprint(net, DATA, SETTINGS, True)["net's attributes"])
    assert found[0] != found[1]


def test_a_fingerprint_is_the_same_in_each_process():
    """Whatever the order of sets and the addresses of objects."""
    code = """
import os, torch, utils
from engine import records
from test_records import DATA, SETTINGS, Block, Mode, decorated
for _ in range(int(os.environ["PYTHONHASHSEED"])):  # PyTorch numbers these
    type("Other", (torch.autograd.Function,), {})
class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return MODES[Mode.FAST] * x
MODES = {Mode.FAST: 2}
def twice(self, x):
    return Twice.apply(x)
members = {"extra_repr": lambda self: str(max), "curve": decorated(lambda s, x: x), "twice": twice}
block = type("Block", (Block,), members)()
block.curves = (max, lambda x: x in {"one", "two", "three", "four"}, torch.relu)
block.extra_repr = lambda: repr(block.curves)
net = utils.build("NetA", SETTINGS)
net.C1.activation = block
run = records.fingerprint(net, DATA, SETTINGS, True)
print([run[name] for name in ("net's attributes", "training code")])
"""
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tests" / "engine")))
    command = [sys.executable, "-c", code]
    printed = run_together(*((command, {"PYTHONHASHSEED": seed, "PYTHONPATH": path}) for seed in ("1", "2")))
    assert printed[0] == printed[1]


def test_a_changed_forward_of_a_torch_module_is_seen(monkeypatch):
    before = fingerprint_of(nn.SiLU())
    monkeypatch.setattr(nn.SiLU, "forward", lambda self, x: x.relu())
    assert fingerprint_of(nn.SiLU()) != before


def test_a_function_that_calls_itself_has_a_fingerprint():
    def curve(x):
        return curve(x - 1) if x else x

    assert fingerprint_of(with_attribute("function", curve)) != fingerprint_of(with_attribute("function", scaled(1)))


@pytest.mark.parametrize("length", [10, 100, 1000])
def test_the_message_shows_where_two_long_texts_differ(tmp_path, monkeypatch, length):
    path, texts = tmp_path / "run.pt", [f"{'x' * length} {word} {'y' * length}" for word in ("first", "second")]
    monkeypatch.setattr(records, "device_name", lambda device: texts[0])
    trained(path)
    monkeypatch.setattr(records, "device_name", lambda device: texts[1])
    refused(lambda: trained(path), ValueError, "x first y", "x second y", ";")


@pytest.mark.parametrize("path", [True, 1, 2.5, b"run.pt"])
def test_a_checkpoint_that_is_no_path_is_refused(path):
    net = utils.build("NetA", SETTINGS)
    refused(lambda: trained(path, net), TypeError, f"path is {path!r}; give a str or a Path")


@pytest.mark.parametrize(
    "changes",
    [
        {"learning_rate": 0.01},
        {"weight_decay": 0.1},
        {"momentum": 0.9},
        {"optimizer": "sgd"},
        {"batch_size": 10},
        {"epochs": 4},
        {"epochs": 2},
        {"augment": "flip"},
        {"seed": 1},
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(finished, changes):
    ((name, value),) = changes.items()
    net = utils.build("NetA", SETTINGS)
    settings = replace(SETTINGS, **changes)
    call = functools.partial(trained, finished, net, settings=settings)
    refused(call, ValueError, f"{finished} is a checkpoint with {name} {getattr(SETTINGS, name)}, not {value};")


def test_a_checkpoint_with_tests_and_one_without_are_told_apart(finished, tmp_path):
    refused(lambda: trained(finished, track=False), ValueError, "each epoch tested True, not False")
    trained(tmp_path / "run.pt", track=False)
    refused(lambda: trained(tmp_path / "run.pt"), ValueError, "each epoch tested False, not True")


def test_a_checkpoint_of_another_number_of_threads_is_refused(finished):
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        refused(lambda: trained(finished), ValueError, f"thread count {threads}, not {threads + 1}")
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("owner", "name", "value", "difference"),
    [
        (records, "COMPUTED", {ROOT / "models.py": b"# another version"}, "training code"),
        (torch, "__version__", "9.9", "torch version"),
        (records, "device_name", lambda device: "another machine", "device name"),
        (fast, "pick_precision", lambda device: torch.float64, "number format"),
    ],
)
def test_a_checkpoint_of_other_code_or_another_machine_is_refused(
    finished, monkeypatch, owner, name, value, difference
):
    monkeypatch.setattr(owner, name, value)
    refused(lambda: trained(finished), ValueError, f"is a checkpoint with {difference} ")


def test_files_that_the_training_imports_count(tmp_path, monkeypatch):
    """Such as helpers that an edited models.py imports, and what these import."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_deeper.py").write_text("SLOPE = 1\n")
    (tmp_path / "own_tricks.py").write_text("from own_deeper import SLOPE\n")
    importlib.import_module("own_tricks")
    edited = records.COMPUTED[ROOT / "models.py"] + b"\nfrom own_tricks import SLOPE\n"
    monkeypatch.setitem(records.COMPUTED, ROOT / "models.py", edited)
    prints = [fingerprint_of(Block())]
    for name in ("own_deeper", "own_tricks"):
        (tmp_path / f"{name}.py").write_text("from own_deeper import SLOPE  # edited\n")
        prints.append(fingerprint_of(Block()))
    assert len({one["training code"] for one in prints}) == 3


def test_abstract_classes_have_a_fingerprint():
    def make(number):
        class Own(Block, abc.ABC):
            state_in_buffers = True
            gain = number

        return Own()

    prints = [fingerprint_of(make(number)) for number in (1, 1, 2)]
    assert prints[0] == prints[1] != prints[2]


def test_class_names_that_look_like_numbers_are_read_as_texts(tmp_path):
    records.upsert(tmp_path / "mistakes.csv", {"net": "NetA", "index": 3, "true": "0", "predicted": "10"}, "index")
    [row] = records.read_rows(tmp_path / "mistakes.csv").to_dict("records")
    assert (row["index"], row["true"], row["predicted"]) == (3, "0", "10")


def test_imports_are_found_in_every_form():
    lines = ["import a.b as c, d", "from e.f import g as h", "    from i import (", "        j,", "    k)  # and more"]
    source = "\n".join([*lines, 'x = "no import"']).encode()
    found = set(records._imports(source))
    assert found >= {"a.b", "d", "e.f", "e.f.g", "i", "i.j", "i.k"}
    assert not found & {"x", "no", "and", "more"}


def test_a_module_that_is_held_counts_with_its_numbers(monkeypatch):
    before = fingerprint_of(subclass(f=variants))
    monkeypatch.setattr(variants, "SLOPE", 2, raising=False)
    assert fingerprint_of(subclass(f=variants)) != before


def test_a_function_in_a_folder_without_init_counts(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_folder").mkdir()
    (tmp_path / "own_folder" / "norms.py").write_text("SLOPE = 1\ndef act(x):\n    return SLOPE * x\n")
    norms = importlib.import_module("own_folder.norms")
    curve = written("def curve(self, x): return own_folder.norms.act(x)", own_folder=sys.modules["own_folder"])
    before = fingerprint_of(subclass(curve=curve))
    norms.SLOPE = 2
    assert fingerprint_of(subclass(curve=curve)) != before


def test_a_class_made_by_exec_counts():
    """Without a __name__ among its globals it says that it is Python's own."""
    found = []
    for slope in (1, 2):
        scope = {"Block": Block}
        exec(f"class Own(Block):\n    state_in_buffers = True\n    slope = {slope}\n", scope)
        assert scope["Own"].__module__ == "builtins"
        found.append(fingerprint_of(scope["Own"]()))
    assert found[0] != found[1]


def test_a_checkout_behind_a_link_is_the_same_code(tmp_path):
    """Of its functions no globals are told, since its files count."""
    (tmp_path / "link").symlink_to(ROOT)
    path = tmp_path / "link" / "models.py"
    scope = {"__name__": "models", "GAIN": 1}
    exec(compile("def curve(self, x): return GAIN * x", str(path), "exec"), scope)
    assert records._globals(scope["curve"]) == []


def test_the_code_of_every_room_that_computes_counts():
    for name in ("models", "utils", "engine/data", "engine/muon", "engine/trainer", "engine/fast"):
        assert (ROOT / f"{name}.py").read_bytes() in records.COMPUTED.values()


def test_a_hash_tells_values_places_types_and_shapes_apart():
    big = torch.arange(3 * 2**19, dtype=torch.int32).view(3, -1)
    tensors = [DATA.images, DATA.images.flip(0), DATA.images.float(), DATA.images.view(60, -1), DATA.images[:59]]
    tensors += [DATA.images.permute(0, 3, 1, 2), DATA.images.permute(0, 3, 2, 1), big, big[[1, 0, 2]], big.flip(1)]
    tensors += [torch.tensor(value) for value in (0.0, -0.0, 0, 1.0, 1, True, False)]
    tensors += [torch.zeros(size, dtype=torch.uint8) for size in (1, 2, 3, 4, 16384, 16385)]
    hashes = [records.data_hash(tensor) for tensor in tensors]
    hashes += [records.data_hash(*pair) for pair in itertools.permutations(tensors[-4:], 2)]
    assert len(set(hashes)) == len(hashes)


def test_a_hash_does_not_depend_on_how_a_tensor_lies_in_memory():
    whole = torch.arange(2**14).to(torch.uint8)  # one block of words, which needs no padding
    for tensor in (DATA.images, DATA.labels, DATA.images.float(), DATA.images[1:, 0, 1], whole):
        padded = torch.cat([tensor.flatten()[:1], tensor.flatten()])[1:].view_as(tensor)  # another offset
        strided = tensor.transpose(0, -1).contiguous().transpose(0, -1)
        assert len({records.data_hash(other) for other in (tensor, tensor.clone(), padded, strided)}) == 1


def test_every_swap_of_two_images_is_seen():
    found = {records.data_hash(swap(DATA.images, *pair)) for pair in itertools.combinations(range(20), 2)}
    assert len(found | {records.data_hash(DATA.images)}) == 191


def test_a_hash_takes_no_copy_of_the_data():
    images = torch.zeros(10_000, 32, 32, 3, dtype=torch.uint8)
    with torch.profiler.profile(profile_memory=True) as profile:
        records.data_hash(images)
    assert 0 < max(event.self_cpu_memory_usage for event in profile.events()) < images.numel() / 10


# ---------------------------------------------------------------------------------------------------------------------
# Interrupted and resumed
# ---------------------------------------------------------------------------------------------------------------------


@functools.cache
def undisturbed(name):
    return trained(net=utils.build(name, SETTINGS))


@pytest.mark.parametrize(
    ("name", "step", "again"),  # of 3 steps in an epoch
    [
        ("NetA", 1, "the same net"),
        ("NetA", 2, "a new net"),
        ("NetA", 9, "the same net"),
        ("NetB", 2, "the same net"),
        ("NetB", 4, "a new net"),
        ("NetC", 4, "the same net"),
    ],
)
def test_interrupted_and_called_again_ends_with_the_same_weights(tmp_path, monkeypatch, name, step, again):
    expected, history = undisturbed(name)
    net = utils.build(name, SETTINGS)
    initial = {key: value.clone() for key, value in net.state_dict().items()}
    with Interrupted(monkeypatch, step):
        trained(tmp_path / "run.pt", net)
    assert same(net.state_dict(), initial)
    found, resumed = trained(tmp_path / "run.pt", net if again == "the same net" else utils.build(name, SETTINGS))
    assert same(found, expected)
    assert [epoch["loss"] for epoch in resumed] == [epoch["loss"] for epoch in history]


def test_interrupted_in_the_first_epoch_the_initial_weights_are_in_the_checkpoint(tmp_path, monkeypatch):
    """So another net is refused, even when nothing was learned yet."""
    with Interrupted(monkeypatch, 1):
        trained(tmp_path / "run.pt")
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    assert saved["history"] == []
    assert same(saved["state"]["net"], utils.build("NetA", SETTINGS).state_dict())
    refused(lambda: trained(tmp_path / "run.pt", kaiming(utils.build("NetA", SETTINGS))), ValueError, "initial weights")


@pytest.mark.parametrize("step", [1, 4])
def test_a_net_that_is_half_trained_is_not_taken_for_a_new_one(tmp_path, monkeypatch, step):
    """Interrupted without a checkpoint, then called with the checkpoint of the same settings."""
    net = utils.build("NetA", SETTINGS)
    with Interrupted(monkeypatch, step):
        trained(tmp_path / "run.pt")
    with Interrupted(monkeypatch, step):
        trained(None, net)
    refused(lambda: trained(tmp_path / "run.pt", net), ValueError, "initial weights")


def test_a_finished_run_is_not_trained_again(finished, monkeypatch):
    expected, history = trained(finished)
    monkeypatch.setattr(Trainer, "step", lambda trainer: pytest.fail("it was trained again"))
    net = utils.build("NetA", SETTINGS)
    for _ in range(2):  # the net that the first call leaves behind is taken, too
        found, again = trained(finished, net)
        assert same(found, expected)
        assert again == history


def test_a_checkpoint_is_removed_by_its_own_history_alone(tmp_path):
    path, other = tmp_path / "run.pt", [{"epoch": 1, "test_accuracy": np.float64("nan"), "elapsed": 0.1 + 0.2}]
    for history in ([], [other[0] | {"elapsed": 0.3}]):
        records.write_checkpoint(path, {}, history, {})
        for of_another in (other, []):
            records.remove_checkpoint(path, of_another)
        assert path.exists()
    for content in (b"", b"damaged"):
        path.write_bytes(content)
        records.remove_checkpoint(path, other)
        assert path.read_bytes() == content
    records.write_checkpoint(path, {}, other, {})
    for _ in range(2):  # what is absent is no error
        records.remove_checkpoint(path, other)
    assert not path.exists()


def test_a_failed_call_leaves_net_and_message(tmp_path, monkeypatch):
    """A full disk at a checkpoint."""
    net, write_bytes, left = utils.build("NetA", SETTINGS), Path.write_bytes, [2]
    initial = {key: value.clone() for key, value in net.state_dict().items()}

    def fill(path, content):
        left[0] -= 1
        if left[0] == 0:
            write_bytes(path, content[:1000])
            raise OSError(errno.ENOSPC, "No space left on device")
        write_bytes(path, content)

    path = tmp_path / "run.pt"
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", fill)
        refused(lambda: trained(path, net), OSError, f"{path} can't be written: the disk at /", " is full")
    assert same(net.state_dict(), initial)
    assert [file.name for file in tmp_path.iterdir() if "lock" not in file.name] == ["run.pt"]
    assert same(trained(path, net)[0], undisturbed("NetA")[0])


def test_restored_on_error():
    net = utils.build("NetA", SETTINGS)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    for error in (ValueError, KeyboardInterrupt, SystemExit, GeneratorExit):
        with pytest.raises(error), records.restored_on_error(net):  # noqa: PT012
            kaiming(net)
            raise error
        assert same(net.state_dict(), before)
    with records.restored_on_error(net):
        kaiming(net)
    assert not same(net.state_dict(), before)


def test_a_failed_call_leaves_modes_and_gradients():
    net = altered_net("NetA", lambda block: block.set_submodule("activation", Block())).eval()
    net.C2.train()
    gradient = net.c11.bias.grad = torch.ones(10)
    modes = [module.training for module in net.modules()]
    with pytest.raises(KeyboardInterrupt), records.restored_on_error(net):  # noqa: PT012
        net.train()(torch.zeros(2, 3, 32, 32)).sum().backward()
        net.c11.bias.grad = None
        raise KeyboardInterrupt
    assert [module.training for module in net.modules()] == modes
    assert net.c11.bias.grad is gradient
    assert net.C1.conv.weight.grad is None


def test_what_the_nets_own_gpu_still_computes_is_waited_for(monkeypatch):
    """Not the current GPU's: a net on another one is restored under steps that still write."""
    calls, device = [], torch.device("cuda:1")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: calls.append(device))
    value = torch.zeros(1).as_subclass(type("OnGpu", (torch.Tensor,), {"device": device, "is_cuda": True}))
    net = SimpleNamespace(state_dict=lambda: {"w": value}, load_state_dict=lambda before: calls.append("restored"))
    net.parameters = net.modules = list
    with pytest.raises(KeyboardInterrupt), records.restored_on_error(net):
        raise KeyboardInterrupt
    assert calls == [device, "restored"]


# ---------------------------------------------------------------------------------------------------------------------
# Damaged, inconsistent and hostile checkpoints
# ---------------------------------------------------------------------------------------------------------------------


def check_refused(path, call=None):
    """Check that training refuses the checkpoint in one line, and leaves it and the net as they are."""
    content, net = path.read_bytes(), utils.build("NetA", SETTINGS)
    weights = {key: value.clone() for key, value in net.state_dict().items()}
    refused(lambda: trained(path, net), ValueError, f"{path} ", "; delete it to start anew, or name another file")
    assert path.read_bytes() == content
    assert same(net.state_dict(), weights)


def test_every_cut_is_refused(finished, tmp_path):
    content = finished.read_bytes()
    for size in [*range(0, len(content), len(content) // 12), len(content) - 1, len(content) - 22]:
        (tmp_path / "run.pt").write_bytes(content[:size])
        check_refused(tmp_path / "run.pt")


def test_a_changed_byte_in_any_tensor_is_refused(finished, tmp_path):
    """By the check sums, which torch.load does not look at."""
    content, random_places = finished.read_bytes(), random.Random(0)
    with zipfile.ZipFile(finished) as archive:
        names = [info for info in archive.infolist() if "/data/" in info.filename and info.file_size]
    for info in random_places.sample(names, 8):
        lengths = struct.unpack_from("<2H", content, info.header_offset + 26)  # of what lies before the tensor
        place = info.header_offset + 30 + sum(lengths) + random_places.randrange(info.file_size)
        damaged = bytearray(content)
        damaged[place] ^= 1 << random_places.randrange(8)
        (tmp_path / "run.pt").write_bytes(damaged)
        check_refused(tmp_path / "run.pt")


@pytest.mark.parametrize(
    "content", [b"", b"no checkpoint", b"\0" * 10_000, pickle.dumps({"state": 1}), b"PK\5\6" + b"\0" * 18]
)
def test_what_is_no_checkpoint_is_refused(tmp_path, content):
    (tmp_path / "run.pt").write_bytes(content)
    check_refused(tmp_path / "run.pt")


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_what_is_no_file_is_refused_without_waiting(tmp_path, make):
    path = tmp_path / "run.pt"
    make(path)
    before = path.lstat()
    refused(lambda: trained(path), ValueError, path, "delete it")
    assert os.path.samestat(path.lstat(), before)


def remove(name):
    return lambda saved: saved.pop(name)


def put(value, *names):
    """Put a value in a nested dict."""

    def alter(saved):
        for name in names[:-1]:
            saved = saved[name]
        saved[names[-1]] = value

    return alter


def convert(change, *names):
    def alter(saved):
        for name in names[:-1]:
            saved = saved[name]
        saved[names[-1]] = change(saved[names[-1]])

    return alter


def lengthen(saved):
    saved["history"].append(saved["history"][-1] | {"epoch": 4})
    saved["state"]["global_step"] += 3


C1 = ("state", "net", "C1.conv.weight")
INCONSISTENT = {
    "no fingerprint": remove("fingerprint"),
    "no history": remove("history"),
    "no state": remove("state"),
    "fingerprint: None": put(None, "fingerprint"),
    "fingerprint of nothing": put({}, "fingerprint"),
    "history: None": put(None, "history"),
    "state: None": put(None, "state"),
    "a later state with an empty history": put([], "history"),
    "a first state with a full history": put(torch.tensor([0]), "state", "global_step"),
    "a history too short": convert(lambda history: history[:2], "history"),
    "a history too long": lengthen,
    "a history twice": convert(lambda history: history * 2, "history"),
    "a history backwards": convert(lambda history: history[::-1], "history"),
    "a history without loss": lambda saved: saved["history"][1].pop("loss"),
    "a history of texts": put("70%", "history", 0, "test_accuracy"),
    "a history of tensors": put(torch.zeros(()), "history", 0, "loss"),
    "a history of None": put(None, "history", 0, "seconds"),
    "a history as a dict": convert(lambda history: dict(enumerate(history)), "history"),
    "a history as a tuple": convert(tuple, "history"),
    "a step too many": convert(lambda step: step + 1, "state", "global_step"),
    "a negative step": convert(lambda step: -step, "state", "global_step"),
    "a step as a number": put(9, "state", "global_step"),
    "a wrong shape": convert(lambda weight: weight[:, :2], *C1),
    "a shape that broadcasts": convert(lambda weight: weight[:1], *C1),
    "a transposed shape": convert(lambda weight: weight.transpose(0, 1), *C1),
    "another type": convert(lambda weight: weight.double(), *C1),
    "whole numbers": convert(lambda weight: weight.int(), *C1),
    "sparse": convert(lambda weight: weight.to_sparse(), *C1),
    "without content": convert(lambda weight: weight.to("meta"), *C1),
    "no tensor": put([1.0], *C1),
    "a missing weight": lambda saved: saved["state"]["net"].pop("C1.conv.weight"),
    "a weight more": put(torch.zeros(1), "state", "net", "C12.conv.weight"),
    "a wrong flip": convert(lambda flip: flip[:-1], "state", "flip"),
    "a wrong generator": convert(lambda state: state[:-1], "state", "generator"),
    "a generator of zeros": convert(torch.zeros_like, "state", "generator"),
    "no momentum": put({}, "state", "optimizer"),
    "a missing momentum": lambda saved: saved["state"]["optimizer"].pop(0),
    "a momentum of another shape": convert(lambda value: value[:1], "state", "optimizer", 0, "momentum_buffer"),
    "momenta in another order": convert(lambda momenta: dict(reversed(momenta.items())), "state", "optimizer"),
    "a weight with a gradient": convert(lambda weight: weight.requires_grad_(), *C1),
    "a momentum of another name": lambda saved: saved["state"]["optimizer"][0].update(
        other=saved["state"]["optimizer"][0].pop("momentum_buffer")
    ),
}


@pytest.mark.parametrize("damage", INCONSISTENT)
def test_an_inconsistent_checkpoint_is_refused(finished, tmp_path, damage):
    saved = torch.load(finished, weights_only=True)
    INCONSISTENT[damage](saved)
    torch.save(saved, tmp_path / "run.pt")
    check_refused(tmp_path / "run.pt")


@functools.cache
def checkpoint_of(settings):
    with tempfile.TemporaryDirectory() as folder:
        trained(Path(folder) / "run.pt", settings=settings)
        return (Path(folder) / "run.pt").read_bytes()


@pytest.mark.parametrize(("optimizer", "rate"), [("sgd", 0.1), ("adamw", 0.003)])
@pytest.mark.parametrize("damage", ["shape", "type", "none", "missing", "name", "text"])
def test_an_inconsistent_state_of_the_other_optimizers_is_refused(tmp_path, optimizer, rate, damage):
    path, settings = tmp_path / "run.pt", replace(SETTINGS, optimizer=optimizer, learning_rate=rate, epochs=1)
    saved = torch.load(io.BytesIO(checkpoint_of(settings)), weights_only=True)
    states = saved["state"]["optimizer"]
    name = next(name for name, value in states[0].items() if value.ndim)
    change = {
        "shape": lambda: states[0].update({name: states[0][name][:1]}),
        "type": lambda: states[0].update({name: states[0][name].int()}),
        "none": states.clear,  # as before the first step
        "missing": lambda: states.pop(3),
        "name": lambda: states[0].update({"other": states[0].pop(name)}),
        "text": lambda: states[0].update({name: "text"}),
    }[damage]
    change()
    torch.save(saved, path)
    content = path.read_bytes()
    refused(lambda: trained(path, settings=settings), ValueError, f"{path} ", "delete it")
    assert path.read_bytes() == content


def test_an_empty_history_with_other_weights_is_refused(tmp_path, monkeypatch):
    with Interrupted(monkeypatch, 1):
        trained(tmp_path / "run.pt")
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    saved["state"]["net"]["C1.conv.weight"] += 1
    torch.save(saved, tmp_path / "run.pt")
    check_refused(tmp_path / "run.pt")


EVIL_PLACES = [("fingerprint",), ("history",), ("state",), ("state", "generator"), ("fingerprint", "seed"), ("more",)]


@pytest.mark.parametrize("place", EVIL_PLACES)
def test_the_code_in_a_checkpoint_does_not_run(finished, tmp_path, place):
    saved = torch.load(finished, weights_only=True)
    put(Evil(tmp_path / "evil"), *place)(saved)
    torch.save(saved, tmp_path / "run.pt")
    check_refused(tmp_path / "run.pt")
    assert not (tmp_path / "evil").exists()
    torch.load(tmp_path / "run.pt", weights_only=False)  # which it does elsewhere
    assert (tmp_path / "evil").exists()


@pytest.mark.parametrize("legacy", [False, True])
def test_the_code_in_a_plain_pickle_does_not_run(tmp_path, legacy):
    if legacy:
        torch.save(Evil(tmp_path / "evil"), tmp_path / "run.pt", _use_new_zipfile_serialization=False)
    else:
        (tmp_path / "run.pt").write_bytes(pickle.dumps(Evil(tmp_path / "evil")))
    check_refused(tmp_path / "run.pt")
    assert not (tmp_path / "evil").exists()


def test_a_checkpoint_is_read_once(finished, tmp_path, monkeypatch):
    """Swapped after it was checked, it does not come into play."""
    expected, _ = trained(finished)
    path, read_bytes, count = tmp_path / "run.pt", records.read_bytes, []
    path.write_bytes(finished.read_bytes())

    def read_and_swap(name):
        content = read_bytes(name)
        count.append(name)
        torch.save(Evil(tmp_path / "evil"), path)
        return content

    monkeypatch.setattr(records, "read_bytes", read_and_swap)
    assert same(trained(path)[0], expected)
    assert count == [path]
    assert not (tmp_path / "evil").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Machine and commit
# ---------------------------------------------------------------------------------------------------------------------


def test_the_device_is_named():
    assert records.device_name(torch.device("cpu")).split()[0] == "cpu"


def git(folder, *arguments):
    names = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main", "-c", "commit.gpgsign=false")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    done = subprocess.run(["git", *names, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def make_repository(folder, *names):
    folder.mkdir(parents=True)
    git(folder, "init", "-q")
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text("a = 1\n")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "--allow-empty", "-m", "first")
    return git(folder, "rev-parse", "--short", "HEAD")


OURS = ("models.py", "engine/records.py", "README.md")


@pytest.fixture
def commit_at(monkeypatch):
    """Return what `code_commit` returns for code in a folder."""

    def call(folder):
        monkeypatch.setattr(records, "ROOT", folder)
        return records.code_commit.__wrapped__()

    monkeypatch.setattr(records, "_commit", None)
    return call


def test_the_commit_is_named_with_a_plus_when_code_differs(tmp_path, commit_at, monkeypatch):
    commit = make_repository(tmp_path / "ours", *OURS)
    (tmp_path / "ours" / "README.md").write_text("another text")
    (tmp_path / "ours" / "untracked.py").touch()
    assert commit_at(tmp_path / "ours") == commit
    (tmp_path / "link").symlink_to("ours")
    assert commit_at(tmp_path / "link") == commit
    make_repository(tmp_path / "other", "a.py")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "other" / ".git"))  # as in a hook
    assert commit_at(tmp_path / "ours") == commit
    (tmp_path / "ours" / "models.py").write_text("a = 2\n")
    assert commit_at(tmp_path / "ours") == f"{commit}+"


def test_code_that_was_committed_after_it_was_loaded_is_not_that_of_the_commit(tmp_path, commit_at, monkeypatch):
    commit = make_repository(tmp_path / "ours", *OURS)
    models = tmp_path / "ours" / "models.py"
    monkeypatch.setattr(records, "LOADED", {models: models.read_bytes()})
    assert commit_at(tmp_path / "ours") == commit
    monkeypatch.setattr(records, "LOADED", {models: b"what it was before the commit"})
    assert commit_at(tmp_path / "ours") == f"{commit}+"


@pytest.mark.parametrize("tracked", [False, True])
@pytest.mark.parametrize("place", ["", "vendored/nets"])
def test_the_commit_of_someone_elses_repository_is_not_ours(tmp_path, commit_at, tracked, place):
    folder = tmp_path / "theirs" / place
    if tracked and not place:
        pytest.skip("files that are tracked at the top are the repository's own")
    make_repository(tmp_path / "theirs", "their.py", *([f"{place}/{name}" for name in OURS] if tracked else []))
    for name in OURS:
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text("a = 1\n")
    assert commit_at(folder) == "unknown"


def test_without_git_the_commit_is_unknown_unless_set(tmp_path, commit_at, monkeypatch):
    assert commit_at(tmp_path) == "unknown"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit_at(tmp_path) == "unknown"
    records.set_commit("abcdef0+")
    assert commit_at(tmp_path) == records.code_commit() == "abcdef0+"
    records.code_commit.cache_clear()
    for text in ("", "abc", "HEAD", "abcdef0 ", "abcdef0\n", "ABCDEF0", "a" * 41, None, "abcdef0++"):
        refused(lambda text=text: records.set_commit(text), ValueError, f"commit is {text!r}")


@pytest.mark.parametrize("accuracy", [86.0, 87.0])
def test_two_new_rows_of_one_run_are_refused(tmp_path, accuracy):
    rows = [{"net": "NetA", "seed": 0, "test_accuracy": value} for value in (86.0, accuracy)]
    with pytest.raises(ValueError, match="two new rows are of the same run; give each run once"):
        records.upsert(tmp_path / "runs.csv", rows)
    assert not (tmp_path / "runs.csv").exists()
    records.upsert(tmp_path / "runs.csv", rows[:1])
