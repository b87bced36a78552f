"""What results/ say: the tables and figures that `python study.py --report` writes into README.md and s8.ipynb."""

import collections
import itertools
import re
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
from scipy import stats

import utils
from utils import NETS

RESULTS = Path("results")
PATHS = (
    "plain-0",
    "plain-4",
    "eager",
    "captured",
    "captured-3",
    "compiled",
    "compiled-3",
)  # of bench.py, as the README lists them


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
        f"{'. '.join(differences)}. Each seed as a point, also with augmentation: [img/accuracy.png](img/accuracy.png)."
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
            colour = utils.COLOURS[utils.NORM_OF[net]]
            axis.scatter(x + np.linspace(-0.15, 0.15, len(values)), values, s=18, color=colour, alpha=0.6)
            axis.hlines(values.mean(), x - 0.25, x + 0.25, color=colour, linewidth=2)
            axis.text(x + 0.28, values.mean(), f"{values.mean():.1f}", va="center", color=colour)
        axis.set_xticks(range(3), [f"{net}, {utils.NORM_OF[net]}" for net in NETS])
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
    picture = f"![Ten images that {net} gets wrong, with true and predicted class](img/{utils.NORM_OF[net]}.png)"
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


PAIRS = (("NetA", "NetB"), ("NetA", "NetC"), ("NetC", "NetB"))


def pairs_table(rows):
    """Markdown: the differences between the nets, paired by seed, with Holm's correction over all of them."""
    from statsmodels.stats.multitest import multipletests  # here, since sweeps need not wait until it is loaded

    lines, values = [], []
    for study in ("main", "augment"):
        chosen = rows[rows["study"] == study]
        accuracy = chosen.pivot(index="seed", columns="net", values="test_accuracy")
        for first, second in PAIRS:
            test = stats.ttest_rel(accuracy[first], accuracy[second])
            low, high = test.confidence_interval()
            values.append(test.pvalue)
            lines.append(
                {
                    "runs": name_of(study, rows),
                    "pair": f"{first} minus {second}",
                    "points": f"{(accuracy[first] - accuracy[second]).mean():+.2f}",
                    "95 % interval": f"{low:+.2f} to {high:+.2f}",
                    "n": len(accuracy),
                    "correlation over seeds": f"{accuracy[first].corr(accuracy[second]):.2f}",
                }
            )
    for line, value in zip(lines, multipletests(values, method="holm")[1], strict=True):
        line["p, Holm"] = f"{value:.2g}"
    return markdown(pd.DataFrame(lines).set_index("runs"))


def mean_of(rows, net, study, **settings):
    """Mean test accuracy of a net in a study, at settings, and how many runs that is. ValueError without any."""
    chosen = rows[(rows["study"] == study) & (rows["net"] == net)]
    for name, value in settings.items():
        chosen = chosen[chosen[name] == value]
    if chosen.empty:
        raise ValueError(f"no row of {net} in {study} at {settings}")
    return chosen["test_accuracy"].mean(), len(chosen)


def with_interval(values):
    """A mean with its 95 % t interval, as text."""
    low, high = stats.t.interval(0.95, len(values) - 1, values.mean(), stats.sem(values))
    return f"{values.mean():.2f} % (95 % interval {low:.2f} to {high:.2f}, n = {len(values)})"


def claims(rows):
    """Markdown: what the original study claimed of each norm, with what the rows say of it."""
    main, augment = (
        rows[rows["study"] == study].pivot(index="seed", columns="net", values="test_accuracy")
        for study in ("main", "augment")
    )
    reached = {net: with_interval(main[net]) for net in NETS}
    gains = "; ".join(f"{net} {utils.paired(augment[net], main[net])}" for net in NETS)
    table = rate_table(rows).set_index("net")["decades of rates within a point"]
    decades = {net: ", ".join(table[f"{net}, {utils.NORM_OF[net]}"]) for net in NETS}
    kinds = {study: gpus(rows[rows["study"] == study]) for study in ("main", "augment")}
    devices = f" (on an {kinds['augment']}, without on an {kinds['main']})" if len(set(kinds.values())) > 1 else ""
    own, _, wide, narrow = layer_variants(rows)
    groups = rows[(rows["study"] == "groups") & (rows["groups"] != "C")].groupby("groups")["test_accuracy"].mean()
    return f"""\
**"Batch norm reaches its accuracy without augmentation": in part.** It reaches {reached["NetA"]} without, but so do
layer norm, {reached["NetB"]}, and group norm, {reached["NetC"]}, within a point. And augmentation is not idle:
flips and crops, with their own weight decay{devices}, change {gains}.

**"Layer norm is hard to tune and presses on the parameter limit": not shown, and it need not press.** With
a scale and a shift per channel it has as many parameters as the others, {own.parameters:,} of at most 50,000. With
one per position (`nn.LayerNorm([C, H, W])`) the same chain has {wide.parameters:,} and reaches
{wide.accuracies.mean():.2f} %; in the one narrower chain that was tried, {narrow.parameters:,} parameters,
{narrow.accuracies.mean():.2f} % (n = {len(narrow.accuracies)} each, at the learning rate tuned for NetB): there the
limit presses. As to tuning, under SGD, AdamW and Muon it stays within a point of its best over {decades["NetB"]}
decades of learning rates, batch norm over {decades["NetA"]} and group norm over {decades["NetC"]} (n = 3 on held-out
images, no interval), and seeds of one net differ by more than the two do. It diverged more often than batch norm
under SGD and Muon, though.

**"Group norm meets both limits easily": holds,** if 50,000 parameters and 20 epochs are meant. It has the same
number of parameters and, with {groups.index.min()} to {groups.index.max()} groups, stays between {groups.min():.2f}
and {groups.max():.2f} % (n = 3 each). So does layer norm: NetC minus NetB is
{utils.paired(main["NetC"], main["NetB"])}."""


