"""Three small convolutional networks that differ in their normalization and in nothing else.

    NetA  batch norm   Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167
    NetB  layer norm   Ba, Kiros & Hinton 2016, https://arxiv.org/abs/1607.06450
    NetC  group norm   Wu & He 2018, https://arxiv.org/abs/1803.08494

They share one chain of layers, 48,042 parameters with the default widths and 10 classes:

    C1 C2 c3 P1 C4 C5 C6 c7 P2 C8 C9 C10 GAP c11

A capital C is a 3x3 convolution, a norm and SiLU; a small c is a 1x1 convolution. P averages 2x2 pixels, GAP the image.

Each norm computes ``(x - mean) / sqrt(variance + 1e-5) * scale + shift`` with one scale and one shift per channel.
What differs is the axes of the activations (N, C, H, W) over which mean and (in training, biased) variance are taken:

    batch  N, H, W              one mean per channel; in eval mode, running averages of the training batches' means
    layer  C, H, W              one mean per image
    group  C / groups, H, W     one mean per image and group of neighboring channels
    none                        no mean and no variance: the scale and the shift alone, as a control

Layer norm here is ``nn.GroupNorm(1, C)``. ``nn.LayerNorm([C, H, W])`` takes the same mean and variance, but learns a
scale and a shift for every position: 147,456 parameters in this chain instead of 432.

This file needs torch alone. In another notebook:

    net = NetB()
    net.load_state_dict(torch.load("NetB.pt", weights_only=True))
    with torch.no_grad():  # images: a tensor (N, 3, 32, 32), uint8 or float32, 0 to 255
        logits = net.eval()((images / 255 - MEAN) / STD)
"""

import operator
from collections import OrderedDict

import torch
from torch import nn

# Mean and standard deviation of each color over all pixels of CIFAR-10's training images, scaled to 0..1.
MEAN = torch.tensor([0.4914, 0.4822, 0.4465]).view(3, 1, 1)
STD = torch.tensor([0.2470, 0.2435, 0.2616]).view(3, 1, 1)

NORM_OF = {"NetA": "batch", "NetB": "layer", "NetC": "group", "Net": "none"}  # Net: the control
CHAIN = ("C1", "C2", "c3", "P1", "C4", "C5", "C6", "c7", "P2", "C8", "C9", "C10", "GAP", "c11")
CONVOLUTIONS = tuple(name for name in CHAIN if name not in ("P1", "P2", "GAP", "c11"))
WIDTHS = (16, 32, 24, 24, 24, 24, 24, 32, 32, 32)  # output channels of CONVOLUTIONS, in that order


class ScaleShift(nn.Module):
    """Apply a norm's scale and shift per channel without its statistics: (N, C, H, W) to the same shape."""

    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        return x * self.weight.view(-1, 1, 1) + self.bias.view(-1, 1, 1)


NORMS = {  # how each norm is made for activations (N, channels, H, W); add a line for a norm of your own
    "batch": lambda channels, groups: nn.BatchNorm2d(channels),
    "layer": lambda channels, groups: nn.GroupNorm(1, channels),
    "group": lambda channels, groups: nn.GroupNorm(groups, channels),
    "none": lambda channels, groups: ScaleShift(channels),
}


