"""Settings, training and its checkpoints, testing, runs and their tables, and the grid of mistakes."""

import copy
import enum
import math
import re
import warnings
from dataclasses import FrozenInstanceError, asdict, fields, replace
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import first_images, same
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import same_color
from PIL import Image
from torch import nn
from torch.nn.utils import prune

import models
import utils
from engine import checkpoints, fast, hashes, records
from engine.data import Data, normalize
from engine.figures import COLORS
from engine.statistics import contrast
from engine.trainer import Trainer
from utils import Scores, Settings

SHORT = Settings(epochs=2, batch_size=50)
LONG = Settings(epochs=4, batch_size=50, augment="flip+crop")
NARROW = (8,) * 10


@pytest.fixture(scope="session")
def tiny(small):
    """150 training and 50 test images of the synthetic data."""
    return first_images(small, 150, 50)


# ---------------------------------------------------------------------------------------------------------------------
# Settings and devices
# ---------------------------------------------------------------------------------------------------------------------

HUGE = 10**5000 - 1  # Python prints no whole number of so many digits
REFUSED = [
    ({"learning_rate": 0}, "learning_rate is 0; give a number above 0"),
    ({"learning_rate": -1.0}, "learning_rate is -1.0; give a number from 0 to 10"),
    ({"learning_rate": 11}, "learning_rate is 11"),
    ({"learning_rate": math.nan}, "learning_rate is nan"),
    ({"learning_rate": math.inf}, "learning_rate is inf"),
    ({"learning_rate": "0.1"}, "learning_rate is '0.1'"),
    ({"learning_rate": None}, "learning_rate is None"),
    ({"learning_rate": True}, "learning_rate is True"),
    ({"learning_rate": [0.1]}, "learning_rate is [0.1]"),
    ({"learning_rate": 1j}, "learning_rate is 1j"),
    ({"learning_rate": HUGE}, "learning_rate is a number of over 30 digits"),
    ({"weight_decay": -0.1}, "weight_decay is -0.1; give a number from 0 to 100"),
    ({"weight_decay": math.nan}, "weight_decay is nan"),
    ({"weight_decay": 1000}, "weight_decay is 1000"),
    ({"weight_decay": "none"}, "weight_decay is 'none'"),
    ({"momentum": 1.01}, "momentum is 1.01; give a number from 0 to 0.999"),
    ({"momentum": -0.5}, "momentum is -0.5"),
    ({"momentum": None}, "momentum is None"),
    ({"momentum": 0, "optimizer": "sgd"}, "momentum is 0; give a number above 0"),
    ({"label_smoothing": 1.1}, "label_smoothing is 1.1; give a number from 0 to 1"),
    ({"warmup": 0}, "warmup is 0; give a number above 0"),
    ({"warmup": 1}, "warmup is 1; give a number from 0 to 0.99"),
    ({"crop": 17}, "crop is 17; give a whole number from 0 to 16"),
    ({"optimizer": "lion"}, "optimizer is 'lion'; choose one of muon, sgd, sgdw, adamw"),
    ({"optimizer": "Muon"}, "optimizer is 'Muon'"),
    ({"optimizer": torch.optim.SGD}, "optimizer is <class"),
    ({"batch_size": 0}, "batch_size is 0; give a whole number from 1 to"),
    ({"batch_size": -5}, "batch_size is -5"),
    ({"batch_size": 2.0}, "batch_size is 2.0"),
    ({"batch_size": "500"}, "batch_size is '500'"),
    ({"batch_size": 2**40}, f"batch_size is {2**40}"),
    ({"batch_size": False}, "batch_size is False"),
    ({"batch_size": np.array([100, 200])}, "batch_size is array([100, 200])"),
    ({"batch_size": np.float64(100)}, "batch_size is np.float64(100.0)"),
    ({"batch_size": HUGE}, "batch_size is a number of over 30 digits; give a whole number"),
    ({"epochs": 0}, "epochs is 0"),
    ({"epochs": 1.5}, "epochs is 1.5"),
    ({"epochs": None}, "epochs is None"),
    ({"epochs": -HUGE}, "epochs is a number of over 30 digits"),
    ({"seed": -1}, "seed is -1; give a whole number from 0 to 4294967295"),
    ({"seed": 0.0}, "seed is 0.0"),
    ({"seed": 2**32}, f"seed is {2**32}"),
    ({"seed": "0"}, "seed is '0'"),
    ({"augment": "mixup"}, "augment is 'mixup'; choose one of none, flip, flip+crop"),
    ({"augment": None}, "augment is None"),
    ({"augment": True}, "augment is True"),
]


def refuses(call, message):
    with pytest.raises(ValueError, match=r"^[^\n]{1,300}$") as error:
        call()
    assert str(error.value).startswith(message), error.value


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_settings_out_of_range_are_refused_by_name(changes, message):
    refuses(lambda: Settings(**changes), message)
    refuses(lambda: replace(Settings(), **changes), message)


def test_the_ends_of_the_ranges_are_allowed():
    Settings(learning_rate=10, weight_decay=0, momentum=0, batch_size=1, epochs=1, seed=2**32 - 1, augment="flip")
    Settings(weight_decay=100, momentum=0.999, optimizer="adamw")


def test_numpy_numbers_are_allowed_and_equal_pythons():
    given = Settings(learning_rate=np.float64(0.1), batch_size=np.int64(64), epochs=np.int32(3), seed=np.uint8(7))
    assert given == Settings(learning_rate=0.1, batch_size=64, epochs=3, seed=7)
    assert {type(value) for value in (given.batch_size, given.epochs, given.seed)} == {int}


def test_minus_zero_is_zero():
    given = asdict(Settings(weight_decay=-0.0, momentum=-0.0, label_smoothing=-0.0))
    assert [str(given[name]) for name in ("weight_decay", "momentum", "label_smoothing")] == ["0.0"] * 3


def test_settings_are_fixed():
    with pytest.raises(FrozenInstanceError):
        Settings().epochs = 5


def devices(monkeypatch, gpus=0, mps=False):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


def test_the_best_device_is_picked(monkeypatch):
    devices(monkeypatch)
    assert utils.pick_device() == torch.device("cpu")
    devices(monkeypatch, mps=True)
    assert utils.pick_device() == torch.device("mps")
    devices(monkeypatch, gpus=2, mps=True)
    assert utils.pick_device() == torch.device("cuda")


def test_a_device_is_picked_by_name(monkeypatch):
    devices(monkeypatch, gpus=2)
    for name in ("cpu", "cuda", "cuda:0", "cuda:1", torch.device("cuda:1")):
        assert utils.pick_device(name) == torch.device(name)


@pytest.mark.parametrize(
    ("name", "gpus", "choices"),
    [
        ("cuda", 0, "cpu"),
        ("tpu", 0, "cpu"),
        ("meta", 1, "cuda, cuda:0, cpu"),
        ("cuda:1", 1, "cuda, cuda:0, cpu"),
        (0, 2, "cuda, cuda:0, cuda:1, cpu"),
        ("", 0, "cpu"),
        ("cuda:7", 2, "cuda, cuda:0, cuda:1, cpu"),
    ],
)
def test_a_device_that_is_not_here_is_refused(monkeypatch, name, gpus, choices):
    devices(monkeypatch, gpus)
    refuses(lambda: utils.pick_device(name), f"device is '{name}'; choose one of {choices}")


