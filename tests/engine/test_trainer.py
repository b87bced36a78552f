"""The training step against the plain loop of PyTorch, its batches and schedule, its state, and how it diverges."""

import copy
import math
import sys
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchgen
import torchvision.transforms.v2.functional as TF
import yaml
from conftest import RATES
from torch import nn
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode

import models
import utils
from engine import fast
from engine.data import normalize
from engine.muon import Muon
from engine.trainer import OPTIMIZERS, Trainer, print_once, schedule, takes_fused_step
from utils import Settings

SHORT = Settings(epochs=2, batch_size=100)
NARROW = (8,) * 10


@pytest.fixture
def float32(monkeypatch):
    monkeypatch.setattr(fast, "pick_precision", lambda device: torch.float32)


def run_epoch(trainer):
    for _ in trainer.epoch():
        pass


def weights(net):
    return torch.cat([value.flatten() for value in net.state_dict().values() if value.is_floating_point()])


# ---------------------------------------------------------------------------------------------------------------------
# The step
# ---------------------------------------------------------------------------------------------------------------------


def plain_images(trainer, indices):
    """Cut, mirror and normalize images one by one, by torchvision's functions."""
    images = []
    for index in indices.tolist():
        image = trainer.data.images[index].permute(2, 0, 1)
        if "crop" in trainer.settings.augment:
            down, right = trainer.shift[index].tolist()
            image = TF.crop(TF.pad(image, [2], padding_mode="reflect"), 2 + down, 2 + right, 32, 32)
        if "flip" in trainer.settings.augment and trainer.flip[index]:
            image = TF.horizontal_flip(image)
        image = TF.to_dtype(image, torch.float32, scale=True)
        images.append(TF.normalize(image, [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]))
    return torch.stack(images)


@pytest.mark.parametrize(
    ("optimizer", "decay", "augment", "smoothing", "warmup"),
    [("sgd", 0.02, "none", 0.1, 0.2), ("sgdw", 0.5, "none", 0.1, 0.2), ("sgd", 0.02, "flip+crop", 0.3, 0.5)],
)
@pytest.mark.parametrize("name", models.NORM_OF)
def test_twelve_steps_of_a_plain_loop(small, float32, name, optimizer, decay, augment, smoothing, warmup):
    """A loop in float32 of PyTorch's own modules and torch.optim.SGD, which sees the same batches."""
    decoupled = decay if optimizer == "sgdw" else 0
    settings = Settings(learning_rate=0.05, weight_decay=decay, momentum=0.9, optimizer=optimizer, epochs=1)
    settings = replace(settings, batch_size=25, augment=augment, label_smoothing=smoothing, warmup=warmup)
    small = replace(small, images=small.images[:300], labels=small.labels[:300])
    net = utils.build(name, settings)
    plain, before = copy.deepcopy(net).train(), weights(net)
    convolutions = [p for n, p in plain.named_parameters() if p.ndim == 4 and not n.startswith("c11")]
    rest = [p for n, p in plain.named_parameters() if p.ndim == 1 or n.startswith("c11")]
    groups = [{"params": convolutions, "weight_decay": decay - decoupled}, {"params": rest}]
    optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9, nesterov=True)
    trainer = Trainer(net, small, settings)
    for step, _ in enumerate(trainer.epoch(), 1):
        indices = trainer.order[step - 1]
        logits = plain(plain_images(trainer, indices))
        loss = F.cross_entropy(logits, small.labels[indices], label_smoothing=smoothing)
        optimizer.zero_grad()
        loss.backward()
        progress = step / 13
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * min(progress / warmup, (1 - progress) / (1 - warmup))
        with torch.no_grad():
            for p in convolutions:
                p *= 1 - group["lr"] * decoupled
        optimizer.step()
        way = (weights(plain) - before).norm()
        assert (weights(net) - weights(plain)).norm() < 0.001 * way, step
    assert step == 12
    assert way > 0.2, "hardly anything was learned"


def test_schedule_climbs_for_a_fifth_and_falls_to_nearly_zero():
    rates = schedule(9, 0.4).tolist()  # at 1/10, 2/10, ... of the way
    assert rates == pytest.approx([0.2, 0.4, 0.35, 0.3, 0.25, 0.2, 0.15, 0.1, 0.05])
    rates = schedule(60, 0.5).tolist()
    assert len(rates) == 60
    assert max(rates) == pytest.approx(0.5, rel=0.05)
    assert rates.index(max(rates)) == 11
    assert 0 < rates[-1] < 0.02


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_step_takes_its_own_rate_of_the_schedule(small, name):
    settings = replace(SHORT, optimizer=name, learning_rate=RATES[name])
    net = utils.build("NetB", settings, widths=NARROW)
    trainer = Trainer(net, small, settings)
    expected = schedule(12, RATES[name]).tolist()
    for _ in range(2):
        for _ in trainer.epoch():
            assert trainer.lr.item() == pytest.approx(expected.pop(0))
            assert all(group["lr"] is trainer.lr for group in trainer.optimizer.param_groups)
    assert expected == []


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_momentum_and_weight_decay_reach_each_optimizer(small, name):
    found = []
    for changes in ({}, {"momentum": 0.5}, {"weight_decay": 0.1}):
        settings = replace(SHORT, optimizer=name, learning_rate=RATES[name], **changes)
        net = utils.build("NetB", settings, widths=NARROW)
        run_epoch(Trainer(net, small, settings))
        found.append(weights(net))
    assert not torch.allclose(found[0], found[1], atol=1e-4)
    assert not torch.allclose(found[0], found[2], atol=1e-4)


def test_muon_computes_in_the_low_precision(small, monkeypatch):
    monkeypatch.setattr(fast, "pick_precision", lambda device: torch.bfloat16)
    assert Trainer(models.NetA(), small, SHORT).optimizer.dtype == torch.bfloat16


def test_master_weights_are_float32_and_what_the_copy_rounds(small, monkeypatch):
    monkeypatch.setattr(fast, "pick_precision", lambda device: torch.bfloat16)
    net = utils.build("NetA", SHORT)
    trainer = Trainer(net, small, SHORT)
    assert trainer.model.C2.conv.weight.dtype == torch.bfloat16
    now = None
    for _ in trainer.epoch():
        last, now = now, {name: p.clone() for name, p in net.named_parameters() if ".norm." not in name}
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    assert len(trainer.copied) == 12  # ten convolutions, weight and bias of c11
    for (low, _), (name, before) in zip(trainer.copied, last.items(), strict=True):
        assert torch.equal(low, before.bfloat16()), name
    assert net.C2.norm.num_batches_tracked == trainer.steps_per_epoch == 6


