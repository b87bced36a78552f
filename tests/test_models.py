import math
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from torch import nn

import models
from models import Net, NetA, NetB, NetC

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


def test_shapes():
    x, shapes = torch.zeros(2, 3, 32, 32), {}
    for name, layer in NetC().named_children():
        x = layer(x)
        shapes[name] = tuple(x.shape[2:])
    sizes = {32: "C1 C2 c3", 16: "P1 C4 C5 C6 c7", 8: "P2 C8 C9 C10", 1: "GAP c11"}
    assert shapes == {name: (size, size) for size, names in sizes.items() for name in names.split()}


def test_equal_parameters_under_budget():
    counts = {sum(p.numel() for p in make().parameters()) for make in NETS} | {
        sum(p.numel() for p in Net("none").parameters())
    }
    assert counts == {48_042}
    assert models.__doc__.count("48,042") == 1


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
        return [
            repr(m) for m in net.modules() if isinstance(m, nn.Conv2d | nn.AvgPool2d | nn.SiLU | nn.AdaptiveAvgPool2d)
        ]

    weights = []
    for make in NETS:
        torch.manual_seed(3)
        net = make()
        weights.append({name: p for name, p in net.named_parameters()})
        assert described(net) == described(NetA())
    for other in weights[1:]:
        assert other.keys() == weights[0].keys()
        assert all(torch.equal(other[name], weights[0][name]) for name in other)


def by_formula(x, scale, shift, axes_of):
    """The papers' (x - mean) / sqrt(var + eps) * scale + shift in float64, one group of values after another."""
    x, out = x.double(), torch.empty(x.shape, dtype=torch.float64)
    for index in axes_of(x):
        part = x[index]
        mean = part.sum() / part.numel()
        variance = ((part - mean) ** 2).sum() / part.numel()
        out[index] = (part - mean) / math.sqrt(variance + 1e-5)
    return out * scale.double().view(-1, 1, 1) + shift.double().view(-1, 1, 1)


AXES = {
    "batch": lambda x: [(slice(None), c) for c in range(x.shape[1])],
    "layer": lambda x: [(n,) for n in range(len(x))],
    "group": lambda x: [(n, slice(c, c + 6)) for n in range(len(x)) for c in range(0, 24, 6)],
}


@pytest.mark.parametrize("norm", AXES)
def test_norms_against_their_formulas(norm):
    generator = torch.Generator().manual_seed(1)
    layer = Net(norm).C5.norm
    with torch.no_grad():
        layer.weight.copy_(torch.randn(24, generator=generator))
        layer.bias.copy_(torch.randn(24, generator=generator))
    x = torch.randn(3, 24, 5, 7, generator=generator) * 3 + 2
    expected = by_formula(x, layer.weight, layer.bias, AXES[norm])
    assert (layer.train()(x) - expected).abs().max() < 1e-4


def test_layer_norm_is_not_nn_layer_norm():
    widths = dict(zip(models.CONVOLUTIONS, models.WIDTHS, strict=True))
    sizes = {"C1": 32, "C2": 32, "C4": 16, "C5": 16, "C6": 16, "C8": 8, "C9": 8, "C10": 8}
    positions = [nn.LayerNorm([widths[name], size, size]) for name, size in sizes.items()]
    assert sum(p.numel() for norm in positions for p in norm.parameters()) == 147_456
    own = [module for module in NetB().modules() if isinstance(module, nn.GroupNorm)]
    assert sum(p.numel() for norm in own for p in norm.parameters()) == 432
    assert "147,456" in models.__doc__
    assert "432" in models.__doc__


@pytest.mark.parametrize("norm", models.NORMS)
def test_loss_at_initialisation(norm):
    torch.manual_seed(0)
    logits = Net(norm)(torch.randn(64, 3, 32, 32))
    assert abs(F.cross_entropy(logits, torch.randint(0, 10, (64,))).item() - math.log(10)) < 0.15


def test_batch_norm_alone_sees_the_other_images():
    x = torch.randn(4, 3, 32, 32)
    for make in NETS:
        net = make().train()
        alone, together = net(x[:2])[0], net(x)[0]
        assert torch.allclose(alone, together, atol=1e-5) == (make is not NetA)


def test_other_sizes():
    net = NetC(groups=2, widths=(8,) * 10, classes=7, in_channels=1)
    assert net(torch.zeros(2, 1, 28, 28)).shape == (2, 7)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"norm": "rms"}, "norm is 'rms'; choose one of batch, layer, group, none"),
        ({"norm": None}, "norm is None; choose one of batch, layer, group, none"),
        ({"norm": "group", "groups": 3}, "groups is 3, which does not divide"),
        ({"norm": "group", "groups": 3}, "choose one of 1, 2, 4, 8"),
        ({"norm": "group", "groups": 0}, "groups is 0; give a whole number of 1 or more"),
        ({"norm": "batch", "widths": (8, 8)}, "widths is (8, 8); give 10 numbers"),
        ({"norm": "batch", "widths": (8,) * 9 + (0.5,)}, "C10 is 0.5; give a whole number of 1 or more"),
        ({"norm": "batch", "widths": 16}, "widths is 16; give 10 numbers"),
        ({"norm": "batch", "classes": 0}, "classes is 0; give"),
        ({"norm": "batch", "in_channels": "3"}, "in_channels is '3'; give"),
    ],
)
def test_refusals(arguments, said):
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        Net(**arguments)
    assert said in str(error.value)


def test_copied_alone_into_an_empty_folder(tmp_path):
    shutil.copy(ROOT / "models.py", tmp_path)
    code = "import torch, models; print(tuple(models.NetB()(torch.zeros(2, 3, 32, 32)).shape))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "(2, 10)"


def test_channel_statistics(real):
    pixels = real.images.double() / 255
    assert (pixels.mean((0, 1, 2)) - models.MEAN.flatten()).abs().max() < 5e-5
    assert (pixels.std((0, 1, 2)) - models.STD.flatten()).abs().max() < 5e-5
