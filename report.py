"""What results/ say: the tables and figures that `python study.py --report` writes into README.md and s8.ipynb."""

import re
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd

import utils
from utils import NETS

RESULTS = Path("results")
PATHS = ("plain-0", "plain-4", "eager", "captured", "captured-3", "compiled")  # of bench.py, as the README lists them


def best_rates(rows):
    """The learning rate of each net with the highest mean accuracy on the validation split."""
    return tuned(rows).idxmax(axis=1).to_dict()


def results_table(rows):
    """Markdown: the published result of each net."""
    main = rows[rows["study"] == "main"]
    table = utils.summarise(main.to_dict("records"))
    differences = [utils.compare(main, "NetA", net) for net in NETS[1:]]
    return (
        f"{markdown(table)}\n\nTest accuracy of the last epoch, percent, one view, {conditions(main)}. "
        "A seed gives all nets the same initial weights and order of images; paired by seed, "
        f"{'. '.join(differences)}."
    )


def name_of(study, rows):
    """What tells the runs of the study main or augment from those of the other, as text."""
    decay = rows[rows["study"] == study]["weight_decay"].iloc[0]
    return f"{'flip and crop' if study == 'augment' else 'no augmentation'}, weight decay {decay:g}"


def plot_accuracy(rows):
    """Test accuracy of every published run, a column of points per net, without and with flip and crop; bars: means."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    main = rows[rows["study"] == "main"].iloc[0]
    figure.suptitle(
        f"CIFAR-10 test accuracy after {main['epochs']} epochs, {main['parameters']:,} parameters, a point per seed"
    )
    for axis, study in zip(axes, ("main", "augment"), strict=True):
        for x, net in enumerate(NETS):
            values = rows[(rows["study"] == study) & (rows["net"] == net)]["test_accuracy"].to_numpy(float)
            colour = utils.COLOURS[utils.NORMS[net]]
            axis.scatter(x + np.linspace(-0.15, 0.15, len(values)), values, s=18, color=colour, alpha=0.6)
            axis.hlines(values.mean(), x - 0.25, x + 0.25, color=colour, linewidth=2)
            axis.text(x + 0.28, values.mean(), f"{values.mean():.1f}", va="center", color=colour)
        axis.set_xticks(range(3), [f"{net}, {utils.NORMS[net]}" for net in NETS])
        axis.set(title=f"{name_of(study, rows)}, n = {len(values)}", xlim=(-0.5, 2.7))
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_ylabel("test accuracy, %")
    return figure


def tuned(rows, setting="learning_rate", augment="none"):
    """Mean validation accuracy of each net (rows) at each value of a setting (columns), from the study tune."""
    tune = rows[(rows["study"] == "tune") & (rows["augment"] == augment)]
    return tune.pivot_table(index="net", columns=setting, values="validation_accuracy")


def augment_table(rows):
    """Markdown: the published result of each net with flip and crop."""
    augment = rows[rows["study"] == "augment"]
    table = utils.summarise(augment.to_dict("records")).drop(columns="seconds a run, median")  # several ran at once
    return markdown(table) + f"\n\n{conditions(augment)}."


def expectations(rows):
    """Markdown: what the notebook's default takes and reaches, by machine: main on a GPU, short on a CPU."""
    lines = []
    for study, does, seeds in (("main", "3 seeds a net", 3), ("short", "a short run: 1 seed a net", 1)):
        chosen = rows[rows["study"] == study]
        means = chosen.groupby("net")["test_accuracy"].mean()
        lines.append(
            {
                "machine": chosen["device"].iloc[0],
                "torch": chosen["torch"].iloc[0].split("+")[0],
                "runs by default": f"{does}, {chosen['epochs'].iloc[0]} epochs",
                "seconds a run": f"{chosen['seconds'].min():.0f} to {chosen['seconds'].max():.0f}",
                "minutes of training": f"{seeds * chosen.groupby('net')['seconds'].median().sum() / 60:.1f}",
                "test accuracy, %": ", ".join(f"{net} {mean:.1f}" for net, mean in means.items()),
                "n": " and ".join(str(n) for n in sorted(chosen.groupby("net").size().unique())),
            }
        )
    return markdown(pd.DataFrame(lines).set_index("machine"))