def test_weights_that_change_between_steps_are_those_that_are_trained(small, float32):
    net, found = utils.build("NetA", SHORT), []
    trainer = Trainer(net, small, SHORT)
    net.load_state_dict(utils.build("NetA", replace(SHORT, seed=7)).state_dict())
    loss = trainer.loss

    def look(*batch):
        found.append(all(torch.equal(low, master) for low, master in trainer.copied))
        return loss(*batch)

    trainer.loss = look
    for _ in trainer.epoch():
        with torch.no_grad():
            net.C5.conv.weight[:12] = 0
    assert found == [True] * 6


CHANGES = {
    "moved": lambda net: net.double().float(),
    "a new parameter": lambda net: setattr(net.C4.conv, "weight", nn.Parameter(net.C4.conv.weight.detach().clone())),
    "a parameter anew": lambda net: setattr(net.C4.conv, "weight", nn.Parameter(net.C4.conv.weight.data)),
    "a new buffer": lambda net: setattr(net.C4.norm, "running_mean", net.C4.norm.running_mean.clone()),
    "frozen": lambda net: net.c11.requires_grad_(False),
    "evaluated": lambda net: net.eval(),
    "a module": lambda net: setattr(net.C4, "activation", nn.ReLU()),
    "one more": lambda net: net.C10.add_module("dropout", nn.Dropout(0.5)),
    "one of its own once more": lambda net: net.C10.add_module("again", net.C10.activation),
    "a setting": lambda net: setattr(net.C1.norm, "eps", 0.1),
    "a setting of NumPy": lambda net: setattr(net.C1.norm, "eps", np.float32(0.1)),
    "a setting that is not shown": lambda net: setattr(net.P1, "divisor_override", 1),
    "a method": lambda net: setattr(net.C1.norm, "forward", lambda x: 0.1 * x),
    "a hook": lambda net: net.C1.register_forward_hook(lambda *_: None),
    "a hook of a weight": lambda net: net.C1.conv.weight.register_hook(lambda gradient: 0 * gradient),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_net_that_changes_in_more_than_weights_is_refused_before_an_epoch(small, change):
    net = utils.build("NetA", SHORT)
    trainer = Trainer(net, small, SHORT)
    run_epoch(trainer)
    change(net)
    before = weights(net)
    with pytest.raises(ValueError, match=r"^the net was changed since this Trainer was made, in more than its weights"):
        run_epoch(trainer)
    assert torch.equal(weights(net), before)


def scale_rate(optimizer):
    for group in optimizer.param_groups:
        group["lr"] *= 0.1  # in place, since it is a tensor


def wait_for_a_plateau(optimizer):
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    for _ in range(3):
        plateau.step(1.0)


RATE_CHANGES = {
    "set": lambda optimizer: optimizer.param_groups[1].update(lr=0.1),
    "scaled": scale_rate,
    "loaded": lambda optimizer: optimizer.load_state_dict(optimizer.state_dict()),  # as another tensor
    "scheduled": lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1).step(),
    "lowered on a plateau": wait_for_a_plateau,
}


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step()")
@pytest.mark.parametrize("change", RATE_CHANGES.values(), ids=RATE_CHANGES)
@pytest.mark.parametrize("name", ["muon", "sgd", "sgdw", "adamw"])
def test_a_rate_that_is_set_in_the_optimizer_is_refused_before_an_epoch(small, name, change):
    trainer = Trainer(utils.build("NetB", SHORT), small, replace(SHORT, optimizer=name))
    run_epoch(trainer)
    change(trainer.optimizer)
    before = weights(trainer.net)
    message = r"^a learning rate was set in the optimizer; write it into this Trainer's learning_rates$"
    with pytest.raises(ValueError, match=message):
        run_epoch(trainer)
    assert torch.equal(weights(trainer.net), before)


def test_a_rate_that_is_set_within_an_epoch_is_refused_in_the_next_step(small):
    trainer = Trainer(utils.build("NetB", SHORT), small, SHORT)
    steps = trainer.epoch()
    next(steps)
    scale_rate(trainer.optimizer)
    with pytest.raises(ValueError, match=r"^a learning rate was set in the optimizer"):
        next(steps)


def test_rates_that_are_written_into_the_schedule_are_taken(small):
    trainer = Trainer(utils.build("NetB", SHORT), small, SHORT)
    run_epoch(trainer)
    trainer.learning_rates *= 0
    before = weights(trainer.net)
    run_epoch(trainer)
    assert torch.equal(weights(trainer.net), before)


def test_a_parameter_that_is_added_to_the_optimizer_is_refused_before_an_epoch(small):
    """Its gradient would be added up over the steps, since they clear those of the net alone."""
    trainer = Trainer(utils.build("NetB", SHORT), small, replace(SHORT, optimizer="sgd"))
    trainer.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(()))]})
    with pytest.raises(ValueError, match=r"^data, settings, loss or optimizer were changed since"):
        run_epoch(trainer)


def test_a_step_that_was_interrupted_is_no_change_of_the_rate(small):
    trainer = Trainer(utils.build("NetB", SHORT), small, SHORT)
    state = copy.deepcopy(trainer.state_dict())
    hook = trainer.optimizer.register_step_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_epoch(trainer)
    hook.remove()
    trainer.load_state_dict(state)
    run_epoch(trainer)


@pytest.mark.parametrize("change", [{"learning_rate": 0.001}, {"label_smoothing": 0.5}, {"momentum": 0.5}])
def test_other_settings_are_refused_before_an_epoch(small, change):
    trainer = Trainer(utils.build("NetB", SHORT), small, SHORT)
    trainer.settings = replace(SHORT, **change)
    with pytest.raises(
        ValueError, match=r"^data, settings, loss or optimizer were changed since this Trainer was made"
    ):
        run_epoch(trainer)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_decay_that_is_set_in_the_optimizer_is_that_of_the_next_steps(small, name):
    found = []
    for decay, later in ((0.0, 2.0), (2.0, 2.0), (2.0, 0.0), (0.0, 0.0)):
        settings = replace(SHORT, optimizer=name, learning_rate=RATES[name] / 10, weight_decay=decay)
        trainer = Trainer(utils.build("NetB", settings, widths=NARROW), small, settings)
        trainer.optimizer.param_groups[0]["weight_decay"] = later
        run_epoch(trainer)
        found.append(weights(trainer.net))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[2], found[3])
    assert not torch.allclose(found[0], found[2], atol=1e-4)


