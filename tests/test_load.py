"""Many runs in one process, and two notebooks' worth of writers: nothing leaks, slows down or gets lost."""

import gc
import resource
import statistics
import time
from dataclasses import replace

import pytest
import torch

import utils

SETTINGS = utils.Settings(epochs=2, batch_size=100, augment="flip+crop")


def resident():
    """Bytes that this process holds now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


@pytest.mark.slow
def test_two_hundred_runs(small, tmp_path):
    seconds, sizes = [], []
    for number in range(200):
        started = time.perf_counter()
        one = utils.run("NetC", small, replace(SETTINGS, seed=number % 7), "main", checkpoints=tmp_path)
        utils.put_rows(tmp_path / "runs.csv", [one.row])
        (tmp_path / f"NetC-{number % 7}.pt").unlink()
        seconds.append(time.perf_counter() - started)
        gc.collect()
        sizes.append(resident())
    assert sizes[-1] - sizes[20] < 100e6, f"it grew by {(sizes[-1] - sizes[20]) / 1e6:.0f} MB"
    assert statistics.median(seconds[-10:]) < 1.5 * statistics.median(seconds[5:15])
    assert len(utils.read_rows(tmp_path / "runs.csv")) == 7  # the same seed replaces its row


@pytest.mark.gpu
def test_gpu_memory_after_many_runs():
    data = utils.draw_stand_in(torch.device("cuda"))
    held = []
    for seed in range(30):
        utils.train(utils.build("NetC", replace(SETTINGS, seed=seed)), data, SETTINGS, track=False)
        gc.collect()
        torch.cuda.empty_cache()
        held.append(torch.cuda.memory_reserved())
    assert held[-1] <= held[5] + 2**24, held
