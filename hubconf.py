"""The three nets for torch.hub: `torch.hub.load(folder, "NetA", source="local", pretrained=True)`."""

from pathlib import Path

import torch

import models

dependencies = ["torch"]


def NetA(pretrained=False, **options):
    """`models.NetA`, batch norm; see `load`."""
    return load("NetA", pretrained, options)


def NetB(pretrained=False, **options):
    """`models.NetB`, layer norm; see `load`."""
    return load("NetB", pretrained, options)


def NetC(pretrained=False, **options):
    """`models.NetC`, group norm; see `load`."""
    return load("NetC", pretrained, options)


def load(name, pretrained, options):
    """The net called `name`, with the published weights (seed 0, trained without augmentation) if `pretrained`.

    options are those of `models.Net`. They change what the weights mean, so ValueError for both.
    """
    if pretrained and options:
        raise ValueError(f"{', '.join(options)} given with pretrained=True; the published weights allow no options")
    net = getattr(models, name)(**options)
    if pretrained:
        weights = Path(__file__).parent / "weights" / f"{name}.pt"
        net.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return net
