"""The pictures in img/ that take the published nets and the images themselves, not the rows of results/.

    python pictures.py    redraw chain.png, same.png and cam.png

Needs weights/ and CIFAR-10. The grids of mistakes, batch.png, layer.png and group.png, come out of s8.ipynb.
"""

import itertools
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F

import hubconf
import models
import utils
from utils import COLOURS, NETS, NORM_OF

GREY = "#555555"


# ---------------------------------------------------------------------------------------------------------------------
# The chain, and what shares a mean
# ---------------------------------------------------------------------------------------------------------------------


def plot_chain():
    """The chain of layers with shapes and parameters, and below it which activations share a mean, norm by norm."""
    figure = plt.figure(figsize=(11, 6.6), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1, 1.1))
    draw_chain(above.subplots())
    cubes = below.subplots(1, 4, subplot_kw={"projection": "3d"})
    for axis, (title, colour, shared) in zip(cubes, shared_means(), strict=True):
        draw_cube(axis, shared, colour)
        axis.set_title(title, fontsize=11)
    below.suptitle("coloured: the activations that share one mean and one variance (after Wu & He 2018)", fontsize=12)
    return figure


def draw_chain(axis):
    """Boxes for the layers on a Matplotlib axis, as high as their output, in the order of the chain."""
    table = utils.layer_table(models.NetC())
    fills = {"3x3 conv, norm, SiLU": "#9ecae1", "1x1 conv": "#fdd0a2"}
    for x, (name, layer) in enumerate(table.iterrows()):
        channels, side = layer["output"].split("x")[:2]
        height = 0.9 + 0.55 * np.log2(int(side))
        axis.bar(x, height, 0.8, -height / 2, color=fills.get(layer["is"], "#d9d9d9"), edgecolor=GREY)
        axis.text(x, 0, name, ha="center", va="center", fontsize=12, weight="bold")
        axis.text(x, height / 2 + 0.12, f"{channels}x{side}x{side}", ha="center", va="bottom", fontsize=8.5)
        parameters = f"{layer['parameters']:,}" if layer["parameters"] else ""
        axis.text(x, -height / 2 - 0.12, parameters, ha="center", va="top", fontsize=8.5, color=GREY)
    handles = [plt.Rectangle((0, 0), 1, 1, facecolor=fill, edgecolor=GREY) for fill in (*fills.values(), "#d9d9d9")]
    names = ["3x3 convolution, norm, SiLU", "1x1 convolution", "average over 2x2 pixels, or all (GAP)"]
    axis.legend(handles, names, loc="lower center", ncols=3, frameon=False, fontsize=9)
    axis.set(xlim=(-0.6, len(table) - 0.4), ylim=(-2.7, 2.2))
    axis.set_title(f"above: output for a 32x32 image; below: parameters, {table['parameters'].sum():,} in all")
    axis.axis("off")


def shared_means():
    """(title, colour, shared) for four norms; shared (4, 8, 6), bool: activations (N, C, HW) that share one mean."""
    n, c, _ = np.indices((4, 8, 6))
    return [
        ("NetA, batch: N, H, W", COLOURS["batch"], c == 0),
        ("NetB, layer: C, H, W", COLOURS["layer"], n == 0),
        ("NetC, group: C / 4, H, W", COLOURS["group"], (n == 0) & (c < 2)),
        ("instance: H, W", "#CC79A7", (n == 0) & (c == 0)),
    ]


def draw_cube(axis, shared, colour):
    """Activations (N, C, HW) as a block of small cubes on a 3D axis: images to the right, channels to the back."""
    faces = np.where(shared, colour, "#f2f2f2")
    axis.voxels(np.ones(shared.shape, bool), facecolors=faces, edgecolor="#999999", linewidth=0.4, shade=False)
    axis.set(xticks=[], yticks=[], zticks=[])
    axis.set_xlabel("N", labelpad=-12)
    axis.set_ylabel("C", labelpad=-12)
    axis.set_zlabel("H, W", labelpad=-9)
    axis.view_init(elev=22, azim=-50)
    axis.set_box_aspect(shared.shape, zoom=0.86)


# ---------------------------------------------------------------------------------------------------------------------
# The same images under all three nets
# ---------------------------------------------------------------------------------------------------------------------


def who_is_wrong(scores, labels):
    """{nets that are wrong: indices}, for each set of nets of {name: Scores}; the most confident in error first.

    The set is a tuple of names in order; confident is the mean confidence of the nets in it.
    """
    wrong = torch.stack([scores[name].predictions != labels for name in scores])  # (nets, N)
    confidences = torch.stack([scores[name].confidences for name in scores])
    found = {}
    for names in itertools.chain(*(itertools.combinations(scores, count) for count in range(1, len(scores) + 1))):
        of_set = torch.tensor([name in names for name in scores])
        indices = (wrong == of_set[:, None]).all(0).nonzero().flatten()
        order = confidences[of_set][:, indices].mean(0).argsort(descending=True, stable=True)
        found[names] = indices[order]
    return found


