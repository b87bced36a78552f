"""The figures of `s8.ipynb`. Each function returns a Matplotlib figure, which the caller closes."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from engine import files, records
from engine.probe import confusion, overlap
from models import NORM_OF

COLORS = {"batch": "#0072B2", "layer": "#D55E00", "group": "#009E73", "none": "#7F7F7F"}  # Okabe & Ito 2008
GRAY = "#555555"


def title(text, data):
    """Return `text`, with a second line that says so when `data` are synthetic."""
    return f"{text}\n{data.name}" if data.synthetic else text


def save_figure(path, figure):
    """Save a Matplotlib figure as a whole file, 1,760 pixels wide: about twice a README's column."""
    dpi = 1760 / figure.get_figwidth()
    kind = Path(path).suffix[1:] or "png"
    files.save(path, lambda temporary: figure.savefig(temporary, dpi=dpi, format=kind))


def plot_samples(data):
    """Draw two training images of each class, a column per class."""
    figure, axes = plt.subplots(2, len(data.classes), figsize=(10, 2.6), dpi=72, layout="constrained")
    figure.suptitle(title("Training images", data))
    for label, column in enumerate(axes.T):
        column[0].set_title(data.classes[label], fontsize=10)
        for axis, index in zip(column, (data.labels == label).nonzero().flatten()[:2], strict=False):
            axis.imshow(data.images[index].cpu().numpy())
    for axis in axes.flat:
        axis.axis("off")
    return figure


def plot_curves(runs, data):
    """Draw loss and accuracy by epoch of {norm: list of Run}: means over the seeds, with bands from lowest to highest.

    Accuracy is solid for the test split, where each run was tested in each epoch, and dotted for training. The last
    panel enlarges the last quarter of the epochs.
    """
    for norm_runs in runs.values():
        records.check_runs(norm_runs, data)
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
    counts = " or ".join(map(str, sorted(set(map(len, runs.values())))))
    figure.suptitle(title(f"Training, epoch by epoch, n = {counts}", data))
    for norm, norm_runs in runs.items():
        histories = pd.concat([pd.DataFrame(run.history) for run in norm_runs])
        late = histories[histories["epoch"] > 0.75 * histories["epoch"].max()]
        panels = (
            (axes[0], histories, "loss", "-"),
            (axes[1], histories, "test_accuracy", "-"),
            (axes[1], histories, "train_accuracy", ":"),
            (axes[2], late, "test_accuracy", "-"),
        )
        for axis, values, column, line in panels:
            by_epoch = values.groupby("epoch")[column]
            mean, low, high = (by_epoch.agg(name, skipna=False) for name in ("mean", "min", "max"))
            label = f"{norm} norm" if line == "-" else None
            axis.plot(mean.index, mean, line, marker=".", color=COLORS[norm], label=label)
            if line == "-" and len(norm_runs) > 1:
                axis.fill_between(mean.index, low, high, color=COLORS[norm], alpha=0.2, linewidth=0)
    axes[1].plot([], [], ":", color=GRAY, label="while training")
    axes[0].set(ylabel="training loss")
    axes[1].set(ylabel="accuracy, %", ylim=(0, 100))
    axes[2].set(ylabel=f"{data.split} accuracy, %", title="the last epochs")
    for axis in axes:
        axis.set_xlabel("epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend(frameon=False)
        axis.grid(alpha=0.3)
    return figure


def plot_confusions(runs, data):
    """Draw a matrix of mistakes per norm of {norm: Run}, all on one scale: row the true class, column the predicted."""
    for run in runs.values():
        records.check_tested(run, data)
    counts = {
        norm: confusion(run.scores.predictions, data.test_labels.cpu(), len(data.classes)).fill_diagonal_(0).numpy()
        for norm, run in runs.items()
    }
    highest = max(1, *(count.max() for count in counts.values()))
    figure, axes = plt.subplots(
        1, len(runs), figsize=(15, 6.4), dpi=72, layout="constrained", squeeze=False, sharey=True
    )
    figure.suptitle(title(f"Mistakes by true and predicted class, {seeds_of(runs)}", data), fontsize=15)
    for axis, (norm, count) in zip(axes[0], counts.items(), strict=True):
        axis.imshow(count, cmap="Greys", vmin=0, vmax=highest)
        for (row, column), value in np.ndenumerate(count):
            if row != column:
                ink = "white" if value > highest / 2 else "black"
                axis.text(column, row, value, ha="center", va="center", fontsize=11, color=ink)
        axis.set_title(f"{norm} norm", color=COLORS[norm], fontsize=14)
        axis.set_anchor("N")
        axis.set_xticks(range(len(data.classes)), data.classes, rotation=60, ha="right", fontsize=12)
        axis.set_yticks(range(len(data.classes)), data.classes, fontsize=12)
        axis.set_xlabel("predicted", fontsize=12)
    axes[0, 0].set_ylabel("true", fontsize=12)
    return figure


def seeds_of(runs):
    """Name the seeds of {norm: Run}: "seed 0"."""
    seeds = sorted({run.row["seed"] for run in runs.values()})
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"


def plot_classes(runs, data):
    """Draw the accuracy in each class that the test split holds, a point per norm of {norm: Run}."""
    for run in runs.values():
        records.check_tested(run, data)
    labels = data.test_labels.cpu()
    present = labels.unique().tolist()
    figure, axis = plt.subplots(figsize=(10, 3.6), layout="constrained")
    for number, (norm, run) in enumerate(runs.items()):
        right = run.scores.predictions == labels
        accuracy = [100 * right[labels == label].float().mean().item() for label in present]
        offset = 0.15 * (number - (len(runs) - 1) / 2)
        axis.plot(np.arange(len(present)) + offset, accuracy, "o", color=COLORS[norm], label=f"{norm} norm")
    axis.set_xticks(range(len(present)), [data.classes[label] for label in present])
    axis.set(ylabel=f"{data.split} accuracy, %", title=title(f"Accuracy by class, {seeds_of(runs)}", data))
    axis.legend(frameon=False)
    axis.grid(axis="y", alpha=0.3)
    return figure


def plot_overlap(mistakes, data):
    """Draw bars of `overlap`, the largest on top."""
    counts = overlap(mistakes).sort_values()
    figure, axis = plt.subplots(figsize=(8, 3), layout="constrained")
    colors = [COLORS[name.split()[0]] if name.endswith("only") else GRAY for name in counts.index]
    axis.bar_label(axis.barh(counts.index, counts, color=colors), padding=3)
    axis.set(
        xlabel=f"{data.split} images",
        title=title(f"{data.split.capitalize()} images by the norms that misclassify them", data),
    )
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def plot_mean_spread(rows, data):
    """Draw rows of `engine.probe.mean_spread` by layer, dashed where each image has its own mean."""
    figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
    shades = plt.get_cmap("viridis")
    sizes = sorted(rows[rows["net"] == "NetA"]["images"].unique())
    for (net, size), line in rows.groupby(["net", "images"], sort=False):
        norm = NORM_OF[net]
        color = shades(0.9 * sizes.index(size) / len(sizes)) if norm == "batch" else COLORS[norm]
        label = f"batch norm, {size} images" if norm == "batch" else f"{norm} norm, one image"
        style = {"color": color, "marker": "o", "markersize": 3, "linestyle": "-" if norm == "batch" else "--"}
        axis.plot(line["layer"], line["spread"], label=label, **style)
    axis.set(ylabel="standard deviation of the means,\nin those of the activations", yscale="log")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.set_title(title("How much the subtracted means differ between batches or images", data))
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=2)
    return figure
