from dataclasses import replace

import pandas as pd
import pytest
import torch
from conftest import ROOT

import bench
import utils

SMALL = utils.Settings(batch_size=100)


def test_bytes_of_a_step_by_hand():
    """One 3x3 convolution with norm and activation, 4x4 pixels: 3 planes in, 8 out."""
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.BatchNorm2d(8), torch.nn.SiLU())
    read, written = 3 * 32 * 32, 8 * 32 * 32
    expected = 3 * read + 3 * written + 8 * written + 5 * written
    assert bench.step_bytes(net, 10) == 10 * 2 * expected


def test_fast_path_is_the_trainer(small):
    loop = bench.Fast("NetC", small, SMALL, images=300)
    assert loop.steps == 3
    assert loop.setup_seconds > 0
    before = loop.trainers[0].net.C2.conv.weight.clone()
    assert loop.epoch() > 0
    assert not torch.equal(before, loop.trainers[0].net.C2.conv.weight)


def test_plain_path_scales_a_part_of_an_epoch(real, cpu):
    seconds = bench.Plain("NetB", cpu, 0, images=256, root=ROOT / "data").epoch()
    assert 2 < seconds < 1000  # 391 steps


def test_rows_have_the_agreed_columns_and_replace_each_other(small, tmp_path):
    rows = [bench.row_of(small, "eager", "NetA", [3.0, 1.0, 2.0], SMALL, peak_memory_mib=5)]
    assert list(rows[0]) == list(pd.read_csv(ROOT / "results" / "bench.csv"))
    assert (rows[0]["seconds_per_epoch"], rows[0]["seconds_min"], rows[0]["seconds_max"]) == (2.0, 1.0, 3.0)
    for row in (rows[0], {**rows[0], "seconds_per_epoch": 7.0}, {**rows[0], "path": "captured"}):
        utils.put_rows(tmp_path / "bench.csv", [row], bench.KEY)
    found = pd.read_csv(tmp_path / "bench.csv")
    assert found["seconds_per_epoch"].tolist() == [7.0, 2.0]


def test_published_speed():
    """What the issue of speed is about: every published path is measured and faster than the plain loop."""
    rows = pd.read_csv(ROOT / "results" / "bench.csv")
    for device, path in (("NVIDIA", "captured"), ("NVIDIA", "compiled"), ("cpu", "eager")):
        found = rows[rows["device"].str.startswith(device) & (rows["path"] == path)]
        assert sorted(found["net"]) == ["NetA", "NetB", "NetC"]
        assert (found["ratio_plain_4"] > 1).all()
        assert (found["seconds_min"] <= found["seconds_per_epoch"]).all()
        assert (found["seconds_per_epoch"] <= found["seconds_max"]).all()
    assert not rows["commit"].str.contains("+", regex=False).any()


def test_scaling_plot_shows_every_row(small):
    rows = [
        bench.row_of(replace(small), "scale", net, [0.1 * size], SMALL, dram_model_seconds=0.01)
        | {"batch_size": size, "train_images": 50_000, "launches_per_step": 200}
        for net in ("NetA", "NetC")
        for size in (250, 500, 1000)
    ]
    figure = bench.plot_scaling(pd.DataFrame(rows))
    lines = figure.axes[0].lines
    assert [list(line.get_xdata()) for line in lines[1::3]] == [[250, 500, 1000]] * 2
    launches = [25, 12.5, 6.25]  # seconds: all of those of the smallest batch, and in proportion to the steps
    assert [list(line.get_ydata()) for line in lines[::3]] == [pytest.approx(launches)] * 2
    assert [list(line.get_ydata()) for line in lines[2::3]] == [[0.01] * 3] * 2


def test_unknown_option():
    with pytest.raises(SystemExit):
        bench.main(["--nonsense"])
