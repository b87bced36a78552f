"""Variants of the nets, and the one settings object that says what a run is."""

import itertools
import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from torch import nn

import models
import utils
from engine import fast
from engine.trainer import OPTIMIZERS, Trainer
from experiments.sweeps import RUNS, SWEEPS, read_texts
from experiments.variants import LAYER_VARIANTS, SIDES, DynamicTanh, Experiment, GhostBatchNorm, LayerNorm2d, RMSNorm


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"net": "NetD"}, "net is 'NetD'; choose one of NetA, NetB, NetC, Net"),
        ({"net": None}, "net is None; choose one of"),
        ({"net": "NetB", "layer_variant": "c"}, "layer_variant is 'c'; choose one of , C, [C,H,W]"),
        ({"net": "NetB", "layer_variant": "C,H,W"}, "layer_variant is 'C,H,W'; choose one of"),
        ({"net": "NetA", "layer_variant": "C"}, "layer_variant is 'C' and net NetA; only NetB has one"),
        ({"net": "NetB", "groups": 4}, "groups is 4 and net NetB; only NetC has one"),
        ({"net": "NetA", "groups": "C"}, "groups is 'C' and net NetA; only NetC has one"),
        ({"net": "NetC", "groups": 3}, "groups is 3, which does not divide each of the widths"),
        ({"net": "NetC", "groups": "c"}, "groups is 'c'; give a whole number"),
        ({"net": "NetC", "groups": 0}, "groups is 0; give a whole number"),
        ({"net": "NetC", "groups": None}, "groups is None; give a whole number"),
        ({"net": "NetC", "statistics_batch": 4}, "statistics_batch is 4 and net NetC; only NetA has one"),
        ({"net": "Net", "statistics_batch": 4}, "statistics_batch is 4 and net Net; only NetA has one"),
        ({"statistics_batch": 3}, "statistics_batch is 3; give a divisor of the batch size, 250"),
        ({"statistics_batch": 1}, "statistics_batch is 1; give a whole number from 2 to 250"),
        ({"statistics_batch": 1000}, "statistics_batch is 1000; give a whole number from 2 to 250"),
        ({"statistics_batch": "half"}, "statistics_batch is 'half'; give a whole number"),
        ({"net": "NetB", "layer_variant": "rms"}, "layer_variant is 'rms'; choose one of , C, [C,H,W], RMS, tanh"),
        ({"convolution": "ws"}, "convolution is 'ws'; choose one of , standardized"),
        ({"initial_weights": "kaiming"}, "initial_weights is 'kaiming'; choose one of , he"),
        ({"widths": (16, 32)}, "widths is (16, 32); give 10, one each"),
        ({"widths": "16 32"}, "widths is '16 32'; give 10, one each"),
        ({"optimizer": "adam"}, "optimizer is 'adam'; choose one of muon, sgd, sgdw, adamw"),
        ({"learning_rate": math.nan}, "learning_rate is nan; give a number"),
        ({"seed": -1}, "seed is -1; give a whole number"),
    ],
)
def test_a_setting_that_the_net_does_not_have_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=r"^[^\n]{1,300}$") as error:
        Experiment(**changes)
    assert str(error.value).startswith(message)


def test_an_unknown_setting_is_refused_by_name():
    with pytest.raises(TypeError, match="layer_varaint"):
        Experiment(net="NetB", layer_varaint="C")


def test_numpy_numbers_are_the_same_settings():
    python = {"net": "NetA", "statistics_batch": 50, "seed": 3, "batch_size": 100, "epochs": 2, "learning_rate": 0.03}
    numpy = python | {name: np.int64(python[name]) for name in ("statistics_batch", "seed", "batch_size", "epochs")}
    numpy |= {"learning_rate": np.float64(0.03), "widths": tuple(np.array(models.WIDTHS))}
    assert Experiment(**numpy) == Experiment(**python)
    assert Experiment(**numpy).columns() == Experiment(**python).columns()
    assert len({Experiment(**numpy), Experiment(**python), Experiment(**python, widths=[*models.WIDTHS])}) == 1
    assert Experiment(net="NetC", groups=np.int64(2)).columns() == Experiment(net="NetC", groups=2).columns()


def test_columns_are_those_of_the_published_rows():
    """So that finished runs count as finished, and that a run at the same settings replaces its row."""
    rows = read_texts(RUNS)
    for net in utils.NETS:
        columns = Experiment(net=net, seed=3).columns()
        found = rows[(rows["study"] == "main") & (rows["net"] == net) & (rows["seed"] == "3")]
        assert len(found) == 1
        assert found.iloc[0][list(columns)].to_dict() == columns
    settings = {field.name for field in fields(Experiment)}
    assert set(columns) == settings <= set(rows.columns), "a setting has no column"