def test_a_run_that_diverged_goes_on_from_an_earlier_state(small):
    trainer = Trainer(utils.build("NetB", SHORT), small, replace(SHORT, epochs=3))
    run_epoch(trainer)
    good, rates = copy.deepcopy(trainer.state_dict()), trainer.learning_rates.clone()
    trainer.learning_rates[:] = torch.inf
    run_epoch(trainer)
    with pytest.raises(FloatingPointError):
        trainer.check_finite()
    trainer.load_state_dict(good)
    trainer.learning_rates.copy_(rates)
    before = weights(trainer.net)
    run_epoch(trainer)
    trainer.check_finite()
    assert (weights(trainer.net) - before).norm() > 0.01 * before.norm()


def test_a_loss_of_ones_own_finds_the_layers_by_their_names(small, float32, monkeypatch):
    """Elsewhere c3 and c7 come after their pools."""

    class Looking(Trainer):
        def loss(self, images, labels):
            return self.model(images).sum(), 0 * images.sum()

    net = utils.build("NetB", SHORT)
    assert isinstance(Trainer(net, small, SHORT).model.c7, fast.AvgPool2x2)
    copies = [Looking(net, small, SHORT).model]
    monkeypatch.setattr(Trainer, "loss", Looking.loss)  # as in a notebook
    copies.append(Trainer(net, small, SHORT).model)
    for model in copies:
        own = found = normalize(small.images[:4])
        for (name, layer), (copied_name, copied) in zip(net.named_children(), model.named_children(), strict=True):
            own, found = layer(own), copied(found)
            assert name == copied_name
            assert torch.allclose(own, found, atol=1e-5), name


class Penalized(Trainer):
    """With a penalty on the weights of the net or of what trains for it."""

    def loss(self, images, labels):
        loss, accuracy = super().loss(images, labels)
        return loss + 0.01 * sum(p.abs().sum() for p in getattr(self, self.penalized).parameters()), accuracy


