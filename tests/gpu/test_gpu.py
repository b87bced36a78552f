"""What needs a CUDA GPU: the captured step, float16, checkpoints, two processes at once, memory, and time."""

import gc
import itertools
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from conftest import RATES, ROOT

import models
import utils
from engine import checkpoints, fast, records
from engine.data import synthetic_data
from engine.trainer import OPTIMIZERS, Trainer, print_once
from experiments.variants import Experiment
from utils import Settings

pytestmark = pytest.mark.gpu
SHORT = Settings(epochs=2, batch_size=500)


@pytest.fixture(scope="module")
def data():
    return synthetic_data(torch.device("cuda"))


def flat(net):
    return torch.cat([value.detach().flatten().float() for value in net.state_dict().values()])


def trained(name, data, settings, fused=None):
    net = utils.build(name, settings)
    utils.train(net, data, settings, track=False, fused=fused)
    return flat(net)


# ---------------------------------------------------------------------------------------------------------------------
# The captured step
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("batch_size", [500, 130])
@pytest.mark.parametrize("name", models.NORM_OF)
def test_captured_eager_and_repeated_runs_agree_bit_for_bit(name, data, monkeypatch, batch_size, fused):
    settings = replace(SHORT, augment="flip+crop", batch_size=batch_size)
    first = trained(name, data, settings, fused)
    assert torch.equal(first, trained(name, data, settings, fused))
    monkeypatch.setattr(Trainer, "capture", lambda trainer: trainer.compute_step)
    assert torch.equal(first, trained(name, data, settings, fused))


def test_a_gpu_takes_the_fused_step_by_itself_and_says_why_where_it_does_not(data, capsys):
    print_once.cache_clear()
    assert Trainer(utils.build("NetA", SHORT), data, SHORT).fused
    capsys.readouterr()  # of the compiler
    assert not Trainer(utils.build("NetA", SHORT), data, SHORT, fused=False).fused
    assert capsys.readouterr().out == ""
    one = Experiment(net="NetB", layer_variant="C")
    assert not Trainer(one.build(), data, one).fused
    assert capsys.readouterr().out == "training without the fused step: there is no kernel for LayerNorm2d\n"


VARIANTS = [
    {"net": "NetB"},
    {"net": "NetB", "layer_variant": "C"},
    {"net": "NetB", "layer_variant": "[C,H,W]"},
    {"net": "NetC", "groups": "C"},
    {"net": "NetA", "statistics_batch": 5},
    {"net": "NetB", "layer_variant": "RMS"},
    {"net": "NetB", "layer_variant": "tanh"},
    {"net": "Net", "convolution": "standardized"},
]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_every_experiment_is_captured_as_it_runs(data, optimizer, variant):
    rate = RATES[optimizer] / 10  # none diverges, not even the net without a norm
    one = Experiment(epochs=2, optimizer=optimizer, learning_rate=rate, **variant)
    losses = []
    for capture in (True, False):
        trainer = Trainer(one.build(), data, one, capture=capture)
        for _ in range(2):
            for _ in trainer.epoch():
                pass
        losses.append(trainer.means()[0])
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)


def test_a_net_with_code_of_its_own_trains_step_by_step(data, capsys):
    """A graph would call its forward once."""

    class Counting(torch.nn.SiLU):
        calls = 0

        def forward(self, x):
            self.calls += self.training
            return super().forward(x)

    print_once.cache_clear()
    net = utils.build("NetB", SHORT)
    net.C5.activation = Counting()
    trainer = Trainer(net, data, SHORT)
    for _ in trainer.epoch():
        pass
    assert net.C5.activation.calls == trainer.steps_per_epoch
    reason = "C5.activation is a Counting, which does not say state_in_buffers = True"
    assert capsys.readouterr().out == f"training in float32, step by step: {reason}\n"


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_recording_leaves_net_and_state_as_they_were(data, optimizer):
    settings = replace(SHORT, optimizer=optimizer, learning_rate=RATES[optimizer])
    net = utils.build("NetA", settings).cuda()
    before, trainer = flat(net), None
    trainer = Trainer(net, data, settings)
    assert torch.equal(flat(net), before)
    assert trainer.optimizer_tensors()
    assert all((tensor == 0).all() for tensor in trainer.optimizer_tensors())
    assert (trainer.counts == 0).all()
    captured = Trainer(net, data, settings, fused=False)
    assert torch.equal(flat(net), before)
    assert len(captured.copied) == 12


@pytest.mark.parametrize("fused", [None, False])
def test_weights_that_are_loaded_late_are_trained_and_moved_ones_refused(data, fused):
    found = []
    for late in (True, False):
        net, loaded = utils.build("NetA", SHORT), utils.build("NetA", replace(SHORT, seed=7)).state_dict()
        if not late:
            net.load_state_dict(loaded)
        trainer = Trainer(net, data, SHORT, fused)
        if late:
            net.load_state_dict(loaded)
        for _ in trainer.epoch():
            pass
        assert trainer.means()[0] > 0
        found.append(flat(net))
    assert torch.equal(*found)
    net.cpu().cuda()
    with pytest.raises(ValueError, match="the net was changed since"):
        next(trainer.epoch())


