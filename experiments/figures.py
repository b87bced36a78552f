"""The figures of findings.ipynb, and those in img/ but for the grids of mistakes, which s8.ipynb draws.

python -m experiments.figures    redraw accuracy, lead, chain and cubes.png in img/ and, with CIFAR-10 in data/,
                                 same.png and cam.png from weights/, the nets of seed 0
"""

import argparse
import itertools

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

import hubconf
import models
import utils
from engine.data import load_data
from engine.figures import COLORS, GRAY, save_figure
from engine.probe import class_activation_maps
from experiments import ROOT, tables
from experiments.tables import ALL, NORMS, OPTIMIZERS, select
from experiments.tuning import check_seeds
from models import NORM_OF

LABELS = {"batch": "batch norm", "layer": "layer norm", "group": "group norm", "none": "no norm"}
OPTIMIZER_COLORS = {"SGD": "#b3423a", "AdamW": "#7a6bb0", "Muon": "#2a7f62"}
WIDTH = 8.8  # inches: at a README's width, 10 points are then 13 pixels
LOWEST = 74  # percent: the bottom of `plot_rate`


def panels(rows=1, columns=1, height=3.2, **options):
    """Make a figure as wide as a README with light grids and no box. Returns the figure and its axes."""
    figure, axes = plt.subplots(rows, columns, figsize=(WIDTH, height), layout="constrained", **options)
    for axis in np.ravel(axes):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.3)
    return figure, axes


def draw_points(axis, place, values, color, vertical=True, **style):
    """Draw a point per run beside each other at `place`, and a line at their mean."""
    values = np.asarray(values, dtype=float)
    places = place + np.linspace(-0.12, 0.12, len(values))
    x, y = (places, values) if vertical else (values, places)
    axis.scatter(x, y, s=18, color=color, alpha=0.6, linewidth=0, **style)
    (axis.hlines if vertical else axis.vlines)(values.mean(), place - 0.25, place + 0.25, color=color, linewidth=2)


def n_of(runs, *columns):
    """Say how many runs, each seed once, there are for each value of some columns: "n = 3", or "n = 3 or 5"."""
    check_seeds(runs, columns)
    counts = runs.groupby([*columns], dropna=False).size().unique()
    return "n = " + " or ".join(map(str, sorted(counts)))


# ---------------------------------------------------------------------------------------------------------------------
# From rows
# ---------------------------------------------------------------------------------------------------------------------


def plot_accuracy(rows):
    """Draw the test accuracy of every run of the published recipe, without and with augmentation, and the means."""
    figure, axes = panels(1, 2, 2.9, sharey=True)
    for axis, (study, title) in zip(axes, tables.STUDIES.items(), strict=True):
        of = tables.samples(select(rows, study=study))
        for place, norm in enumerate(NORMS):
            draw_points(axis, place, of[norm], COLORS[norm])
            mean = tables.decimal_round(of[norm].mean(), 2)
            axis.text(place + 0.3, mean, mean, va="center", color=COLORS[norm], weight="bold")
        axis.set_xticks(range(len(NORMS)), [LABELS[norm] for norm in NORMS])
        axis.set(xlim=(-0.5, 2.75), title=title)
        axis.grid(visible=False, axis="x")
    axes[0].set_ylabel("test accuracy, %")
    return figure