def test_a_loss_of_the_net_beside_its_copy_is_refused(small, float32):
    net = utils.build("NetB", SHORT)
    trainer, plain = Penalized(net, small, SHORT), copy.deepcopy(net)
    trainer.penalized = "net"
    message = (
        r"^the loss depends on C1\.conv\.weight itself, beside the copy that is trained; "
        r"use self\.model in `loss`, and self in `forward`$"
    )
    with pytest.raises(ValueError, match=message):
        run_epoch(trainer)
    assert torch.equal(weights(net), weights(plain))
    trainer = Penalized(net, small, SHORT)
    trainer.penalized = "model"
    next(trainer.epoch())
    images, labels = trainer.data.images[trainer.order[0]], trainer.data.labels[trainer.order[0]]
    loss = F.cross_entropy(plain(normalize(images)), labels, label_smoothing=0.1)
    (loss + 0.01 * sum(p.abs().sum() for p in plain.parameters())).backward()
    for own, wanted in zip(net.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(own.grad, wanted.grad, atol=1e-4)


def test_a_forward_that_closes_over_the_net_is_refused(small, float32):
    """The copy's closure leads to the net's weights."""

    class Closed(models.NetB):
        state_in_buffers = True

        def __init__(self):
            super().__init__()
            self.scale = lambda: self.c11.weight.norm()

        def forward(self, x):
            return super().forward(x) / self.scale()

    with pytest.raises(ValueError, match=r"^the loss depends on c11\.weight itself, beside the copy that is trained"):
        run_epoch(Trainer(Closed(), small, SHORT))


def test_weights_tied_by_their_memory_are_refused(small):
    """Memory format and device would untie them; one Parameter in two modules stays one."""
    net = utils.build("NetB", SHORT)
    net.C6.conv.weight = nn.Parameter(net.C5.conv.weight)
    message = r"^C6\.conv\.weight shares memory with C5\.conv\.weight; give both modules one nn\.Parameter$"
    for train in (utils.train, Trainer):
        with pytest.raises(ValueError, match=message):
            train(net, small, SHORT)
    net.C6.conv.weight = net.C5.conv.weight
    run_epoch(Trainer(net, small, SHORT))
    assert net.C6.conv.weight is net.C5.conv.weight


def test_what_a_norm_says_of_its_buffers_may_change(small):
    """As its `extra_repr` may, since forward changes them."""

    class Norm(models.ScaleShift):
        state_in_buffers = True

        def __init__(self, channels):
            super().__init__(channels)
            self.register_buffer("mean", torch.zeros(1))

        def extra_repr(self):
            return f"mean={self.mean.item()}"

        def forward(self, x):
            self.mean.lerp_(x.detach().mean().float(), 0.1)
            return super().forward(x).to(x.dtype)

    net = models.NetB(widths=NARROW)
    net.C5.norm = Norm(8)
    trainer = Trainer(net, small, SHORT)
    run_epoch(trainer)
    run_epoch(trainer)
    assert trainer.model is not net


def test_a_net_that_trains_as_it_is_may_change_between_epochs(small):
    found = []
    for activation in (nn.SiLU(), nn.SiLU(), nn.ReLU()):
        net = utils.build("NetA", SHORT)
        net.register_forward_hook(lambda *_: None)
        trainer = Trainer(net, small, SHORT)
        run_epoch(trainer)
        net.C4.activation = activation
        run_epoch(trainer)
        found.append(weights(net))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_steps_and_batches_are_those_of_an_epoch(small):
    trainer = Trainer(utils.build("NetA", SHORT), small, SHORT)
    for take in (trainer.step, trainer.batch):
        with pytest.raises(ValueError, match=r"^no epoch is under way; take steps by iterating over epoch\(\)$"):
            take()
    for number, _ in enumerate(trainer.epoch()):
        if number == 0:
            _, labels = trainer.batch()
            assert torch.equal(labels, small.labels[trainer.order[1]])
    with pytest.raises(ValueError, match="no epoch is under way"):
        trainer.step()
    state = copy.deepcopy(trainer.state_dict())
    next(trainer.epoch())
    trainer.load_state_dict(state)
    assert trainer.means() == (0, 0)
    with pytest.raises(ValueError, match="no epoch is under way"):
        trainer.step()


def test_means_are_those_of_the_steps_so_far(small, float32):
    trainer, found = Trainer(utils.build("NetB", SHORT), small, SHORT), []
    step, losses = trainer.loss, []
    trainer.loss = lambda *batch: losses.append(step(*batch)) or losses[-1]
    for _ in trainer.epoch():
        loss, accuracy = zip(*((loss.item(), 100 * right.item()) for loss, right in losses), strict=True)
        found.append(len(losses))
        assert trainer.means() == pytest.approx((sum(loss) / len(loss), sum(accuracy) / len(loss)), rel=1e-5)
    assert found == [1, 2, 3, 4, 5, 6]


def test_training_draws_no_random_numbers_of_the_caller(small):
    net = utils.build("NetA", SHORT)
    before = torch.get_rng_state()
    run_epoch(Trainer(net, small, SHORT))
    assert torch.equal(torch.get_rng_state(), before)


def test_precisions_differ_by_rounding_alone(small, monkeypatch):
    losses = []
    for dtype in (torch.bfloat16, torch.float32):
        monkeypatch.setattr(fast, "pick_precision", lambda device, dtype=dtype: dtype)
        trainer = Trainer(utils.build("NetB", SHORT), small, SHORT)
        run_epoch(trainer)
        losses.append(trainer.means()[0])
    assert losses[0] == pytest.approx(losses[1], abs=0.02)


def test_means_are_of_the_batches_as_the_net_saw_them(small, float32):
    """At a rate so small that the net stays what it is: loss with label smoothing, and accuracy in percent."""
    settings = replace(SHORT, learning_rate=1e-9, weight_decay=0.0)
    net = utils.build("NetB", settings, widths=NARROW)
    logits = net(normalize(small.images)).detach()
    trainer = Trainer(net, small, settings)
    for _ in range(2):  # the second time, without what the first has summed up
        run_epoch(trainer)
        loss, accuracy = trainer.means()
        assert loss == pytest.approx(F.cross_entropy(logits, small.labels, label_smoothing=0.1).item(), abs=1e-3)
        assert accuracy == pytest.approx(100 * (logits.argmax(1) == small.labels).float().mean().item(), abs=0.2)


# ---------------------------------------------------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------------------------------------------------


def test_every_image_once_an_epoch_in_a_new_order(small):
    trainer = Trainer(utils.build("NetA", SHORT, widths=NARROW), small, SHORT)
    orders = []
    for _ in range(2):
        next(trainer.epoch())
        orders.append(trainer.order.flatten().clone())
    assert orders[0].sort().values.tolist() == list(range(600))
    assert not torch.equal(*orders)


def test_an_epoch_leaves_out_what_does_not_fill_a_batch(small):
    trainer = Trainer(utils.build("NetA", SHORT, widths=NARROW), small, replace(SHORT, batch_size=250))
    assert len(list(trainer.epoch())) == trainer.steps_per_epoch == 2
    assert len(trainer.order.flatten().unique()) == 500


def test_nets_of_a_seed_share_initial_weights_and_batches(small):
    trainers = []
    for name in models.NORM_OF:
        settings = replace(SHORT, augment="flip+crop", seed=5)
        net = utils.build(name, settings)
        fresh = utils.build("NetA", settings)
        assert all(torch.equal(p, q) for p, q in zip(net.parameters(), fresh.parameters(), strict=True))
        trainers.append(Trainer(net, small, settings))
        next(trainers[-1].epoch())
        for state in ("order", "shift", "flip"):
            assert torch.equal(getattr(trainers[-1], state), getattr(trainers[0], state))
    other = Trainer(models.NetA(), small, replace(SHORT, seed=6))
    next(other.epoch())
    assert not torch.equal(other.order, trainers[0].order)


def first_batch(small, augment):
    settings = replace(SHORT, augment=augment, batch_size=200, epochs=4)
    trainer = Trainer(utils.build("NetA", settings, widths=NARROW), small, settings)
    next(trainer.epoch())
    trainer.counts.zero_()
    return trainer, trainer.batch()[0].float()


def test_images_are_augmented_only_when_asked_for(small):
    trainer, images = first_batch(small, "none")
    expected = normalize(small.images[trainer.order[0]]).to(trainer.dtype).float()
    assert torch.equal(images, expected)
    trainer, images = first_batch(small, "flip")
    mirrored = trainer.flip[trainer.order[0]]
    assert 60 < mirrored.sum() < 140
    assert torch.equal(images[mirrored], expected[mirrored].flip(3))
    assert torch.equal(images[~mirrored], expected[~mirrored])
    trainer, _ = first_batch(small, "flip+crop")
    assert len({tuple(shift) for shift in trainer.shift.tolist()}) == 25  # up to two pixels each way
    settings = replace(SHORT, augment="flip+crop", crop=1)
    trainer = Trainer(utils.build("NetA", settings, widths=NARROW), small, settings)
    next(trainer.epoch())
    assert len({tuple(shift) for shift in trainer.shift.tolist()}) == 9


def test_flips_alternate_and_crops_are_drawn_anew(small):
    trainer, _ = first_batch(small, "flip+crop")
    flips, shifts = [], []
    for _ in range(3):
        next(trainer.epoch())
        flips.append(trainer.flip.clone())
        shifts.append(trainer.shift.clone())
    assert torch.equal(flips[0], ~flips[1])
    assert torch.equal(flips[0], flips[2])
    assert (shifts[0] == shifts[1]).all(1).float().mean() < 0.1


def test_training_leaves_the_data_alone(small):
    before = copy.deepcopy(small)
    run_epoch(Trainer(utils.build("NetC", SHORT, widths=NARROW), small, replace(SHORT, augment="flip+crop")))
    assert torch.equal(before.images, small.images)
    assert torch.equal(before.labels, small.labels)


# ---------------------------------------------------------------------------------------------------------------------
# State
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_state_dict_holds_all_that_the_next_epochs_depend_on(small, tmp_path, name):
    """Through a file, and into a trainer that has trained already or not."""
    settings = replace(SHORT, epochs=3, augment="flip+crop", optimizer=name, learning_rate=RATES[name])
    small = replace(small, images=small.images[:200], labels=small.labels[:200])

    def trainer(seed=settings.seed):
        return Trainer(utils.build("NetA", replace(settings, seed=seed), widths=NARROW), small, settings)

    whole = trainer()
    run_epoch(whole)
    torch.save(whole.state_dict(), tmp_path / "state.pt")
    run_epoch(whole)
    run_epoch(whole)
    for trained in (False, True):
        resumed = trainer(seed=1)
        if trained:
            run_epoch(resumed)
        resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        run_epoch(resumed)
        run_epoch(resumed)
        assert torch.equal(weights(whole.net), weights(resumed.net))
        assert whole.means() == resumed.means()


def poison(trainer, step):
    """Make the loss nan at a step of the run."""
    loss = trainer.loss

    def poisoned(images, labels):
        value, accuracy = loss(images, labels)
        return value * torch.where(trainer.global_step[0] == step, math.nan, 1.0), accuracy

    trainer.loss = poisoned


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weights_stop_at_the_first_step_that_is_not_finite(small, name):
    settings = replace(SHORT, optimizer=name, learning_rate=RATES[name], seed=7, batch_size=50)
    small = replace(small, images=small.images[:300], labels=small.labels[:300])
    nets = [utils.build("NetC", settings, widths=NARROW) for _ in range(2)]
    whole, stopped = (Trainer(net, small, settings) for net in nets)
    poison(stopped, 8)
    run_epoch(whole)  # of six steps
    epoch = whole.epoch()
    next(epoch), next(epoch)
    whole.check_finite()
    run_epoch(stopped)
    stopped.check_finite()
    run_epoch(stopped)
    assert torch.equal(weights(nets[0]), weights(nets[1]))
    message = (
        r"^group norm, seed 7, diverged in epoch 2, step 3 of 6, at a learning rate of \S+ \(learning_rate is \S+\)"
    )
    with pytest.raises(FloatingPointError, match=message + "; try a lower one$"):
        stopped.check_finite()


# ---------------------------------------------------------------------------------------------------------------------
# What is refused, and what a trainer leaves alone
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("net", [nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)), nn.Conv2d(3, 10, 32)])
def test_another_kind_of_net_is_refused_in_one_line(small, net):
    with pytest.raises(TypeError, match=rf"^net is a {type(net).__name__}; give a models.Net, such as NetA\(\)$"):
        Trainer(net, small, SHORT)