def test_length_of_the_notebooks_runs():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert utils.run_length(cpu) == ((0,), 5)
    assert utils.run_length(cuda) == ((0, 1, 2), 20)
    assert utils.run_length(torch.device("mps")) == ((0, 1, 2), 20)
    assert utils.run_length(cpu, 2, 7) == ((0, 1), 7)
    assert utils.run_length(cuda, np.int64(10), 1) == (tuple(range(10)), 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, None), "seeds is 0; give a whole number from 1 to 1000"),
        (("three", None), "seeds is 'three'"),
        ((10**11, None), f"seeds is {10**11}"),
        (((0, 1), None), "seeds is (0, 1)"),
        ((None, 0), "epochs is 0; give a whole number from 1 to 20"),
        ((None, 21), "epochs is 21"),
        ((None, 2.5), "epochs is 2.5"),
    ],
)
def test_lengths_out_of_range_are_refused_by_name(cpu, arguments, message):
    refuses(lambda: utils.run_length(cpu, *arguments), message)


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


def test_nets_are_built_by_name_from_the_seed():
    for name in models.NORM_OF:
        torch.manual_seed(99)  # what was drawn before does not matter
        net = utils.build(name, Settings(seed=3))
        assert net.norm == models.NORM_OF[name]
        assert type(net).__name__ == name
        again, other = utils.build(name, Settings(seed=3)), utils.build(name, Settings(seed=4))
        assert torch.equal(net.C2.conv.weight, again.C2.conv.weight)
        assert not torch.equal(net.C2.conv.weight, other.C2.conv.weight)
    assert utils.build("NetC", Settings(), groups=2, classes=100).c11.out_channels == 100


@pytest.mark.parametrize("name", ["NetD", models.NetA, [], None])
def test_a_net_of_another_name_is_refused(name):
    refuses(lambda: utils.build(name, Settings()), f"net is {name!r}; choose one of NetA, NetB, NetC, Net")


def trained(data, name="NetC", settings=SHORT, **options):
    net = utils.build(name, settings)
    history = utils.train(net, data, settings, **options)
    return net.state_dict(), history


def without_times(history):
    return [{name: value for name, value in epoch.items() if name not in ("seconds", "elapsed")} for epoch in history]


@pytest.mark.parametrize("name", models.NORM_OF)
def test_same_seed_same_weights(tiny, name):
    (first, history), (second, again) = trained(tiny, name), trained(tiny, name)
    assert same(first, second)
    assert without_times(history) == without_times(again)
    other, _ = trained(tiny, name, replace(SHORT, seed=1))
    assert not torch.equal(first["C2.conv.weight"], other["C2.conv.weight"])


def test_history_says_what_happened_in_each_epoch(tiny):
    net = utils.build("NetB", SHORT)
    history = utils.train(net, tiny, SHORT)
    assert [list(epoch) for epoch in history] == [list(records.HISTORY)] * 2
    assert [epoch["epoch"] for epoch in history] == [1, 2]
    assert history[-1]["test_accuracy"] == utils.test(net, tiny.test_images, tiny.test_labels).accuracy
    rates = [min(p / 0.2, (1 - p) / 0.8) * SHORT.learning_rate for p in (3 / 7, 6 / 7)]
    assert [epoch["learning_rate"] for epoch in history] == pytest.approx(rates)
    assert 0 < history[0]["seconds"] <= history[0]["elapsed"] < history[1]["elapsed"]
    trainer = Trainer(utils.build("NetB", SHORT), tiny, SHORT)
    for _ in trainer.epoch():
        pass
    assert (history[0]["loss"], history[0]["train_accuracy"]) == trainer.means()


def test_an_untracked_run_trains_the_same_and_tests_nothing(tiny, monkeypatch):
    expected, _ = trained(tiny)
    monkeypatch.setattr(utils, "test", lambda *arguments: pytest.fail("it was tested"))
    found, history = trained(tiny, track=False)
    assert same(expected, found)
    assert all(math.isnan(epoch["test_accuracy"]) for epoch in history)


@pytest.mark.parametrize("name", models.NORM_OF)
def test_one_batch_is_learned_by_heart(tiny, name):
    one = replace(tiny, images=tiny.images[:20], labels=tiny.labels[:20])
    settings = Settings(epochs=120, batch_size=20, weight_decay=0.0)
    net = utils.build(name, settings)
    utils.train(net, one, settings, track=False)
    assert utils.test(net, one.images, one.labels).accuracy == 100


@pytest.mark.parametrize(
    ("optimizer", "rate", "decay"), [("muon", 0.03, 0.5), ("sgd", 0.1, 5e-4), ("adamw", 0.01, 0.1)]
)
def test_each_optimizer_learns(small, optimizer, rate, decay):
    settings = Settings(epochs=3, batch_size=50, learning_rate=rate, weight_decay=decay, optimizer=optimizer)
    history = utils.train(utils.build("NetA", settings, widths=NARROW), small, settings, track=False)
    assert history[-1]["loss"] < history[0]["loss"] - 0.1


def test_random_labels_stay_at_chance(synthetic):
    generator = torch.Generator().manual_seed(0)
    data = replace(
        synthetic,
        images=synthetic.images[:1000],
        labels=torch.randint(0, 10, (1000,), generator=generator),
        test_labels=torch.randint(0, 10, (2000,), generator=generator),
    )
    net = utils.build("NetC", SHORT)
    utils.train(net, data, SHORT, track=False)
    accuracy = utils.test(net, data.test_images, data.test_labels).accuracy
    assert abs(accuracy - 10) < 3 * 100 * math.sqrt(0.1 * 0.9 / 2000)


def test_progress_is_shown_on_standard_output(tiny, capfd):
    trained(tiny, label="NetC, seed 0")
    trained(tiny, track=False)
    captured = capfd.readouterr()
    tracked, untracked = (part.split("\r")[-1] for part in captured.out.strip("\n").split("\n"))
    assert "NetC, seed 0" in tracked
    assert "100%" in tracked
    assert "epoch 2, loss " in tracked
    assert ", test " in tracked
    assert "epoch 2, loss " in untracked
    assert ", test " not in untracked
    assert captured.err == ""


def test_memory_is_kept_from_the_first_run_on_a_cpu_on(tiny, monkeypatch):
    calls = []
    monkeypatch.setattr(fast, "keep_memory", lambda: calls.append(1))
    trained(tiny, settings=replace(SHORT, epochs=1), track=False)
    assert calls


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize(
    ("net", "kind"),
    [
        (torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 10)), "a Sequential"),
        (models.NetA, "the class NetA"),
        ("NetA", "a str"),
        (None, "a NoneType"),
    ],
)
def test_another_kind_of_net_is_refused_in_one_line(tiny, tmp_path, checkpointed, net, kind):
    checkpoint = tmp_path / "run.pt" if checkpointed else None
    with pytest.raises(TypeError, match=rf"^net is {kind}; give a models.Net, such as NetA\(\)$"):
        utils.train(net, tiny, SHORT, checkpoint=checkpoint)


def test_other_kinds_of_data_and_settings_are_refused(tiny):
    pair, wrong = (tiny.images, tiny.labels), {"epochs": 1}
    for call in (utils.train, utils.run):
        net = models.NetB() if call is utils.train else "NetB"
        with pytest.raises(TypeError, match=r"^data is a tuple; give what engine\.data\.load_data returns$"):
            call(net, pair, Settings())
        with pytest.raises(TypeError, match=r"^settings is a dict; give Settings\(\)$"):
            call(net, tiny, wrong)
        with pytest.raises(TypeError, match=r"^settings is the class Settings; give Settings\(\)$"):
            call(net, tiny, Settings)


class StandardizedByView(nn.Conv2d):
    def forward(self, x):
        rows = self.weight.view(len(self.weight), -1)
        rows = (rows - rows.mean(1, keepdim=True)) / (rows.std(1, keepdim=True) + 1e-5)
        return self._conv_forward(x, rows.view_as(self.weight), self.bias)