def advice(rows):
    """Markdown: which norm to take, by what one has."""
    sizes = sorted(rows[(rows["study"] == "batch") & (rows["net"] == "NetA")]["statistics_batch"].unique())
    many = [mean_of(rows, "NetA", "batch", statistics_batch=size)[0] for size in sizes if size >= 16]
    few = [mean_of(rows, "NetA", "batch", statistics_batch=size)[0] for size in sizes if 2 < size < 16]
    two, n = mean_of(rows, "NetA", "batch", statistics_batch=2)
    others = [mean_of(rows, net, "batch")[0] for net in ("NetB", "NetC")]
    theirs = f"the others {min(others):.1f} to {max(others):.1f} (n = {n})"
    small = {net: mean_of(rows, net, "width", parameters=9410)[0] for net in NETS}
    by_batch = batch_sizes(rows).groupby(["net", "batch_size"])["test_accuracy"].mean()
    ahead = pd.concat([by_batch["NetA"] - by_batch[net] for net in ("NetB", "NetC")], axis=1)
    usual, large = ahead.loc[32:500].to_numpy(), ahead.loc[1024]
    one, several = (mean_of(rows, "NetC", "groups", groups=groups)[0] for groups in ("C", "4"))
    gaps, bare = differences_table(rows), finished(rows)["muon", "Net"].mean()
    lines = [
        (
            "batches of 16 images or more to take statistics over",
            "batch norm",
            f"{min(many):.1f} to {max(many):.1f} %, {theirs}",
        ),
        (
            "batches of 4 or 8 images",
            "any",
            f"batch norm {min(few):.1f} to {max(few):.1f} %, {theirs}",
        ),
        (
            "batches of 2 images",
            "group norm, or layer norm with a scale per channel",
            f"{min(others):.1f} to {max(others):.1f} %, batch norm {two:.1f} (n = {n})",
        ),
        (
            "an optimizer batch of 32 to 1,024 images",
            "batch norm",
            f"in the means {usual.min():.1f} to {usual.max():.1f} points ahead up to 500 images, "
            f"{large.min():.1f} and {large.max():.1f} with 1,024 (six sizes, n = 3, not in every seed)",
        ),
        (
            "AdamW instead of Muon",
            "batch norm",
            f"{gaps.loc['NetA minus NetB', 'AdamW']} points ahead of layer norm then, "
            f"{gaps.loc['NetA minus NetC', 'AdamW']} of group norm (95 % intervals, n = 10)",
        ),
        (
            "Muon, and reasons against any norm",
            "none",
            f"{bare:.1f} %; batch norm is {gaps.loc['NetA minus Net', 'Muon']} points ahead (95 % interval, n = 10); "
            "half a decade above its best learning rate it diverges or learns nothing at each of five weight decays",
        ),
        (
            "very few parameters",
            "batch norm",
            f"9,410 of them: {small['NetA']:.1f} %, layer norm {small['NetB']:.1f}, "
            f"group norm {small['NetC']:.1f} (n = 3)",
        ),
        (
            "instance norm, one channel a group, in mind",
            "fewer groups",
            f"{one:.1f} %, with 4 groups {several:.1f} (n = 3)",
        ),
        (
            "`nn.LayerNorm([C, H, W])` in mind, and a parameter limit",
            "`nn.GroupNorm(1, C)`",
            "the same statistics with 2 parameters per channel instead of 2 per channel and position",
        ),
    ]
    return markdown(pd.DataFrame(lines, columns=["if you have", "use", "because"]).set_index("if you have"))


def draw_points(axis, x, values, colour, label=None):
    """A point per run at x, and a line at their mean."""
    values = np.asarray(values, dtype=float)
    axis.scatter(np.full(len(values), x), values, s=14, color=colour, alpha=0.6, label=label)
    axis.hlines(values.mean(), x - 0.25, x + 0.25, color=colour, linewidth=2)