def test_a_batch_larger_than_the_data_is_refused(small):
    with pytest.raises(ValueError, match=r"^batch_size is 601; there are 600 training images$"):
        Trainer(models.NetA(), small, replace(SHORT, batch_size=601))


def test_another_head_is_refused_in_one_line(small):
    net = models.NetA()
    net.c11 = nn.Sequential(nn.Dropout(0.1), nn.Conv2d(32, 10, 1))
    with pytest.raises(TypeError, match=r"^c11 is a Sequential; give a Conv2d, as in models.Net$"):
        Trainer(net, small, SHORT)


def test_there_are_no_more_epochs_than_the_schedule_has(small):
    trainer = Trainer(models.NetA(widths=NARROW), small, replace(SHORT, epochs=1))
    run_epoch(trainer)
    with pytest.raises(ValueError, match=r"^all epochs are done; settings.epochs is 1$"):
        run_epoch(trainer)
    longer = replace(SHORT, epochs=3)
    resumed = Trainer(models.NetA(widths=NARROW), small, longer)
    resumed.load_state_dict(trainer.state_dict())
    assert resumed.epochs_left == 2


def test_a_net_for_fewer_classes_than_the_data_has_is_refused(small):
    many = replace(small, classes=tuple(map(str, range(100))))
    with pytest.raises(ValueError, match=rf"^classes is 10; {small.name} has 100$"):
        Trainer(models.NetA(), many, SHORT)


def test_frozen_parameters_and_other_types_are_refused_by_name(small):
    net = models.NetA()
    net.C5.conv.requires_grad_(False)
    with pytest.raises(ValueError, match=r"^C5.conv.weight is frozen; give a net whose parameters are all float32"):
        Trainer(net, small, SHORT)
    with pytest.raises(ValueError, match=r"^C1.conv.weight is of torch.bfloat16; give a net"):
        Trainer(models.NetA().bfloat16(), small, SHORT)


def test_a_norm_that_was_frozen_by_eval_is_refused(small):
    """Training would unfreeze it without a word. A net that is in eval mode as a whole, as after a test, is trained."""
    net = models.NetA(widths=NARROW)
    net.C5.norm.eval()
    with pytest.raises(
        ValueError, match=r"^C5.norm is in eval mode, which training would end; call net.train\(\) first$"
    ):
        Trainer(net, small, SHORT)
    assert not net.C5.norm.training
    Trainer(net.eval(), small, SHORT)
    assert net.C5.norm.training


def test_a_norm_that_freezes_itself_is_trained_as_it_is(small):
    class Frozen(nn.BatchNorm2d):
        def train(self, mode=True):
            return super().train(False)

    net = models.NetA(widths=NARROW)
    net.C5.norm = Frozen(8)
    for _ in range(2):
        run_epoch(Trainer(net, small, SHORT))
        assert not net.C5.norm.training
        assert net.C5.norm.num_batches_tracked == 0


def test_a_net_for_gray_images_is_refused(small):
    with pytest.raises(ValueError, match=r"^in_channels is 1; the images have 3 colors$"):
        Trainer(models.NetA(in_channels=1), small, SHORT)


def test_a_parameter_without_a_gradient_is_refused_by_name(small):
    net = models.NetA(widths=NARROW)
    net.C5.register_parameter("spare", nn.Parameter(torch.ones(1)))
    with pytest.raises(ValueError, match=r"^C5.spare gets no gradient; give a net that uses all its parameters$"):
        run_epoch(Trainer(net, small, SHORT))


class Counting(nn.SiLU):
    """Count the calls in training, in an attribute."""

    calls = 0

    def forward(self, x):
        self.calls += self.training
        return super().forward(x)


class Centered(models.ScaleShift):
    """Subtract a running mean that is no buffer."""

    def __init__(self, channels):
        super().__init__(channels)
        self.mean = torch.zeros(channels, 1, 1)

    def forward(self, x):
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean((0, 2, 3))[:, None, None]
        return super().forward(x - self.mean)


