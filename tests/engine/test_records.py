"""Rows, predictions, machine and commit: nothing is lost, nothing damaged is read."""

import csv
import io
import itertools
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import child, refused
from torch import nn

import utils
from engine import files, records


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


def test_class_names_that_look_like_numbers_are_read_as_texts(tmp_path):
    records.upsert(tmp_path / "mistakes.csv", {"net": "NetA", "index": 3, "true": "0", "predicted": "10"}, "index")
    [row] = records.read_rows(tmp_path / "mistakes.csv").to_dict("records")
    assert (row["index"], row["true"], row["predicted"]) == (3, "0", "10")


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
    net = utils.build("NetA", utils.Settings())
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


def test_two_notebooks_share_an_output_folder(tmp_path, small):
    """The same run and other runs, saved at the same time."""
    folder = files.output_folder(tmp_path / "out")

    def notebook(seeds):
        torch.set_num_threads(1)
        for seed in seeds:
            settings = utils.Settings(epochs=1, batch_size=200, seed=seed)
            one = utils.run("NetA", small, settings, track=False)
            utils.save_runs([one], small, folder)

    wait(child(lambda: notebook((0, 1, 2))), child(lambda: notebook((0, 3, 4))))
    assert sorted(row["seed"] for row in rows_of(folder / "results" / "runs.csv")) == list("01234")
    torch.load(folder / "weights" / "NetA.pt", weights_only=True)
    for name in ("history", "mistakes"):
        records.read_rows(folder / "results" / f"{name}.csv")
    assert not list(tmp_path.rglob(".*.part*"))


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