@pytest.mark.parametrize("as_it_is", [False, True])
def test_weights_in_channels_last_stay_there(tiny, as_it_is):
    net = models.NetA().to(memory_format=torch.channels_last)
    if as_it_is:
        net.C5.register_forward_hook(lambda *_: None)
    before = net.C5.conv.weight.stride()
    utils.train(net, tiny, SHORT)
    assert net.C5.conv.weight.stride() == net.C5.conv.weight.grad.stride() == before


def test_weights_have_views_where_no_copy_is_trained(tiny):
    net = models.NetB()
    net.C5.conv = StandardizedByView(24, 24, 3, padding=1, bias=False)
    utils.train(net, tiny, SHORT)
    assert all(parameter.is_contiguous() for parameter in net.parameters())


def test_weights_are_pruned_again_and_again(tiny):
    net = models.NetA()
    convs = [(module, "weight") for module in net.modules() if isinstance(module, nn.Conv2d)]
    for times in (1, 2):
        utils.train(net, tiny, SHORT)
        assert all(parameter.is_contiguous() for parameter in net.parameters())
        prune.global_unstructured(convs, pruning_method=prune.L1Unstructured, amount=0.5)
        zeros = sum((conv.weight == 0).sum().item() for conv, _ in convs)
        assert zeros / sum(conv.weight.numel() for conv, _ in convs) == pytest.approx(1 - 0.5**times, abs=1e-3)


class Masked(nn.Module):
    state_in_buffers = True

    def __init__(self):
        super().__init__()
        self.register_buffer("mask", torch.ones(1, 24, 16, 16))

    def forward(self, x):
        return x * self.mask


def test_weights_and_buffers_have_views_after_an_interrupted_training(tiny, monkeypatch):
    net = models.NetA()
    net.C5.norm = nn.Sequential(net.C5.norm, Masked())
    monkeypatch.setattr(Trainer, "means", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        utils.train(net, tiny, SHORT)
    assert all(tensor.is_contiguous() for tensor in (*net.parameters(), *net.buffers()))


def test_what_is_no_module_is_not_tested(tiny):
    with pytest.raises(TypeError, match=r"^net is the class NetA; give a module, such as NetA\(\)$"):
        utils.test(models.NetA, tiny.test_images, tiny.test_labels)


def test_a_batch_larger_than_the_data_is_refused(tiny):
    refuses(lambda: trained(tiny, settings=replace(SHORT, batch_size=151)), "batch_size is 151; there are 150 training")


def test_out_of_memory_names_a_smaller_batch(tiny, monkeypatch):
    def fail(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Trainer, "__init__", fail)
    message = r"^batch_size is 50: that takes more than the memory of cpu; try 25$"
    with pytest.raises(MemoryError, match=message):
        trained(tiny)


def test_a_run_that_diverges_ends_where_it_does(tiny, tmp_path):
    """With 10 times the largest sensible rate, and no norm to hold it."""
    settings = replace(LONG, learning_rate=10.0, weight_decay=0.0, seed=7, epochs=20)
    message = (
        r"none norm, seed 7, diverged in epoch \d+, step \d of 3, at a learning rate of \S+ \(learning_rate is 10.0"
    )
    with pytest.raises(FloatingPointError, match=message):
        trained(tiny, "Net", settings, checkpoint=tmp_path / "run.pt")


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints; what they refuse by themselves is in engine/test_checkpoints.py
# ---------------------------------------------------------------------------------------------------------------------


def interrupt(monkeypatch, data, checkpoint, epochs, name="NetA", settings=LONG):
    """Train until `epochs` epochs are in the checkpoint, and stop in the middle of the next one; return the net."""
    step, left = Trainer.step, 3 * epochs + 2

    def count(trainer):
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        step(trainer)

    net = utils.build(name, settings)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", count)
        with pytest.raises(KeyboardInterrupt):
            utils.train(net, data, settings, checkpoint=checkpoint)
    return net


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("NetA", {}),
        ("NetC", {}),
        ("NetB", {"optimizer": "sgd", "learning_rate": 0.1, "weight_decay": 5e-4}),
        ("NetB", {"optimizer": "adamw", "learning_rate": 0.003}),
    ],
)
@pytest.mark.parametrize("epochs", [1, 3])
def test_an_interrupted_run_resumes_bit_for_bit(tiny, tmp_path, monkeypatch, name, changes, epochs):
    settings, path = replace(LONG, **changes), tmp_path / "run.pt"
    expected, history = trained(tiny, name, settings)
    interrupt(monkeypatch, tiny, path, epochs, name, settings)
    assert len(torch.load(path, weights_only=True)["history"]) == epochs
    torch.manual_seed(99)  # what else happened in the meantime does not matter
    found, resumed = trained(tiny, name, settings, checkpoint=path)
    assert same(expected, found)
    assert without_times(resumed) == without_times(history)
    elapsed = [epoch["elapsed"] for epoch in resumed]
    assert elapsed == sorted(elapsed)


@pytest.mark.parametrize("epochs", [0, 2])
def test_an_interrupted_call_with_a_checkpoint_leaves_the_net_as_before(tiny, tmp_path, monkeypatch, epochs):
    """So that the same call, once more, resumes."""
    net, path = interrupt(monkeypatch, tiny, tmp_path / "run.pt", epochs), tmp_path / "run.pt"
    assert same(utils.build("NetA", LONG).state_dict(), net.state_dict())
    expected, _ = trained(tiny, "NetA", LONG)
    assert len(utils.train(net, tiny, LONG, checkpoint=path)) == 4
    assert same(expected, net.state_dict())


def test_a_diverged_call_with_a_checkpoint_leaves_the_net_as_before(tiny, tmp_path):
    settings = replace(LONG, learning_rate=10.0, weight_decay=0.0, epochs=20)
    net = utils.build("Net", settings)
    with pytest.raises(FloatingPointError):
        utils.train(net, tiny, settings, checkpoint=tmp_path / "run.pt")
    assert same(utils.build("Net", settings).state_dict(), net.state_dict())


def test_an_interrupted_call_without_a_checkpoint_keeps_what_was_learned(tiny, monkeypatch):
    net = interrupt(monkeypatch, tiny, None, 1)
    assert not same(utils.build("NetA", LONG).state_dict(), net.state_dict())


def test_a_run_writes_its_first_and_last_checkpoint_and_those_that_are_due(tiny, tmp_path, monkeypatch):
    write, written = checkpoints.write_checkpoint, []

    def count(path, run, history, state):
        written.append(len(history))
        write(path, run, history, state)

    monkeypatch.setattr(checkpoints, "write_checkpoint", count)
    for number, seconds in enumerate((3600, 0)):
        monkeypatch.setattr(utils, "CHECKPOINT_SECONDS", seconds)
        trained(tiny, settings=LONG, checkpoint=tmp_path / f"{number}.pt")
    assert written == [0, LONG.epochs, *range(LONG.epochs + 1)]


def test_a_checkpoint_without_a_name_is_refused(tiny):
    refuses(lambda: trained(tiny, checkpoint=""), "path is ''; name a file or a folder")


def test_a_folder_for_checkpoints_that_is_no_path_is_refused_in_one_line(tiny):
    with pytest.raises(TypeError, match=r"^path is 5; give a str or a Path$"):
        utils.run("NetA", tiny, SHORT, checkpoints=5)


class Name(enum.StrEnum):
    MUON = "muon"
    FLIP = "flip"


def test_a_run_whose_settings_are_enums_resumes(tiny, tmp_path):
    settings = replace(SHORT, optimizer=Name.MUON, augment=Name.FLIP)
    assert type(settings.optimizer) is type(settings.augment) is str
    _, history = trained(tiny, settings=settings, checkpoint=tmp_path / "run.pt")
    assert trained(tiny, settings=settings, checkpoint=tmp_path / "run.pt")[1] == history