class UnitFilters(nn.Conv2d):
    """Keep each filter at length 1, in the weights themselves."""

    def forward(self, x):
        with torch.no_grad():
            self.weight /= self.weight.flatten(1).norm(dim=1)[:, None, None, None]
        return super().forward(x)


class Shared(nn.Module):
    """Call a norm that belongs to another layer, kept in a list."""

    def __init__(self, norm):
        super().__init__()
        self.norms = [norm]

    def forward(self, x):
        return 2 * self.norms[0](x)


class Clipped(torch.autograd.Function):
    """The identity, whose gradient is clipped to 1e-4."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.clamp(-1e-4, 1e-4)


class ClippedGradients(nn.Module):
    def forward(self, x):
        return Clipped.apply(x)


def clip_weight(conv, gradient_inputs, gradients):
    return (gradient_inputs[0].clamp(-1e-4, 1e-4),)


def pull_to(weight):
    return lambda module, inputs, output: output + weight.mean()


class Unregistered(models.ScaleShift):
    """Says that its state is in its buffers, but has a part that PyTorch doesn't know."""

    state_in_buffers = True

    def __init__(self, part):
        super().__init__(8)
        self.parts = [part]

    def forward(self, x):
        part = self.parts[0]
        return super().forward((part["conv"] if isinstance(part, dict) else part)(x))


def centralize(weight):
    gradient = weight.grad.flatten(1)
    weight.grad = (gradient - gradient.mean(1, keepdim=True)).view(weight.shape)


class Gradients(torch.autograd.Function):
    """Notes the largest gradient that reaches it."""

    found = ()

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        Gradients.found += (gradient.abs().max().item(),)
        return gradient


def test_on_a_cpu_modules_of_ones_own_see_gradients_as_they_are(small):
    """In low precision, too: only float16 needs a scaled loss."""
    Gradients.found = ()
    for promise in (True, False):
        members = {"state_in_buffers": promise, "forward": lambda self, x: Gradients.apply(x)}
        net = utils.build("NetB", Settings())
        net.GAP = nn.Sequential(net.GAP, type("Seen", (nn.Module,), members)())
        trainer = Trainer(net, small, Settings(epochs=1, batch_size=50, augment="none"))
        next(trainer.epoch())
    assert len(Gradients.found) == 2
    assert Gradients.found[0] == pytest.approx(Gradients.found[1], rel=0.1)


OWN_CODE = {  # what a user may do to a net, by name; each is called with a NetB
    "an attribute that counts": lambda net: setattr(net.C5, "activation", Counting()),
    "a running mean that is no buffer": lambda net: setattr(net.C5, "norm", Centered(8)),
    "weights that forward changes": lambda net: setattr(net.C5, "conv", UnitFilters(8, 8, 3, padding=1)),
    "a norm that another layer has": lambda net: setattr(net.C5, "norm", Shared(net.C4.norm)),
    "a gradient that backward clips": lambda net: setattr(net.C5, "norm", ClippedGradients()),
    "a hook that clips a gradient": lambda net: net.C5.conv.register_full_backward_hook(clip_weight),
    "a hook of a parameter": lambda net: net.c11.weight.register_hook(lambda gradient: gradient.clamp(-0.01, 0.01)),
    "a hook that sets a gradient in another layout": lambda net: net.C5.conv.weight.register_post_accumulate_grad_hook(
        centralize
    ),
    "a hook that computes with a weight": lambda net: net.C5.conv.register_forward_hook(pull_to(net.c11.weight)),
    "a method of one module": lambda net: setattr(
        net.C5.norm, "forward", lambda x: x * net.C5.norm.weight[0] - net.C5.norm.bias[1]
    ),
    "a norm in a list": lambda net: setattr(net.C5, "norm", Unregistered(nn.BatchNorm2d(8, affine=False))),
    "a layer in a dict": lambda net: setattr(
        net.C5, "norm", Unregistered({"conv": nn.Conv2d(8, 8, 1).requires_grad_(False)})
    ),
    "pruned weights": lambda net: prune.l1_unstructured(net.C5.conv, "weight", 0.5),
    "weights of a weight norm": lambda net: nn.utils.parametrizations.weight_norm(net.C5.conv),
    "layers that share a norm": lambda net: setattr(net.C5, "norm", net.C4.norm),
    "a compiled part": lambda net: setattr(net, "C5", torch.compile(net.C5, backend="eager")),
    "a part compiled in place": lambda net: net.C5.compile(backend="eager"),
    "running averages of instance norm": lambda net: setattr(
        net.C5, "norm", nn.InstanceNorm2d(8, affine=True, track_running_stats=True)
    ),
    "buffers of two modules": lambda net: setattr(
        net, "GAP", nn.Sequential(net.GAP, *2 * [nn.BatchNorm2d(8, affine=False)])
    ),
    "a buffer more": lambda net: net.C5.norm.register_buffer("steps", torch.zeros(())),
}


@pytest.mark.parametrize("kind", OWN_CODE)
def test_a_net_with_code_of_its_own_trains_as_in_a_plain_loop(small, monkeypatch, capsys, kind):
    monkeypatch.setattr(fast, "pick_precision", lambda device: torch.bfloat16)  # of other nets
    settings = Settings(optimizer="sgd", learning_rate=0.05, momentum=0.9, epochs=1, batch_size=100, weight_decay=0)
    net, plain = (utils.build("NetB", settings, widths=NARROW).train() for _ in range(2))
    for one in (net, plain):
        torch.manual_seed(1)
        OWN_CODE[kind](one)
    print_once.cache_clear()
    trainer = Trainer(net, small, settings)
    assert capsys.readouterr().out == f"training in float32, step by step: {fast.reason_against_copy(net)}\n"
    optimizer, before = torch.optim.SGD(plain.parameters(), 0.05, 0.9, nesterov=True), weights(net)
    for step, _ in enumerate(trainer.epoch()):
        indices = trainer.order[step]
        optimizer.zero_grad()
        logits = plain(normalize(small.images[indices]))
        F.cross_entropy(logits, small.labels[indices], label_smoothing=settings.label_smoothing).backward()
        optimizer.param_groups[0]["lr"] = trainer.learning_rates[step].item()
        optimizer.step()
    assert (weights(net) - weights(plain)).norm() < 0.001 * (weights(plain) - before).norm()
    torch.testing.assert_close(dict(net.named_buffers()), dict(plain.named_buffers()))
    for name in ("calls", "mean"):
        for first, second in zip(net.modules(), plain.modules(), strict=True):
            torch.testing.assert_close(vars(first).get(name), vars(second).get(name))