def plot_statistics(rows, inside):
    """Why batch norm needs a batch: how much its means differ, and its accuracy, by the images they are taken over."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    utils.draw_spreads(left, inside)
    left.set_title("what the norms subtract")
    batch = rows[rows["study"] == "batch"]
    sizes = sorted(batch["statistics_batch"].dropna().unique())
    for x, size in enumerate(sizes):
        values = batch[(batch["net"] == "NetA") & (batch["statistics_batch"] == size)]["test_accuracy"]
        draw_points(right, x, values, utils.COLOURS["batch"], None if x else "NetA, batch")
    for net in ("NetB", "NetC"):
        values, colour = batch[batch["net"] == net]["test_accuracy"], utils.COLOURS[utils.NORM_OF[net]]
        right.axhline(values.mean(), color=colour, linestyle="--", label=f"{net}, {utils.NORM_OF[net]}")
        right.axhspan(values.min(), values.max(), color=colour, alpha=0.12, linewidth=0)
    right.set_xticks(range(len(sizes)), [f"{size:.0f}" for size in sizes])
    right.set(xlabel="images that the statistics are taken over", ylabel="test accuracy, %")
    right.set_title(f"what it costs: {len(values)} seeds, batches of 512")
    right.legend(frameon=False)
    right.grid(axis="y", alpha=0.3)
    return figure


def statistics_text(rows, inside):
    """Markdown: figure and sentences on batch norm's statistics batch."""
    sizes = sorted(rows[(rows["study"] == "batch") & (rows["net"] == "NetA")]["statistics_batch"].unique())
    means = {size: mean_of(rows, "NetA", "batch", statistics_batch=size)[0] for size in sizes}
    layer, n = mean_of(rows, "NetB", "batch")
    group, _ = mean_of(rows, "NetC", "batch")
    listed = ", ".join(f"{means[size]:.2f} % with {size:.0f}" for size in sizes)
    spread = inside[inside["net"] == "NetA"].groupby("images")["spread"].mean()
    return f"""\
![Left, spread of the subtracted means by layer; right, accuracy by statistics batch](img/statistics.png)

**Does batch norm fail in small batches, as Wu & He (2018) saw on ImageNet? With 2 images, yes.** With its mean and
variance taken over slices of the batch of 512, all else alike, NetA ends at {listed}; NetB at {layer:.2f} and NetC
at {group:.2f} %, which have no such statistics (n = {n} each, a point per run, no interval). With 2 every run of
NetA is below all of the others', with 4 and 8 they overlap, and from 16 on every one is above. The left panel is
consistent with a reason. In the published NetA of seed 0, trained with whole batches, the mean over
{spread.index.min()} test images differs from slice to slice by {spread.iloc[0]:.2f} standard deviations, on average
over the layers, and that over {spread.index.max()} by {spread.iloc[-1]:.3f}; eval mode puts one running average in
the place of all of them. What layer and group norm subtract is an image's own, in training as in eval mode."""


def plot_axes(rows):
    """Accuracy by the axes that a net's statistics are taken over: groups of channels, and kinds of layer norm."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained", width_ratios=(1, 1.2))
    groups = rows[rows["study"] == "groups"]
    counts = ["1", "2", "4", "8", "C"]
    for x, count in enumerate(counts):
        draw_points(left, x, groups[groups["groups"] == count]["test_accuracy"], utils.COLOURS["group"])
    left.set_xticks(range(5), ["1\n(layer)", "2", "4\n(NetC)", "8", "one a channel\n(instance)"])
    left.set(xlabel="groups of channels", ylabel="test accuracy, %", title="NetC")
    variants = layer_variants(rows)
    for x, variant in enumerate(variants):
        draw_points(right, x, variant.accuracies, utils.COLOURS["layer"])
    right.set_xticks(range(len(variants)), [f"{variant.name}\n{variant.parameters:,}" for variant in variants])
    right.set(title="NetB", xlabel="statistics over, scale and shift, parameters")
    for axis in (left, right):
        axis.grid(axis="y", alpha=0.3)
    return figure


LayerVariant = collections.namedtuple("LayerVariant", "name parameters accuracies")


def layer_variants(rows):
    """The kinds of layer norm in the study layer: as published, per pixel, per position, and that within the budget."""
    layer = rows[rows["study"] == "layer"]
    published, pixel, position = (layer[layer["layer_variant"] == name] for name in ("C,H,W", "C", "[C,H,W]"))
    over = position["parameters"] > 50_000
    kinds = {
        "C, H, W,\nper channel": published,
        "C of each pixel,\nper channel": pixel,
        "C, H, W,\nper position": position[over],
        "the same,\nnarrower": position[~over],
    }
    return [LayerVariant(name, part["parameters"].iloc[0], part["test_accuracy"]) for name, part in kinds.items()]


def axes_text(rows):
    """Markdown: figure and sentences on groups and kinds of layer norm."""
    groups = rows[rows["study"] == "groups"].groupby("groups")["test_accuracy"].mean()
    some = groups.drop("C")
    own, pixel, wide, narrow = (variant.accuracies.mean() for variant in layer_variants(rows))
    return f"""\
![Accuracy by number of groups, and by kind of layer norm](img/axes.png)

**Which axes matter? Not the number of groups, as long as each has several channels.** From 1 to 8 groups group norm
stays between {some.min():.2f} and {some.max():.2f} %; one channel a group, instance norm, has {groups["C"]:.2f}.
Layer norm over all of an image has {own:.2f} %, over the channels of each pixel {pixel:.2f}; a scale and a shift
per position instead of per channel {wide:.2f}, and within 50,000 parameters they leave so narrow a net that it has
{narrow:.2f} (n = 3 each, a point per run, no interval)."""


def three_seeds(rows):
    """Three seeds of the published setting: those of the study epochs."""
    return rows[(rows["study"] == "epochs") & (rows["epochs"] == utils.Settings.epochs)]


def batch_sizes(rows):
    """The runs by the optimizer's batch: those of batch-size, and `three_seeds` of the published batch."""
    return pd.concat([rows[rows["study"] == "batch-size"], three_seeds(rows)])