def test_a_finished_run_is_not_run_again(tiny, tmp_path, monkeypatch):
    path, settings = tmp_path / "run.pt", replace(LONG, learning_rate=np.float64(0.03))
    expected, history = trained(tiny, "NetA", settings, checkpoint=path)
    monkeypatch.setattr(Trainer, "step", lambda trainer: pytest.fail("it was trained again"))
    found, again = trained(tiny, "NetA", settings, checkpoint=path)
    assert same(expected, found)
    assert again == history


def test_a_checkpoint_of_another_run_is_refused_and_kept(tiny, tmp_path, monkeypatch):
    path = tmp_path / "run.pt"
    interrupt(monkeypatch, tiny, path, 1)
    before = path.read_bytes()
    for changes in ({"weight_decay": 0.1}, {"optimizer": "sgd"}, {"seed": 3}, {"epochs": 5}, {"augment": "none"}):
        (name,) = changes
        with pytest.raises(ValueError, match=f"run.pt is a checkpoint with {name} |with initial weights "):
            trained(tiny, "NetA", replace(LONG, **changes), checkpoint=path)
    for call in (
        lambda: trained(tiny, "NetB", LONG, checkpoint=path),
        lambda: trained(tiny, "NetA", LONG, track=False, checkpoint=path),
        lambda: trained(replace(tiny, images=255 - tiny.images), "NetA", LONG, checkpoint=path),
        lambda: trained(replace(tiny, labels=tiny.labels.flip(0)), "NetA", LONG, checkpoint=path),
        lambda: trained(replace(tiny, test_images=tiny.test_images.flip(0)), "NetA", LONG, checkpoint=path),
    ):
        refuses(call, f"{path} is a checkpoint with ")
    with monkeypatch.context() as patch:
        patch.setattr(fast, "pick_precision", lambda device: torch.float64)
        refuses(lambda: trained(tiny, "NetA", LONG, checkpoint=path), f"{path} is a checkpoint with ")
    assert path.read_bytes() == before


def test_a_checkpoint_whose_state_does_not_fit_is_refused_before_anything_is_loaded(tiny, tmp_path, monkeypatch):
    path = tmp_path / "run.pt"
    net = interrupt(monkeypatch, tiny, path, 1)
    before = copy.deepcopy(net.state_dict())
    saved = torch.load(path, weights_only=True)
    saved["state"]["flip"] = saved["state"]["flip"][:100]
    torch.save(saved, path)
    with pytest.raises(ValueError, match=r"run.pt can't be read as a checkpoint \(its state\['flip'\] is "):
        utils.train(net, tiny, LONG, checkpoint=path)
    assert same(before, net.state_dict())


# ---------------------------------------------------------------------------------------------------------------------
# Testing
# ---------------------------------------------------------------------------------------------------------------------


def test_metrics_against_an_independent_count(small):
    torch.manual_seed(0)
    net = models.NetC()
    scores = utils.test(net, small.test_images, small.test_labels)
    with torch.no_grad():
        logits = net.eval()(normalize(small.test_images)).double().numpy()
    odds = np.exp(logits - logits.max(1, keepdims=True))
    odds /= odds.sum(1, keepdims=True)
    labels = small.test_labels.numpy()
    right = sum(int(np.argmax(row) == label) for row, label in zip(odds, labels, strict=True))
    assert scores.accuracy == pytest.approx(100 * right / 200)
    assert scores.loss == pytest.approx(-np.log(odds[np.arange(200), labels]).mean(), abs=1e-5)
    assert np.allclose(scores.confidences, odds.max(1), atol=1e-5)


@st.composite
def outcomes(draw):
    """Labels, predictions and confidences of some images."""
    n = draw(st.integers(1, 60))
    labels, predictions = (draw(st.lists(st.integers(0, 9), min_size=n, max_size=n)) for _ in range(2))
    confidences = draw(st.lists(st.integers(1, 5), min_size=n, max_size=n))  # few values: many ties
    return torch.tensor(labels), torch.tensor(predictions), torch.tensor(confidences) / 5


@given(outcomes(), st.integers(0, 2**31))
def test_scores_by_plain_arithmetic(outcome, seed):
    """Of a net that says what it is told to, image by image."""
    labels, _, _ = outcome
    logits = torch.randn(len(labels), 10, generator=torch.Generator().manual_seed(seed)) * 5
    parts = iter(logits.split(100))

    class Told(torch.nn.Module):
        def forward(self, x):
            return next(parts)

    scores = utils.test(Told(), torch.zeros(len(labels), 32, 32, 3, dtype=torch.uint8), labels)
    probabilities = logits.double().exp() / logits.double().exp().sum(1, keepdim=True)
    loss = -sum(probabilities[i, label].log() for i, label in enumerate(labels.tolist())) / len(labels)
    assert abs(scores.loss - loss) < 1e-4
    assert scores.predictions.tolist() == [max(range(10), key=line.__getitem__) for line in logits.tolist()]
    assert abs(scores.accuracy - 100 * (scores.predictions == labels).double().mean()) < 1e-4
    assert (scores.confidences - probabilities.max(1).values).abs().max() < 1e-5


IMAGES, LABELS = torch.zeros(4, 32, 32, 3, dtype=torch.uint8), torch.tensor([0, 1, 2, 9])


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (IMAGES / 255, LABELS, "images are torch.float32 of shape (4, 32, 32, 3)"),
        (IMAGES.permute(0, 3, 1, 2), LABELS, "images are torch.uint8 of shape (4, 3, 32, 32)"),
        (IMAGES[:0], LABELS[:0], "images are empty"),
        (IMAGES.tolist(), LABELS, "images are of type list; give a torch.Tensor"),
        (IMAGES, LABELS + 9, "the labels of images go from 9 to 18; 0 to 9 are allowed"),
        (IMAGES, LABELS[:1], "the labels of images are torch.int64 of shape (1,)"),
    ],
)
def test_wrong_images_are_not_scored(images, labels, message):
    refuses(lambda: utils.test(models.NetA(), images, labels), message)


def test_a_net_for_other_images_is_not_scored():
    for net in (models.NetA().half(), models.NetA().double()):
        kind = net.c11.weight.dtype
        refuses(lambda net=net: utils.test(net, IMAGES, LABELS), f"C1.conv.weight is of {kind}; give a net whose para")
    refuses(lambda: utils.test(models.NetA(in_channels=1), IMAGES, LABELS), "in_channels is 1; the images have 3 color")


def test_a_net_of_a_hundred_classes_is_scored_on_a_hundred():
    net = models.NetA(classes=100)
    assert utils.test(net, IMAGES, LABELS * 11).predictions.shape == (4,)
    refuses(lambda: utils.test(net, IMAGES, LABELS + 91), "the labels of images go from 91 to 100; 0 to 99 are allowed")


def test_scoring_is_in_strict_float32_and_deterministic(small):
    cudnn = torch.backends.cudnn

    class Asks(torch.nn.Module):
        def forward(self, x):
            self.seen = (x.dtype, cudnn.allow_tf32, cudnn.deterministic, torch.is_grad_enabled())
            return x.flatten(1)[:, :10]

    net, before = Asks(), (cudnn.allow_tf32, cudnn.deterministic)
    utils.test(net, small.test_images, small.test_labels)
    assert net.seen == (torch.float32, False, True, False)
    assert (cudnn.allow_tf32, cudnn.deterministic) == before