@pytest.mark.parametrize("optimizer", ["sgd", "sgdw", "adamw", "muon"])
def test_the_layout_of_weights_in_memory_changes_nothing(small, optimizer):
    """Neither weights set between epochs in another layout nor a parameter that is a slice of a tensor."""
    settings = Settings(optimizer=optimizer, learning_rate=0.01, momentum=0.9, epochs=2, batch_size=100)
    found, source = [], torch.linspace(0.5, 1.5, 16)
    for other in (False, True):
        net = utils.build("NetA", settings, widths=NARROW)
        net.C1.register_forward_hook(lambda *_: None)  # so that it trains as it is
        net.C1.norm.weight = nn.Parameter(source[::2] if other else source[::2].clone())
        trainer = Trainer(net, small, settings)
        for _ in range(2):
            run_epoch(trainer)
            if other:
                values = torch.cat([p.detach().flatten() for p in net.parameters()])
                nn.utils.vector_to_parameters(values, net.parameters())
        found.append(weights(net))
    assert torch.equal(*found)
    assert torch.equal(source, torch.linspace(0.5, 1.5, 16))


def declared(cls, *arguments):
    return type(cls.__name__, (cls,), {"state_in_buffers": True})(*arguments)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda net: None, ""),
        (lambda net: setattr(net.C5, "norm", nn.LayerNorm([8, 16, 16])), ""),
        (lambda net: setattr(net.C5, "activation", nn.Sequential(nn.ReLU(), nn.Dropout(0.1))), ""),
        (lambda net: setattr(net.C5, "norm", nn.BatchNorm2d(8)), ""),
        (lambda net: setattr(net.C5, "norm", declared(Centered, 8)), ""),
        (lambda net: setattr(net.C5, "norm", Centered(8)), "C5.norm is a Centered, which does not say state_in_buffer"),
        (lambda net: setattr(net.C5, "norm", type("Below", (type(declared(Centered, 8)),), {})(8)), "is a Below, whi"),
        (lambda net: setattr(net.C5, "norm", nn.BatchNorm2d(8, momentum=None)), "C5.norm is a BatchNorm2d, which does"),
        (lambda net: setattr(net.C5, "norm", nn.SyncBatchNorm(8)), "C5.norm is a SyncBatchNorm, which does not say"),
        (lambda net: net.register_buffer("steps", torch.zeros(())), "net is a NetB, which does not say"),
        (lambda net: setattr(net, "forward", print), "net has a hook, is compiled, or has a method of its own"),
        (lambda net: net.c11.weight.register_post_accumulate_grad_hook(print), "c11.weight has a hook"),
    ],
)
def test_why_a_copy_can_not_train(change, reason):
    net = models.NetB(widths=NARROW)
    change(net)
    found = fast.reason_against_copy(net)
    assert reason in found
    assert bool(reason) == bool(found)


def test_a_norm_that_is_written_into_models_promises_for_itself(monkeypatch):
    monkeypatch.setattr(models, "Centered", Centered, raising=False)
    net = models.NetB(widths=NARROW)
    net.C5.norm = models.Centered(8)
    assert fast.reason_against_copy(net)


def test_a_class_that_says_so_is_copied_and_keeps_its_buffers(small, monkeypatch):
    class Norm(models.ScaleShift):
        state_in_buffers = True

        def __init__(self):
            super().__init__(8)
            self.register_buffer("mean", torch.zeros(8))

        def forward(self, x):
            if self.training:
                self.mean.lerp_(x.detach().float().mean((0, 2, 3)), 0.1)
            return super().forward(x - self.mean.to(x.dtype).view(-1, 1, 1)).to(x.dtype)

    monkeypatch.setattr(fast, "pick_precision", lambda device: torch.bfloat16)
    net = models.NetB(widths=NARROW)
    net.C5.norm = Norm()
    trainer = Trainer(net, small, SHORT)
    run_epoch(trainer)
    assert trainer.model is not net
    assert trainer.dtype == torch.bfloat16
    assert net.C5.norm.mean.abs().min() > 0


def test_a_net_that_can_not_be_copied_is_refused_in_one_line(small):
    net = models.NetA(widths=NARROW)
    net.last = net(torch.zeros(2, 3, 32, 32))
    with pytest.raises(ValueError, match=r"^net can't be copied: [^\n]+; remove what can't$"):
        Trainer(net, small, SHORT)


class Lazy(nn.Module):
    """Make a scale in the first call, or a new one in each."""

    def __init__(self, each):
        super().__init__()
        self.each = each
        self.register_parameter("scale", nn.Parameter(torch.ones(8, 1, 1)) if each else None)

    def forward(self, x):
        if self.scale is None or self.each:
            self.scale = nn.Parameter(torch.ones(8, 1, 1))
        return x * self.scale


@pytest.mark.parametrize("each", [False, True])
def test_a_parameter_that_training_makes_is_refused(small, each):
    net = models.NetB(widths=NARROW)
    net.C5.norm = Lazy(each)
    with pytest.raises(ValueError, match=r"^training makes a parameter, or removes one; have all of them before$"):
        run_epoch(Trainer(net, small, SHORT))


def test_autocast_changes_nothing(small, float32):
    settings = replace(SHORT, epochs=1)
    found = []
    for enabled in (False, True):
        net = utils.build("NetB", settings, widths=NARROW)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            run_epoch(Trainer(net, small, settings))
            found.append((weights(net), utils.test(net, small.test_images, small.test_labels).loss))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