@pytest.mark.parametrize("name", models.NORM_OF)
def test_the_fused_step_trains_as_the_captured_one_does(data, name):
    """By the mean loss of each of two epochs, since training makes rounding grow."""
    settings = replace(SHORT, augment="flip+crop")
    losses = []
    for fused in (True, False):
        history = utils.train(utils.build(name, settings), data, settings, track=False, fused=fused)
        losses.append([epoch["loss"] for epoch in history])
    assert losses[0] == pytest.approx(losses[1], abs=0.02)


@pytest.mark.parametrize("fused", [None, False])
def test_the_captured_step_stops_where_the_eager_one_does(data, fused):
    settings = replace(SHORT, learning_rate=10.0, weight_decay=0.0)
    found = []
    for capture in (True, False):
        net = utils.build("Net", settings)
        trainer = Trainer(net, data, settings, fused, capture=capture)
        for _ in trainer.epoch():
            pass
        trainer.means()  # waits for the device
        with pytest.raises(FloatingPointError) as error:
            trainer.check_finite()
        assert flat(net).isfinite().all()
        found.append((flat(net), str(error.value)))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


def test_no_garbage_is_collected_while_a_step_is_recorded(data, monkeypatch):
    """It may hold another net's graph, and to free that ends the recording."""
    seen, step = [], Trainer.compute_step

    def watched(trainer):
        seen.append((torch.cuda.is_current_stream_capturing(), gc.isenabled()))
        step(trainer)

    monkeypatch.setattr(Trainer, "compute_step", watched)
    Trainer(utils.build("NetA", SHORT), data, SHORT, fused=False)
    assert (True, False) in seen
    assert (True, True) not in seen
    assert gc.isenabled()


def test_nothing_waits_for_the_gpu_within_an_epoch(data):
    trainer = Trainer(utils.build("NetC", SHORT), data, replace(SHORT, augment="flip+crop"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in trainer.epoch():
            pass
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert trainer.means()[0] > 0


@pytest.mark.parametrize("fused", [None, False])
def test_what_follows_an_epoch_waits_for_it(data, fused):
    """Weights that are read, loaded or changed, without a word to the trainer, which has enqueued all steps."""
    settings, found = replace(SHORT, batch_size=50), []
    other = {name: value.cuda() for name, value in utils.build("NetA", replace(SHORT, seed=7)).state_dict().items()}
    for wait in (False, True):
        net = utils.build("NetA", settings)
        trainer = Trainer(net, data, settings, fused)
        for left in (None, 9):  # all of an epoch; the first steps of another
            for _ in itertools.islice(trainer.epoch(), left):
                pass
            if wait:
                torch.cuda.synchronize()
            found.append(flat(net))
            net.load_state_dict(other)
            torch.cuda.synchronize()
            found.append(flat(net))
    for hurried, patient in zip(found[:4], found[4:], strict=True):
        assert torch.equal(hurried, patient)


def test_one_step_an_epoch(data):
    trained("NetA", data, replace(SHORT, batch_size=10_000))


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("mean", [0, 10])
def test_group_norm_in_float16(groups, mean):
    """Output and gradients against nn.GroupNorm in float64, closer than engine/test_fast.py asks for."""
    torch.manual_seed(0)
    norm = torch.nn.GroupNorm(groups, 32).to("cuda", torch.float64)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.uniform_(-1, 1)
    images = torch.randn(16, 32, 8, 8, device="cuda").add(mean).half().contiguous(memory_format=torch.channels_last)
    gradient = torch.randn_like(images)
    found = []
    for layer, x in ((norm, images.double()), (fast.ChannelsLastGroupNorm(norm.float()), images.clone())):
        layer.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
        x.requires_grad_()
        norm.zero_grad()
        y = layer(x)
        y.backward(gradient.to(y.dtype))
        found.append([tensor.double() for tensor in (y, x.grad, norm.weight.grad, norm.bias.grad)])
    for expected, value in zip(*found, strict=True):
        assert (value - expected).norm() < (0.002 + 0.0006 * mean) * expected.norm()


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", ["NetA", "NetC"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_interrupted_run_resumes_bit_for_bit(data, tmp_path, monkeypatch, optimizer, name, fused):
    settings = Settings(epochs=4, augment="flip+crop", optimizer=optimizer, learning_rate=RATES[optimizer])
    path, write = tmp_path / "run.pt", checkpoints.write_checkpoint
    whole = utils.build(name, settings)
    utils.train(whole, data, settings, track=False, fused=fused)

    def write_two(path, run, history, state):
        write(path, run, history, state)
        if len(history) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "write_checkpoint", write_two)
    net = utils.build(name, settings)
    with pytest.raises(KeyboardInterrupt):
        utils.train(net, data, settings, track=False, fused=fused, checkpoint=path)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="number format"):
        utils.train(net, data, settings, track=False, fused=not fused, checkpoint=path)
    assert len(utils.train(net, data, settings, track=False, fused=fused, checkpoint=path)) == 4
    assert torch.equal(flat(whole), flat(net))