class Net(nn.Sequential):
    """The chain with one kind of norm: images (N, in_channels, H, W), normalized, to logits (N, classes).

    norm         one of NORMS
    groups       groups of channels in group norm; must divide the width of each normalized layer (capital C)
    widths       output channels of C1 C2 c3 C4 C5 C6 c7 C8 C9 C10
    classes      number of logits
    in_channels  3 for color images

    H and W should be multiples of 4, since pooling drops what is left over.
    Raises ValueError for an unknown norm, a wrong number of widths, or groups that do not divide a width.
    """

    def __init__(self, norm, groups=4, widths=WIDTHS, classes=10, in_channels=3):
        counts = check(norm, groups, widths, classes, in_channels)
        groups, classes, in_channels = (counts[name] for name in ("groups", "classes", "in_channels"))
        widths = [counts[name] for name in CONVOLUTIONS]
        inputs = dict(zip(CONVOLUTIONS, (in_channels, *widths[:-1]), strict=True))
        outputs = dict(zip(CONVOLUTIONS, widths, strict=True))
        layers = OrderedDict()
        for name in CHAIN:
            if name in ("P1", "P2"):
                layers[name] = nn.AvgPool2d(2)
            elif name == "GAP":
                layers[name] = nn.AdaptiveAvgPool2d(1)
            elif name == "c11":
                layers[name] = nn.Conv2d(widths[-1], classes, 1)
            elif name.startswith("c"):
                layers[name] = nn.Conv2d(inputs[name], outputs[name], 1, bias=False)
            else:
                conv = nn.Conv2d(inputs[name], outputs[name], 3, padding=1, bias=False)
                parts = OrderedDict(conv=conv, norm=NORMS[norm](outputs[name], groups), activation=nn.SiLU())
                layers[name] = nn.Sequential(parts)
        super().__init__(layers)
        self.norm, self.groups, self.widths = norm, groups, tuple(widths)

    def forward(self, x):
        return super().forward(x).flatten(1)


class NetA(Net):
    """`Net` with batch norm."""

    def __init__(self, **options):
        super().__init__("batch", **options)


class NetB(Net):
    """`Net` with layer norm."""

    def __init__(self, **options):
        super().__init__("layer", **options)


class NetC(Net):
    """`Net` with group norm, four groups unless `groups` says otherwise."""

    def __init__(self, **options):
        super().__init__("group", **options)


def param_groups(net, weight_decay):
    """Split the parameters of a `Net` into two groups for any optimizer, as torch.optim takes them.

    All convolutions but c11 decay, and `Muon` orthogonalizes their updates. Scales, shifts and c11 do neither.
    """
    modules = [module for module in net.modules() if isinstance(module, nn.Conv2d) and module is not net.c11]
    decaying = {p for module in modules for p in module.parameters() if p.shape == module.weight.shape}
    convolutions, rest = ([p for p in net.parameters() if (p in decaying) == decays] for decays in (True, False))
    return [
        {"params": convolutions, "weight_decay": weight_decay, "use_muon": True},
        {"params": rest, "weight_decay": 0.0, "use_muon": False},
    ]


def show(value):
    """Return `repr(value)` for messages, in one line of 90 characters; Python has none for numbers of 5,000 digits."""
    if isinstance(value, int) and abs(value) > 10**30:
        return "a number of over 30 digits"
    text = " ".join(repr(value).split())
    return text if len(text) <= 90 else f"{text[:87]}..."


def whole_number(name, value, low=1, high=2**32 - 1):
    """Return `value` as an int; ValueError, in one line, unless it is a whole number from `low` to `high`."""
    try:
        number = None if isinstance(value, bool) or getattr(value, "dtype", 0) is torch.bool else operator.index(value)
    except TypeError:
        number = None
    if number is None or not low <= number <= high:
        raise ValueError(f"{name} is {show(value)}; give a whole number from {low} to {high}")
    return number


def choose(name, value, choices):
    """Return `value` as a plain str, which an Enum may be more than; ValueError unless it is one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} is {show(value)}; choose one of {', '.join(choices)}")
    return str.__str__(value)


def check(norm, groups, widths, classes, in_channels):
    """Return groups, classes, in_channels and widths as ints by name; ValueError where no `Net` can have them."""
    choose("norm", norm, NORMS)
    if not isinstance(widths, tuple | list) or len(widths) != len(CONVOLUTIONS):
        raise ValueError(f"widths is {show(widths)}; give {len(CONVOLUTIONS)}, one each for {' '.join(CONVOLUTIONS)}")
    counts = {"groups": groups, "classes": classes, "in_channels": in_channels}
    counts |= dict(zip(CONVOLUTIONS, widths, strict=True))
    counts = {name: whole_number(name, count) for name, count in counts.items()}
    normed, groups = [width for name, width in counts.items() if name.startswith("C")], counts["groups"]
    if norm == "group" and any(width % groups for width in normed):
        choices = [str(n) for n in range(1, min(normed) + 1) if not any(width % n for width in normed)]
        problem = f"groups is {groups}, which does not divide each of the widths {normed}"
        raise ValueError(f"{problem}; choose one of {', '.join(choices)}")
    return counts
