"""Runs that are interrupted and go on, runs that diverge, and checkpoints that are of no use."""

import collections
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

import study
import utils
from utils import Settings

SETTINGS = Settings(epochs=4, batch_size=100, augment="flip+crop")


def run(data, path=None, settings=SETTINGS, name="NetA"):
    net = utils.build(name, settings)
    history = utils.train(net, data, settings, checkpoint=path)
    return net.state_dict(), history


def without_times(history):
    return [{name: value for name, value in epoch.items() if name not in ("seconds", "elapsed")} for epoch in history]


def interrupt(data, path, epochs, monkeypatch, settings=SETTINGS, name="NetA"):
    """Train until `epochs` epochs are in the checkpoint, and stop in the middle of the next one."""
    step, steps = utils.Trainer.step, epochs * (len(data.images) // settings.batch_size) + 2

    def count(trainer):
        nonlocal steps
        steps -= 1
        if steps == 0:
            raise KeyboardInterrupt
        step(trainer)

    monkeypatch.setattr(utils.Trainer, "step", count)
    with pytest.raises(KeyboardInterrupt):
        run(data, path, settings, name)
    monkeypatch.setattr(utils.Trainer, "step", step)


@pytest.mark.parametrize("name", ["NetA", "NetC"])
@pytest.mark.parametrize("epochs", [1, 3])
def test_goes_on_bit_for_bit(small, tmp_path, monkeypatch, name, epochs):
    expected, history = run(small, name=name)
    path = tmp_path / "run.pt"
    interrupt(small, path, epochs, monkeypatch, name=name)
    assert len(torch.load(path, weights_only=True)["history"]) == epochs
    torch.manual_seed(99)  # what else happened in the meantime does not matter
    found, resumed = run(small, path, name=name)
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    assert without_times(resumed) == without_times(history)
    assert [epoch["elapsed"] for epoch in resumed] == sorted(epoch["elapsed"] for epoch in resumed)


def test_a_finished_run_is_not_run_again(small, tmp_path, monkeypatch):
    path, settings = tmp_path / "run.pt", replace(SETTINGS, learning_rate=np.float64(0.03))
    expected, _ = run(small, path, settings)
    monkeypatch.setattr(utils.Trainer, "step", lambda trainer: pytest.fail("it was trained again"))
    found, history = run(small, path, settings)
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    assert len(history) == SETTINGS.epochs


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"settings": replace(SETTINGS, weight_decay=0.1)}, "weight_decay 0.5, not 0.1"),
        ({"settings": replace(SETTINGS, seed=3)}, "seed 0, not 3"),
        ({"settings": replace(SETTINGS, epochs=5)}, "epochs 4, not 5"),
        ({"name": "NetB"}, "norm 'batch', not 'layer'"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_and_kept(small, tmp_path, monkeypatch, change, difference):
    path = tmp_path / "run.pt"
    interrupt(small, path, 1, monkeypatch)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=f"run.pt is a checkpoint with {difference}; delete it to start anew"):
        run(small, path, **change)
    fewer = replace(small, images=small.images[:500], labels=small.labels[:500])
    with pytest.raises(ValueError, match="train_images 600, not 500"):
        run(fewer, path)
    with pytest.raises(ValueError, match="with sum of the pixels "):
        run(replace(small, images=255 - small.images), path)
    with pytest.raises(ValueError, match="with sum of the labels, each times its place "):
        run(replace(small, labels=small.labels.flip(0)), path)
    assert path.read_bytes() == before