def test_no_enqueued_step_writes_after_an_interrupted_call_has_restored_the_net(data, tmp_path, monkeypatch):
    settings = Settings(epochs=20, batch_size=100)
    epoch, left = Trainer.epoch, 90

    def interrupted(trainer):
        nonlocal left
        for _ in epoch(trainer):
            left -= 1
            if left == 0:
                raise KeyboardInterrupt  # with many steps in the queue
            yield

    monkeypatch.setattr(Trainer, "epoch", interrupted)
    net = utils.build("NetC", settings)
    with pytest.raises(KeyboardInterrupt):
        utils.train(net, data, settings, checkpoint=tmp_path / "run.pt")
    torch.cuda.synchronize()
    assert torch.equal(flat(net), flat(utils.build("NetC", settings).cuda()))


# ---------------------------------------------------------------------------------------------------------------------
# Processes, devices, memory and time
# ---------------------------------------------------------------------------------------------------------------------

CELLS = """
import sys
import utils
from pathlib import Path
from engine.data import synthetic_data
data, folder = synthetic_data(utils.pick_device("cuda:0")), Path(sys.argv[1])
for name in utils.NETS:
    runs = [utils.run(name, data, utils.Settings(epochs=3), checkpoints=folder / "checkpoints")]
    utils.save_runs(runs, data, folder)
    utils.plot_mistakes(runs[0], data, folder / "img" / f"{runs[0].row['norm']}.png")
"""


def test_two_notebooks_share_the_gpu(tmp_path):
    """Two processes that do at the same time what the notebook's cells do: both finish, with the same rows."""
    command = [sys.executable, "-c", CELLS]
    both = [subprocess.Popen([*command, str(tmp_path / name)], cwd=ROOT) for name in ("one", "two")]
    assert [process.wait(300) for process in both] == [0, 0]
    rows = [
        records.read_rows(tmp_path / name / "results" / "runs.csv").drop(columns="seconds") for name in ("one", "two")
    ]
    assert rows[0].equals(rows[1])
    assert len(rows[0]) == 3
    assert len(list(tmp_path.glob("*/img/*.png"))) == 6


def test_data_on_two_devices_are_refused(data):
    with pytest.raises(ValueError, match="test_images are on cpu, images on cuda:0; move one"):
        replace(data, test_images=data.test_images.cpu(), test_labels=data.test_labels.cpu())


def test_a_second_gpu_trains_as_the_first_does(data):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    found = [trained("NetC", synthetic_data(utils.pick_device(f"cuda:{number}")), SHORT).cpu() for number in (0, 1)]
    assert torch.equal(*found)


def test_what_leaves_a_test_is_on_the_cpu(data):
    scores = utils.test(utils.build("NetA", SHORT).cuda(), data.test_images, data.test_labels)
    assert (scores.predictions.device.type, scores.confidences.device.type) == ("cpu", "cpu")


def test_a_batch_beyond_the_gpus_memory_is_named(data):
    n = 300_000
    many = replace(data, images=data.images[:1].expand(n, -1, -1, -1), labels=data.labels[:1].expand(n))
    net = models.NetA(widths=(512,) * 10)
    with pytest.raises(
        MemoryError, match=r"^batch_size is 300000: that takes more than the memory of cuda:0; try 150000$"
    ):
        utils.train(net, many, Settings(batch_size=n))
    gc.collect()
    torch.cuda.empty_cache()


def test_gpu_memory_after_many_runs(data):
    settings, held = Settings(epochs=2, batch_size=100, augment="flip+crop"), []
    few = replace(data, images=data.images[:2000], labels=data.labels[:2000])
    for seed in range(30):
        utils.train(utils.build("NetC", replace(settings, seed=seed)), few, settings, track=False)
        gc.collect()
        torch.cuda.empty_cache()
        held.append(torch.cuda.memory_reserved())
    assert held[-1] <= held[5] + 2**24, held


def test_scoring_is_fast(data):
    images, labels = data.images[:10_000], data.labels[:10_000]
    for name in ("NetA", "NetC"):
        net = utils.build(name, SHORT).to("cuda", memory_format=torch.channels_last)
        utils.test(net, images, labels)
        started = time.perf_counter()
        utils.test(net, images, labels)
        assert time.perf_counter() - started < 0.5
