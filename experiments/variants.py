"""Variants of the published nets, and `Experiment`: one run of a net or of a variant.

CONTRIBUTING.md says what `state_in_buffers` promises.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

import models
import utils
from engine import records
from models import NORM_OF

CLASSES = {"CIFAR-10": 10, "CIFAR-100": 100}
SIDES = {"C1": 32, "C2": 32, "C4": 16, "C5": 16, "C6": 16, "C8": 8, "C9": 8, "C10": 8}  # pixels, height and width


class GhostBatchNorm(nn.BatchNorm2d):
    """Batch norm over ghost batches: in training, each `size` images of a batch share their statistics.

    Hoffer et al. 2017, https://arxiv.org/abs/1705.08741. (N, C, H, W) to the same shape; `size` divides N.
    """

    state_in_buffers = True

    def __init__(self, channels, size):
        super().__init__(channels)
        self.size = size

    def extra_repr(self):
        return f"{super().extra_repr()}, size={self.size}"

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        ghosts = x.float().unflatten(0, (-1, self.size))  # (N / size, size, C, H, W)
        variance, mean = torch.var_mean(ghosts, (1, 3, 4), correction=0, keepdim=True)
        with torch.no_grad():
            count = ghosts[0, :, 0].numel()
            self.running_mean.lerp_(mean.mean(0).flatten(), self.momentum)
            self.running_var.lerp_(variance.mean(0).flatten() * count / (count - 1), self.momentum)
        scale, shift = self.weight.view(-1, 1, 1), self.bias.view(-1, 1, 1)
        return ((ghosts - mean) * (variance + self.eps).rsqrt() * scale + shift).flatten(0, 1).to(x.dtype)


class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of each pixel, (N, C, H, W) to the same shape."""

    state_in_buffers = True

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class RMSNorm(models.ScaleShift):
    """Divide by the root mean square of each image's activations, (N, C, H, W) to the same shape; subtract nothing.

    Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467, with layer norm's axes, scale and shift.
    """

    state_in_buffers = True

    def forward(self, x):
        squares = x.float().square().mean((1, 2, 3), keepdim=True)
        return super().forward(x * (squares + 1e-5).rsqrt().to(x.dtype))


class DynamicTanh(models.ScaleShift):
    """Apply tanh(alpha x) with a learned alpha in place of a norm, (N, C, H, W) to the same shape.

    Zhu et al. 2025, https://arxiv.org/abs/2503.10622. There alpha starts at 0.5; here at 1, since without skip
    connections 0.5 would halve the signal in each layer.
    """

    state_in_buffers = True

    def __init__(self, channels):
        super().__init__(channels)
        self.alpha = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return super().forward(torch.tanh(self.alpha * x))


class StandardizedConv2d(nn.Conv2d):
    """Convolve with weights whose filters have mean 0 and the variance of `kaiming_init`.

    Weight standardization (Qiao et al. 2019, https://arxiv.org/abs/1903.10520), scaled as by Brock et al. 2021,
    https://arxiv.org/abs/2101.08692, which a norm undoes and the control needs.
    """

    state_in_buffers = True

    @classmethod
    def of(cls, conv, gain):
        """Return a convolution with the sizes and the initial weights of `conv`."""
        sizes = conv.in_channels, conv.out_channels, conv.kernel_size
        standardized = cls(*sizes, padding=conv.padding, bias=False)
        standardized.gain = gain
        with torch.no_grad():
            standardized.weight.copy_(conv.weight)
        return standardized

    def forward(self, x):
        variance, mean = torch.var_mean(self.weight.float(), (1, 2, 3), correction=0, keepdim=True)
        scale = self.gain / (variance * self.weight[0].numel() + 1e-5).sqrt()
        return F.conv2d(x, ((self.weight - mean) * scale).to(x.dtype), padding=self.padding)


def standardize_weights(net):
    """Put a StandardizedConv2d in place of each convolution but c11."""
    for name, module in list(net.named_modules()):
        if isinstance(module, nn.Conv2d) and module is not net.c11:
            # As for kaiming_init: c3 and c7 have no activation.
            net.set_submodule(name, StandardizedConv2d.of(module, 2**0.5 if name.endswith(".conv") else 1.0))


