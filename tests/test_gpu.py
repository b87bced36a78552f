"""What needs a CUDA GPU: the captured step, float16, checkpoints, two processes at once, and the time of scoring."""

import gc
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from conftest import ROOT

import study
import utils
from utils import Settings

pytestmark = pytest.mark.gpu
SHORT = Settings(epochs=2, batch_size=500)


@pytest.fixture(scope="module")
def data():
    return utils.draw_stand_in(torch.device("cuda"))


def weights(name, data, settings):
    net = utils.build(name, settings)
    utils.train(net, data, settings, track=False)
    return torch.cat([value.flatten().float() for value in net.state_dict().values()])


@pytest.mark.parametrize("name", list(utils.NORM_OF))
def test_captured_eager_and_repeated_runs_agree_bit_for_bit(name, data, monkeypatch):
    settings = replace(SHORT, augment="flip+crop")
    first = weights(name, data, settings)
    assert torch.equal(first, weights(name, data, settings))
    monkeypatch.setattr(utils.Trainer, "capture", lambda trainer: trainer.step)
    assert torch.equal(first, weights(name, data, settings))


@pytest.mark.parametrize("name", study.OPTIMIZERS)
@pytest.mark.parametrize("variant", [{}, {"layer_variant": "[C,H,W]"}, {"groups": "C"}, {"statistics_batch": 4}])
def test_every_job_of_the_sweeps_is_captured_as_it_runs(data, name, variant):
    net = "NetC" if "groups" in variant else "NetA" if "statistics_batch" in variant else "NetB"
    rate = {"muon": 0.03, "sgd": 0.1, "adamw": 0.003}[name]
    job = study.Job(net, replace(SHORT, learning_rate=rate), name, **variant)
    losses = []
    for capture in (True, False):
        trainer = utils.Trainer(job.build(), data, job.settings, capture=capture, optimizer=study.OPTIMIZERS[name])
        for _ in range(2):
            for _ in trainer.epoch():
                pass
        losses.append(trainer.means()[0])
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)


def test_compiled_and_captured_agree(data):
    """Over eight steps: the compiler chooses kernels by their time, and training makes their rounding grow."""
    few = replace(data, images=data.images[:2000], labels=data.labels[:2000])
    losses = [utils.train(utils.build("NetC", SHORT), few, SHORT, compile=c)[-1]["loss"] for c in (False, True)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("mean", [0, 10])
def test_group_norm_in_float16(groups, mean):
    """Output and gradients against nn.GroupNorm in float64."""
    torch.manual_seed(0)
    norm = torch.nn.GroupNorm(groups, 32).to("cuda", torch.float64)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.uniform_(-1, 1)
    images = torch.randn(16, 32, 8, 8, device="cuda").add(mean).half().contiguous(memory_format=torch.channels_last)
    weights = torch.randn_like(images)
    found = []
    for layer, x in ((norm, images.double()), (utils.ChannelsLastGroupNorm(norm.float()), images.clone())):
        layer.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
        x.requires_grad_()
        norm.zero_grad()
        y = layer(x)
        y.backward(weights.to(y.dtype))
        found.append([tensor.double() for tensor in (y, x.grad, norm.weight.grad, norm.bias.grad)])
    for expected, value in zip(*found, strict=True):
        assert (value - expected).norm() < (0.002 + 0.0006 * mean) * expected.norm()


def test_the_captured_step_stops_where_the_eager_one_does(data):
    settings = replace(SHORT, learning_rate=10.0, weight_decay=0.0)
    found = []
    for capture in (True, False):
        net = utils.build("Net", settings)
        trainer = utils.Trainer(net, data, settings, capture=capture)
        for _ in trainer.epoch():
            pass
        trainer.means()  # waits for the device
        with pytest.raises(FloatingPointError) as error:
            trainer.check_finite()
        weights = torch.cat([p.detach().flatten() for p in net.parameters()])
        assert weights.isfinite().all()
        found.append((weights, str(error.value)))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


def test_no_garbage_is_collected_while_a_step_is_recorded(data, monkeypatch):
    """It may hold another net's graph, and to free that ends the recording."""
    seen, step = [], utils.Trainer.step

    def watched(trainer):
        seen.append((torch.cuda.is_current_stream_capturing(), gc.isenabled()))
        step(trainer)

    monkeypatch.setattr(utils.Trainer, "step", watched)
    utils.Trainer(utils.build("NetA", SHORT), data, SHORT)
    assert (True, False) in seen
    assert (True, True) not in seen
    assert gc.isenabled()


def test_goes_on_from_a_checkpoint(data, tmp_path, monkeypatch):
    settings, path = replace(SHORT, epochs=4, augment="flip+crop"), tmp_path / "run.pt"
    expected = weights("NetC", data, settings)
    save, saved = utils.save, []

    def save_twice(path, write):
        save(path, write)
        saved.append(path)
        if len(saved) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(utils, "save", save_twice)
    with pytest.raises(KeyboardInterrupt):
        utils.train(utils.build("NetC", settings), data, settings, track=False, checkpoint=path)
    monkeypatch.setattr(utils, "save", save)
    net = utils.build("NetC", settings)
    assert len(utils.train(net, data, settings, track=False, checkpoint=path)) == 4
    assert torch.equal(expected, torch.cat([value.flatten().float() for value in net.state_dict().values()]))


CELLS = """
import sys, utils
from pathlib import Path
data = utils.draw_stand_in(utils.pick_device())
plan = utils.Plan(seeds=(0,), epochs=3, data="synthetic", publish=False, out=Path(sys.argv[1]))
for name, norm in (("NetA", "batch"), ("NetB", "layer"), ("NetC", "group")):
    runs = [utils.run(name, data, utils.Settings(epochs=3), checkpoints=plan.checkpoints)]
    utils.save_experiment(runs, data, plan)
    utils.plot_mistakes(name, runs[0].scores, data, plan.folder("img") / f"{norm}.png")
"""


def test_two_notebooks_share_the_gpu(tmp_path):
    """Two processes that do at the same time what the notebook's cells do: both finish, with the same rows."""
    command = [sys.executable, "-c", CELLS]
    both = [subprocess.Popen([*command, str(tmp_path / name)], cwd=ROOT) for name in ("one", "two")]
    assert [process.wait(300) for process in both] == [0, 0]
    rows = [
        utils.read_rows(tmp_path / name / "results" / "runs.csv").drop(columns="seconds") for name in ("one", "two")
    ]
    assert rows[0].equals(rows[1])
    assert len(rows[0]) == 3


def test_data_on_two_devices(data):
    with pytest.raises(ValueError, match="test_images are on cpu, images on cuda:0; move one"):
        replace(data, test_images=data.test_images.cpu(), test_labels=data.test_labels.cpu())


def test_one_step_an_epoch(data):
    weights("NetA", data, replace(SHORT, batch_size=10_000))


def test_scoring_is_fast(data):
    images, labels = data.images[:10_000], data.labels[:10_000]
    for name in ("NetA", "NetC"):
        net = utils.build(name, SHORT).to("cuda", memory_format=torch.channels_last)
        utils.test(net, images, labels)
        started = time.perf_counter()
        utils.test(net, images, labels)
        assert time.perf_counter() - started < 0.5
