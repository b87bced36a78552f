"""The fused step by Triton's interpreter on the CPU: every kernel takes part in each test of a whole step.

Triton reads TRITON_INTERPRET when it is imported, so these tests run in processes of their own: without the variable
this file holds two tests, which run the others.
"""

import copy
import math
import os
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import draw_batch, make_net, poison, run_together

pytest.importorskip("triton", reason="Triton is not installed")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if INTERPRETED:
    import models
    import utils
    from engine import kernels
    from engine.data import Data, crop_and_flip, normalize
    from engine.muon import Muon
    from engine.trainer import Trainer

    kernels.COMPOSE_BLOCK, kernels.REDUCE_BLOCK = 8192, 2048  # few programs: the interpreter runs one after another
    interpreted = pytest.mark.filterwarnings("ignore:invalid value", "ignore:overflow", "ignore:divide by zero")
else:

    def interpreted(test):
        """Hide a test from this process."""

    COMMAND = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    VARIABLES = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": ""}

    def test_the_step_by_the_interpreter():
        run_together(*(([*COMMAND, "-k", tests], VARIABLES) for tests in ("trainer", "not trainer")))

    @pytest.mark.slow
    def test_the_step_with_further_optimizers_by_the_interpreter():
        run_together(([*COMMAND, "-m", "slow"], VARIABLES))


def make_batch(count, classes=10):
    """Images in which neighboring pixels are alike, labels, and what of them makes up a batch."""
    torch.manual_seed(2)
    images = 255 * F.interpolate(torch.rand(8, 3, 8, 8), size=32, mode="bilinear").permute(0, 2, 3, 1)
    return images.to(torch.uint8).contiguous(), torch.randint(classes, (8,)), draw_batch(count, 8, 2)


