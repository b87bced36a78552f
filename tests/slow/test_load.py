"""Many runs in one process, and runs that are killed or stopped: nothing leaks, slows down or gets lost."""

import gc
import os
import random
import resource
import signal
import statistics
import subprocess
import sys
import time
import weakref
from dataclasses import replace

import pytest
import torch
from conftest import ROOT

import utils
from engine import records
from engine.data import synthetic_data
from engine.trainer import Trainer

pytestmark = pytest.mark.slow
SETTINGS = utils.Settings(epochs=2, batch_size=100, augment="flip+crop")


def resident():
    """Bytes that this process holds now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_two_hundred_runs_in_one_process(small, tmp_path):
    """Nobody calls the garbage collector after each run, nor does this."""
    data, seconds, sizes = small, [], []
    for number in range(200):
        started = time.perf_counter()
        one = utils.run("NetC", data, replace(SETTINGS, seed=number % 7), checkpoints=tmp_path / "checkpoints")
        utils.save_runs([one], data, tmp_path)
        seconds.append(time.perf_counter() - started)
        sizes.append(resident())
    assert sizes[-1] - sizes[20] < 100e6, f"it grew by {(sizes[-1] - sizes[20]) / 1e6:.0f} MB"
    assert statistics.median(seconds[-30:]) < 1.5 * statistics.median(seconds[5:35])
    assert len(records.read_rows(tmp_path / "results" / "runs.csv")) == 7  # the same seed replaces its row


@pytest.mark.parametrize("optimizer", ["muon", "sgd", "adamw"])
@pytest.mark.parametrize("name", utils.NETS)
def test_a_trainer_is_freed_without_the_collector(small, name, optimizer):
    data, settings = small, replace(SETTINGS, optimizer=optimizer, epochs=1)
    gc.collect()
    gc.disable()
    try:
        trainer = Trainer(utils.build(name, settings), data, settings)
        for _ in trainer.epoch():
            pass
        trainer.load_state_dict(trainer.state_dict())
        kept = [weakref.ref(value) for value in (trainer, trainer.net, trainer.model, trainer.optimizer, trainer.order)]
        del trainer
        assert [reference() for reference in kept] == [None] * len(kept)
    finally:
        gc.enable()


@pytest.mark.gpu
def test_gpu_memory_after_many_runs():
    data, held = synthetic_data(torch.device("cuda")), []
    for seed in range(30):
        settings = replace(SETTINGS, seed=seed)
        utils.train(utils.build("NetC", settings), data, settings, track=False)
        torch.cuda.empty_cache()
        held.append(torch.cuda.memory_reserved())
    assert held[-1] <= held[5] + 2**24, held


# ---------------------------------------------------------------------------------------------------------------------
# Killed and stopped
# ---------------------------------------------------------------------------------------------------------------------

KILLS = 22
DRIVER = """
import sys; sys.path.insert(0, {root!r})
from dataclasses import replace
import torch, utils
from engine.data import synthetic_data
data = synthetic_data(torch.device("cpu"))
data = replace(data, images=data.images[:400], labels=data.labels[:400],
    test_images=data.test_images[:100], test_labels=data.test_labels[:100])
settings = utils.Settings(epochs=60, batch_size=50, augment="flip+crop")
net = utils.build("NetB", settings)
utils.CHECKPOINT_SECONDS = 0
print("ready", flush=True)
history = utils.train(net, data, settings, checkpoint={path!r})
torch.save([net.state_dict(), [epoch["loss"] for epoch in history]], {result!r})
"""


@pytest.fixture
def start(tmp_path):
    """Start a run in a process of its own, which is there once this returns."""

    def start(name):
        driver = DRIVER.format(root=str(ROOT), path=str(tmp_path / f"{name}.ckpt"), result=str(tmp_path / f"{name}.pt"))
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        process = subprocess.Popen([sys.executable, "-c", driver], env=environment, stdout=subprocess.PIPE)
        assert process.stdout.readline() == b"ready\n"
        return process

    return start


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL")
def test_killed_and_stopped_runs_end_with_the_weights_of_an_undisturbed_one(tmp_path, start):
    process, started = start("undisturbed"), time.perf_counter()
    while process.poll() is None and not (tmp_path / "undisturbed.ckpt").exists():
        time.sleep(0.005)
    first = time.perf_counter() - started
    process.communicate()
    assert process.returncode == 0
    # Seconds, on however slow a machine: to the first checkpoint, before the first epoch, and two epochs of 60.
    longest = first + max(0.5, (time.perf_counter() - started - first) / 30)
    print(f"{first:.2f} s to the first checkpoint, {longest:.2f} s to the last kill")

    generator, seen = random.Random(0), []
    for _ in range(KILLS):
        process = start("killed")
        time.sleep(generator.uniform(0, longest))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "it ended before it could be killed: give it more epochs"
        if (tmp_path / "killed.ckpt").exists():
            seen.append(len(torch.load(tmp_path / "killed.ckpt", weights_only=True)["history"]))
    assert seen == sorted(seen)
    assert 0 < seen[-1] < 60
    process = start("killed")
    process.communicate()
    assert process.returncode == 0

    process, stops = start("stopped"), 0
    while process.poll() is None:
        process.send_signal(signal.SIGSTOP)
        time.sleep(0.05)
        process.send_signal(signal.SIGCONT)
        time.sleep(0.1)
        stops += 1
    assert process.returncode == 0
    assert stops > 10

    expected, losses = torch.load(tmp_path / "undisturbed.pt", weights_only=True)
    for name in ("killed", "stopped"):
        found, resumed = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        assert losses == resumed
        assert all(torch.equal(expected[key], found[key]) for key in expected)
    assert not list(tmp_path.glob(".*.part*")), "half a file of a killed process is left"