def test_a_checkpoint_of_other_code_or_torch_is_refused(small, tmp_path, monkeypatch):
    path = tmp_path / "run.pt"
    interrupt(small, path, 1, monkeypatch)
    (tmp_path / "models.py").write_text("# another version")
    for owner, name, value, said in (
        (utils.models, "__file__", str(tmp_path / "models.py"), "code"),
        (torch, "__version__", "9.9", "torch"),
        (utils, "device_name", lambda device: "another machine", "device"),
        (utils, "pick_precision", lambda device: torch.float64, "precision"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            with pytest.raises(ValueError, match=f"is a checkpoint with {said} "):
                run(small, path)


def test_a_damaged_checkpoint_is_refused_and_kept(small, tmp_path, monkeypatch):
    path = tmp_path / "run.pt"
    interrupt(small, path, 1, monkeypatch)
    whole = path.read_bytes()
    altered = bytearray(whole)
    altered[len(whole) // 2] ^= 255
    torch.save({"run": 1}, tmp_path / "other.pt")
    for content in (b"", whole[:1000], whole[:-10], b"no checkpoint", altered, (tmp_path / "other.pt").read_bytes()):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"run.pt can't be read as a checkpoint \(.+\); delete it to start anew"):
            run(small, path)
        assert path.read_bytes() == content
    path.unlink()
    path.mkdir()
    with pytest.raises(ValueError, match="can't be read as a checkpoint"):
        run(small, path)


class Intruder:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_no_code_is_run_out_of_a_checkpoint(small, tmp_path):
    torch.save({"run": Intruder(tmp_path / "intruder"), "history": [], "state": {}}, tmp_path / "run.pt")
    with pytest.raises(ValueError, match="can't be read as a checkpoint"):
        run(small, tmp_path / "run.pt")
    assert not (tmp_path / "intruder").exists()


def test_an_experiment_that_is_saved_leaves_no_checkpoint(small, tmp_path):
    plan = utils.Plan(seeds=(0, 1), epochs=1, data="synthetic", publish=False, out=tmp_path)
    settings = replace(SETTINGS, epochs=1)
    runs = [utils.run("NetB", small, replace(settings, seed=s), checkpoints=plan.checkpoints) for s in plan.seeds]
    assert sorted(path.name for path in plan.checkpoints.iterdir()) == ["NetB-0.pt", "NetB-1.pt"]
    utils.save_experiment(runs, small, plan)
    assert not list(plan.checkpoints.iterdir())
    assert replace(plan, publish=True, out=tmp_path / "checkout").checkpoints.parts == ("out", "checkpoints")


# ---------------------------------------------------------------------------------------------------------------------
# Divergence
# ---------------------------------------------------------------------------------------------------------------------


def poison(trainer, step):
    """Make the loss nan at a step of the run."""
    loss = trainer.loss

    def poisoned(images, labels):
        value, share = loss(images, labels)
        return value * torch.where(trainer.now[1, 0] == step, float("nan"), 1.0), share

    trainer.loss = poisoned


@pytest.mark.parametrize("name", study.OPTIMIZERS)
def test_weights_stop_at_the_first_step_that_is_not_finite(small, name):
    rate = {"muon": 0.03, "sgd": 0.1, "adamw": 0.003}[name]
    settings = replace(SETTINGS, learning_rate=rate, augment="none")
    nets = [utils.build("NetC", settings) for _ in range(2)]
    whole, stopped = (utils.Trainer(net, small, settings, optimizer=study.OPTIMIZERS[name]) for net in nets)
    poison(stopped, 8)
    for _ in range(2):  # epochs of 6 steps
        for _ in stopped.epoch():
            pass
    first, second = whole.epoch(), whole.epoch()
    for _ in first:
        pass
    next(second), next(second)
    assert all(torch.equal(a, b) for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True))
    with pytest.raises(FloatingPointError, match="diverged in epoch 2, step 3 of 6, at a learning rate of "):
        stopped.check_finite()
    whole.check_finite()


def test_train_says_where_it_diverged(small, tmp_path):
    """With 10 times the largest sensible rate, and no norm to hold it."""
    settings = replace(SETTINGS, learning_rate=10.0, weight_decay=0.0, seed=7)
    said = r"none norm, seed 7, diverged in epoch \d, step \d of 6, at a learning rate of \S+ \(learning_rate is 10.0\)"
    with pytest.raises(FloatingPointError, match=said):
        run(small, tmp_path / "run.pt", settings, "Net")


def test_sweeps_note_what_diverged_and_go_on(small, tmp_path, monkeypatch):
    wild, tame = (replace(SETTINGS, learning_rate=rate, weight_decay=0.0) for rate in (10.0, 0.03))
    jobs = [study.Job("Net", wild), study.Job("Net", tame)]
    steps, step = collections.Counter(), utils.Trainer.step
    monkeypatch.setattr(utils.Trainer, "step", lambda trainer: (steps.update([trainer.settings]), step(trainer)))
    runs = study.run_together("rate", jobs, replace(small, real=True), [False, False])
    assert steps[wild] % 6 == 0  # to the end of the epoch
    assert steps[wild] < steps[tame] == 6 * SETTINGS.epochs
    assert [one.row["status"] for one in runs] == ["diverged", "done"]
    assert [one.row["test_accuracy"] == "" for one in runs] == [True, False]


# ---------------------------------------------------------------------------------------------------------------------
# Killed
# ---------------------------------------------------------------------------------------------------------------------

KILLS = 22
DRIVER = """
import sys; sys.path.insert(0, {root!r})
from dataclasses import replace
import torch, utils
stand_in = utils.draw_stand_in(torch.device("cpu"))
data = replace(stand_in, images=stand_in.images[:400], labels=stand_in.labels[:400],
    test_images=stand_in.test_images[:100], test_labels=stand_in.test_labels[:100])
settings = utils.Settings(epochs=60, batch_size=50, augment="flip+crop")
net = utils.build("NetB", settings)
print("ready", flush=True)
history = utils.train(net, data, settings, checkpoint={path!r})
torch.save([net.state_dict(), [epoch["loss"] for epoch in history]], {result!r})
"""


@pytest.mark.slow
def test_killed_again_and_again(tmp_path):
    """At random moments of training: in the end, the weights of an undisturbed run."""
    assert f"killed {KILLS} times" in (ROOT / "README.md").read_text()

    def start(name):
        driver = DRIVER.format(root=str(ROOT), path=str(tmp_path / f"{name}.ckpt"), result=str(tmp_path / f"{name}.pt"))
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        process = subprocess.Popen([sys.executable, "-c", driver], env=environment, stdout=subprocess.PIPE)
        assert process.stdout.readline() == b"ready\n"
        return process

    process = start("undisturbed")
    process.communicate()
    assert process.returncode == 0
    generator, kills, seen = random.Random(0), 0, []
    while kills < KILLS:
        process = start("killed")
        time.sleep(generator.uniform(0, 0.5))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "it ended before it could be killed: give it more epochs"
        kills += 1
        if (tmp_path / "killed.ckpt").exists():
            seen.append(len(torch.load(tmp_path / "killed.ckpt", weights_only=True)["history"]))
    assert seen == sorted(seen)
    assert 0 < seen[-1] < 60
    process = start("killed")
    process.communicate()
    assert process.returncode == 0
    (expected, losses), (found, resumed) = (
        torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("undisturbed", "killed")
    )
    assert losses == resumed
    assert all(torch.equal(expected[key], found[key]) for key in expected)
