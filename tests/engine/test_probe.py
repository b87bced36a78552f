"""What is measured inside a net and of its mistakes, by plain arithmetic and by hand."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import models
import utils
from engine.data import normalize
from engine.probe import (
    class_activation_maps,
    confusion,
    eval_mode,
    layer_table,
    mean_spread,
    overlap,
    people_table,
    vote_table,
)


def mixed_modes():
    """A net in training mode, of which two modules are in eval mode; and the modes of all."""
    net = models.NetA().train()
    net.C2.norm.eval()
    net.C5.eval()
    return net, {name: module.training for name, module in net.named_modules()}


def modes(net):
    return {name: module.training for name, module in net.named_modules()}


def break_at(net, name):
    """Let a layer of the net raise."""

    def fail(x):
        raise RuntimeError("broken layer")

    net.get_submodule(name).forward = fail


def hooks(net):
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in net.modules())


def test_each_module_has_its_own_mode_after_eval_mode():
    net, before = mixed_modes()
    with eval_mode(net) as same:
        assert same is net
        assert not any(module.training for module in net.modules())
    assert modes(net) == before
    with pytest.raises(KeyboardInterrupt), eval_mode(net):
        raise KeyboardInterrupt
    assert modes(net) == before


def test_layer_table():
    net = models.NetC()
    table = layer_table(net)
    assert list(table.index) == "C1 C2 c3 P1 C4 C5 C6 c7 P2 C8 C9 C10 GAP c11".split()  # noqa: SIM905
    assert table["parameters"].sum() == 48_042
    assert table.loc["C2"].tolist() == ["3x3 conv, norm, SiLU", "32x32x32", 16 * 32 * 9 + 2 * 32]
    assert table.loc["c7"].tolist() == ["1x1 conv", "24x16x16", 24 * 24]
    assert table.loc["P2"].tolist() == ["AvgPool2d", "24x8x8", 0]
    assert table.loc["c11", "output"] == "10x1x1"
    assert net.training


# ---------------------------------------------------------------------------------------------------------------------
# mean_spread
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "size", "groups"), [("NetA", 4, 16), ("NetB", 1, 1), ("NetC", 1, 4)])
def test_mean_spread_by_plain_arithmetic(small, name, size, groups):
    """Of the first layer, group by group of channels and batch by batch of images, in float64."""
    net = utils.build(name, utils.Settings())
    images = small.test_images[:12]
    x = net.C1.conv(normalize(images)).detach().double()
    means, variances = [], []
    for start in range(0, 12, size):
        parts = x[start : start + size].split(16 // groups, dim=1)
        means.append([part.mean().item() for part in parts])
        variances += [part.var(correction=0).item() for part in parts]
    by_group = list(zip(*means, strict=True))
    moved = sum(pd.Series(values).var() for values in by_group) / len(by_group)
    expected = (moved / (sum(variances) / len(variances))) ** 0.5
    rows = mean_spread(net, name, images, size)
    assert rows[0] == {"net": name, "images": size, "layer": "C1", "spread": pytest.approx(expected, abs=2e-5)}
    assert [row["layer"] for row in rows] == "C1 C2 C4 C5 C6 C8 C9 C10".split()  # noqa: SIM905


def test_mean_spread_is_the_same_in_parts(small):
    """Images are taken 500 at a time; which part a batch is in changes nothing."""
    net, images = models.NetA(widths=(4,) * 10), small.images
    whole = mean_spread(net, "NetA", images, 100)
    norm, found = net.C1.norm, []
    hook = norm.register_forward_pre_hook(lambda module, inputs: found.append(inputs[0]))
    mean_spread(net, "NetA", images, 100)
    hook.remove()
    assert [len(x) for x in found] == [500, 100]
    x = torch.cat(found).double().unflatten(0, (6, 100))
    variance, mean = torch.var_mean(x, (1, 3, 4), correction=0)
    assert whole[0]["spread"] == pytest.approx((mean.var(0).mean() / variance.mean()).sqrt().item(), abs=2e-5)


def test_mean_spread_leaves_modes_statistics_and_no_hook(small):
    net, before = mixed_modes()
    mean_before = net.C1.norm.running_mean.clone()
    mean_spread(net, "NetA", small.test_images[:4])
    assert modes(net) == before
    assert hooks(net) == 0
    assert torch.equal(net.C1.norm.running_mean, mean_before)
    break_at(net, "C6.conv")
    with pytest.raises(RuntimeError, match="broken layer"):
        mean_spread(net, "NetA", small.test_images[:4])
    assert modes(net) == before
    assert hooks(net) == 0


def test_other_norms_have_no_mean_spread(small):
    net = models.NetB()
    net.C4.norm = torch.nn.LayerNorm([24, 16, 16])
    with pytest.raises(ValueError, match=r"^C4.norm is a LayerNorm; give batch, layer or group norm$"):
        mean_spread(net, "NetB", small.test_images[:4])


@pytest.mark.parametrize("size", [0, -1, 5, 8, 12, 24])
def test_sizes_that_leave_fewer_than_two_means_are_refused(small, size):
    with pytest.raises(
        ValueError, match=rf"^size is {size}; give a divisor of the 12 images that is at most half of them$"
    ):
        mean_spread(models.NetA(), "NetA", small.test_images[:12], size)


# ---------------------------------------------------------------------------------------------------------------------
# class_activation_maps
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["batch", "layer", "group", "none"])
def test_the_mean_of_a_class_activation_map_is_the_logit(small, norm):
    net = models.Net(norm).train()
    maps = class_activation_maps(net, small.test_images[:6])
    assert maps.shape == (6, 10, 8, 8)
    assert not maps.requires_grad
    assert net.training
    expected = net.eval()(normalize(small.test_images[:6]))
    assert (maps.mean((2, 3)) - expected).abs().max() < 1e-5
    assert maps.std((2, 3)).min() > 0


def test_a_layer_that_is_there_twice_is_computed_twice(small):
    net = models.NetA().eval()
    net.P2 = net.P1
    maps = class_activation_maps(net, small.test_images[:6])
    torch.testing.assert_close(maps.mean((2, 3)), net(normalize(small.test_images[:6])))
    assert list(layer_table(net).index) == list(models.CHAIN)


class Residual(models.NetB):
    def forward(self, x):
        return super().forward(x) + x.mean((1, 2, 3))[:, None]


@pytest.mark.parametrize("change", ["a forward of its own", "another pool", "an activation at the end"])
def test_maps_of_a_net_that_computes_otherwise_are_refused(small, change):
    net = Residual() if change == "a forward of its own" else models.NetB()
    if change == "another pool":
        net.GAP = nn.AdaptiveMaxPool2d(1)
    if change == "an activation at the end":
        net.c11 = nn.Sequential(net.c11, nn.ReLU())
    with pytest.raises(ValueError, match=r"^the maps' means are not the net's logits; give a net that computes as"):
        class_activation_maps(net, small.test_images[:6])


def test_class_activation_maps_restore_the_modes(small):
    net, before = mixed_modes()
    class_activation_maps(net, small.test_images[:2])
    assert modes(net) == before
    break_at(net, "c11")
    with pytest.raises(RuntimeError, match="broken layer"):
        class_activation_maps(net, small.test_images[:2])
    assert modes(net) == before


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes
# ---------------------------------------------------------------------------------------------------------------------


def test_confusion_against_an_independent_count():
    predictions, labels = np.random.default_rng(0).integers(0, 10, (2, 500))
    expected = pd.crosstab(labels, predictions).to_numpy()
    assert (confusion(torch.from_numpy(predictions), torch.from_numpy(labels)).numpy() == expected).all()


def test_confusion_of_another_number_of_classes():
    assert confusion(torch.tensor([2, 0, 2]), torch.tensor([2, 2, 1]), 3).tolist() == [[0, 0, 0], [0, 0, 1], [1, 0, 1]]


def test_confusion_of_classes_as_bytes():
    """As results/predictions.npz holds them."""
    classes = torch.arange(100, dtype=torch.uint8)
    assert torch.equal(confusion(classes, classes, 100), torch.eye(100, dtype=torch.int64))


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=60))
def test_confusion_counts_every_image_once(pairs):
    labels, predictions = torch.tensor(pairs).T
    counts = confusion(predictions, labels)
    assert counts.sum() == len(labels)
    assert counts.diagonal().sum() == (labels == predictions).sum()
    assert torch.equal(counts.sum(1), labels.bincount(minlength=10))
    assert torch.equal(counts.sum(0), predictions.bincount(minlength=10))
    assert torch.equal(confusion(labels, predictions), counts.T)


def mistakes(*pairs):
    return pd.DataFrame(pairs, columns=["net", "index"])


def test_overlap_counts_each_image_under_the_norms_that_miss_it():
    table = mistakes(*(("NetA", n) for n in (1, 2, 3, 4)), ("NetC", 1), ("NetC", 9), ("NetB", 3), ("NetB", 1))
    counts = overlap(table)
    assert counts.name == "images"
    assert counts.to_dict() == {
        "batch only": 2,
        "group only": 1,
        "batch and layer": 1,
        "batch, layer and group": 1,
    }


def test_overlap_without_mistakes():
    assert overlap(mistakes()).to_dict() == {}


def run_with(predictions):
    return SimpleNamespace(scores=utils.Scores(0.0, 0.0, torch.tensor(predictions), torch.ones(len(predictions))))


def test_people_table_by_hand():
    data = SimpleNamespace(test_labels=torch.tensor([0, 1, 2, 0, 3, 3] + [4] * 10), split="test", classes=range(10))
    votes = torch.zeros(16, 10, dtype=torch.int64)
    votes[6:, 4] = 50
    votes[0, 0], votes[0, 1] = 45, 5  # 90% agree: not disputed
    votes[1, 1], votes[1, 2] = 20, 30  # disputed, and most people say 2
    votes[2, 2] = 50
    votes[3, 0], votes[3, 5], votes[3, 7] = 44, 4, 2  # 88% agree
    votes[4, 1], votes[4, 3], votes[4, 8] = 20, 16, 14  # no majority
    votes[5, 1], votes[5, 3] = 25, 25
    runs = {
        "batch": run_with([1, 2, 2, 0, 1, 1] + [4] * 10),  # wrong: 0, 4, 5, which some say, and 1, as most say
        "layer": run_with([3, 1, 4, 7, 3, 3] + [4] * 10),  # wrong: 0 and 2, as nobody says, and 3, as someone says
        "group": run_with([0, 1, 2, 0, 3, 3] + [4] * 10),  # all right
    }
    table = people_table(runs, data, votes)
    assert table.equals(people_table(runs, data, (4 * votes).byte()))
    assert list(table.index) == ["batch", "layer", "group", "all test images"]
    columns = ["mistakes", "disputed, %", "someone agrees with the net, %", "most people agree with the net, %"]
    assert list(table.columns) == columns
    assert table.loc["batch"].tolist() == [4, 75.0, 100.0, 25.0]
    assert table.loc["layer"].tolist() == [3, 33.3, 33.3, 0.0]
    assert table.loc["group"].tolist() == [0, "-", "-", "-"]
    assert table.loc["all test images"].tolist() == [16, 25.0, "-", "-"]


@pytest.mark.parametrize(("split", "columns"), [("validation", 10), ("test", 9)])
def test_votes_on_other_images_are_refused(small, split, columns):
    data, votes = replace(small, split=split), torch.ones(len(small.test_labels), columns, dtype=torch.int64)
    for table in (people_table, vote_table):
        with pytest.raises(ValueError, match=r"^votes are for other images than those of .*; leave them out$"):
            table({}, data, votes)


def test_votes_that_mostly_contradict_the_labels_are_refused(small):
    """As those on CIFAR-10 do for another data set of as many images and classes."""
    votes = nn.functional.one_hot(small.test_labels, 10) * 50
    people_table({"batch": run_with(small.test_labels.tolist())}, small, votes)
    for table in (people_table, vote_table):
        with pytest.raises(ValueError, match=r"^votes are for other images than those of "):
            table({}, small, votes.roll(1, 1))


@pytest.mark.parametrize("shared", ["block", "norm"])
def test_spread_of_shared_layers_is_refused(small, shared):
    net = models.NetC()
    if shared == "block":
        net.C5 = net.C4
    else:
        net.C5.norm = net.C4.norm
    with pytest.raises(ValueError, match=r"^C4, or its norm, is applied more than once; give each layer its own$"):
        mean_spread(net, "NetC", small.test_images[:4])


def test_float_images_are_refused(small):
    images = small.test_images[:4] / 255
    for measure in (lambda net: mean_spread(net, "NetA", images, 2), lambda net: class_activation_maps(net, images)):
        with pytest.raises(ValueError, match=r"^images are torch.float32; give torch.uint8, 0 to 255$"):
            measure(models.NetA())


def test_vote_table_by_hand():
    data = SimpleNamespace(test_labels=torch.tensor([0, 1, 2, 0] + [6] * 16), split="test", classes=range(10))
    votes = torch.zeros(20, 10, dtype=torch.int64)
    votes[4:, 6] = 50  # most people say what the label says
    votes[0, 0], votes[0, 1] = 20, 30  # most people say 1
    votes[1, 2], votes[1, 3], votes[1, 1] = 20, 15, 15  # the commonest answer is not the label, but no majority
    votes[2, 5] = 50
    votes[3, 0], votes[3, 4] = 24, 26
    runs = {
        "batch": [run_with(seed + [6, 0] * 8) for seed in ([1, 2, 5, 0], [1, 2, 2, 0], [0, 2, 5, 9])],  # vote: 1 2 5 0
        "layer": [run_with([7, 1, 2, 0] + [6] * 16)],
    }
    table = vote_table(runs, data, votes)
    assert table.equals(vote_table(runs, data, (4 * votes).byte()))
    assert table.loc["batch"].tolist() == [3, 3, 66.7, 33.3, 0.0]
    assert table.loc["layer"].tolist() == [1, 3, 0.0, 66.7, 33.3]


def test_seeds_that_are_divided_equally_side_with_nobody():
    """Whatever the order of the classes."""
    data = SimpleNamespace(test_labels=torch.tensor([3, 5] + [6] * 8), split="test", classes=range(10))
    votes = torch.zeros(10, 10, dtype=torch.int64)
    votes[0, 5], votes[1, 3], votes[2:, 6] = 50, 50, torch.tensor(50)
    runs = {"batch": [run_with([3, 3] + [6] * 8), run_with([5, 5] + [6] * 8)]}
    assert vote_table(runs, data, votes).loc["batch"].tolist() == [2, 2, 0.0, 0.0, 100.0]


def test_probing_leaves_a_net_trainable(small):
    net = models.NetA().train()
    mean_spread(net, "NetA", small.test_images[:4], 2)
    class_activation_maps(net, small.test_images[:2])
    logits = net(normalize(small.images[:4]))
    nn.functional.cross_entropy(logits, small.labels[:4]).backward()
    assert all(p.grad is not None for p in net.parameters())