def test_without_a_variant_its_column_is_empty():
    """Else rows from before the variant would count as other runs."""
    variants = [field for field in fields(Experiment) if field.name not in (*vars(utils.Settings()), "dataset", "net")]
    assert {field.name for field in variants if field.default != ""} == {"widths"}


def test_settings_that_differ_have_columns_that_differ():
    """No two runs of a sweep look alike in the file."""
    rows = read_texts(RUNS)
    for name, (_, make, _) in SWEEPS.items():
        runs = make(rows)
        assert len({tuple(one.columns().items()) for one in runs}) == len(set(runs)) == len(runs), name
        assert runs or name.endswith("-edges"), name


@pytest.mark.parametrize(("size", "ghosts"), [(8, 5), (40, 1)])
def test_ghost_batch_norm_is_batch_norm_of_each_ghost_batch(size, ghosts):
    torch.manual_seed(0)
    x = torch.randn(40, 6, 5, 5) * 3 + 1
    ours, theirs = GhostBatchNorm(6, size), nn.BatchNorm2d(6)
    nn.init.normal_(ours.weight)
    nn.init.normal_(ours.bias)
    theirs.load_state_dict(ours.state_dict())
    expected = torch.cat([theirs.train()(part) for part in x.split(size)])
    assert (ours.train()(x) - expected).abs().max() < 1e-5
    if ghosts == 1:
        assert (ours.running_mean - theirs.running_mean).abs().max() < 1e-5
        assert (ours.running_var - theirs.running_var).abs().max() < 1e-5
        assert (ours.eval()(x) - theirs.eval()(x)).abs().max() < 1e-5
    with pytest.raises(RuntimeError):
        ours.train()(x[:13])
    assert ours.train()(x.bfloat16()).dtype == torch.bfloat16
    assert f"size={size}" in repr(ours)  # which tells its checkpoints from batch norm's


def test_gradients_of_ghost_batch_norm_are_batch_norms():
    torch.manual_seed(0)
    x = torch.randn(40, 6, 5, 5)
    gradients = []
    for norm in (GhostBatchNorm(6, 40), nn.BatchNorm2d(6)):
        images = x.clone().requires_grad_()
        norm(images).pow(3).sum().backward()
        gradients.append([images.grad, norm.weight.grad, norm.bias.grad])
    for ours, theirs in zip(*gradients, strict=True):
        assert (ours - theirs).norm() < 1e-4 * theirs.norm()


def test_layer_norm_of_each_pixel():
    norm = LayerNorm2d(24)
    nn.init.normal_(norm.weight)
    x = torch.randn(2, 24, 5, 7) * 3 + 1
    expected = (x - x.mean(1, keepdim=True)) / (x.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    expected = expected * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)
    assert (norm(x) - expected).abs().max() < 1e-5


def test_rms_norm_divides_by_the_root_mean_square_of_an_image():
    norm = RMSNorm(24)
    nn.init.normal_(norm.weight)
    x = torch.randn(2, 24, 5, 7) * 3 + 1
    expected = x / (x.square().mean((1, 2, 3), keepdim=True) + 1e-5).sqrt() * norm.weight.view(-1, 1, 1)
    assert (norm(x) - expected).abs().max() < 1e-5


def test_dynamic_tanh_learns_its_alpha():
    norm = DynamicTanh(4)
    x = torch.randn(2, 4, 3, 3)
    assert torch.equal(norm(x), torch.tanh(x))
    norm(x).square().sum().backward()
    assert norm.alpha.grad.abs() > 0
    assert Experiment(net="NetB", layer_variant="tanh").build().C4.norm.alpha.item() == 1