def test_scoring_leaves_each_modules_mode_and_the_statistics_alone(small):
    net = models.NetA().train()
    net.C2.norm.eval()  # frozen on purpose
    net.C5.eval()
    modes = {name: module.training for name, module in net.named_modules()}
    mean = net.C1.norm.running_mean.clone()
    utils.test(net, small.test_images, small.test_labels)
    assert {name: module.training for name, module in net.named_modules()} == modes
    assert torch.equal(net.C1.norm.running_mean, mean)
    net.c11.forward = lambda x: 1 / 0
    with pytest.raises(ZeroDivisionError):
        utils.test(net, small.test_images, small.test_labels)
    assert {name: module.training for name, module in net.named_modules()} == modes


# ---------------------------------------------------------------------------------------------------------------------
# Runs and their rows
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_runs(tiny, tmp_path_factory):
    """Two seeds of NetA, and the folder of their checkpoints."""
    folder = tmp_path_factory.mktemp("runs")
    settings = Settings(epochs=1, batch_size=50)
    return [
        utils.run("NetA", tiny, replace(settings, seed=s), checkpoints=folder / "checkpoints") for s in (7, 8)
    ], folder


@pytest.mark.parametrize(
    ("name", "study", "epochs", "wanted"),
    [
        ("SYNTHETIC DATA", "main", 1, "synthetic"),
        ("SYNTHETIC DATA", "noisy", 1, "synthetic noisy"),
        ("CIFAR-10", "main", 20, "main"),
        ("CIFAR-10", "main", 19, "short"),
        ("CIFAR-10", "noisy", 1, "noisy"),
    ],
)
def test_the_study_of_a_row(tiny, name, study, epochs, wanted):
    settings = Settings(epochs=epochs)
    row = utils.settings_columns("NetA", utils.build("NetA", settings), replace(tiny, name=name), settings, study)
    assert row["study"] == wanted


def test_a_row_says_what_was_run_and_what_came_out(tiny, two_runs):
    (run, _), _ = two_runs
    settings = Settings(epochs=1, batch_size=50, seed=7)
    assert run.row.items() >= asdict(settings).items()
    right = (run.scores.predictions == tiny.test_labels).float().mean().item()
    assert (
        run.row.items()
        >= {
            "study": "synthetic",
            "net": "NetA",
            "norm": "batch",
            "statistics_batch": 50,
            "widths": "16 32 24 24 24 24 24 32 32 32",
            "train_images": 150,
            "split": "test",
            "parameters": 48_042,
            "test_accuracy": round(100 * right, 3),
            "train_accuracy": round(utils.test(run.net, tiny.images, tiny.labels).accuracy, 3),
            "test_loss": round(run.scores.loss, 5),
            "validation_accuracy": "",
            "precision": str(fast.pick_precision(torch.device("cpu"))).removeprefix("torch."),
            "seconds": round(run.history[-1]["elapsed"], 2),
            "status": "done",
        }.items()
    )
    assert run.name == "batch norm (NetA), seed 7"
    assert set(run.row) - records.NON_KEY_COLUMNS >= {field.name for field in fields(Settings)}


def test_rows_of_short_validation_and_diverged_runs(tiny):
    net = utils.build("NetC", SHORT)
    real = replace(tiny, name="CIFAR-10")
    row = utils.finish("NetC", net, real, SHORT, [], "main", 1.0).row
    assert (row["study"], row["groups"], row["statistics_batch"]) == ("short", 4, "")
    assert utils.finish("NetC", net, real, Settings(), [], "main", 1.0).row["study"] == "main"
    assert utils.finish("NetC", net, real, SHORT, [], "tune", 1.0).row["study"] == "tune"
    row = utils.finish("NetC", net, replace(real, split="validation"), SHORT, [], "tune", 1.0).row
    assert (row["split"], row["test_accuracy"], row["test_loss"]) == ("validation", "", "")
    assert row["validation_accuracy"] > 0
    row = utils.finish("NetC", net, real, SHORT, [], "tune", 1.0, diverged=True).row
    assert [row[name] for name in ("status", "test_accuracy", "train_accuracy")] == ["diverged", "", ""]


def test_columns_say_over_what_a_norm_takes_its_statistics():
    assert records.statistics_columns("batch", 4, 500) == {"layer_variant": "", "groups": "", "statistics_batch": 500}
    assert records.statistics_columns("layer", 4, 500) == {
        "layer_variant": "C,H,W",
        "groups": 1,
        "statistics_batch": "",
    }
    assert records.statistics_columns("group", 4, 500) == {"layer_variant": "", "groups": 4, "statistics_batch": ""}
    assert set(records.statistics_columns("none", 4, 500).values()) == {""}


def test_runs_are_saved_and_leave_no_checkpoint(tiny, two_runs):
    runs, folder = two_runs
    assert sorted(path.name for path in (folder / "checkpoints").glob("*.pt")) == ["NetA-7.pt", "NetA-8.pt"]
    for _ in range(2):  # saved again, a run replaces itself
        utils.save_runs(runs, tiny, folder)
    assert not list((folder / "checkpoints").glob("*.pt"))
    rows = pd.read_csv(folder / "results" / "runs.csv")
    assert rows["seed"].tolist() == [7, 8]
    assert rows["test_accuracy"].tolist() == [round(one.scores.accuracy, 3) for one in runs]
    history = pd.read_csv(folder / "results" / "history.csv")
    assert history[["net", "seed", "epoch"]].values.tolist() == [["NetA", 7, 1], ["NetA", 8, 1]]
    assert history["loss"].tolist() == [round(one.history[0]["loss"], 5) for one in runs]
    mistakes = pd.read_csv(folder / "results" / "mistakes.csv")
    assert len(mistakes) == round(50 * (1 - runs[0].scores.accuracy / 100))
    net = models.NetA()
    net.load_state_dict(torch.load(folder / "weights" / "NetA.pt", weights_only=True))
    assert torch.equal(utils.test(net, tiny.test_images, tiny.test_labels).predictions, runs[0].scores.predictions)


def test_predictions_are_saved_by_seed(tiny, two_runs, tmp_path):
    """And of the first seed the weights and mistakes, in whatever order the runs are given."""
    (first, second), _ = two_runs
    utils.save_runs([second, first], tiny, tmp_path)
    found = np.load(tmp_path / "results" / "predictions.npz", allow_pickle=False)
    assert found["NetA seeds"].tolist() == [7, 8]
    assert found["NetA"].tolist() == [one.scores.predictions.tolist() for one in (first, second)]
    assert found["labels"].tolist() == tiny.test_labels.tolist()
    assert found["NetA"].dtype == found["labels"].dtype == np.uint8
    weights = torch.load(tmp_path / "weights" / "NetA.pt", weights_only=True)
    assert same(weights, first.net.state_dict())
    mistakes = pd.read_csv(tmp_path / "results" / "mistakes.csv")
    assert mistakes["index"].tolist() == utils.mistakes_table(first, tiny)["index"].tolist()


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"}


