"""Running what is missing of the sweeps: by one process, by several, killed and started again."""

import functools
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pandas as pd
import pytest
import torch
from conftest import ROOT

import utils
from engine import fast, records
from experiments import run
from experiments.sweeps import SWEEPS, missing, read_texts
from experiments.variants import Experiment

TINY = Experiment(net="NetC", epochs=1, batch_size=100)


@pytest.fixture
def tiny(monkeypatch, tmp_path, small):
    """Data that counts as real, and two sweeps of the same three short runs, with their rows in tmp_path."""
    todo = [replace(TINY, seed=seed) for seed in range(3)]
    monkeypatch.setitem(SWEEPS, "recipe", ("validation", lambda rows: todo, None))
    monkeypatch.setitem(SWEEPS, "augment", ("test", lambda rows: todo, None))
    monkeypatch.setattr(run, "RUNS", tmp_path / "results" / "runs.csv")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    few = {name: getattr(small, name)[:200] for name in ("images", "labels")}
    few |= {name: getattr(small, name)[:100] for name in ("test_images", "test_labels")}
    data = replace(small, name="CIFAR-10", **few)
    monkeypatch.setattr(run, "load_data", lambda device, source, root: data)
    run.data_of.cache_clear()
    yield data, todo
    run.data_of.cache_clear()


def test_runs_what_is_missing_and_no_more(tiny, monkeypatch):
    _, todo = tiny
    monkeypatch.setitem(SWEEPS, "augment", ("test", lambda rows: todo[:1], None))
    run.run_sweep("augment")
    first = read_texts(run.RUNS)
    assert missing("augment", first) == []
    monkeypatch.setitem(SWEEPS, "augment", ("test", lambda rows: todo, None))
    assert missing("augment", first) == todo[1:]
    run.run_sweep("augment")
    rows = read_texts(run.RUNS)
    assert rows["seed"].tolist() == ["0", "1", "2"]
    assert rows.iloc[0].to_dict() == first.iloc[0].to_dict(), "a finished run was run again"
    assert rows["test_accuracy"].astype(float).between(0, 100).all()
    assert missing("augment", rows) == []


@pytest.mark.usefixtures("tiny")
def test_rows_name_the_variant_and_what_came_out(monkeypatch):
    variants = [
        replace(TINY, net="NetA", statistics_batch=50),
        replace(TINY, net="NetB", layer_variant="[C,H,W]"),
        replace(TINY, groups="C", optimizer="sgd", momentum=0.9),
        replace(TINY, net="Net", initial_weights="he"),
    ]
    monkeypatch.setitem(SWEEPS, "augment", ("test", lambda rows: variants, None))
    run.run_sweep("augment")
    rows = read_texts(run.RUNS)
    assert missing("augment", rows) == []
    names = ["study", "net", "norm", "statistics_batch", "layer_variant", "groups", "optimizer", "initial_weights"]
    assert rows[names].values.tolist() == [
        ["augment", "NetA", "batch", "50", "", "", "muon", ""],
        ["augment", "NetB", "layer", "", "[C,H,W]", "1", "muon", ""],
        ["augment", "NetC", "group", "", "", "C", "sgd", ""],
        ["augment", "Net", "none", "", "", "", "muon", "he"],
    ]
    assert rows["parameters"].tolist() == ["48042", str(48_042 + 147_456 - 432), "48042", "48042"]
    assert set(rows["status"]) == {"done"}
    assert set(rows.columns) == set(read_texts().columns)


def test_validation_runs_do_not_touch_the_test_set(tiny, monkeypatch):
    data, todo = tiny
    monkeypatch.setattr(run, "VALIDATION_IMAGES", 100)
    monkeypatch.setitem(SWEEPS, "recipe", ("validation", lambda rows: todo[:1], None))
    seen, score = [], utils.test
    monkeypatch.setattr(utils, "test", lambda net, images, labels: seen.append(images) or score(net, images, labels))
    run.run_sweep("recipe")
    assert seen
    assert all(images.data_ptr() != data.test_images.data_ptr() for images in seen)
    [row] = read_texts(run.RUNS).to_dict("records")
    assert row["split"] == "validation"
    assert row["test_accuracy"] == ""
    assert row["train_images"] == "100"
    assert float(row["validation_accuracy"]) >= 0