def test_a_scale_of_four_dimensions_is_no_convolution(small):
    class Scaled(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1, channels, 1, 1))

        def forward(self, x):
            return self.scale * x

    net = models.Net("layer")
    net.C5.norm = Scaled(24)
    net.C5.conv.gain = nn.Parameter(torch.ones(24, 1, 1, 1))
    convolutions, rest = (group["params"] for group in models.param_groups(net, 0.5))
    assert len(convolutions) == 10
    assert any(parameter is net.C5.norm.scale for parameter in rest)
    assert any(parameter is net.C5.conv.gain for parameter in rest)
    del net.C5.conv.gain
    run_epoch(Trainer(net, small, SHORT))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_kernels_take_the_steps_of_newton_schulz_alone(small, monkeypatch, name):
    """Made-up kernels: that of Muon knows no other direction."""
    state = types.SimpleNamespace(batch=(), launches=lambda: [])
    muon = types.SimpleNamespace(launch=lambda: None)
    kernels = types.SimpleNamespace(StepState=lambda *_: state, MuonStep=lambda *_: muon)
    trainer = Trainer(models.NetB(widths=NARROW), small, replace(SHORT, optimizer=name))
    trainer.fused = types.SimpleNamespace(launches=lambda: [])
    trainer.prepare_fused_step(kernels)
    assert trainer.update == (muon if name in ("muon", "muon-one-rate") else trainer.optimizer.step)
    Own = type("Own", (Muon,), {})
    monkeypatch.setitem(OPTIMIZERS, "own", lambda groups, lr, momentum, dtype: Own(groups, lr, momentum))
    groups = models.param_groups
    trainer = Trainer(models.NetB(widths=NARROW), small, replace(SHORT, optimizer="own"))
    trainer.fused = types.SimpleNamespace(launches=lambda: [])
    trainer.prepare_fused_step(kernels)
    assert trainer.update == trainer.optimizer.step
    for edit in ({"momentum": 0.5}, {"lr": 0.01}, {"weight_decay": 0.1}):  # as if models.py said so
        monkeypatch.setattr(
            models, "param_groups", lambda *options, edit=edit: [groups(*options)[0], groups(*options)[1] | edit]
        )
        trainer = Trainer(models.NetB(widths=NARROW), small, replace(SHORT, optimizer=name))
        trainer.fused = types.SimpleNamespace(launches=lambda: [])
        trainer.prepare_fused_step(kernels)
        assert trainer.update == trainer.optimizer.step


def test_the_fused_step_says_why_it_does_not_run(small, monkeypatch, capsys):
    with pytest.raises(ValueError, match=r"^there is no fused step here: it needs a GPU$"):
        Trainer(models.NetA(widths=NARROW), small, SHORT, fused=True)
    assert Trainer(models.NetA(widths=NARROW), small, SHORT).fused is None
    assert capsys.readouterr().out == ""
    pytest.importorskip("triton", reason="Triton is not installed")
    from engine import kernels

    monkeypatch.setattr(kernels, "reason_against_device", lambda device: "the GPU is too old")
    cuda, net = torch.device("cuda"), models.NetA()
    for _ in range(2):
        assert not takes_fused_step(net, cuda)
    assert capsys.readouterr().out == "training without the fused step: the GPU is too old\n"
    monkeypatch.setattr(kernels, "reason_against_device", lambda device: "")
    assert takes_fused_step(net, cuda)
    assert not takes_fused_step(net, cuda, fused=False)
    net.C4.activation = nn.ReLU()
    assert not takes_fused_step(net, cuda)
    assert capsys.readouterr().out.startswith("training without the fused step: its layers are not those of models.Net")
    monkeypatch.setitem(sys.modules, "engine.kernels", None)
    monkeypatch.delattr("engine.kernels")
    assert not takes_fused_step(models.NetA(), cuda)
    assert "training without the fused step: Triton can't be imported (" in capsys.readouterr().out


def test_a_step_leaves_no_global_setting_behind(small, monkeypatch):
    """cuDNN's settings, the C library's allocator, and the random generator of whoever trains."""
    monkeypatch.setattr(fast.ctypes, "CDLL", lambda name: pytest.fail("the allocator was changed"))
    cudnn, seen = torch.backends.cudnn, []
    names = ("enabled", "benchmark", "deterministic", "allow_tf32")
    monkeypatch.setattr(cudnn, "deterministic", False)

    def flags():
        return [getattr(cudnn, name) for name in names] + [torch.get_num_threads(), torch.is_grad_enabled()]

    before, random = flags(), torch.get_rng_state()
    trainer = Trainer(models.NetA(widths=NARROW), small, SHORT)
    random_after_build = torch.get_rng_state()
    assert flags() == before
    loss = trainer.loss
    trainer.loss = lambda *batch: (seen.append(cudnn.deterministic), loss(*batch))[1]
    next(trainer.epoch())
    assert seen == [True]  # inside, it is deterministic
    assert flags() == before
    assert torch.equal(torch.get_rng_state(), random_after_build)
    assert not torch.equal(random, random_after_build), "the net's weights were not drawn"


def test_no_cuda_call_on_the_cpu_path(small, monkeypatch):
    """torch.cuda.stream(None) fails where MPS is, so training on a CPU must not touch torch.cuda."""
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: pytest.fail("torch.cuda.stream was called"))
    trainer = Trainer(models.NetA(widths=NARROW), small, SHORT)
    next(trainer.epoch())
    trainer.means()


class Operators(TorchDispatchMode):
    """Notes the operators of PyTorch that run in it, in `seen`; fails where one of them makes float64 numbers."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            assert getattr(value, "dtype", None) != torch.float64, f"{function} makes float64, which MPS lacks"
        self.seen.add(str(function).removeprefix("aten.").removesuffix(".default"))
        return result


@pytest.fixture(scope="module")
def operators_table():
    """PyTorch's own table of its operators, with the devices that each has a kernel for."""
    table = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
    entries = yaml.load(table.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return {entry["func"].split("(")[0]: entry for entry in entries}


@pytest.mark.parametrize("name", models.NORM_OF)
def test_training_uses_no_operator_that_mps_lacks(small, float32, operators_table, name):
    """No Mac is at hand, so this asks PyTorch's table. In float32, as on MPS."""
    few = replace(small, images=small.images[:100], labels=small.labels[:100])
    with Operators() as operators:
        settings = replace(SHORT, epochs=1, augment="flip+crop")
        utils.train(utils.build(name, settings), few, settings)
    assert len(operators.seen) > 50
    for operator in operators.seen:
        if operator.startswith("profiler."):  # marks an optimizer's step, on the host
            continue
        entry = operators_table[operators_table[operator].get("structured_delegate", operator)]
        keys = ", ".join(entry.get("dispatch", ["Composite"])).split(", ")
        assert "MPS" in keys or any(key.startswith("Composite") for key in keys), f"{operator} has kernels for {keys}"