def compare(net, images, labels, batch, augment, limit=5e-3):
    """Hold loss, accuracy, gradients and running statistics of one step to PyTorch's in float32."""
    plain = copy.deepcopy(net).train()
    fused = kernels.FusedNet(net, images, labels, len(batch[0]), augment)
    poison(fused)
    loss, accuracy = fused(*batch)
    chosen, shift, flip = batch
    pictures = images[chosen]
    if augment != "none":
        pictures = crop_and_flip(pictures, shift, flip)
    logits = plain(normalize(pictures))
    wanted = F.cross_entropy(logits, labels[chosen], label_smoothing=0.1)
    wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-3)
    assert accuracy.item() == pytest.approx((logits.argmax(1) == labels[chosen]).float().mean().item())
    for (name, parameter), other in zip(net.named_parameters(), plain.parameters(), strict=True):
        assert (parameter.grad - other.grad).norm() <= limit * other.grad.norm(), name
    for (name, buffer), other in zip(net.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(buffer, other, rtol=2e-3, atol=2e-3, msg=name)
    assert fused.diverged.item() == 0
    return fused


@interpreted
@pytest.mark.parametrize(
    ("norm", "count", "augment"), [("layer", 1, "none"), ("group", 2, "flip"), ("none", 1, "flip")]
)
def test_a_step_agrees_with_autograd(norm, count, augment):
    images, labels, batch = make_batch(count)
    compare(make_net(norm), images, labels, batch, augment)


@interpreted
def test_a_step_of_batch_norm_agrees_with_autograd_for_an_odd_batch():
    images, labels, batch = make_batch(3)
    compare(make_net("batch"), images, labels, batch, "flip+crop")


@interpreted
def test_of_equal_logits_the_first_counts():
    images, labels, batch = make_batch(1)
    net = make_net("layer")
    torch.nn.init.zeros_(net.c11.weight)
    torch.nn.init.zeros_(net.c11.bias)
    compare(net, images, labels.fill_(3), batch, "none")


@interpreted
def test_other_widths_groups_and_classes_agree_with_autograd():
    images, labels, batch = make_batch(1, classes=100)
    net = make_net("group", widths=(2, 20, 8, 12, 16, 8, 24, 28, 32, 20), groups=2, classes=100)
    compare(net, images, labels, batch, "none")


@interpreted
def test_what_is_not_finite_is_noticed_and_zeros_are_not():
    images, labels, batch = make_batch(1)
    net = make_net("layer")
    fused = kernels.FusedNet(net, images, labels, 1)
    with torch.no_grad():
        net.C2.conv.weight.zero_()  # every activation from here on is the same
    fused(*batch)
    assert fused.diverged.item() == 0
    assert all(parameter.grad.isfinite().all() for parameter in net.parameters())
    with torch.no_grad():
        net.C2.conv.weight.fill_(1e6)  # beyond float16
    fused(*batch)
    assert fused.diverged.item() == 1


@interpreted
def test_muon_in_one_kernel_steps_as_the_optimizer_does():
    images, labels, _ = make_batch(1)
    net = make_net("group")
    fused = kernels.FusedNet(net, images, labels, 1)
    muon = Muon(models.param_groups(net, 0.5), torch.tensor(0.03), 0.95)
    step = kernels.MuonStep(fused, muon)
    plain = copy.deepcopy(net)
    other = Muon(models.param_groups(plain, 0.5), torch.tensor(0.03), 0.95)
    before = [parameter.detach().clone() for parameter in net.parameters()]
    for _ in range(2):
        fused.totals.normal_()
        for parameter, copied in zip(net.parameters(), plain.parameters(), strict=True):
            copied.grad = parameter.grad.clone()
        step()
        other.step()
    for own, wanted, first in zip(net.parameters(), plain.parameters(), before, strict=True):
        assert (own - wanted).norm() <= 5e-3 * (wanted - first).norm()
    for (own, _), (wanted, _) in zip(muon.flat, other.flat, strict=True):
        torch.testing.assert_close(own, wanted)
    fused.diverged.fill_(1)
    kept = fused.values.clone()
    fused.totals.fill_(math.nan)
    step()
    assert torch.equal(fused.values, kept)


@interpreted
def test_many_images_are_added_up_by_a_kernel_of_their_own():
    sums, pooled = torch.randn(2, 600, 32), torch.full((2, 1, 32), math.nan)
    kernels.add_images[(4,)](sums, pooled, 600, CHANNELS=32, BLOCK=8, CHUNK=512)
    torch.testing.assert_close(pooled, sums.sum(1, keepdim=True), rtol=1e-4, atol=1e-4)


@interpreted
def test_the_batch_the_learning_rate_and_the_counts_move_from_step_to_step():
    images, labels, _ = make_batch(3)
    fused = kernels.FusedNet(make_net("none"), images, labels, 3, "flip")
    order, shift, flip = torch.randperm(6).view(2, 3), torch.randint(-2, 3, (8, 2)), torch.rand(8) < 0.5
    rates, counts, sums, lr = torch.rand(4), torch.tensor([1, 2]), torch.zeros(2), torch.tensor(0.0)
    steps = kernels.StepState(fused, order, shift, flip, rates, counts, sums, lr)
    for got, wanted in zip(steps.begin(), (order[1], shift[order[1]], flip[order[1]]), strict=True):
        assert torch.equal(got, wanted)
    assert lr == rates[2]
    fused.metrics.copy_(torch.tensor([2.0, 0.5]))
    steps.end()
    assert counts.tolist() == [2, 3]
    fused.diverged.fill_(1)
    steps.end()
    assert counts.tolist() == [2, 3]
    assert sums.tolist() == [4.0, 1.0]


@interpreted
def test_a_weight_can_be_computed_from_another():
    images, labels, batch = make_batch(1)
    net = make_net("group")
    fused = kernels.FusedNet(net, images, labels, 1)
    weight = fused.detach("C5.conv.weight")
    transformed = weight - weight.mean((1, 2, 3), keepdim=True)
    fused.weights["C5.conv.weight"].copy_(transformed.detach())
    fused(*batch)
    transformed.backward(fused.gradients["C5.conv.weight"])
    plain = copy.deepcopy(net)
    plain.zero_grad()
    with torch.no_grad():
        plain.C5.conv.weight.copy_(transformed)
    logits = plain(normalize(images[batch[0]]))
    F.cross_entropy(logits, labels[batch[0]], label_smoothing=0.1).backward()
    wanted = plain.C5.conv.weight.grad
    wanted = wanted - wanted.mean((1, 2, 3), keepdim=True)
    assert (weight.grad - wanted).norm() <= 5e-3 * wanted.norm()


@interpreted
@pytest.mark.parametrize(
    ("name", "optimizer"),
    [
        ("NetA", "muon"),
        ("NetC", "sgd"),
        pytest.param("NetB", "sgdw", marks=pytest.mark.slow),
        pytest.param("Net", "adamw", marks=pytest.mark.slow),
    ],
)
def test_a_trainer_trains_as_it_does_without_the_kernels(name, optimizer):
    images, labels, _ = make_batch(1)
    data = Data(images[:4], labels[:4], images[:1], labels[:1], name="few")
    rate = {"muon": 0.02, "sgd": 0.02, "sgdw": 0.02, "adamw": 0.001}[optimizer]
    settings = utils.Settings(
        epochs=1,
        batch_size=2,
        augment="flip+crop",
        optimizer=optimizer,
        learning_rate=rate,
        momentum=0.9,
        label_smoothing=0.3,
    )
    found = []
    for fused in (True, False):
        net = utils.build(name, settings)
        before = [parameter.detach().clone() for parameter in net.parameters()]
        trainer = Trainer(net, data, settings, fused)
        assert bool(trainer.fused) == fused
        if not fused:
            trainer.model, trainer.copied, trainer.dtype = net, [], torch.float32
            trainer.trained = [*net.parameters()]
        for _ in trainer.epoch():
            pass
        assert trainer.counts.flatten().tolist() == [2, 2]
        after = zip(net.parameters(), before, strict=True)
        found.append((trainer.means(), torch.cat([(p.detach() - first).flatten() for p, first in after])))
    assert found[0][0] == pytest.approx(found[1][0], rel=2e-3)
    limit = {"muon": 0.15, "sgd": 0.01, "sgdw": 0.01, "adamw": 0.1}[
        optimizer
    ]  # Muon and AdamW take small gradients for large ones
    assert (found[0][1] - found[1][1]).norm() <= limit * found[1][1].norm()


class Centered(torch.nn.Conv2d):
    """Called Conv2d by whoever prints it."""

    state_in_buffers = True

    def forward(self, x):
        return self._conv_forward(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)


Centered.__name__ = "Conv2d"


class Clamped(torch.nn.Sequential):
    def forward(self, x):
        return super().forward(x).clamp(-1, 1)


@interpreted
@pytest.mark.parametrize("optimizer", ["muon", "sgd"])
def test_gradients_that_were_taken_away_are_there_in_the_next_step(optimizer):
    images, labels, _ = make_batch(8)
    data = Data(images, labels, images, labels)
    net = make_net("layer")
    trainer = Trainer(net, data, utils.Settings(epochs=1, batch_size=4, optimizer=optimizer), fused=True)
    moved = []
    for _ in trainer.epoch():
        moved.append(net.c11.weight.detach().clone())
        net.zero_grad()
    assert not torch.equal(*moved)


class OwnLoss(Trainer if INTERPRETED else object):
    def loss(self, images, labels):
        loss, accuracy = super().loss(images, labels)
        return 2 * loss, accuracy


@interpreted
def test_a_change_that_a_fused_step_would_not_see_is_refused():
    images, labels, _ = make_batch(4)
    data, settings = Data(images, labels, images, labels), utils.Settings(epochs=1, batch_size=4)
    changes = [
        lambda trainer: trainer.optimizer.register_step_pre_hook(print),
        lambda trainer: trainer.optimizer.param_groups[1].update(momentum=0),
        lambda trainer: setattr(trainer, "learning_rates", 0 * trainer.learning_rates),
        lambda trainer: setattr(trainer, "data", Data(images, 1 - labels % 2, images, labels)),
        lambda trainer: setattr(trainer, "settings", utils.Settings(epochs=1, batch_size=4, label_smoothing=0.9)),
        lambda trainer: setattr(trainer, "optimizer", copy.deepcopy(trainer.optimizer)),
        lambda trainer: setattr(trainer, "loss", lambda images, labels: (images.sum(), 1)),
        lambda trainer: trainer.optimizer.state.clear(),
        lambda trainer: setattr(trainer.optimizer, "rest_lr", 1),
    ]
    for change in changes:
        trainer = Trainer(make_net("layer"), data, settings, fused=True)
        change(trainer)
        with pytest.raises(ValueError, match=r"^data, settings, loss or optimizer were changed since this Trainer was"):
            next(trainer.epoch())
    assert OwnLoss(make_net("layer"), data, settings).fused is None
    with pytest.raises(ValueError, match=r"^there is no fused step here: this Trainer has a loss of its own$"):
        OwnLoss(make_net("layer"), data, settings, fused=True)


@interpreted
def test_a_net_in_eval_mode_has_no_fused_step():
    images, labels, _ = make_batch(4)
    with pytest.raises(ValueError, match=r"^there is no fused step in eval mode; give a net in train mode"):
        kernels.FusedNet(make_net("batch").eval(), images, labels, 4)


@interpreted
def test_a_net_that_the_kernels_do_not_compute_is_turned_down_with_a_reason():
    def changed(change, **options):
        net = models.Net("batch", **options)
        change(net)
        return net

    class Mixed(models.Net, Clamped):
        state_in_buffers = True

    assert kernels.reason_against(models.NetC(groups=2)) == ""
    cases = {
        "no kernel for InstanceNorm2d": changed(lambda net: setattr(net.C4, "norm", torch.nn.InstanceNorm2d(24))),
        "no scale and shift for": changed(lambda net: setattr(net.C4, "norm", torch.nn.GroupNorm(1, 24, bias=False))),
        "no scale and shift for each": changed(lambda net: setattr(net.C4, "norm", models.ScaleShift(1))),
        "no scale and shift": changed(lambda net: setattr(net.C4, "norm", torch.nn.BatchNorm2d(24, affine=False))),
        "eps of its norms": changed(lambda net: setattr(net.C4.norm, "eps", 0.0)),
        "C4.norm is a BatchNorm2d, which does": changed(lambda net: setattr(net.C4.norm, "momentum", None)),
        "layers are not those": changed(lambda net: setattr(net.C4, "activation", torch.nn.ReLU())),
        "three colors": models.Net("batch", in_channels=1),
        "layers are not those of": changed(lambda net: setattr(net, "P1", torch.nn.AvgPool2d(2, divisor_override=1))),
        "layers are not those of models": changed(lambda net: setattr(net.C4, "conv", Centered(24, 24, 3, bias=False))),
        "layers are not those of models.Net": Mixed("none"),
        "layers are not those of models.Net with": changed(
            lambda net: setattr(net.C5.conv, "weight", torch.nn.Parameter(torch.ones(24, 24, 1, 1)))
        ),
        "in eval mode": changed(lambda net: net.C4.norm.eval()),  # as an own `train` leaves it
        "keep no averages": changed(lambda net: setattr(net.C4.norm, "num_batches_tracked", None)),
        "C4 has a hook": changed(lambda net: net.C4.register_forward_hook(print)),
        "a method of its own": changed(lambda net: setattr(net.C4.conv, "forward", print)),
        "C5.conv.weight is C6.conv.weight, too": changed(
            lambda net: setattr(net.C6.conv, "weight", net.C5.conv.weight)
        ),
        "C4.norm.weight is C5.norm.weight, too": changed(lambda net: setattr(net.C5, "norm", net.C4.norm)),
        "C4.norm is a Own, which does not": changed(
            lambda net: setattr(net.C4, "norm", type("Own", (Centered,), {})(24, 24, 1))
        ),
        "are frozen": changed(lambda net: net.c11.requires_grad_(False)),
        "more than 32 channels": models.Net("none", widths=(40,) * 10),
        "more than 128 classes": models.Net("none", classes=200),
    }
    for reason, net in cases.items():
        assert reason in kernels.reason_against(net)
    forward, conv = models.Net.forward, torch.nn.Conv2d
    edits = [  # as if models.py said so
        (torch.nn, "SiLU", torch.nn.ReLU),
        (torch.nn, "AvgPool2d", torch.nn.MaxPool2d),
        (torch.nn, "Conv2d", lambda i, o, size, padding=0, bias=True: conv(i, o, 5, padding=2, bias=bias)),
        (models.Net, "forward", lambda net, x: forward(net, x).clamp(-10, 10)),
        (models.Net, "__call__", lambda net, x: forward(net, x).clamp(-10, 10)),
        (models.ScaleShift, "forward", lambda norm, x: x * norm.weight[0]),
    ]
    for place, name, value in edits:
        with pytest.MonkeyPatch.context() as edited:
            edited.setattr(place, name, value)
            net = models.Net("none")
            if place is torch.nn:
                edited.undo()
            assert kernels.reason_against(net)
    hook = torch.nn.modules.module.register_module_forward_hook(lambda module, inputs, output: 2 * output)
    try:
        assert kernels.reason_against(models.Net("none"))
    finally:
        hook.remove()
    assert kernels.reason_against(models.Net("none")) == ""