def test_a_run_that_diverged_is_noted_and_not_run_again(tiny, monkeypatch):
    data, _ = tiny
    wild = replace(TINY, net="Net", optimizer="sgd", learning_rate=10.0, momentum=0.99, epochs=30, batch_size=20)
    data = replace(data, images=data.images[:40], labels=data.labels[:40])
    monkeypatch.setattr(run, "load_data", lambda device, source, root: data)
    monkeypatch.setitem(SWEEPS, "augment", ("test", lambda rows: [wild], None))
    steps, step = [], run.Trainer.step
    monkeypatch.setattr(run.Trainer, "step", lambda trainer: steps.append(trainer.diverged.fill_(1)) or step(trainer))
    run.run_sweep("augment")
    rows = read_texts(run.RUNS)
    assert rows["status"].tolist() == ["diverged"]
    assert rows["test_accuracy"].tolist() == rows["train_accuracy"].tolist() == [""]
    assert len(steps) == 2, "it went on after the epoch in which it diverged"
    assert missing("augment", rows) == []


def test_shards_cover_everything_once(tiny, monkeypatch):
    _, todo = tiny
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, seeds in (("0", ["0", "2"]), ("1", ["0", "1", "2"])):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setattr(run, "missing_now", functools.partial(next, iter([todo, []])))
        run.run_sweep("augment")
        assert sorted(read_texts(run.RUNS)["seed"]) == seeds


def test_rows_that_call_for_more_runs_get_them(tiny, monkeypatch):
    _, todo = tiny
    monkeypatch.setitem(SWEEPS, "augment", ("test", lambda rows: todo[: 1 + len(rows)], None))
    run.run_sweep("augment")
    assert read_texts(run.RUNS)["seed"].tolist() == ["0", "1", "2"]


def test_a_row_that_is_not_found_again_ends_a_sweep(tiny, monkeypatch):
    monkeypatch.setattr(run, "read_texts", lambda path: read_texts(path).assign(groups="other"))
    with pytest.raises(ValueError, match=r"^sweep augment: the row just written is not found again: Experiment\("):
        run.run_sweep("augment")


def test_each_data_set_is_loaded_once_and_split_as_asked(tiny, monkeypatch):
    data, asked = replace(tiny[0], name="CIFAR-100"), []

    def load(device, source, root):
        asked.append(source)
        return data if source == "cifar100" else tiny[0]

    monkeypatch.setattr(run, "load_data", load)
    monkeypatch.setattr(run, "VALIDATION_IMAGES", 100)
    assert run.data_of("CIFAR-100", "test") is data
    assert run.data_of("CIFAR-100", "validation").split == "validation"
    run.data_of("CIFAR-10", "validation")
    assert asked == ["cifar100", "cifar10"]
    assert [part[0].dataset for part in run.parts([TINY, replace(TINY, dataset="CIFAR-100")])] == [
        "CIFAR-10",
        "CIFAR-100",
    ]


def test_images_of_another_data_set_are_refused(tiny):
    with pytest.raises(
        ValueError, match=r"^dataset is 'Fashion'; what engine.data.load_data reads for it is CIFAR-10$"
    ):
        run.data_of("Fashion", "validation")


def test_small_batches_run_many_at_a_time():
    sizes = [32] * 14 + [256] * 6 + [500] * 4 + [1024]
    todo = [replace(TINY, batch_size=size, seed=seed) for seed, size in enumerate(sizes)]
    parts = list(run.parts(todo))
    assert [one for part in parts for one in part] == todo
    assert [(len(part), part[0].batch_size) for part in parts] == [
        *((12, 32), (2, 32), (5, 256), (1, 256), (3, 500), (1, 500), (1, 1024))
    ]


def test_together_as_alone(tiny):
    """Runs that share a device get the weights that each would get by itself, also when one is longer."""
    data, _ = tiny
    todo = [replace(TINY, seed=epochs, epochs=epochs) for epochs in (2, 3)]
    together = run.train_together("augment", todo, data)
    alone = [utils.run("NetC", data, one, track=False) for one in todo]
    assert [one.scores.loss for one in together] == [one.scores.loss for one in alone]
    assert [one.row["test_accuracy"] for one in together] == [one.row["test_accuracy"] for one in alone]