def speed_table():
    """Markdown: seconds an epoch by machine and path, and how many times as fast as the plain loop, from bench.py."""
    bench = pd.read_csv(RESULTS / "bench.csv")
    lines = []
    for (device, path), rows in bench.groupby(["device", "path"]):
        if path not in PATHS:
            continue
        seconds = rows.set_index("net")["seconds_per_epoch"]
        line = {"machine": device, "path": path} | {
            net: f"{seconds[net]:.3g}" if net in seconds else "-" for net in NETS
        }
        for plain, name in (("ratio_plain_4", "plain-4 takes"), ("ratio_plain_0", "plain-0 takes")):
            low, high = (f"{ratio:.3g}" for ratio in (rows[plain].min(), rows[plain].max()))
            line[name] = "-" if low == "nan" else f"{low} times" if low == high else f"{low} to {high} times"
        lines.append(line)
    lines.sort(key=lambda line: (line["machine"].startswith("cpu"), PATHS.index(line["path"])))
    return markdown(pd.DataFrame(lines).set_index("machine"))


def conditions(rows):
    """What the runs of `rows` share, as text."""
    return ", ".join(
        [
            " and ".join(f"{n} epochs" for n in sorted(rows["epochs"].unique())),
            "augmentation: " + " and ".join(sorted(rows["augment"].unique())),
            "weight decay " + " and ".join(f"{decay:g}" for decay in sorted(rows["weight_decay"].unique())),
            " and ".join(sorted(rows["device"].unique())),
            " and ".join(sorted(rows["precision"].unique())),
            "torch " + " and ".join(sorted(version.split("+")[0] for version in rows["torch"].unique())),
        ]
    )