def test_a_tilde_is_the_home_folder(tiny, two_runs, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    utils.save_runs(two_runs[0], tiny, "~/out")
    utils.run("NetB", tiny, Settings(epochs=1, batch_size=50), checkpoints="~/out/checkpoints")
    utils.train(utils.build("NetB", SHORT), tiny, Settings(epochs=1, batch_size=50), checkpoint="~/run.pt")
    utils.plot_mistakes(two_runs[0][0], tiny, "~/out/img/batch.png")
    utils.plot_mistakes(two_runs[0][0], tiny, "~/without_a_suffix")
    records.upsert("~/rows.csv", {"seed": 1})
    names = {"runs.csv", "NetB-0.pt", "run.pt", "batch.png", "without_a_suffix", "rows.csv"}
    assert names <= {one.name for one in (tmp_path / "home").rglob("*")}
    assert not list((tmp_path / "here").iterdir())


def test_a_folder_of_other_data_is_refused_before_training(tiny, two_runs, tmp_path, monkeypatch):
    """So that another data set's runs replace neither histories nor mistakes nor weights."""
    utils.save_runs(two_runs[0], tiny, tmp_path)
    before = contents(tmp_path)
    other = replace(tiny, test_images=tiny.test_images.flip(0), test_labels=tiny.test_labels.flip(0), name="CIFAR-100")
    [run] = [utils.run("NetB", other, Settings(epochs=1, batch_size=50))]
    monkeypatch.setattr(Trainer, "step", lambda trainer: pytest.fail("it was trained"))
    for call in (
        lambda: utils.run("NetB", other, SHORT, checkpoints=tmp_path / "checkpoints"),
        lambda: utils.save_runs([run], other, tmp_path),
    ):
        refuses(call, f"{tmp_path}/results/predictions.npz holds predictions for 50 images with other labels; name an")
    assert contents(tmp_path) == before


def test_a_folder_of_other_images_with_these_labels_is_refused_before_training(tiny, two_runs, tmp_path, monkeypatch):
    utils.save_runs(two_runs[0], tiny, tmp_path)
    before = contents(tmp_path)
    monkeypatch.setattr(Trainer, "step", lambda trainer: pytest.fail("it was trained"))
    gray = tiny.test_images.float().mean(3, keepdim=True).byte().expand(-1, -1, -1, 3).contiguous()
    for other in (replace(tiny, test_images=gray, name="gray"), replace(tiny, test_images=255 - tiny.test_images)):
        found = hashes.test_hash(other)
        runs = [replace(one, row=one.row | {"dataset": other.name}, images=found) for one in two_runs[0]]
        for call in (
            lambda other=other: utils.run("NetB", other, SHORT, checkpoints=tmp_path / "checkpoints"),
            lambda other=other, runs=runs: utils.save_runs(runs, other, tmp_path),
        ):
            refuses(call, f"{tmp_path}/results/predictions.npz holds predictions for 50 other images; name another")
    assert contents(tmp_path) == before


def test_rows_of_other_data_are_refused_where_predictions_are_missing(tiny, two_runs, tmp_path, monkeypatch):
    utils.save_runs(two_runs[0], tiny, tmp_path)
    (tmp_path / "results" / "predictions.npz").unlink()
    other = replace(tiny, name="mine")
    monkeypatch.setattr(Trainer, "step", lambda trainer: pytest.fail("it was trained"))
    message = f"{tmp_path}/results/runs.csv holds runs of {tiny.name!r}, not 'mine'; name another folder"
    refuses(lambda: utils.run("NetB", other, SHORT, checkpoints=tmp_path / "checkpoints"), message)


@pytest.mark.parametrize("study", ["mine ", "two\nlines", "\ud800"])
def test_a_study_that_tables_do_not_keep_is_refused_before_training(tiny, monkeypatch, study):
    monkeypatch.setattr(Trainer, "step", lambda trainer: pytest.fail("it was trained"))
    refuses(lambda: utils.run("NetA", tiny, SHORT, study=study), f"study is {study!r}; give text in one line")


def test_nothing_is_saved_over_published_results(tiny, two_runs, tmp_path, monkeypatch):
    utils.save_runs(two_runs[0], tiny, tmp_path)
    (tmp_path / "models.py").touch()
    before = contents(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Trainer, "step", lambda trainer: pytest.fail("it was trained"))
    for call in (
        lambda: utils.run("NetB", tiny, SHORT, checkpoints="checkpoints"),
        lambda: utils.save_runs(two_runs[0], tiny, "."),
    ):
        refuses(call, f"'.' can't be the output folder: {tmp_path} holds other things; choose another")
    assert contents(tmp_path) == before


def test_a_column_that_rows_lack_is_refused_before_training(tiny, two_runs, tmp_path, monkeypatch):
    utils.save_runs(two_runs[0], tiny, tmp_path)
    rows = pd.read_csv(tmp_path / "results" / "runs.csv")
    rows.assign(note="by hand").to_csv(tmp_path / "results" / "runs.csv", index=False)
    before = contents(tmp_path)
    monkeypatch.setattr(Trainer, "step", lambda trainer: pytest.fail("it was trained"))
    for call in (
        lambda: utils.run("NetB", tiny, SHORT, checkpoints=tmp_path / "checkpoints"),
        lambda: utils.save_runs(two_runs[0], tiny, tmp_path),
    ):
        refuses(call, f"{tmp_path}/results/runs.csv has a column 'note'")
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "name", ["results/runs.csv", "results/history.csv", "results/mistakes.csv", "results/predictions.npz", "NetA.pt"]
)
def test_a_file_that_can_not_be_written_is_named_before_training(tiny, two_runs, tmp_path, monkeypatch, name):
    utils.save_runs(two_runs[0], tiny, tmp_path)
    [path] = tmp_path.rglob(name.rpartition("/")[2])
    path.chmod(0o444)
    before = contents(tmp_path)
    monkeypatch.setattr(Trainer, "step", lambda trainer: pytest.fail("it was trained"))
    for call in (
        lambda: utils.run("NetA", tiny, SHORT, checkpoints=tmp_path / "checkpoints"),
        lambda: utils.save_runs(two_runs[0], tiny, tmp_path),
    ):
        with pytest.raises(OSError, match=rf"^{path} can't be written: [^\n]* is read-only$"):
            call()
    assert contents(tmp_path) == before


def test_of_a_net_without_mistakes_and_history_none_are_left(tiny, two_runs, tmp_path):
    utils.save_runs(two_runs[0], tiny, tmp_path)
    scores = replace(two_runs[0][0].scores, predictions=tiny.test_labels, accuracy=100.0)
    utils.save_runs([replace(two_runs[0][0], scores=scores, history=[])], tiny, tmp_path)
    for name in ("history", "mistakes"):
        assert pd.read_csv(tmp_path / "results" / f"{name}.csv").empty


def test_runs_that_do_not_belong_together_are_not_saved(tiny, two_runs, tmp_path):
    (first, second), _ = two_runs
    of_another_net = replace(second, row=second.row | {"net": "NetB"})
    for runs in ([first, of_another_net], [first, second, first], []):
        nets, seeds = [one.row["net"] for one in runs], sorted(one.row["seed"] for one in runs)
        message = f"runs are of {nets} with seeds {seeds}; give runs of one net, each seed once"
        refuses(lambda runs=runs: utils.save_runs(runs, tiny, tmp_path), message)
    few = {"test_images": tiny.test_images[:9], "test_labels": tiny.test_labels[:9]}
    for changes in (
        {"test_labels": (tiny.test_labels + 1) % 10},
        {"name": "CIFAR-10"},
        {"split": "validation"},
        few,
        {"test_images": 255 - tiny.test_images},
    ):
        data = replace(tiny, **changes)
        message = f"data are not what batch norm (NetA), seed 7 was tested on, but {data.name}, {data.split} split"
        refuses(lambda data=data: utils.save_runs([first], data, tmp_path), message)
    assert not list(tmp_path.iterdir())


def test_runs_of_two_settings_are_not_saved(tiny, two_runs, tmp_path):
    first, second = two_runs[0]
    runs = [first, replace(second, row=second.row | {"weight_decay": 0.1})]
    refuses(lambda: utils.save_runs(runs, tiny, tmp_path), "runs differ in weight_decay; give runs of one setting")
    assert not list(tmp_path.iterdir())


def test_a_class_that_the_data_lack_is_refused(tiny, two_runs, tmp_path):
    """Of a net of 12 classes, tested on data of 10."""
    run = two_runs[0][0]
    scores = replace(run.scores, predictions=torch.full_like(tiny.test_labels, 11), accuracy=0.0)
    for call in (
        lambda: utils.mistakes_table(replace(run, scores=scores), tiny),
        lambda: utils.save_runs([replace(run, scores=scores)], tiny, tmp_path),
    ):
        refuses(call, "a predicted class is 11; give a whole number from 0 to 9")
    assert not list(tmp_path.iterdir())


