"""The nets: their chain, their norms by formula, equal budgets, and what they refuse."""

import math
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from torch import nn

import models
from models import MEAN, NORM_OF, STD, WIDTHS, Net, NetA, NetB, NetC, param_groups

NETS = (NetA, NetB, NetC)
CHAIN = ["C1", "C2", "c3", "P1", "C4", "C5", "C6", "c7", "P2", "C8", "C9", "C10", "GAP", "c11"]


@pytest.mark.parametrize("make", NETS)
def test_chain(make):
    net = make()
    assert [name for name, _ in net.named_children()] == CHAIN
    for name, layer in net.named_children():
        convolutions = [module for module in layer.modules() if isinstance(module, nn.Conv2d)]
        if name.startswith(("C", "c")):
            size = 3 if name.startswith("C") else 1
            assert [convolution.kernel_size for convolution in convolutions] == [(size, size)]
            assert (convolutions[0].bias is not None) == (name == "c11")
            assert len(list(layer.children())) == (3 if name.startswith("C") else 0)
        else:
            assert convolutions == []


def test_sizes_along_the_chain():
    x, sizes = torch.zeros(2, 3, 32, 32), {}
    for name, layer in NetC().named_children():
        x = layer(x)
        sizes[name] = tuple(x.shape[2:])
    expected = {32: "C1 C2 c3", 16: "P1 C4 C5 C6 c7", 8: "P2 C8 C9 C10", 1: "GAP c11"}
    assert sizes == {name: (size, size) for size, names in expected.items() for name in names.split()}


def test_each_net_is_named_for_its_norm():
    kinds = {"batch": nn.BatchNorm2d, "layer": nn.GroupNorm, "group": nn.GroupNorm, "none": models.ScaleShift}
    for name, norm in NORM_OF.items():
        net = Net(norm) if name == "Net" else getattr(models, name)()
        assert net.norm == norm
        assert type(net.C4.norm) is kinds[norm]
    assert (NetB().C4.norm.num_groups, NetC().C4.norm.num_groups, NetC(groups=2).C4.norm.num_groups) == (1, 4, 2)


def test_equal_parameters_under_budget():
    counts = {sum(p.numel() for p in Net(norm).parameters()) for norm in models.NORMS}
    assert counts == {48_042}
    assert "48,042" in models.__doc__


@pytest.mark.parametrize("norm", models.NORMS)
def test_every_parameter_is_used(norm):
    torch.manual_seed(0)
    net = Net(norm)
    F.cross_entropy(net(torch.randn(8, 3, 32, 32)), torch.arange(8)).backward()
    for name, parameter in net.named_parameters():
        assert parameter.requires_grad, name
        assert parameter.grad.abs().sum() > 0, name


def test_nothing_but_the_norm_differs():
    def described(net):
        kinds = nn.Conv2d | nn.AvgPool2d | nn.SiLU | nn.AdaptiveAvgPool2d
        return [repr(module) for module in net.modules() if isinstance(module, kinds)]

    nets = []
    for make in (*NETS, lambda: Net("none")):
        torch.manual_seed(3)
        nets.append(make())
    first = dict(nets[0].named_parameters())
    for net in nets[1:]:
        assert described(net) == described(nets[0])
        other = dict(net.named_parameters())
        assert list(other) == list(first)
        assert all(torch.equal(other[name], first[name]) for name in other)


def by_formula(x, scale, shift, parts):
    """The papers' (x - mean) / sqrt(var + eps) * scale + shift in float64, one group of values after another."""
    x, out = x.double(), torch.empty(x.shape, dtype=torch.float64)
    for index in parts:
        part = x[index]
        mean = part.sum() / part.numel()
        variance = ((part - mean) ** 2).sum() / part.numel()
        out[index] = (part - mean) / math.sqrt(variance + 1e-5)
    return out * scale.double().view(-1, 1, 1) + shift.double().view(-1, 1, 1)


PARTS = {  # of activations (3, 24, 5, 7), what shares a mean
    "batch": [(slice(None), c) for c in range(24)],
    "layer": [(n,) for n in range(3)],
    "group": [(n, slice(c, c + 6)) for n in range(3) for c in range(0, 24, 6)],
}


@pytest.mark.parametrize("norm", models.NORMS)
def test_norms_against_their_formulas(norm):
    generator = torch.Generator().manual_seed(1)
    layer = Net(norm).C5.norm
    with torch.no_grad():
        layer.weight.copy_(torch.randn(24, generator=generator))
        layer.bias.copy_(torch.randn(24, generator=generator))
    x = torch.randn(3, 24, 5, 7, generator=generator) * 3 + 2
    if norm == "none":
        expected = x * layer.weight.view(24, 1, 1) + layer.bias.view(24, 1, 1)
    else:
        expected = by_formula(x, layer.weight, layer.bias, PARTS[norm])
    assert (layer.train()(x) - expected).abs().max() < 1e-4


def test_layer_norm_is_not_nn_layer_norm():
    widths = dict(zip(models.CONVOLUTIONS, WIDTHS, strict=True))
    sizes = {"C1": 32, "C2": 32, "C4": 16, "C5": 16, "C6": 16, "C8": 8, "C9": 8, "C10": 8}
    positions = [nn.LayerNorm([widths[name], size, size]) for name, size in sizes.items()]
    assert sum(p.numel() for norm in positions for p in norm.parameters()) == 147_456
    norms = [module for module in NetB().modules() if isinstance(module, nn.GroupNorm)]
    assert sum(p.numel() for norm in norms for p in norm.parameters()) == 432
    assert "147,456" in models.__doc__
    assert "432" in models.__doc__