def test_memory_is_kept_on_a_cpu(tiny, monkeypatch):
    calls = []
    monkeypatch.setattr(fast, "keep_memory", lambda: calls.append(1))
    run.train_together("augment", [TINY], tiny[0])
    assert calls


def test_the_seconds_that_runs_should_take():
    """At the median of the GPU's seconds a step; validation runs have 45,000 images, not 50,000."""
    gpu = {"device": "NVIDIA", "epochs": "2", "batch_size": "100", "train_images": "45000"}
    rows = pd.DataFrame([gpu | {"seconds": str(seconds)} for seconds in (9, 90, 18)])  # 900 steps: 0.02 s each
    rows = pd.concat([rows, rows.assign(device="cpu x86", seconds="1000")])
    todo = [replace(TINY, epochs=1, batch_size=100), replace(TINY, epochs=3, batch_size=1000)]
    assert run.predict_seconds("recipe", todo, rows) == pytest.approx(0.02 * (450 + 3 * 45))
    assert run.predict_seconds("augment", todo, rows) == pytest.approx(0.02 * (500 + 3 * 50))
    assert run.predict_seconds("augment", [], rows) == 0
    assert math.isnan(run.predict_seconds("recipe", todo, rows[rows["device"] != "NVIDIA"]))
    assert math.isnan(run.predict_seconds("recipe", todo, pd.DataFrame(columns=["study"])))


def test_dry_run_says_what_is_missing_and_runs_nothing(tiny, monkeypatch, capsys):
    monkeypatch.setattr(run, "run_sweep", lambda *arguments: pytest.fail("it ran"))
    run.main(["--dry-run"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(SWEEPS)
    assert lines[0] == "recipe: 3 of 3 runs missing, no GPU run so far to predict from"
    assert "rate-seeds: waits for rate" in lines
    measured = {"study": "recipe", "split": "validation", "device": "NVIDIA", "train_images": 500, "seconds": 60}
    rows = [one.columns() | measured for one in tiny[1]]
    records.upsert(run.RUNS, rows[:2])
    run.main(["recipe", "--dry-run"])
    assert capsys.readouterr().out == "recipe: 1 of 3 runs missing, about 90.0 GPU minutes\n"  # 5 steps took a minute
    assert missing("recipe", read_texts(run.RUNS)) == tiny[1][2:]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there is no GPU here, where all sweeps would take days: name one"),
        (["rates"], "sweep is 'rates'; choose from recipe, augment, captured, fused, search"),
        (["recipe", "--commit", "latest"], "commit is 'latest'; give 7 to 40 hexadecimal digits"),
        (["recipe"], "CIFAR-10 is not in"),
    ],
)
@pytest.mark.usefixtures("tiny")
def test_what_can_not_be_run_ends_in_one_line(monkeypatch, capsys, arguments, message):
    def absent(device, source, root):
        raise OSError(f"CIFAR-10 is not in {root}")

    monkeypatch.setattr(run, "load_data", absent)
    with pytest.raises(SystemExit):
        run.main(arguments)
    assert f"error: {message}" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("study", "studies"), "there is no column 'study'"),
        (lambda text: text.replace(",60,", ",a minute,"), "could not convert string to float: 'a minute'"),
    ],
)
def test_a_dry_run_with_a_damaged_file_ends_in_one_line(tiny, capsys, change, message):
    measured = {"study": "recipe", "split": "validation", "seconds": 60, "device": "NVIDIA", "train_images": 500}
    records.upsert(run.RUNS, [tiny[1][0].columns() | measured])
    run.RUNS.write_text(change(run.RUNS.read_text()))
    with pytest.raises(SystemExit):
        run.main(["--dry-run"])
    assert f"error: {run.RUNS}: {message}" in capsys.readouterr().err.splitlines()[-1]


