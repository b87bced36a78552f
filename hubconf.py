"""The three networks for torch.hub: `torch.hub.load(folder, "NetA", source="local", pretrained=True)`.

If your code has imported a module of its own called models, that one is taken instead of this folder's models.py.
"""

import io
import pathlib
import zipfile

import torch

import models

dependencies = ["torch"]


def _builder(name):
    """Return the function by which torch.hub builds the net called `name`."""

    def build(pretrained=False, **options):
        if pretrained and options:
            raise ValueError(f"{', '.join(options)} given with pretrained=True; the published weights allow no options")
        net = getattr(models, name)(**options)
        if pretrained:
            path = pathlib.Path(__file__).parent / "weights" / f"{name}.pt"
            content = io.BytesIO(path.read_bytes())
            try:
                damaged = zipfile.ZipFile(content).testzip()  # torch.load does not look at the check sums
            except zipfile.BadZipFile:
                damaged = True
            if damaged:
                raise ValueError(f"{path} is damaged; download it again")
            content.seek(0)
            net.load_state_dict(torch.load(content, map_location="cpu", weights_only=True))
        return net

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"""Build the network with {models.NORM_OF[name]} norm.

    It takes images (N, 3, 32, 32), normalized with models.MEAN and STD, to logits (N, 10).

    pretrained  load the published weights: seed 0, trained without augmentation
    options     those of `models.Net`; they change what the weights mean, so ValueError when both are given
    """
    return build


NetA, NetB, NetC = map(_builder, ("NetA", "NetB", "NetC"))
