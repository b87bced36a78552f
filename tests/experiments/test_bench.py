"""What is timed beside the plain loop, how it is scaled up, and the rows that say so."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from conftest import ROOT

import utils
from engine import records
from engine.trainer import Trainer
from experiments import bench

SMALL = utils.Settings(batch_size=100)


def test_bytes_of_a_step_by_hand():
    """One 3x3 convolution with norm and activation, 3 channels in and 8 out; then a pool."""
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.BatchNorm2d(8), torch.nn.SiLU())
    read, written = 3 * 32 * 32, 8 * 32 * 32
    expected = 3 * read + 3 * written + 8 * written + 5 * written
    assert bench.step_bytes(net, 10) == 10 * 2 * expected
    pool = 2 * (written + written // 4)
    assert bench.step_bytes(net.append(torch.nn.AvgPool2d(2)), 10) == 10 * 2 * (expected + pool)


def test_a_fused_step_moves_each_tensor_once_for_each_reader():
    """Two layers of 10 and 3 bytes of output: written once, read by three and by two; their gradients by one."""

    def layer(before, x, dy, y):
        parts = {name: SimpleNamespace(nbytes=size) for name, size in (("x", x), ("dy", dy), ("y", y))}
        return SimpleNamespace(before=before, pool=1, **parts)

    first = layer(None, 10, 5, 100)
    fused = SimpleNamespace(layers=[first, layer(first, 3, 1, 1000)])
    assert bench.fused_bytes(fused) == (1 + 3) * 10 + (1 + 1) * 5 + (1 + 1) * 100 + (1 + 2) * 3 + (1 + 1) * 1


def test_fast_path_is_the_trainer(small):
    loop = bench.TrainerLoop("NetC", small, SMALL, images=300, at_once=2)
    assert loop.steps == 3
    assert loop.setup_seconds > 0
    assert len(loop.trainers) == 2
    before = loop.trainers[1].net.C2.conv.weight.clone()
    assert loop.epoch() > 0
    assert not torch.equal(before, loop.trainers[1].net.C2.conv.weight)


@pytest.fixture
def clock(monkeypatch):
    """Let each look at the clock of the benchmark come a second after the one before."""
    seconds = itertools.count()
    monkeypatch.setattr(bench.time, "perf_counter", lambda: float(next(seconds)))


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize(("images", "at_once", "seconds"), [(600, 1, 1), (300, 1, 2), (300, 2, 1), (600, 2, 0.5)])
def test_a_part_of_an_epoch_is_scaled_up_for_each_net(small, images, at_once, seconds):
    loop = bench.TrainerLoop("Net", small, SMALL, images, at_once=at_once)
    assert loop.epoch() == pytest.approx(seconds)


@pytest.mark.usefixtures("real", "clock")
def test_plain_loop_scales_a_part_of_an_epoch(cpu):
    loop = bench.PlainLoop("NetB", cpu, 0, images=256, root=ROOT / "data")
    before = loop.net.C2.conv.weight.clone()
    assert loop.epoch() == pytest.approx(391 / 2)  # two of its 391 steps in a second
    assert not torch.equal(before, loop.net.C2.conv.weight)


def test_rows_have_the_agreed_columns_and_replace_each_other(small, tmp_path):
    row = bench.row_of(small, "eager", "NetA", [3.0, 1.0, 2.0], SMALL, peak_memory_mib=5)
    assert list(row) == list(pd.read_csv(ROOT / "results" / "bench.csv"))
    assert (row["seconds_per_epoch"], row["seconds_min"], row["seconds_max"]) == (2.0, 1.0, 3.0)
    assert (row["batch_size"], row["train_images"], row["peak_memory_mib"]) == (100, 600, 5)
    for one in (row, {**row, "seconds_per_epoch": 7.0}, {**row, "path": "captured"}):
        records.upsert(tmp_path / "bench.csv", [one], bench.KEY)
    found = pd.read_csv(tmp_path / "bench.csv")
    assert found["seconds_per_epoch"].tolist() == [7.0, 2.0]


def test_rows_of_the_plain_loop_name_its_batch_and_precision(small):
    row = bench.row_of(small, "plain-4", "NetA", [1.0], SMALL)
    assert (row["batch_size"], row["precision"]) == (bench.PLAIN_BATCH, "float32")


def test_published_speed():
    """Every published path is measured and faster than the plain loop."""
    rows = pd.read_csv(ROOT / "results" / "bench.csv")
    for device, path in (("NVIDIA", "captured"), ("NVIDIA", "fused"), ("cpu", "eager")):
        found = rows[rows["device"].str.startswith(device) & (rows["path"] == path)]
        assert sorted(found["net"]) == ["NetA", "NetB", "NetC"]
        assert (found["ratio_plain_4"] > 1).all()
        assert (found["seconds_min"] <= found["seconds_per_epoch"]).all()
        assert (found["seconds_per_epoch"] <= found["seconds_max"]).all()
    assert not rows["commit"].str.contains("+", regex=False).any()


@pytest.mark.parametrize(("wrong", "named"), [(None, None), ("capture", "captured"), ("fused", "fused")])
def test_a_path_that_computes_something_else_is_named(small, monkeypatch, capsys, wrong, named):
    """A path trains with random labels here; the fused one may differ by rounding, so only by its loss is known."""
    few = replace(small, images=small.images[:500], labels=torch.zeros_like(small.labels[:500]))
    shuffled = replace(few, labels=torch.arange(500) % 10)

    def trainer(net, data, settings, fused=None, capture=True):
        path = "fused" if fused is None else "capture" if capture else "eager"
        return Trainer(net, shuffled if path == wrong else few, settings)

    monkeypatch.setattr(bench, "Trainer", trainer)
    monkeypatch.setattr(bench, "NORM_OF", {"NetC": "group"})
    if wrong:
        with pytest.raises(SystemExit, match=f"^NetC: the {named} step does not compute what the eager one does$"):
            bench.check(few)
    else:
        bench.check(few)
        assert capsys.readouterr().out.count("weights 0.0e+00 from eager's") == 3


def test_unknown_option():
    with pytest.raises(SystemExit):
        bench.main(["--nonsense"])


@pytest.mark.parametrize("epochs", ["0", "-1"])
def test_no_epochs_end_in_one_line(monkeypatch, capsys, epochs):
    monkeypatch.setattr(bench, "load_data", lambda *arguments: pytest.fail("it was measured"))
    with pytest.raises(SystemExit):
        bench.main(["--epochs", epochs])
    assert f"error: epochs is {epochs}; give a whole number from 1" in capsys.readouterr().err.splitlines()[-1]


def test_every_path_of_every_net_is_measured(small, monkeypatch, tmp_path):
    """On few synthetic images, with no loop that needs CIFAR-10's files and on a CPU."""

    class PlainLoop(bench.TrainerLoop):
        def __init__(self, name, device, workers, images):
            super().__init__(name, small, SMALL, images)

    monkeypatch.setattr(bench, "load_data", lambda *arguments: small)
    monkeypatch.setattr(bench, "BENCH", tmp_path / "bench.csv")
    monkeypatch.setattr(bench, "copy_bandwidth", lambda device: 1e9)
    monkeypatch.setattr(bench, "Settings", lambda **changes: SMALL)
    monkeypatch.setattr(bench, "PlainLoop", PlainLoop)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    bench.main(["--epochs", "1"])
    rows = pd.read_csv(tmp_path / "bench.csv")
    found = sorted(zip(rows["net"], rows["path"], strict=True))
    assert found == sorted(itertools.product(utils.NETS, ("eager", "plain-0", "plain-4")))
    assert rows["seconds_per_epoch"].gt(0).all()
    assert rows[rows["path"] == "eager"]["ratio_plain_4"].gt(0).all()


def test_absent_data_end_in_one_line(monkeypatch, capsys):
    def absent(*arguments):
        raise OSError("CIFAR-10 is not in data/: download it")

    monkeypatch.setattr(bench, "load_data", absent)
    with pytest.raises(SystemExit):
        bench.main([])
    assert "error: CIFAR-10 is not in data/: download it" in capsys.readouterr().err.splitlines()[-1]