def test_standardized_filters_have_no_mean_and_the_variance_of_kaiming_init():
    plain, one = Experiment(net="Net").build(), Experiment(net="Net", convolution="standardized").build()
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), one.parameters(), strict=True))
    assert type(one.c11) is nn.Conv2d
    for name, follows in (("C4.conv", 2), ("c7", 1)):
        conv = one.get_submodule(name)
        patches = torch.eye(conv.weight[0].numel()).view(-1, *conv.weight[0].shape)  # each reads one weight
        filters = conv.to(torch.float32)(patches)[:, :, *(size // 2 for size in conv.kernel_size)]
        assert filters.mean(0).abs().max() < 1e-6
        assert filters.square().sum(0).mean().item() == pytest.approx(follows, rel=0.02)
        with torch.no_grad():
            conv.weight.mul_(3).add_(1)
        again = conv(patches)[:, :, *(size // 2 for size in conv.kernel_size)]
        assert (again - filters).abs().max() < 1e-3, "scale or mean of a filter counts"


def test_variants_differ_in_their_norm_alone():
    plain = Experiment(net="NetB").build()
    variants = [Experiment(net="NetB", layer_variant=variant).build() for variant in ("C", "[C,H,W]")]
    for other in variants:
        for name in ("C1.conv", "c3", "C9.conv", "c11"):
            assert torch.equal(other.get_submodule(name).weight, plain.get_submodule(name).weight)
    assert all(isinstance(variants[0].get_submodule(f"{name}.norm"), LayerNorm2d) for name in SIDES)
    x = torch.randn(4, 3, 32, 32)
    assert (variants[1](x) - plain(x)).abs().max() < 1e-4  # the same until scales and shifts are trained
    assert (variants[0](x) - plain(x)).abs().max() > 1e-3
    counts = [sum(p.numel() for p in net.parameters()) for net in (plain, *variants)]
    assert counts == [48_042, 48_042, 48_042 + 147_456 - 432]
    instance = Experiment(net="NetC", groups="C").build()
    assert [instance.get_submodule(f"{name}.norm").num_groups for name in SIDES] == [16, 32, 24, 24, 24, 32, 32, 32]
    assert Experiment(net="NetC", groups=2).build().C4.norm.num_groups == 2
    ghost = Experiment(net="NetA", statistics_batch=50).build()
    assert [ghost.get_submodule(f"{name}.norm").size for name in SIDES] == [50] * 8
    wide = Experiment(net="NetC", widths=(8, 16, 8, 8, 8, 8, 8, 16, 16, 16)).build()
    assert wide.C1.conv.out_channels == 8


def test_a_built_net_depends_on_its_seed_alone():
    first = Experiment(net="NetA", seed=4).build()
    torch.manual_seed(99)
    again, other = Experiment(net="NetA", seed=4).build(), Experiment(net="NetA", seed=5).build()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.C2.conv.weight, other.C2.conv.weight)


def test_kaiming_initial_weights_keep_the_signal():
    own, kaiming, again = (Experiment(net="Net", initial_weights=draw) for draw in ("", "he", "he"))
    torch.manual_seed(7)
    nets = own.build(), kaiming.build(), again.build()
    assert all(torch.equal(a, b) for a, b in zip(nets[1].parameters(), nets[2].parameters(), strict=True))
    other = replace(kaiming, seed=1).build()
    assert not torch.equal(other.C4.conv.weight, nets[1].C4.conv.weight)
    for name, follows in (("C4.conv", 2), ("c7", 1), ("c11", 1)):
        weight = nets[1].get_submodule(name).weight
        assert weight.std().item() == pytest.approx((follows / weight[0].numel()) ** 0.5, rel=0.1)
    images = torch.randn(100, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    fading, kept = (net(images).std(0).mean().item() for net in nets[:2])
    assert fading < 1e-5 < 1e-3 < kept
    assert own.columns() | {"initial_weights": "he"} == kaiming.columns()


VARIANTS = [
    {"net": "NetB", "layer_variant": "C"},
    {"net": "NetB", "layer_variant": "[C,H,W]"},
    {"net": "NetC", "groups": "C"},
    {"net": "NetB", "layer_variant": "RMS"},
    {"net": "NetB", "layer_variant": "tanh", "initial_weights": "he"},
    {"net": "NetA", "statistics_batch": 4},
    {"net": "Net", "convolution": "standardized"},
]


@pytest.mark.parametrize(
    ("optimizer", "variant"),
    [(name, {"net": "NetB"}) for name in OPTIMIZERS]
    + [("sgd", variant) for variant in VARIANTS]
    + [pytest.param(*pair, marks=pytest.mark.slow) for pair in itertools.product(("sgdw", "adamw", "muon"), VARIANTS)],
)
def test_every_optimizer_and_every_variant_trains(small, optimizer, variant):
    """In ten steps on the same 40 images."""
    rate = {"sgd": 0.1, "sgdw": 0.1, "adamw": 0.003}.get(optimizer, 0.03)
    if variant.get("layer_variant") == "tanh" and optimizer != "adamw":
        rate = 0.1  # without statistics, signals start small
    few = replace(small, images=small.images[:40], labels=small.labels[:40])
    few_norms = {"weight_decay": 0.01} if {"convolution", "initial_weights"} & set(variant) else {}
    one = Experiment(batch_size=40, epochs=10, optimizer=optimizer, learning_rate=rate, **few_norms, **variant)
    trainer = Trainer(one.build(), few, one)
    losses = []
    for _ in range(10):
        for _ in trainer.epoch():
            pass
        losses.append(trainer.means()[0])
    assert losses[-1] < losses[0] - (0.03 if variant.get("layer_variant") == "tanh" else 0.05)


@pytest.mark.parametrize(
    "variant",
    [
        *({"net": "NetB", "layer_variant": kind} for kind in LAYER_VARIANTS),
        {"net": "NetA", "statistics_batch": 5},
        {"net": "NetC", "groups": "C"},
        {"net": "Net", "convolution": "standardized"},
    ],
    ids=str,
)
def test_a_copy_can_train_every_variant(variant):
    assert fast.reason_against_copy(Experiment(**variant).build()) == ""