BUDGETS = {  # study: its column, what that is, the runs
    "width": ("parameters", "parameters", lambda rows: rows[rows["study"] == "width"]),
    "epochs": ("epochs", "epochs", lambda rows: rows[rows["study"] == "epochs"]),
    "batch-size": ("batch_size", "images in the optimizer's batch", batch_sizes),
}


def plot_budget(rows):
    """Accuracy of each net by parameters, by epochs and by the optimizer's batch; points: runs, lines: means."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 4.4), layout="constrained")
    figure.suptitle("CIFAR-10 test accuracy under Muon: three seeds and their mean; the vertical scales differ")
    for axis, (column, label, choose) in zip(axes, BUDGETS.values(), strict=True):
        runs = choose(rows)
        for net, aside in zip(NETS, (0.98, 1, 1.02), strict=True):  # so that no point hides another
            own, colour = runs[runs["net"] == net], utils.COLOURS[utils.NORM_OF[net]]
            line = own.groupby(column)["test_accuracy"].mean()
            axis.scatter(own[column] * aside, own["test_accuracy"], s=14, color=colour, alpha=0.6)
            axis.plot(line.index * aside, line, color=colour, label=f"{net}, {utils.NORM_OF[net]}")
        axis.set(xscale="log", xlabel=label, title=f"on an {gpus(runs)}")
        axis.minorticks_off()
        axis.set_xticks(line.index, [f"{count:,}" for count in line.index], fontsize=9)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("test accuracy, %")
    axes[0].legend(frameon=False)
    return figure


def gpus(runs):
    """The kinds of GPU that runs ran on, in short."""
    return " and ".join(sorted(set(runs["device"].str.removeprefix("NVIDIA ").str.split(" ").str[0])))


def leads_table(runs, column, label):
    """Markdown: by how much batch norm's mean test accuracy is above the others', by a column of settings."""
    accuracy = runs.groupby([column, "net"])["test_accuracy"].mean().unstack("net")
    lines = [
        {label: f"NetA minus {net}"}
        | {f"{value:,}": f"{accuracy['NetA'][value] - accuracy[net][value]:+.1f}" for value in accuracy.index}
        for net in ("NetB", "NetC")
    ]
    return markdown(pd.DataFrame(lines).set_index(label))


def budget_text(rows):
    """Markdown: figure, sentences and tables on parameters, epochs and the optimizer's batch."""
    leads = {study: leads_table(choose(rows), column, label) for study, (column, label, choose) in BUDGETS.items()}
    by_parameters, _, by_batch = (
        choose(rows).groupby(["net", column])["test_accuracy"].mean() for column, _, choose in BUDGETS.values()
    )
    losses = {net: by_parameters[net].iloc[-1] - by_parameters[net].iloc[0] for net in NETS}
    epochs = rows[rows["study"] == "epochs"].groupby(["net", "epochs"])[["test_accuracy", "train_accuracy"]].mean()
    gains = {net: epochs["test_accuracy"][net, 40] - epochs["test_accuracy"][net, 20] for net in NETS}
    trained = {net: f"{epochs['train_accuracy'][net, 40]:.1f}" for net in NETS}
    ranges = {net: f"{by_batch[net].loc[32:256].min():.1f} to {by_batch[net].loc[32:256].max():.1f}" for net in NETS}
    least, most = by_parameters["NetA"].index[[0, -1]]
    first = rows[rows["study"] == "batch-size-first"]
    before = first.groupby(["net", "batch_size"])["test_accuracy"].mean()
    was = ", ".join(f"{lead:+.1f}" for lead in before["NetA"] - before["NetC"])
    return f"""\
![Accuracy by parameters, by epochs and by the optimizer's batch](img/budget.png)

**What does a smaller budget cost? In the smallest net batch norm's lead is the largest.** From {most:,} parameters down
to {least:,}, NetA loses {losses["NetA"]:.1f} points, NetB {losses["NetB"]:.1f} and NetC {losses["NetC"]:.1f}. Half of
NetC's norms have only two channels a group then. Points of lead:

{leads["width"]}

**Do the others catch up with more epochs? Not by 40, at this weight decay.** Every run of NetA is above all of the
others' at each number of epochs. From 20 to 40 NetA gains {gains["NetA"]:.1f} points, NetB {gains["NetB"]:.1f} and NetC
{gains["NetC"]:.1f}; by then layer and group norm fit the training images better than batch norm, {trained["NetB"]} and
{trained["NetC"]} to {trained["NetA"]} %, and the test images worse. Points of lead:

{leads["epochs"]}

**And the optimizer's batch? Batch norm's mean is ahead at every size, and furthest with 1,024 images.** The learning
rate was tuned again at 32 and at 1,024 images (one seed), and interpolated for sizes between. From 32 to 256 images the
means stay within {ranges["NetA"]} % for NetA, {ranges["NetB"]} for NetB and {ranges["NetC"]} for NetC. Points of lead:

{leads["batch-size"]}

With 1,024 images there are half as many steps as with 500. Weights decay at each step, in proportion to the learning
rate: an epoch has half as much of it with 32 images as with 500, and with 1,024 again half for NetA and NetB. None of
this was corrected for, so what happens need not be the batch itself. Before smaller rates were tried at 32, the best
were two to four times as large; at those, and what was interpolated from them ({len(first)} runs, `batch-size-first`
in the rows, with more decay an epoch), NetA's lead over NetC was {was} from 32 to 256 images.

Of all three, n = 3 and no interval. The learning rates by parameters and by epochs are those tuned for the largest net
and 20 epochs. The published setting is in each panel; its better measure are the ten seeds of the first table."""