def test_another_runs_checkpoint_is_left(tiny, two_runs, tmp_path, monkeypatch):
    """One that was interrupted, at other settings; the runs that are saved had none."""
    path = tmp_path / "checkpoints" / "NetA-7.pt"
    for epochs in (0, 1):
        interrupt(monkeypatch, tiny, path, epochs, settings=replace(LONG, seed=7))
        before = path.read_bytes()
        utils.save_runs(two_runs[0], tiny, tmp_path)
        assert path.read_bytes() == before
        path.unlink()


def test_confidences_are_saved_with_four_digits(tiny, two_runs, tmp_path):
    runs, _ = two_runs
    utils.save_runs(runs[:1], tiny, tmp_path)
    texts = pd.read_csv(tmp_path / "results" / "mistakes.csv", dtype=str)["confidence"]
    assert texts.str.fullmatch(r"[01]\.\d{1,4}").all()
    assert (texts.str.len() == 6).any()


def test_small_learning_rates_are_saved_with_five_digits(tiny, two_runs, tmp_path):
    run, _ = two_runs[0]
    history = [run.history[0] | {"learning_rate": rate} for rate in (2.87654321e-6, 0.014990000426769257)]
    utils.save_runs([replace(run, history=history)], tiny, tmp_path)
    texts = pd.read_csv(tmp_path / "results" / "history.csv", dtype=str)
    assert texts["learning_rate"].tolist() == ["2.8765e-06", "0.01499"]
    assert texts["loss"][0] == str(round(run.history[0]["loss"], 5))


def row_of(net, seed, accuracy, **changes):
    row = {"study": "main", "net": net, "norm": models.NORM_OF[net], "split": "test", "seed": seed, "epochs": 20}
    row |= {"augment": "none", "weight_decay": 0.5, "learning_rate": 0.06 if net == "NetA" else 0.03}
    row |= {"parameters": 48_042, "train_accuracy": 95.0, "test_accuracy": accuracy, "seconds": 5.0 + seed}
    return row | changes


def rows_of(net, accuracies, **changes):
    return [row_of(net, seed, accuracy, **changes) for seed, accuracy in enumerate(accuracies)]


def test_summary_has_a_line_per_net():
    rows = rows_of("NetB", [85.0]) + rows_of("NetA", [86.0, 87.0, 88.5])
    table = utils.summarize(rows)
    assert table.index.tolist() == ["NetB", "NetA"]
    line = table.loc["NetA"]
    expected = {
        "norm": "batch",
        "epochs": 20,
        "test accuracy, %": 87.17,
        "std": 1.26,
        "n": 3,
        "training accuracy, %": 95.0,
    }
    assert {name: line[name] for name in expected} == expected  # the deviation of a sample: n - 1
    assert line["seconds per run"] == 6.0
    assert math.isnan(table.loc["NetB", "std"])
    pd.testing.assert_frame_equal(utils.summarize(pd.DataFrame(rows)), table)


@pytest.mark.parametrize(
    ("changes", "values"),
    [
        ({"epochs": 5}, [20, 5]),
        ({"augment": "flip"}, ["none", "flip"]),
        ({"study": "augment"}, ["main", "augment"]),
        ({"weight_decay": 0.1}, [0.5, 0.1]),
        ({"learning_rate": 0.01}, [0.06, 0.01]),
    ],
)
def test_rows_of_several_settings_are_lines_of_their_own(changes, values):
    table = utils.summarize(rows_of("NetA", [86.0, 87.0]) + rows_of("NetA", [80.0], **changes))
    (name,) = changes
    assert table[name].tolist() == values
    assert table["n"].tolist() == [2, 1]
    assert table["test accuracy, %"].tolist() == [86.5, 80.0]


def test_a_seed_that_diverged_is_not_counted():
    rows = [*rows_of("NetA", [86.0, 87.0]), row_of("NetA", 2, "", train_accuracy="", status="diverged")]
    table = utils.summarize(rows)
    assert table["n"].tolist() == [2]
    assert table["test accuracy, %"].tolist() == [86.5]


def test_a_setting_that_some_rows_lack_keeps_its_line():
    old = [{name: value for name, value in row.items() if name != "optimizer"} for row in rows_of("NetA", [86.0])]
    table = utils.summarize(old + rows_of("NetA", [80.0], optimizer="sgd"))
    assert table["test accuracy, %"].tolist() == [86.0, 80.0]


def test_the_nets_learning_rates_are_no_mixture():
    table = utils.summarize(rows_of("NetA", [86.0]) + rows_of("NetB", [85.0]))
    assert "learning_rate" not in table


def test_a_set_of_one_run_has_no_interval_and_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = utils.compare(rows_of("NetA", [86.0]) + rows_of("NetB", [85.0]), [("batch", "layer")])
    assert table.loc["batch minus layer", "points"] == 1.0
    assert table.loc["batch minus layer", ["low", "high"]].isna().all()


def test_comparison_is_in_percentage_points():
    values = {"NetA": [86.0, 87.0, 88.5], "NetB": [85.0, 86.5, 86.0, 85.5], "NetC": [86.5, 86.0, 86.2]}
    rows = [row for net, accuracies in values.items() for row in rows_of(net, accuracies)]
    table = utils.compare(rows)
    assert list(table.index) == ["batch minus layer", "batch minus group", "group minus layer"]
    assert list(table.columns) == ["points", "low", "high", "n"]
    assert table.loc["batch minus layer"].tolist() == [*np.round(contrast(values["NetA"], values["NetB"])[:3], 2), 3]
    assert table.loc["batch minus layer", "points"] == 1.42
    assert utils.compare(rows, [("layer", "batch")]).loc["layer minus batch", "points"] == -1.42


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (rows_of("NetA", [86.0]), "no row has the norm 'layer'; there are batch"),
        (
            rows_of("NetA", [86.0]) * 2 + rows_of("NetB", [85.0]),
            "the rows of batch norm hold a seed twice; give each run once",
        ),
        (
            [*rows_of("NetA", [86.0, 87.0]), row_of("NetA", 2, 88.0, epochs=5), *rows_of("NetB", [85.0])],
            "the rows of batch norm differ in epochs; compare rows of one setting",
        ),
        (
            [
                row_of("NetA", 0, 86.0),
                row_of("NetA", 1, 80.0, learning_rate=1.0) | {"net": "NetX"},
                row_of("NetB", 0, 85.0),
            ],
            "the rows of batch norm differ in learning_rate; compare rows of one setting",
        ),
        (
            rows_of("NetA", [86.0]) + rows_of("NetB", [85.0]) + [row_of("NetB", 1, 88.0, weight_decay=0.1)],
            "the rows of layer norm differ in weight_decay; compare rows of one setting",
        ),
        (
            rows_of("NetA", [86.0], optimizer="sgd") + rows_of("NetB", [85.0], optimizer="muon"),
            "rows to compare differ in optimizer: sgd, muon",
        ),
        (
            rows_of("NetA", [86.0], batch_size=500) + rows_of("NetB", [85.0], batch_size=50),
            "rows to compare differ in batch_size: 500, 50",
        ),
        *[
            (
                rows_of("NetA", [86.0], **{name: first}) + rows_of("NetB", [85.0], **{name: second}),
                f"rows to compare differ in {name}: {first}, {second}",
            )
            for name, first, second in [
                ("widths", "16 32", "16 64"),
                ("activation", "SiLU", "ReLU"),
                ("initial_weights", math.nan, "orthogonal"),
                ("convolution", math.nan, "depthwise"),
                ("dropout", "0.0", "0.3"),
            ]
        ],
        ([], "rows are empty; give rows of results/runs.csv"),
    ],
)
def test_rows_that_cannot_be_compared_are_refused(rows, message):
    refuses(lambda: utils.compare(rows, [("batch", "layer")]), message)