def plot_same(scores, data, each=3):
    """The same test images under all nets of {name: Scores}: a row for each set of nets that is wrong."""
    labels = data.test_labels.cpu()
    rows = who_is_wrong(scores, labels)
    figure, axes = plt.subplots(
        len(rows), 2 * each, figsize=(11, 1.5 * len(rows) + 0.9), layout="constrained", width_ratios=(1, 1.5) * each
    )
    figure.suptitle(
        "The same test images under all three nets (seed 0), and how sure each is\n"
        "black: the true class; bold: what is wrong"
    )
    for line, (names, indices) in zip(axes, rows.items(), strict=True):
        everyone = len(names) == len(scores)
        said = "all three" if everyone else f"{' and '.join(names)}" + (" alone" if len(names) == 1 else "")
        line[0].set_title(said, loc="left", fontsize=11, color=GREY)
        for axis in line:
            axis.axis("off")
        for picture, text, index in zip(line[::2], line[1::2], indices.tolist(), strict=False):
            picture.imshow(data.test_images[index].cpu().numpy(), interpolation="nearest")
            text.text(0, 0.82, data.classes[labels[index]], fontsize=11)
            for height, (name, score) in zip((0.58, 0.36, 0.14), scores.items(), strict=True):
                guess = data.classes[score.predictions[index]]
                style = {"weight": "bold" if name in names else "normal", "color": COLOURS[NORM_OF[name]]}
                text.text(0, height, f"{name} {guess} {100 * score.confidences[index]:.0f} %", fontsize=9.5, **style)
    return figure


# ---------------------------------------------------------------------------------------------------------------------
# Where the nets looked
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def class_activation_maps(net, images):
    """Each position's share in each logit (Zhou et al. 2016, https://arxiv.org/abs/1512.04150).

    images: (N, H, W, 3) uint8, as `utils.Data` holds them. Returns (N, classes, H / 4, W / 4). c11 is linear, so it
    may come before GAP as well: the mean of a map over its positions is the net's logit. Leaves the net in eval mode.
    """
    x = utils.standardise(images)
    for name, layer in net.eval().named_children():
        if name != "GAP":
            x = layer(x)
    return x


def plot_cam(nets, scores, data, count=6):
    """Where {name: net} saw what they took test images for: the images that all get wrong, the most confident first.

    Red is where a net finds more for the class that it predicts than for the true one, blue where less.
    """
    labels = data.test_labels.cpu()
    chosen = who_is_wrong(scores, labels)[tuple(nets)][:count]
    figure, axes = plt.subplots(len(nets) + 1, count, figsize=(11, 8.4), layout="constrained", squeeze=False)
    figure.suptitle(
        f"Where the nets looked: the {len(chosen)} test images that all three get wrong with most confidence (seed 0)\n"
        "red: more for the class that is named than for the true one; blue: less"
    )
    for axis in axes.flat:
        axis.axis("off")
    images = data.test_images[chosen]
    for axis, image, label in zip(axes[0], images.cpu().numpy(), labels[chosen], strict=False):
        axis.imshow(image, interpolation="nearest")
        axis.set_title(f"true: {data.classes[label]}", fontsize=11)
    for line, (name, net) in zip(axes[1:], nets.items(), strict=True):
        guesses = scores[name].predictions[chosen]
        maps = class_activation_maps(net, images).cpu()
        rows = torch.arange(len(chosen))
        evidence = maps[rows, guesses] - maps[rows, labels[chosen]]
        evidence = F.interpolate(evidence[:, None], 32, mode="bilinear")[:, 0].numpy()
        grey = images.float().mean(3).cpu().numpy()
        for axis, image, heat, guess, index in zip(line, grey, evidence, guesses, chosen, strict=False):
            axis.imshow(image, cmap="gray", vmin=0, vmax=255)
            axis.imshow(heat, cmap="RdBu_r", vmin=-abs(evidence).max(), vmax=abs(evidence).max(), alpha=0.6)
            sure = 100 * scores[name].confidences[index]
            axis.set_title(f"{name}: {data.classes[guess]} {sure:.0f} %", fontsize=10.5, color=COLOURS[NORM_OF[name]])
    return figure


def main():
    data = utils.load_data(torch.device("cpu"), "cifar10")
    nets = {name: getattr(hubconf, name)(pretrained=True).eval() for name in NETS}
    scores = {name: utils.test(net, data.test_images, data.test_labels) for name, net in nets.items()}
    figures = {"chain": plot_chain(), "same": plot_same(scores, data), "cam": plot_cam(nets, scores, data)}
    for name, figure in figures.items():
        utils.save_figure(Path("img") / f"{name}.png", figure)


if __name__ == "__main__":
    main()