def test_named_sweeps_run_in_their_order_under_the_named_commit(tiny, monkeypatch, capsys):
    data, _ = tiny
    ran = []
    monkeypatch.setattr(run, "load_data", lambda device, source, root: data)
    monkeypatch.setattr(run, "run_sweep", lambda sweep: ran.append((sweep, records.code_commit())))
    monkeypatch.setattr(records, "_commit", None)
    try:
        run.main(["optimizer", "augment", "--commit", "1a2b3c4"])
    finally:
        records.code_commit.cache_clear()
    assert ran == [("augment", "1a2b3c4")]
    assert capsys.readouterr().out == "optimizer: waits for rate-seeds\n"


def test_a_column_that_new_rows_lack_is_refused_before_training(tiny, monkeypatch, capsys):
    records.upsert(run.RUNS, [tiny[1][0].columns() | {"study": "recipe", "mood": "good"}])
    before = run.RUNS.read_bytes()
    monkeypatch.setattr(run, "run_sweep", lambda sweep: pytest.fail("it ran"))
    with pytest.raises(SystemExit):
        run.main(["recipe"])
    assert "has a column 'mood', which tells rows apart" in capsys.readouterr().err
    assert run.RUNS.read_bytes() == before


def test_a_variant_named_like_a_column_of_all_rows_is_refused_before_training(tiny, monkeypatch, capsys):
    columns = Experiment.columns
    monkeypatch.setattr(Experiment, "columns", lambda one: columns(one) | {"activation": ""})
    monkeypatch.setattr(run, "run_sweep", lambda sweep: pytest.fail("it ran"))
    with pytest.raises(SystemExit):
        run.main(["recipe"])
    message = "error: Experiment.activation is '' and the column activation of its row 'SiLU'; a variant needs a name"
    assert message in capsys.readouterr().err


DRIVER = """
import sys; sys.path.insert(0, {root!r})
from dataclasses import replace
from pathlib import Path
import torch
from engine.data import synthetic_data
from experiments import run
from experiments.sweeps import SWEEPS, experiments
drawn = synthetic_data(torch.device("cpu"))
data = replace(drawn, name="CIFAR-10", images=drawn.images[:500], labels=drawn.labels[:500],
    test_images=drawn.test_images[:500], test_labels=drawn.test_labels[:500])
first = experiments(["NetA", "NetB", "NetC"], 2, [{{"epochs": 2, "batch_size": 100}}])
second = lambda rows: experiments(["Net"], 2, [{{"epochs": 1, "batch_size": 50}}])
SWEEPS.clear()
SWEEPS.update(first=("test", lambda rows: first, None), second=("test", second, "first"))
run.load_data = lambda *arguments: data
run.RUNS = Path({runs!r})
run.main(["first", "second"])
"""


@pytest.fixture
def start(tmp_path):
    """Function: start processes of their own that run two sweeps of six and two short runs, with rows in `runs`."""
    started = []

    def start(runs, *launcher):
        runs.parent.mkdir(exist_ok=True)
        driver = runs.parent / "driver.py"
        driver.write_text(DRIVER.format(root=str(ROOT), runs=str(runs)))
        # The same number of threads, the same bits.
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, *launcher, str(driver)]
        started.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
        return started[-1]

    yield start
    for process in started:
        process.kill()


def accuracies(runs):
    return read_texts(runs).set_index(["study", "net", "seed"])["test_accuracy"].sort_index().to_dict()


def finish(process):
    output = process.communicate(timeout=300)[0].decode()
    assert process.returncode == 0, output[-3000:]
    return output


@pytest.mark.slow
def test_killed_and_started_again_or_by_two_processes_as_undisturbed(tmp_path, start):
    undisturbed, killed, shared = (tmp_path / name / "runs.csv" for name in ("undisturbed", "killed", "shared"))
    finish(start(undisturbed))
    expected = accuracies(undisturbed)
    assert len(expected) == 8

    process = start(killed)
    while not killed.exists():
        time.sleep(0.05)
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 1 <= len(accuracies(killed)) < 8
    finish(start(killed))
    assert accuracies(killed) == expected

    output = finish(start(shared, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"))
    assert accuracies(shared) == expected
    assert "waits for" not in output, "a process began the second sweep before the other had finished the first"