def test_norms_that_are_compared_may_have_been_tuned():
    rows = rows_of("NetA", [86.0], weight_decay=0.1) + rows_of("NetB", [85.0], learning_rate=0.01)
    assert utils.compare(rows, [("batch", "layer")]).loc["batch minus layer", "points"] == 1.0


def test_rows_from_memory_and_from_a_file_are_of_one_setting():
    old = rows_of("NetA", [86.0, 87.0], layer_variant=math.nan)
    new = [row | {"seed": row["seed"] + 2} for row in rows_of("NetA", [86.0, 87.0], layer_variant="")]
    assert utils.summarize(old + new)["n"].tolist() == [4]


def test_what_can_not_be_summarized_is_refused():
    rows = rows_of("NetA", [86.0, 87.0])
    refuses(
        lambda: utils.summarize([*rows, row_of("NetA", 0, 50.0, device="cpu") | {"seed": "0"}]),
        "the rows hold a seed twice;",
    )
    rows[1]["test_accuracy"] = "85,98"
    refuses(lambda: utils.summarize(rows), "test_accuracy holds a text that is no number: Unable")
    refuses(lambda: utils.summarize([]), "rows are empty; give rows of results/runs.csv")


# ---------------------------------------------------------------------------------------------------------------------
# Misclassified images
# ---------------------------------------------------------------------------------------------------------------------


def test_most_confident_mistakes():
    predictions = torch.tensor([0, 1, 1, 2, 3, 3])
    labels = torch.tensor([0, 0, 2, 2, 0, 1])
    confidences = torch.tensor([0.9, 0.5, 0.8, 1.0, 0.8, 0.6])
    pick = utils.most_confident_mistakes
    assert pick(predictions, confidences, labels).tolist() == [2, 4, 5, 1]
    assert pick(predictions, confidences, labels, count=2).tolist() == [2, 4]
    assert pick(labels, confidences, labels).tolist() == []


@given(outcomes(), st.integers(1, 12))
def test_pick_of_the_mistakes(outcome, count):
    labels, predictions, confidences = outcome
    chosen = utils.most_confident_mistakes(predictions, confidences, labels, count).tolist()
    wrong = [i for i in range(len(labels)) if labels[i] != predictions[i]]
    assert chosen == sorted(wrong, key=lambda i: (-confidences[i].item(), i))[:count]


def flat_colors(count, seed=0):
    """`count` test images of one color each, all labeled 0, and a run that calls them all 1."""
    colors = torch.tensor([[20 * n + 10, 255 - 20 * n, (60 * n) % 256] for n in range(count)], dtype=torch.uint8)
    images = colors[:, None, None, :].expand(count, 32, 32, 3).contiguous()
    labels = torch.zeros(count).long()
    scores = Scores(0.0, 0.0, torch.ones(count).long(), torch.linspace(0.9, 0.5, count))
    row = {"net": "NetB", "norm": "layer", "seed": seed}
    return colors.tolist(), Data(images, labels, images, labels), utils.Run(None, [], scores, row)


def texts_of(figure):
    return [text.get_text() for axis in figure.axes for text in axis.texts]


@pytest.mark.parametrize("count", [10, 3])
def test_grid_shows_the_images_in_their_colors_and_places(tmp_path, count):
    colors, data, run = flat_colors(count)
    figure = utils.plot_mistakes(run, data, tmp_path / "layer.png")
    pixels = np.asarray(Image.open(tmp_path / "layer.png").convert("RGB"))
    places = []
    for color in colors:
        rows, columns = np.nonzero((pixels == color).all(2))
        assert len(rows) > 150 * 150, "the image is not there, or not in its colors"
        places.append((round(rows.mean() / pixels.shape[0] * 5 - 0.5), columns.mean() > pixels.shape[1] / 2))
    assert places == [(n // 2, n % 2 == 1) for n in range(count)]
    texts = texts_of(figure)
    assert texts[:3] == ["net: automobile, 90%", "label: airplane", "test image 0"]
    assert len(texts) == 3 * count
    guess = figure.axes[1].texts[0]
    assert same_color(guess.get_color(), COLORS["layer"])


@pytest.mark.parametrize("seed", [0, 7])
def test_grid_names_net_norm_seed_and_number(seed):
    _, data, run = flat_colors(10, seed)
    title = utils.plot_mistakes(run, data).get_suptitle()
    assert title == f"The 10 most confident mistakes\nlayer norm (NetB), seed {seed}"
    data = replace(data, name="SYNTHETIC DATA, NOT RESULTS")
    assert utils.plot_mistakes(run, data).get_suptitle() == f"{title}\nSYNTHETIC DATA, NOT RESULTS"


def test_grid_of_ten_of_many_mistakes_is_five_by_two():
    _, data, run = flat_colors(12)
    figure = utils.plot_mistakes(run, data)
    images = [axis for axis in figure.axes if axis.images]
    assert len(images) == 10
    figure.canvas.draw()
    corners = [(round(axis.get_position().x0, 2), round(axis.get_position().y0, 2)) for axis in images]
    assert len({x for x, _ in corners}) == 2
    assert len({y for _, y in corners}) == 5


def test_grid_without_a_mistake():
    _, data, run = flat_colors(3)
    right = replace(run, scores=replace(run.scores, accuracy=100.0, predictions=data.test_labels))
    figure = utils.plot_mistakes(right, data)
    assert figure.get_suptitle() == "No mistakes\nlayer norm (NetB), seed 0"
    assert texts_of(figure) == []


def test_grid_says_what_people_answered():
    _, data, run = flat_colors(10)
    votes = torch.zeros(10, 10, dtype=torch.int64)
    votes[3:, 0] = 51
    votes[0, 6], votes[0, 3], votes[0, 1] = 25, 24, 2
    votes[1, 0] = 51
    votes[2, 0] = votes[2, 9] = 25
    people = [text for text in texts_of(utils.plot_mistakes(run, data, votes=votes)) if text.startswith("people")]
    expected = ["people: 25 frog, 24 cat", "people: 51 airplane", "people: 25 airplane, 25 truck"]
    assert people == expected + ["people: 51 airplane"] * 7


def test_mistakes_table():
    _, data, run = flat_colors(4)
    confidences = torch.tensor([0.9, 0.5919, 0.3, 1 / 3])
    scores = Scores(0.0, 50.0, torch.tensor([0, 3, 0, 9]), confidences)
    table = utils.mistakes_table(replace(run, scores=scores), data)
    assert table.to_dict("records") == [
        {"net": "NetB", "index": 1, "true": "airplane", "predicted": "cat", "confidence": 0.5919},
        {"net": "NetB", "index": 3, "true": "airplane", "predicted": "truck", "confidence": 0.3333},
    ]


@pytest.mark.parametrize("show", [utils.mistakes_table, utils.plot_mistakes])
def test_mistakes_of_other_images_are_refused(tiny, two_runs, show):
    run = two_runs[0][0]
    other = replace(tiny, test_images=tiny.test_images.flip(0), test_labels=tiny.test_labels.flip(0))
    for data in (other, replace(tiny, test_images=255 - tiny.test_images)):
        with pytest.raises(ValueError, match=rf"^data are not what {re.escape(run.name)} was tested on, but "):
            show(run, data)


def test_testing_leaves_the_data_alone(small):
    before = copy.deepcopy(small)
    utils.test(models.NetA(widths=NARROW), small.test_images, small.test_labels)
    assert torch.equal(before.test_images, small.test_images)
    assert torch.equal(before.test_labels, small.test_labels)