def kaiming_init(net, seed):
    """Draw the convolutions' weights so that the signal keeps its size from layer to layer (He et al. 2015).

    https://arxiv.org/abs/1502.01852. Before an activation PyTorch's own weights are smaller by the square root of 6.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d):
            follows = "relu" if name.endswith(".conv") else "linear"  # c3, c7 and c11 have no activation
            nn.init.kaiming_normal_(module.weight, nonlinearity=follows, generator=generator)


# What stands in the place of layer norm, made for activations (N, channels, side, side).
LAYER_VARIANTS = {
    "C": lambda channels, side: LayerNorm2d(channels),
    "[C,H,W]": lambda channels, side: nn.LayerNorm([channels, side, side]),  # scale and shift per position
    "RMS": lambda channels, side: RMSNorm(channels),
    "tanh": lambda channels, side: DynamicTanh(channels),
}


@dataclass(frozen=True)
class Experiment(utils.Settings):
    """Settings, net and variant of one run. ValueError, by name, for a variant that the net does not have."""

    dataset: str = "CIFAR-10"
    net: str = "NetA"
    widths: tuple = models.WIDTHS
    groups: int | str = ""  # of group norm; "C": as many as channels, which is instance norm; "": four
    layer_variant: str = ""  # one of LAYER_VARIANTS; "": layer norm as published
    statistics_batch: int | str = ""  # size of GhostBatchNorm, images; "": the whole batch
    initial_weights: str = ""  # "he": kaiming_init; "": PyTorch's
    convolution: str = ""  # "standardized": StandardizedConv2d but for c11; "": nn.Conv2d

    def __post_init__(self):
        super().__post_init__()
        utils.choose("dataset", self.dataset, CLASSES)
        utils.choose("net", self.net, NORM_OF)
        utils.choose("layer_variant", self.layer_variant, ("", *LAYER_VARIANTS))
        utils.choose("initial_weights", self.initial_weights, ("", "he"))
        utils.choose("convolution", self.convolution, ("", "standardized"))
        for name, net in (("groups", "NetC"), ("layer_variant", "NetB"), ("statistics_batch", "NetA")):
            if getattr(self, name) != "" and self.net != net:
                raise ValueError(f"{name} is {getattr(self, name)!r} and net {self.net}; only {net} has one")
        if self.statistics_batch != "":
            models.whole_number("statistics_batch", self.statistics_batch, 2, self.batch_size)
            if self.batch_size % self.statistics_batch:
                raise ValueError(
                    f"statistics_batch is {self.statistics_batch}; give a divisor of the batch size, {self.batch_size}"
                )
        groups = 1 if self.groups in ("", "C") else self.groups
        models.check(NORM_OF[self.net], groups, self.widths, 10, 3)
        object.__setattr__(self, "widths", tuple(self.widths))  # a list could be no key of a dict

    def build(self):
        """Build the net; its initial weights are drawn from the seed alone, so variants of a net share them."""
        options = {} if self.groups in ("", "C") else {"groups": self.groups}
        net = utils.build(self.net, self, widths=self.widths, classes=CLASSES[self.dataset], **options)
        for name, side in SIDES.items():
            block = getattr(net, name)
            channels = block.conv.out_channels
            if self.groups == "C":
                block.norm = nn.GroupNorm(channels, channels)
            if self.layer_variant:
                block.norm = LAYER_VARIANTS[self.layer_variant](channels, side)
            if self.statistics_batch:
                block.norm = GhostBatchNorm(channels, self.statistics_batch)
        if self.initial_weights == "he":
            kaiming_init(net, self.seed)
        if self.convolution == "standardized":
            standardize_weights(net)
        return net

    def columns(self):
        """Return what tells this run apart in results/runs.csv, as {column: text}."""
        published = records.statistics_columns(NORM_OF[self.net], 4, self.batch_size)
        variant = {name: getattr(self, name) or value for name, value in published.items()}
        columns = vars(self) | variant | {"widths": " ".join(map(str, self.widths))}
        return {name: str(value) for name, value in columns.items()}