def plot_rate(rows):
    """Draw validation accuracy by learning rate, at each rate with the best weight decay: a panel per optimizer.

    Lines: means of three seeds. Crosses below: rates at which a run overflowed or is under `LOWEST`.
    """
    runs, grid = tables.rate_runs(rows), select(rows, study="rate")
    figure, (upper, lower) = panels(2, len(OPTIMIZERS), 4, sharex="col", sharey="row", height_ratios=(7, 1))
    for axis, strip, (name, title) in zip(upper, lower, OPTIMIZERS.items(), strict=True):
        tried = sorted(select(grid, optimizer=name)["learning_rate"].unique())
        for place, norm in enumerate(ALL):
            own = select(runs, optimizer=name, norm=norm)
            line = tables.by_rate(own).reindex(tried)
            style = {"color": COLORS[norm], "linestyle": ":" if norm == "none" else "-"}
            axis.plot(line.index, line, label=LABELS[norm], **style)
            axis.scatter(own["learning_rate"], own["validation_accuracy"], color=COLORS[norm], s=12, alpha=0.6)
            worst = own.groupby("learning_rate")["validation_accuracy"].min().reindex(tried)
            low = line.isna() | (worst < LOWEST)
            crosses = line[low].index.intersection(select(grid, optimizer=name, norm=norm)["learning_rate"])
            strip.scatter(crosses, [-place] * len(crosses), color=COLORS[norm], marker="x", s=18)
        axis.set(title=title, xscale="log", ylim=(LOWEST, max(88, 0.5 + runs["validation_accuracy"].max())))
        strip.set(xlabel="learning rate", yticks=[], ylim=(-len(ALL) + 0.3, 0.7))
        strip.minorticks_off()
        strip.set_xticks(tried[1::2], [f"{rate:g}" for rate in tried[1::2]])
    upper[0].set_ylabel("validation accuracy, %")
    lower[0].set_ylabel(f"overflow or\nbelow {LOWEST}%", rotation=0, ha="right", va="center", fontsize=8)
    figure.legend(*upper[0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=len(ALL))
    return figure


def plot_statistics(rows, inside):
    """Draw how much batch norm's means vary, and its accuracy, by the images that they are taken over.

    inside  rows of results/inside.csv: the means' spread in units of the standard deviation, by images and layer
    """
    figure, (left, right) = panels(1, 2, 3.4)
    own = select(inside, net="NetA")
    left.scatter(own["images"], own["spread"], s=18, color=COLORS["batch"], alpha=0.6, linewidth=0)
    left.plot(own.groupby("images")["spread"].mean(), color=COLORS["batch"])
    sizes = sorted(own["images"].unique())
    left.set(
        xscale="log",
        yscale="log",
        xlabel="images that the means are taken over",
        ylabel="SD of means / SD of activations",
    )
    left.set_title("standard deviation of the means, a point per layer", fontsize=10)
    left.minorticks_off()
    left.set_xticks(sizes, sizes)
    left.set_yticks(ticks := [0.01, 0.03, 0.1, 0.3], ticks)
    batch = select(rows, study="batch")
    for norm in ("layer", "group"):
        low, high = select(batch, norm=norm)["test_accuracy"].agg(["min", "max"], skipna=False)
        right.axhspan(low, high, color=COLORS[norm], alpha=0.25, linewidth=0, label=LABELS[norm])
    sizes = sorted(batch["statistics_batch"].dropna().unique())
    for place, size in enumerate(sizes):
        values = select(batch, statistics_batch=size)["test_accuracy"]
        draw_points(right, place, values, COLORS["batch"], label=None if place else LABELS["batch"])
    right.set_xticks(range(len(sizes)), [f"{size:.0f}" for size in sizes])
    right.set(xlabel="images in a ghost batch", ylabel="test accuracy, %")
    right.set_title(f"test accuracy, a point per run ({n_of(batch, 'net', 'statistics_batch')})", fontsize=10)
    right.legend(frameon=False, loc="lower right")
    return figure


def plot_axes(rows):
    """Draw the accuracy of group norm by its number of groups, and of layer norm by its axes and parameters."""
    figure, (left, right) = panels(1, 2, 3.2, width_ratios=(1.35, 1))
    runs = select(rows, study="groups")
    counts = {"1": "1\n(layer norm)", "2": "2", "4": "4", "8": "8", "C": "one each\n(instance)"}
    for place, count in enumerate(counts):
        draw_points(left, place, runs[runs["groups"].astype(str) == count]["test_accuracy"], COLORS["group"])
    left.set_xticks(range(len(counts)), counts.values(), fontsize=9)
    left.set(ylabel="test accuracy, %", xlabel="groups of channels")
    left.grid(visible=False, axis="x")
    runs, kinds = tables.layer_runs(rows), list(tables.LAYER_KINDS.values())
    for place, kind in enumerate(kinds):
        draw_points(right, place, select(runs, kind=kind)["test_accuracy"], COLORS["layer"], vertical=False)
    parameters = runs.groupby("kind")["parameters"].first()
    labels = [f"{kind.replace('; ', chr(10))}\n{parameters[kind]:,} parameters" for kind in kinds]
    right.set_yticks(range(len(kinds)), labels, fontsize=8)
    right.set(xlabel="test accuracy, %", ylim=(len(kinds) - 0.5, -0.5))
    left.set_title(f"group norm, by number of groups ({n_of(select(rows, study='groups'), 'groups')})", fontsize=10)
    right.set_title(f"layer norm, by axes ({n_of(runs, 'kind')})", fontsize=10)
    right.grid(visible=False, axis="y")
    return figure


BUDGETS = {"parameters": "parameters", "epochs": "epochs", "batch_size": "batch size"}


def plot_budget(rows):
    """Draw the test accuracy of each norm by parameters, epochs and batch size; points: runs, lines: their means."""
    figure, axes = panels(1, 3, 3.2)
    for axis, (column, label) in zip(axes, BUDGETS.items(), strict=True):
        runs = tables.budget(rows, column)
        for norm, aside in zip(NORMS, (0.98, 1, 1.02), strict=True):  # so that no point hides another
            own = select(runs, norm=norm)
            line = own.groupby(column)["test_accuracy"].mean(skipna=False)
            axis.scatter(own[column] * aside, own["test_accuracy"], s=14, color=COLORS[norm], alpha=0.6, linewidth=0)
            axis.plot(line.index * aside, line, color=COLORS[norm], label=LABELS[norm])
        title = f"{label} ({n_of(runs, 'norm', column)})"
        axis.set(xscale="linear" if column == "parameters" else "log", title=title)
        axis.minorticks_off()
        axis.set_xticks(line.index, [f"{count:,}" for count in line.index], fontsize=8.5)
    axes[0].set_ylabel("test accuracy, %")
    axes[0].legend(frameon=False, loc="lower right")
    return figure


def plot_lead(rows):
    """Draw batch norm's lead over layer norm by batch size, a line per optimizer and data set, with 95% intervals."""
    figure, axes = panels(1, 2, 3.2, sharey=True, width_ratios=(1.25, 1))
    table = tables.surface(rows).reset_index()
    for axis, data in zip(axes, ("CIFAR-10", "CIFAR-100"), strict=True):
        places = np.linspace(0.94, 1.06, len(OPTIMIZER_COLORS))
        for aside, (name, color) in zip(places, OPTIMIZER_COLORS.items(), strict=True):
            line = table[(table["dataset"] == data) & (table["optimizer"] == name)].set_index("batch_size")
            if line.empty:
                continue
            lead, low, high = (line[f"batch minus layer{end}"] for end in ("", ", low", ", high"))
            axis.errorbar(line.index * aside, lead, [lead - low, high - lead], fmt="o-", color=color, label=name)
            axis.annotate(
                f" {name}",
                (line.index[-1] * aside, lead.iloc[-1]),
                color=color,
                va="center",
                xytext=(6, 0),
                textcoords="offset points",
            )
        axis.axhline(0, color=GRAY, linewidth=1)
        sizes = sorted(table[table["dataset"] == data]["batch_size"].unique())
        axis.set(title=data, xscale="log", xlabel="batch size, images", xlim=(min(55, 0.9 * sizes[0]), 2 * sizes[-1]))
        axis.minorticks_off()
        axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes[0].set_ylabel("lead over layer norm,\npercentage points")
    return figure


def plot_scaling(bench):
    """Draw seconds per epoch by batch size, width and training images, beside what bytes and launches would take.

    bench  rows of results/bench.csv whose path is "scale"
    """
    bench = bench[bench["path"] == "scale"]
    if len(devices := bench["device"].unique()) > 1:
        raise ValueError(f"the rows are of {' and '.join(devices)}; give those of one device")
    steps = bench["train_images"] // bench["batch_size"]
    bench = bench.assign(launches=pd.to_numeric(bench["launches_per_step"], errors="coerce") * steps)  # of an epoch
    sweeps = {
        "batch_size": ("batch size", {"width": 1, "train_images": 50_000}),
        "width": ("width, times the published", {"batch_size": 500, "train_images": 50_000}),
        "train_images": ("training images", {"batch_size": 500, "width": 1}),
    }
    figure, axes = panels(1, 3, 3.4, sharey=True)
    for axis, (column, (label, fixed)) in zip(axes, sweeps.items(), strict=True):
        for net in ("NetA", "NetC"):
            norm, own = NORM_OF[net], select(bench, net=net)
            smallest = own.sort_values("batch_size").iloc[0]  # where launches are the limit
            each = smallest["seconds_per_epoch"] / smallest["launches"]
            line = select(own, **fixed).sort_values(column).set_index(column)
            axis.plot(line["seconds_per_epoch"], "o-", color=COLORS[norm], markersize=4, label=LABELS[norm])
            axis.plot(each * line["launches"], "--", color=COLORS[norm], alpha=0.7)
            axis.plot(line["dram_model_seconds"], ":", color=COLORS[norm])
        axis.set(title=label, xscale="log", yscale="log")
        axis.minorticks_off()
        labels = [f"{count:,}" if place % 2 == 0 or len(line) < 7 else "" for place, count in enumerate(line.index)]
        axis.set_xticks(line.index, labels, fontsize=8)
    axes[0].set_yticks(ticks := [0.01, 0.03, 0.1, 0.3, 1], ticks)
    axes[0].set_ylabel("seconds per epoch")
    handles, labels = axes[0].get_legend_handles_labels()
    handles += [plt.Line2D([], [], color=GRAY, linestyle=style) for style in ("-", "--", ":")]
    labels += ["measured", "kernel launches alone", "memory traffic alone"]
    figure.legend(handles, labels, frameon=False, loc="outside lower center", ncols=len(labels))
    return figure


# ---------------------------------------------------------------------------------------------------------------------
# The network, and what shares a mean
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def layers(net):
    """List (name, layer, shape of its output for one 32x32 image) in the order of the chain."""
    found, x = [], torch.zeros(1, 3, 32, 32)
    for name, layer in net.eval().named_children():
        x = layer(x)
        found.append((name, layer, tuple(x.shape[1:])))
    return found


def plot_chain():
    """Draw the network layer by layer, as high as its output: shapes above, parameters below."""
    figure, axis = plt.subplots(figsize=(WIDTH, 2.7), layout="constrained")
    fills = ("#9ecae1", "#fdd0a2", "#d9d9d9")
    chain = layers(models.NetC())
    for x, (name, layer, (channels, side, _)) in enumerate(chain):
        kind = 0 if isinstance(layer, torch.nn.Sequential) else 1 if isinstance(layer, torch.nn.Conv2d) else 2
        height = 0.9 + 0.5 * np.log2(side)
        axis.bar(x, height, 0.84, -height / 2, color=fills[kind], edgecolor=GRAY)
        axis.text(x, 0, name, ha="center", va="center", fontsize=11, weight="bold")
        axis.text(x, height / 2 + 0.1, f"{channels}x{side}x{side}", ha="center", va="bottom", fontsize=7.5)
        parameters = sum(p.numel() for p in layer.parameters())
        axis.text(x, -height / 2 - 0.12, f"{parameters:,}" if parameters else "", ha="center", va="top", fontsize=8)
    handles = [plt.Rectangle((0, 0), 1, 1, facecolor=fill, edgecolor=GRAY) for fill in fills]
    names = ["3x3 convolution, norm, SiLU", "1x1 convolution", "average over 2x2 pixels (P), the image (GAP)"]
    figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    axis.set(xlim=(-0.6, len(chain) - 0.4), ylim=(-2.05, 2.05))
    axis.axis("off")
    return figure


def shared_means():
    """List (title, color, shared) of four norms; shared (4, 8, 6), bool: activations (N, C, HW) that share a mean."""
    n, c, _ = np.indices((4, 8, 6))
    return [
        ("batch norm: N, H, W", COLORS["batch"], c == 0),
        ("layer norm: C, H, W", COLORS["layer"], n == 0),
        ("group norm: C / 4 channels, H, W", COLORS["group"], (n == 0) & (c < 2)),
        ("instance norm: H, W", "#CC79A7", (n == 0) & (c == 0)),
    ]


def plot_cubes():
    """Draw which activations share one mean and one variance under each norm, after Wu & He 2018."""
    figure, axes = plt.subplots(1, 4, figsize=(WIDTH, 2.2), layout="constrained", subplot_kw={"projection": "3d"})
    for axis, (title, color, shared) in zip(axes, shared_means(), strict=True):
        faces = np.where(shared, color, "#f2f2f2")
        axis.voxels(np.ones(shared.shape, bool), facecolors=faces, edgecolor="#999999", linewidth=0.4, shade=False)
        axis.set(xticks=[], yticks=[], zticks=[])
        axis.set_title(title, fontsize=9.5, y=0.93)
        axis.set_xlabel("N", labelpad=-12)
        axis.set_ylabel("C", labelpad=-12)
        axis.set_zlabel("H, W", labelpad=-10)
        axis.view_init(elev=22, azim=-50)
        axis.set_box_aspect(shared.shape, zoom=0.86)
    return figure


# ---------------------------------------------------------------------------------------------------------------------
# The same images under all nets, and where the nets looked
# ---------------------------------------------------------------------------------------------------------------------


def who_is_wrong(scores, labels):
    """Find the test images that each set of nets gets wrong and no other does: {names: indices}.

    scores  {name: Scores}. Indices are in the order of the nets' mean confidence in their errors, the highest first.
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
    """Draw the same test images under all nets of {name: Scores}: a row for each set of nets that is wrong."""
    labels = data.test_labels.cpu()
    rows = who_is_wrong(scores, labels)
    figure, axes = plt.subplots(
        len(rows), 2 * each, figsize=(WIDTH, 1.12 * len(rows)), layout="constrained", width_ratios=(1, 1.6) * each
    )
    for line, (names, indices) in zip(axes, rows.items(), strict=True):
        norms = [NORM_OF[name] for name in names]
        text = f"only {' and '.join(norms)} norm {'is' if len(names) == 1 else 'are'} wrong"
        text = "all three are wrong" if len(names) == len(scores) else text
        heading = line[0].text(0, 1.06, text, transform=line[0].transAxes, fontsize=10, color=GRAY)
        heading.set_in_layout(False)  # or the first column would be as wide as it is
        line[1].set_title(" ", fontsize=10)  # keeps its height
        for axis in line:
            axis.axis("off")
            axis.set_anchor("W")
        for picture, beside, index in zip(line[::2], line[1::2], indices.tolist(), strict=False):
            picture.imshow(data.test_images[index].cpu().numpy(), interpolation="nearest")
            beside.text(0, 0.84, f"label: {data.classes[labels[index]]}", fontsize=9.5)
            for height, (name, score) in zip((0.58, 0.34, 0.1), scores.items(), strict=True):
                answer = f"{NORM_OF[name]}: {data.classes[score.predictions[index]]}"
                style = {"weight": "bold" if name in names else "normal", "color": COLORS[NORM_OF[name]]}
                beside.text(0, height, f"{answer} {100 * score.confidences[index]:.0f}%", fontsize=9, **style)
    return figure


def plot_cam(nets, scores, data, count=6):
    """Draw where {name: net} found their answers: the test images that all get wrong, the most confident first.

    Red is where a net finds more for the class that it predicts than for the label, blue where less.
    """
    labels = data.test_labels.cpu()
    chosen = who_is_wrong(scores, labels)[tuple(nets)][:count]
    figure, axes = plt.subplots(len(nets) + 1, count, figsize=(WIDTH, 6.6), layout="constrained", squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    images = data.test_images[chosen]
    for axis, image, label in zip(axes[0], images.cpu().numpy(), labels[chosen], strict=False):
        axis.imshow(image, interpolation="nearest")
        axis.set_title(f"label: {data.classes[label]}", fontsize=9)
    for line, (name, net) in zip(axes[1:], nets.items(), strict=True):
        predictions = scores[name].predictions[chosen]
        maps = class_activation_maps(net, images).cpu()
        rows = torch.arange(len(chosen))
        evidence = maps[rows, predictions] - maps[rows, labels[chosen]]
        evidence = F.interpolate(evidence[:, None], 32, mode="bilinear")[:, 0].numpy()
        gray = images.float().mean(3).cpu().numpy()
        for axis, image, heat, prediction, index in zip(line, gray, evidence, predictions, chosen, strict=False):
            axis.imshow(image, cmap="gray", vmin=0, vmax=255)
            axis.imshow(heat, cmap="RdBu_r", vmin=-abs(evidence).max(), vmax=abs(evidence).max(), alpha=0.6)
            answer = f"{data.classes[prediction]} {100 * scores[name].confidences[index]:.0f}%"
            axis.set_title(f"{NORM_OF[name]} norm:\n{answer}", fontsize=9, color=COLORS[NORM_OF[name]])
    return figure


# ---------------------------------------------------------------------------------------------------------------------
# All of them
# ---------------------------------------------------------------------------------------------------------------------


def plot_rows():
    """Draw the figures that need no images. Returns {name: figure}."""
    rows = tables.read_results()
    return {"accuracy": plot_accuracy(rows), "lead": plot_lead(rows), "chain": plot_chain(), "cubes": plot_cubes()}


def plot_images():
    """Draw the figures of the published nets on CIFAR-10's test images. Returns {name: figure}."""
    data = load_data(torch.device("cpu"), "cifar10", ROOT / "data")
    nets = {name: getattr(hubconf, name)(pretrained=True).eval() for name in NORM_OF if NORM_OF[name] in NORMS}
    scores = {name: utils.test(net, data.test_images, data.test_labels) for name, net in nets.items()}
    return {"same": plot_same(scores, data), "cam": plot_cam(nets, scores, data)}


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.parse_args(arguments)
    try:
        figures = plot_rows()
        if (ROOT / "data" / "cifar-10-batches-py").is_dir():
            figures |= plot_images()
        else:
            print("img/same.png and cam.png stay as they are: they need CIFAR-10 in data/")
        for name, figure in figures.items():
            save_figure(ROOT / "img" / f"{name}.png", figure)
    except KeyError as error:
        parser.error(f"there is no column {error}")
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