@pytest.mark.parametrize("norm", models.NORMS)
def test_loss_before_training_is_that_of_a_guess(norm):
    torch.manual_seed(0)
    logits = Net(norm)(torch.randn(64, 3, 32, 32))
    assert abs(F.cross_entropy(logits, torch.randint(0, 10, (64,))).item() - math.log(10)) < 0.15


def test_batch_norm_alone_sees_the_other_images():
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for make in NETS:
        net = make().train()
        alone, together = net(x[:2])[0], net(x)[0]
        assert torch.allclose(alone, together, atol=1e-5) == (make is not NetA)


def test_other_sizes():
    net = NetC(groups=2, widths=(8,) * 10, classes=7, in_channels=1)
    assert net(torch.zeros(2, 1, 28, 28)).shape == (2, 7)
    assert (net.norm, net.groups, net.widths) == ("group", 2, (8,) * 10)


@pytest.mark.parametrize("norm", models.NORMS)
def test_convolutions_decay_and_nothing_else_does(norm):
    net = Net(norm)
    names = {parameter: name for name, parameter in net.named_parameters()}
    decays, rest = param_groups(net, 0.3)
    expected = [f"{name}.conv.weight" if name[0] == "C" else f"{name}.weight" for name in models.CONVOLUTIONS]
    assert [names[parameter] for parameter in decays["params"]] == expected
    assert {names[parameter] for parameter in rest["params"]} == set(names.values()) - set(expected)
    assert (decays["weight_decay"], rest["weight_decay"]) == (0.3, 0.0)
    assert (decays["use_muon"], rest["use_muon"]) == (True, False)


REFUSED = [
    ({"norm": "instance"}, "norm is 'instance'; choose one of batch, layer, group, none"),
    ({"norm": None}, "norm is None; choose one of"),
    ({"norm": []}, "norm is []"),
    ({"norm": nn.BatchNorm2d}, "norm is <class"),
    ({"norm": "group" * 10**5}, "norm is 'groupgroup"),
    ({"groups": np.zeros((2, 2), int)}, "groups is array([[0, 0], [0, 0]])"),
    ({"groups": torch.tensor(True)}, "groups is tensor(True); give a whole number"),
    ({"groups": np.ones((30, 30))}, "groups is array([[1., 1., "),
    ({"widths": np.ones((2, 10))}, "widths is array([[1., 1., "),
    ({"groups": 0}, "groups is 0; give a whole number from 1 to"),
    ({"groups": -4}, "groups is -4"),
    ({"groups": 3}, "groups is 3, which does not divide each of the widths [16, 32, 24, 24, 24, 32, 32, 32]; choose one"
    " of 1, 2, 4, 8"),
    ({"groups": 64}, "groups is 64, which does not divide"),
    ({"groups": 2.0}, "groups is 2.0"),
    ({"groups": "4"}, "groups is '4'"),
    ({"groups": True}, "groups is True"),
    ({"groups": np.array([2, 4])}, "groups is array([2, 4])"),
    ({"widths": WIDTHS[:9]}, "widths is (16, 32"),
    ({"widths": [*WIDTHS, 8]}, "widths is [16, 32"),
    ({"widths": 32}, "widths is 32; give 10, one each for C1 C2 c3"),
    ({"widths": (0, *WIDTHS[1:])}, "C1 is 0"),
    ({"widths": (*WIDTHS[:9], 0.5)}, "C10 is 0.5; give a whole number from 1 to"),
    ({"widths": (torch.tensor(1.5), *WIDTHS[1:])}, "C1 is tensor(1.5000)"),
    ({"widths": "16 32 24"}, "widths is '16 32 24'"),
    ({"classes": 0}, "classes is 0"),
    ({"classes": 10.0}, "classes is 10.0"),
    ({"classes": 10**5000}, "classes is a number of over 30 digits; give a whole number from 1 to"),
    ({"in_channels": -3}, "in_channels is -3"),
    ({"in_channels": None}, "in_channels is None"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_what_no_net_can_be_built_from_is_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=r"^[^\n]{1,300}$") as error:
        Net(**{"norm": "group", **arguments})
    assert str(error.value).startswith(message), error.value


def test_the_ends_of_the_ranges_and_numpy_numbers_are_allowed():
    Net("group", groups=1, widths=[8] * 10, classes=1, in_channels=1)
    net = Net("group", groups=np.array(2), widths=tuple(np.full(10, 8)), classes=np.int64(3), in_channels=np.int32(3))
    assert net(torch.zeros(1, 3, 8, 8)).shape == (1, 3)
    assert str(net.widths) == str((8,) * 10)  # rows and checkpoints hold them as text


def test_copied_alone_into_an_empty_folder(tmp_path):
    """models.py needs torch alone, and its docstring's lines give logits."""
    shutil.copy(ROOT / "models.py", tmp_path)
    code = """
import sys, torch
from models import *
torch.save(NetB().state_dict(), "NetB.pt")
images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
"""
    lines = models.__doc__.split("In another notebook:")[1].strip("\n").splitlines()
    code += "\n".join(line.removeprefix("    ") for line in lines)
    code += "\nprint(tuple(logits.shape), 'numpy' in sys.modules and 'pandas' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == "(2, 10) False", done.stderr


def test_mean_and_std_are_those_of_cifar10(real):
    values = torch.arange(256, dtype=torch.float64) / 255
    for color in range(3):
        share = real.images[..., color].flatten().bincount(minlength=256) / real.images[..., color].numel()
        mean = (share * values).sum()
        assert abs(mean - MEAN[color].item()) < 5e-5
        assert abs((share * (values - mean) ** 2).sum().sqrt() - STD[color].item()) < 5e-5