def markdown(frame):
    """A DataFrame as a Markdown table."""
    names = [frame.index.name, *map(str, frame.columns)]
    lines = [
        names,
        ["---"] * len(names),
        *([index, *map(str, values)] for index, *values in frame.itertuples(name=None)),
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def mistakes_text(net, rows):
    """Markdown: the three sentences on a net's mistakes, and its grid."""
    picture = f"![Ten images that {net} gets wrong, with true and predicted class](img/{utils.NORMS[net]}.png)"
    mistakes = pd.read_csv(RESULTS / "mistakes.csv")
    published = rows[rows["study"].isin(("main", "augment"))]
    return f"{utils.describe_mistakes(net, mistakes, published)}\n\n{picture}"


def finding(net, rows):
    """Markdown: what the rows say of one net, in two sentences."""
    means, seeds = tuned(rows).loc[net], rows[rows["study"] == "tune"]["seed"].nunique()
    main = rows[(rows["study"] == "main") & (rows["net"] == net)]["test_accuracy"]
    return (
        f"It reaches {main.mean():.2f} % on the test set (standard deviation {main.std():.2f}, n = {len(main)}). "
        f"On the held-out training images its accuracy goes from {means.min():.2f} to {means.max():.2f} % over the "
        f"learning rates {', '.join(map(str, means.index))} (n = {seeds}, no interval); it is highest at "
        f"{means.idxmax()}."
    )


def conclusion(rows):
    """Markdown: the differences between the nets, paired by seed."""
    lines = ["Differences in test accuracy, paired by seed:", ""]
    for study in ("main", "augment"):
        chosen = rows[rows["study"] == study]
        pairs = (("NetA", "NetB"), ("NetA", "NetC"), ("NetC", "NetB"))
        lines.append(f"- {name_of(study, rows)}: " + "; ".join(utils.compare(chosen, *pair) for pair in pairs))
    return "\n".join(lines)


def tuning(rows):
    """Markdown: what a learning rate that is too high costs each net, on the held-out images."""
    means = tuned(rows)
    before, last = means.columns[-2:]
    best = means.idxmax(axis=1)
    same = ", ".join(f"{net} {means.loc[net, before] - means.loc[net, last]:.2f}" for net in NETS)
    own = ", ".join(f"{net} {means.loc[net, best[net]] - means.loc[net, 2 * best[net]]:.2f}" for net in NETS)
    return (
        '"Hard to tune", in points of accuracy on the held-out images (n = 2): from a learning rate of '
        f"{before} to {last} the nets lose {same}; from its own best rate to twice that, each loses {own}."
    )


def decades_within(rates, accuracies, points=1.0):
    """How many decades of learning rates stay within `points` of the best accuracy, in one piece around the best.

    rates ascend; between two of them the accuracy is taken to be linear in the rate's logarithm. What lies outside of
    the rates does not count, so the result is a lower bound when an end is within.
    """
    logs, left = np.log10(rates), np.asarray(accuracies) - (np.max(accuracies) - points)
    best = int(np.argmax(left))
    low, high = best, best
    while low > 0 and left[low - 1] >= 0:
        low -= 1
    while high < len(left) - 1 and left[high + 1] >= 0:
        high += 1
    ends = [logs[low], logs[high]]
    if low > 0:
        ends[0] -= (logs[low] - logs[low - 1]) * left[low] / (left[low] - left[low - 1])
    if high < len(left) - 1:
        ends[1] += (logs[high + 1] - logs[high]) * left[high] / (left[high] - left[high + 1])
    return ends[1] - ends[0]


def rate_table(rows):
    """What the study rate found for each optimizer and net: the best setting, and how wide its optimum is.

    Accuracies are means over the seeds on the validation split; at each rate the best weight decay counts.
    """
    chosen = rows[rows["study"] == "rate"]
    means = chosen.pivot_table(
        index=["optimizer", "net"], columns=["learning_rate", "weight_decay"], values="validation_accuracy"
    )
    lines = []
    for (optimizer, net), line in means.iterrows():
        line = line.dropna()
        by_rate = line.groupby(level="learning_rate").max()
        rate, decay = line.idxmax()
        within = by_rate >= by_rate.max() - 1
        open_ended = within.loc[:rate].all() or within.loc[rate:].all()  # the grid ends before the optimum does
        diverged = chosen[(chosen["optimizer"] == optimizer) & (chosen["net"] == net)]["status"] == "diverged"
        lines.append(
            {
                "optimizer": optimizer,
                "net": net,
                "best learning rate": f"{rate:g}",
                "best weight decay": f"{decay:g}",
                "accuracy": f"{line.max():.2f}",
                "decades within a point": f"{'at least ' if open_ended else ''}"
                f"{decades_within(by_rate.index, by_rate.to_numpy()):.2f}",
                "diverged": diverged.sum(),
                "n": chosen.groupby(["optimizer", "net", "learning_rate", "weight_decay"]).size().min(),
            }
        )
    return pd.DataFrame(lines).set_index("optimizer")


def plot_rate(rows):
    """Validation accuracy against the learning rate, the best weight decay at each: a panel per optimizer."""
    chosen = rows[rows["study"] == "rate"]
    names = [name for name in ("sgd", "adamw", "muon") if name in set(chosen["optimizer"])]
    figure, axes = plt.subplots(1, len(names), figsize=(10, 3.6), layout="constrained", sharey=True, squeeze=False)
    figure.suptitle(f"Accuracy on held-out images by learning rate, mean of {chosen['seed'].nunique()} seeds")
    for axis, name in zip(axes[0], names, strict=True):
        for net, norm in utils.NORMS.items():
            own = chosen[(chosen["optimizer"] == name) & (chosen["net"] == net)]
            means = own.groupby(["learning_rate", "weight_decay"])["validation_accuracy"].mean()
            by_rate = means.groupby(level="learning_rate").max()
            axis.plot(by_rate.index, by_rate, "o-", color=utils.COLOURS[norm], label=f"{net}, {norm}", markersize=4)
        axis.set(title=name, xscale="log", xlabel="learning rate")
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("accuracy, %")
    axes[0, 0].legend(frameon=False)
    return figure


def optimizer_runs(rows):
    """The rows of the study optimizer at the settings that `rate` finds best now, without those of a smaller grid."""
    keys = ["optimizer", "net", "learning_rate", "weight_decay"]
    means = rows[rows["study"] == "rate"].groupby(keys)["validation_accuracy"].mean()
    best = pd.DataFrame(list(means.groupby(level=[0, 1]).idxmax()), columns=keys)
    return rows[rows["study"] == "optimizer"].merge(best, on=keys)


def optimizer_table(rows):
    """Test accuracy of each optimizer and net at the setting tuned for the pair: mean, standard deviation and n."""
    by_pair = optimizer_runs(rows).groupby(["optimizer", "net"])["test_accuracy"]
    text = {pair: f"{v.mean():.2f} (std {v.std():.2f}, n = {len(v)})" for pair, v in by_pair}
    return pd.Series(text).rename_axis(["optimizer", "net"]).unstack("net")


def gap_of_gaps(rows, first, second, optimizers=("sgd", "muon")):
    """How much larger the gap between two nets is under the first optimizer than under the second, as text."""
    accuracy = optimizer_runs(rows).pivot(index="seed", columns=["optimizer", "net"], values="test_accuracy")
    gaps = [accuracy[name, first] - accuracy[name, second] for name in optimizers]
    return f"{first} minus {second}, {optimizers[0]} minus {optimizers[1]}: {utils.paired(*gaps)}"


def variants_table(rows, study, columns):
    """Test accuracy in a study by net and the columns that vary: mean, standard deviation and n."""
    grouped = rows[rows["study"] == study].groupby(["net", *columns], sort=False, dropna=False)["test_accuracy"]
    table = grouped.agg(["mean", "std", "count"]).reset_index()
    table[["mean", "std"]] = table[["mean", "std"]].map("{:.2f}".format)
    return table.rename(columns={"mean": "test accuracy, mean", "count": "n"}).set_index("net")


def fill(text, blocks):
    """`text` with what stands between <!-- name --> and <!-- end --> replaced by blocks[name]; KeyError for others."""

    def block(match):
        return f"<!-- {match[1]} -->\n{blocks[match[1]]}\n<!-- end -->"

    return re.sub(r"<!-- ([\w-]+) -->\n.*?<!-- end -->", block, text, flags=re.DOTALL)


def report():
    """Rewrite the generated parts of README.md and of the notebook, and img/accuracy.png, from results/."""
    rows = utils.read_rows(RESULTS / "runs.csv")
    figure = plot_accuracy(rows)
    utils.save(Path("img/accuracy.png"), lambda temporary: figure.savefig(temporary, dpi=160))
    blocks = {
        "results": results_table(rows),
        "expect": expectations(rows),
        "tune": markdown(tuned(rows).map("{:.2f}".format)),
        "tune-augment": markdown(tuned(rows, "weight_decay", "flip+crop").map("{:.2f}".format)),
        "augment": augment_table(rows),
        "conclusion": conclusion(rows),
        "tuning": tuning(rows),
        "speed": speed_table(),
    }
    for net in NETS:
        blocks |= {f"finding-{net}": finding(net, rows), f"mistakes-{net}": mistakes_text(net, rows)}
    readme, notebook = Path("README.md"), Path("s8.ipynb")
    text = fill(readme.read_text(encoding="utf-8"), blocks)
    utils.save(readme, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    cells = nbformat.read(notebook, as_version=4)
    for cell in cells.cells:
        if cell.cell_type == "markdown":
            cell.source = fill(cell.source, blocks)
    utils.save(notebook, lambda temporary: nbformat.write(cells, temporary))