def augment_effects(rows):
    """Test and training accuracy of each net by weight decay and augmentation, a line for each of the two together."""
    chosen = rows[rows["study"].isin(("main", "flip", "augment"))]
    lines = []
    for augment, decay in itertools.product(("none", "flip", "flip+crop"), (0.1, 0.5)):
        own = chosen[(chosen["weight_decay"] == decay) & (chosen["augment"] == augment)]
        accuracy = own.groupby("net")[["test_accuracy", "train_accuracy"]].mean()
        line = {"weight decay": f"{decay:g}", "augmentation": augment, "GPU": gpus(own), "n": len(own) // len(NETS)}
        for net in NETS:
            test, train = accuracy.loc[net]
            line[f"{net}: test, training minus test"] = f"{test:.2f}, {train - test:.1f}"
        for net in ("NetB", "NetC"):
            line[f"NetA minus {net}"] = f"{accuracy['test_accuracy']['NetA'] - accuracy['test_accuracy'][net]:+.1f}"
        lines.append(line)
    return pd.DataFrame(lines).set_index("weight decay")


def augment_text(rows):
    """Markdown: table and sentences on weight decay and augmentation."""
    table = augment_effects(rows)
    leads = table.set_index("augmentation", append=True)[["NetA minus NetB", "NetA minus NetC"]]
    both = leads.loc[[("0.5", "flip"), ("0.5", "flip+crop")]].to_numpy()
    decay, flips = (" and ".join(leads.loc[one]) for one in (("0.5", "none"), ("0.1", "flip")))
    return f"""\
**What do weight decay and augmentation do to batch norm's lead?** With little decay and no augmentation it is the
largest, and so is the distance between training and test accuracy, in each net. From there, more
decay leaves {decay} points of it over NetB and NetC, flips leave {flips}; both together, with crops or
without, {min(both.flat, key=float)} to
{max(both.flat, key=float)} (means, n in the table), but then no net gains by the larger decay:

{markdown(table)}

Accuracies in percent, at each net's learning rate. Where n is 10 the runs are those of the tables above."""


def protections_text():
    """Markdown: how many protections were taken out to see their tests fail, and the versions that were tried."""
    takeouts, versions = (pd.read_csv(RESULTS / f"{name}.csv", dtype=str) for name in ("takeouts", "versions"))
    table = versions[["python", "torch", "torchvision", "passed", "failed", "skipped"]]
    table = table.sort_values(
        ["python", "torch"], key=lambda column: column.str.split(".").map(lambda numbers: tuple(map(int, numbers)))
    )
    return f"""\
`tests/takeouts.py` took {len(takeouts)} protections out of the code, one at a time, and saw the test of each fail
(`results/takeouts.csv`). `tests/versions.py` ran the tests under others than the pinned versions, without CIFAR-10:

{markdown(table.set_index("python"))}"""


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


SETTING = ["optimizer", "net", "learning_rate", "weight_decay"]
OPTIMIZER_TITLES = {"sgd": "SGD", "adamw": "AdamW", "muon": "Muon"}
CHANCE = 10.0  # percent, with ten classes


def means(rows, keys):
    """Mean validation accuracy by `keys`, columns of settings; none (nan) where a run diverged."""
    accuracy = pd.to_numeric(rows["validation_accuracy"], errors="coerce").rename("accuracy")
    return accuracy.groupby([rows[key] for key in keys]).agg(lambda values: values.mean(skipna=False))


def best_decays(rows):
    """A SETTING, as a tuple, for each learning rate in the study rate: that with the best weight decay.

    There is none where all runs diverged.
    """
    accuracy = means(rows[rows["study"] == "rate"], SETTING).dropna()
    return list(accuracy.groupby(SETTING[:-1]).idxmax())


def rate_runs(rows):
    """The runs of the studies of rates at `best_decays`, where all three seeds are there."""
    chosen = pd.DataFrame(best_decays(rows), columns=SETTING)
    runs = rows[rows["study"].isin(("rate", "rate-seeds"))].merge(chosen, on=SETTING)
    return runs.groupby(SETTING).filter(lambda own: len(own) == 3)


def best_settings(rows):
    """The SETTING of each optimizer and net with the best mean over the three seeds, without a run that diverged."""
    return list(means(rate_runs(rows), SETTING).dropna().groupby(SETTING[:2]).idxmax())


def best_means(rows):
    """Mean accuracy of each optimizer and net at its best setting, on held-out images."""
    return means(rate_runs(rows), SETTING).groupby(SETTING[:2]).max()


def by_rate(runs):
    """Mean accuracy at each learning rate, of runs of one optimizer and net; none (nan) where a run diverged."""
    return means(runs, ["learning_rate"])


def rate_table(rows):
    """What the studies of rates found for each optimizer and net: the best setting, and how wide its optimum is.

    Accuracies are means over three seeds on the validation split. A dash stands where nothing learned.
    """
    best = {setting[:2]: setting[2:] for setting in best_settings(rows)}
    runs, grid = rate_runs(rows), rows[rows["study"] == "rate"]
    lines = []
    for pair in itertools.product(OPTIMIZER_TITLES, utils.NORM_OF):
        tried, own = (part[(part["optimizer"] == pair[0]) & (part["net"] == pair[1])] for part in (grid, runs))
        line = {"optimizer": OPTIMIZER_TITLES[pair[0]], "net": f"{pair[1]}, {utils.NORM_OF[pair[1]]}"}
        line |= dict.fromkeys(
            ("learning rate", "weight decay", "accuracy", "decades of rates within a point", "of each seed"), "-"
        )
        if pair in best:
            line["accuracy"] = f"{by_rate(own).max():.2f}"
        if pair in best and by_rate(own).max() > CHANCE + 1:  # a point for luck
            rates, (rate, decay) = sorted(tried["learning_rate"].unique()), best[pair]
            ends = tried["weight_decay"].agg(["min", "max"])  # what could be beyond; not below 0
            edge = " (at an edge)" if decay > 0 and decay in set(ends) else ""
            line |= {"learning rate": f"{rate:g}", "weight decay": f"{decay:g}{edge}"}
            line["decades of rates within a point"] = decades_text(by_rate(own), rates)
            line["of each seed"] = ", ".join(decades_text(by_rate(one), rates) for _, one in own.groupby("seed"))
        diverged = (tried["status"] == "diverged").sum()
        lines.append(line | {"diverged, first seed": f"{diverged} of {len(tried)}"})
    return pd.DataFrame(lines).set_index("optimizer")


def decades_text(accuracies, rates):
    """`decades_within` a point as text, with "at least" when the rates tried end before the optimum does."""
    accuracies = accuracies.reindex(rates).fillna(-np.inf)  # where runs diverged, the optimum has ended
    within = accuracies >= accuracies.max() - 1
    best = accuracies.idxmax()
    open_ended = within.loc[:best].all() or within.loc[best:].all()
    return f"{'at least ' if open_ended else ''}{decades_within(accuracies.index, accuracies.to_numpy()):.1f}"


def plot_rate(rows):
    """Validation accuracy against the learning rate, the best weight decay at each: a panel per optimizer.

    Crosses below it stand for rates at which a seed diverged, or hardly anything was learned.
    """
    runs, grid = rate_runs(rows), rows[rows["study"] == "rate"]
    kinds = [
        (f"{net}, {norm}", runs[runs["net"] == net], utils.COLOURS[norm], ":" if norm == "none" else "-")
        for net, norm in utils.NORM_OF.items()
    ]
    kinds.append(("Net, He's initial weights, one decay", rows[rows["study"] == "initial"], "black", "--"))
    figure, (panels, strips) = plt.subplots(
        2,
        len(OPTIMIZER_TITLES),
        figsize=(11, 5),
        layout="constrained",
        sharex="col",
        sharey="row",
        height_ratios=(8, 1),
    )
    figure.suptitle("Accuracy on held-out images: three seeds and their mean, at the best weight decay for each rate")
    for panel, strip, (optimizer, title) in zip(panels, strips, OPTIMIZER_TITLES.items(), strict=True):
        tried = sorted(grid[grid["optimizer"] == optimizer]["learning_rate"].unique())
        for place, (label, of_kind, colour, style) in enumerate(kinds):
            own = of_kind[of_kind["optimizer"] == optimizer]
            line = by_rate(own).reindex(tried)
            learned = line.where(line > 2 * CHANCE)
            panel.plot(learned.index, learned, color=colour, label=label, linestyle=style)
            panel.scatter(own["learning_rate"], own["validation_accuracy"], color=colour, s=12, alpha=0.6)
            crosses = learned[learned.isna()].index
            strip.scatter(crosses, [-place] * len(crosses), color=colour, marker="x", s=18)
        panel.set(title=title, xscale="log", ylim=(50, 90))
        panel.grid(alpha=0.3)
        strip.set(xlabel="learning rate", yticks=[], ylim=(-len(kinds), 1))
    panels[0].set_ylabel("accuracy, %")
    strips[0].set_ylabel(f"diverged,\nor < {2 * CHANCE:.0f} %", rotation=0, ha="right", va="center")
    figure.legend(*panels[0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=5)
    return figure


def leads(rows, optimizer):
    """How far batch norm is above layer and group norm in `best_means`, as text."""
    best = best_means(rows)[optimizer]
    return " and ".join(f"{best['NetA'] - best[net]:.1f}" for net in ("NetB", "NetC"))


def rate_text(rows):
    """Markdown: sentences and table on the norms under other optimizers, on held-out images."""
    best = best_means(rows).map("{:.1f}".format)
    theirs = {name: f"{best[name, 'NetB']} and {best[name, 'NetC']}" for name in OPTIMIZER_TITLES}
    grid = rows[rows["study"] == "rate"].groupby("optimizer")[["learning_rate", "weight_decay"]].nunique().max()
    initial = rows[rows["study"] == "initial"]
    redrawn = means(initial, ["optimizer", "learning_rate"]).groupby("optimizer").max().map("{:.1f}".format)
    beyond = initial[(initial["optimizer"] == "adamw") & (initial["learning_rate"] == 0.03)]["validation_accuracy"]
    beyond = " and ".join(f"{value:.1f}" for value in beyond.dropna())
    return f"""\
**Is it the norm, or the optimizer?** Each pair of optimizer and net had the same trials on the held-out images:
{grid["learning_rate"]} learning rates, half a decade apart, with each of {grid["weight_decay"]} weight decays, and at
each rate two seeds more with the decay that was best, unless all had diverged. At the best of these batch norm leads
layer and group norm by {leads(rows, "sgd")} points under SGD (with Nesterov momentum), {leads(rows, "adamw")} under
AdamW and {leads(rows, "muon")} under Muon (n = 3 each, no interval; of the decays the two
largest ran on an H100, the others on an H200). `Net`, the same network with scale and shift but no norm, stays at
{best["sgd", "Net"]} %, which is chance, under SGD; it gets {best["adamw", "Net"]} % under AdamW, where layer and group
norm get {theirs["adamw"]}, and {best["muon", "Net"]} under Muon, where they get {theirs["muon"]}.
A reason that fits: with PyTorch's initial weights the signal of an image fades from layer to layer, until the logits of
two images hardly differ, and the gradients with it. A step of SGD is as small as its gradient; how far AdamW and Muon
step hardly depends on it. So the control was trained from other initial weights as well (He et al. 2015), with which
the logits of two images differ far more: from these it reaches {redrawn["sgd"]} % under SGD,
{redrawn["adamw"]} under AdamW and {redrawn["muon"]} under Muon (n = 3; with one weight decay, not
{grid["weight_decay"]}, at the last learning rate at which no seed diverged, so the best may lie beyond: under AdamW two
seeds of three reach {beyond} one rate higher). The initial weights kept it at chance, then; that they do it by the
size of the gradient is not shown. Not tested: float32, more epochs for the control, the other nets from these weights.

**Is layer norm hard to tune? Not shown.** The measure here is how many decades of learning rates stay near the best:

{markdown(rate_table(rows))}

Accuracy on the held-out images, percent, mean of three seeds, 20 epochs without augmentation. A gradient beyond
float16's range, 65,504 with the loss scaled by {utils.LOSS_SCALE}, counts as diverged. Layer
norm's range is narrower than batch norm's under all three optimizers if near means a point, under SGD alone if it means
half a point, and under SGD and AdamW if it means two; but seeds of one net differ by more than the two nets do. It
diverged more often than batch norm under SGD and Muon. In the nets with a norm, where they learn, the best decay falls
or stays as the rate grows; at the smallest rates it is mostly the largest that was tried, so the optima may be wider
there."""


def optimizer_runs(rows):
    """The rows of the study optimizer at the settings that are best now, for the grid may have grown since."""
    chosen = pd.DataFrame(best_settings(rows), columns=SETTING)
    return rows[rows["study"] == "optimizer"].merge(chosen, on=SETTING)


def finished(rows, column="test_accuracy"):
    """A column of `optimizer_runs` by seed, for each optimizer and net with ten seeds."""
    values = optimizer_runs(rows).pivot(index="seed", columns=["optimizer", "net"], values=column)
    return values.loc[:, values.count() == 10]


def optimizer_table(rows):
    """Accuracy of each optimizer and net on the test set, with its standard deviation, and on the training set."""
    test, train = finished(rows), finished(rows, "train_accuracy").mean()
    text = {pair: f"{own.mean():.2f} ({own.std():.2f}), {train[pair]:.1f}" for pair, own in test.items()}
    lines = [
        {"optimizer": title}
        | {f"{net}, {norm}": text.get((optimizer, net), "-") for net, norm in utils.NORM_OF.items()}
        for optimizer, title in OPTIMIZER_TITLES.items()
    ]
    return pd.DataFrame(lines).set_index("optimizer")


def differences_table(rows):
    """What the nets differ by on the test set under each optimizer, and how these differences differ, by seed.

    A dash stands where a net has no ten seeds or learned nothing.
    """
    accuracy = finished(rows)
    learned = accuracy.columns[accuracy.mean() > CHANCE + 1]
    lines = []
    for first, second in (("NetA", "NetB"), ("NetA", "NetC"), *((net, "Net") for net in NETS)):
        gaps = {
            title: accuracy[optimizer, first] - accuracy[optimizer, second]
            for optimizer, title in OPTIMIZER_TITLES.items()
            if {(optimizer, first), (optimizer, second)} <= set(learned)
        }
        less = {f"{one} less Muon": one for one in ("SGD", "AdamW")}
        gaps |= {column: gaps[one] - gaps["Muon"] for column, one in less.items() if {one, "Muon"} <= set(gaps)}
        lines.append(
            {"points": f"{first} minus {second}"}
            | {
                column: interval(gaps[column]) if column in gaps else "-"
                for column in (*OPTIMIZER_TITLES.values(), *less)
            }
        )
    return pd.DataFrame(lines).set_index("points")


def interval(differences):
    """Mean of differences and its 95 % t interval, as text."""
    low, high = stats.ttest_1samp(differences, 0).confidence_interval()
    return f"{differences.mean():+.2f} ({low:+.2f} to {high:+.2f})"


def optimizer_text(rows):
    """Markdown: the norms under each optimizer on the test set, and the differences of their differences."""
    here, main = finished(rows)["muon", "NetC"], rows[(rows["study"] == "main") & (rows["net"] == "NetC")]
    earlier = rows[rows["study"] == "optimizer-h200"]
    chosen = pd.DataFrame(best_settings(rows), columns=SETTING)
    there = earlier.merge(chosen, on=SETTING).pivot(index="seed", columns=["optimizer", "net"], values="test_accuracy")
    published = rows[(rows["study"] == "width") & (rows["parameters"] == 48_042)]
    published = pd.concat([published, three_seeds(rows)])
    accuracy = published.groupby(["study", "net"])["test_accuracy"].mean()
    leads_on = " and ".join(
        f"{accuracy[study, 'NetA'] - accuracy[study, 'NetB']:.1f} points on an {gpus(own)}"
        for study, own in published.groupby("study")
    )
    return f"""\
**The same on the test set,** ten seeds of each pair at its best setting. Accuracy in percent, its standard deviation,
and accuracy on the training images:

{markdown(optimizer_table(rows))}

Differences, paired by seed, with 95 % intervals that are not corrected for their number, and a dash where the control
learned nothing; on the right, how much larger they are under another optimizer than under Muon:

{markdown(differences_table(rows))}

Where layer and group norm are further behind, they also fit the training images less: part of the lead may be training
that 20 epochs don't finish. More epochs were not tried under SGD and AdamW.

All of these ran on an {gpus(optimizer_runs(rows))}. A seed is another run on another kind of GPU, so what ran on an
{gpus(earlier)} before (`optimizer-h200` in the rows) is a repetition: there NetA minus NetB was
{interval(there["adamw", "NetA"] - there["adamw", "NetB"])} points under AdamW, and NetA minus Net
{interval(there["muon", "NetA"] - there["muon", "Net"])} under Muon (n = 10). NetB under Muon has no such runs at its
best setting; at the published one, with three seeds, batch norm's lead over it is {leads_on}. NetC's best setting under
Muon is the published one, too; here it scores {utils.paired(here, main.set_index("seed")["test_accuracy"])} more than
in the first table."""


def minutes_text(rows):
    """Markdown: what all runs took together on GPUs."""
    runs = rows[~rows["device"].str.startswith("cpu")]
    minutes = runs["seconds"].sum() / 60
    return (
        f"The {len(runs):,} runs on GPUs that `results/runs.csv` holds took {minutes:.0f} minutes of one GPU together, "
        "compiling included."
    )


def headline(rows):
    """Markdown: batch norm's lead under other optimizers, in some sentences and a figure."""
    gaps = differences_table(rows)
    ahead = gaps.loc["NetA minus NetB"]
    return f"""\
**Batch norm's lead depends on the optimizer.** All of the above is under Muon, at one weight decay and the best of four
learning rates. With both tuned in equal trials for each optimizer and net, on the held-out images, batch norm is ahead
of layer norm by {ahead["Muon"]} points under Muon, {ahead["AdamW"]} under AdamW and {ahead["SGD"]} under SGD (test set,
95 % interval, n = 10).
The same network without a norm gets {finished(rows)["muon", "Net"].mean():.1f} % under Muon,
layer norm minus no norm being {gaps.loc["NetB minus Net", "Muon"]} points; under SGD it stays at chance,
{best_means(rows)["sgd", "Net"]:.0f} %, from PyTorch's initial weights, and learns from He's.

![Accuracy on held-out images by learning rate, a panel for each of three optimizers](img/rate.png)"""


def fill(text, blocks):
    """`text` with what stands between <!-- name --> and <!-- end --> replaced by blocks[name]; KeyError for others."""

    def block(match):
        return f"<!-- {match[1]} -->\n{blocks[match[1]]}\n<!-- end -->"

    return re.sub(r"<!-- ([\w-]+) -->\n.*?<!-- end -->", block, text, flags=re.DOTALL)


def report():
    """Rewrite the generated parts of README.md and of the notebook, and five pictures in img/, from results/."""
    rows = utils.read_rows(RESULTS / "runs.csv")
    inside = pd.read_csv(RESULTS / "inside.csv")
    figures = {
        "accuracy": plot_accuracy(rows),
        "statistics": plot_statistics(rows, inside),
        "axes": plot_axes(rows),
        "budget": plot_budget(rows),
        "rate": plot_rate(rows),
    }
    for name, figure in figures.items():
        utils.save_figure(Path("img") / f"{name}.png", figure)
    blocks = {
        "headline": headline(rows),
        "minutes": minutes_text(rows),
        "results": results_table(rows),
        "expect": expectations(rows),
        "tune": markdown(tuned(rows).map("{:.2f}".format)),
        "tune-augment": markdown(tuned(rows, "weight_decay", "flip+crop").map("{:.2f}".format)),
        "augment": augment_table(rows),
        "pairs": pairs_table(rows),
        "claims": claims(rows),
        "advice": advice(rows),
        "sweep-rate": rate_text(rows),
        "sweep-optimizer": optimizer_text(rows),
        "sweep-statistics": statistics_text(rows, inside),
        "sweep-axes": axes_text(rows),
        "sweep-augment": augment_text(rows),
        "sweep-budget": budget_text(rows),
        "speed": speed_table(),
        "protections": protections_text(),
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
