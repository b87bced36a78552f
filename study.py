"""The sweeps behind the findings, as lists of settings, and the tables that README.md shows.

    python study.py                 run what results/runs.csv does not hold yet
    python study.py --only tune     the same for one list
    python study.py --dry-run       say what is missing
    python study.py --report        rewrite what README.md, s8.ipynb and img/accuracy.png show of results/
    torchrun --nproc-per-node=2 study.py    the same by two processes, each on its own GPU

Needs CIFAR-10. A run that is finished is in results/runs.csv at once, and skipped the next time.
"""

import argparse
import os
import re
import time
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

import utils
from utils import LEARNING_RATES, Settings

RUNS = Path("results/runs.csv")
NETS = ("NetA", "NetB", "NetC")
PATHS = ("plain-0", "plain-4", "eager", "captured", "captured-3", "compiled")  # of bench.py, as the README lists them
AT_ONCE = 3  # runs that share a GPU: while one waits for its small kernels, another computes

AUGMENTED_WEIGHT_DECAY = (
    0.1  # with flip and crop: best on the validation split, over the three nets; see the study tune
)

# name: (split, list of (net, settings)); the test split is for what is published, the validation split for choices
STUDIES = {
    "tune": (
        "validation",
        [
            (net, Settings(learning_rate=rate, seed=seed))
            for net in NETS
            for rate in (0.015, 0.03, 0.06, 0.12)
            for seed in (0, 1)
        ]
        + [
            (net, Settings(LEARNING_RATES[net], decay, augment="flip+crop", seed=seed))
            for net in NETS
            for decay in (0.1, 0.2, 0.5)
            for seed in (0, 1)
        ],
    ),
    "augment": (
        "test",
        [
            (net, Settings(LEARNING_RATES[net], AUGMENTED_WEIGHT_DECAY, augment="flip+crop", seed=seed))
            for net in NETS
            for seed in range(10)
        ],
    ),
}


def missing(study, rows):
    """The (net, settings) of a study that `rows` (of results/runs.csv) do not hold."""
    names = ["net", *Settings.__dataclass_fields__]
    rows = rows[rows["study"] == study].reindex(columns=names)
    done = set(rows.itertuples(index=False, name=None))
    return [(net, s) for net, s in STUDIES[study][1] if (net, *(getattr(s, name) for name in names[1:])) not in done]


def run_study(study, data):
    """Run what is missing of a study, a few runs at a time, each written when it ends."""
    split, _ = STUDIES[study]
    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    mine = STUDIES[study][1][rank::world]
    todo = [job for job in missing(study, utils.read_rows(RUNS)) if job in mine]
    if split == "validation":
        data = utils.validation_split(data)
    at_once = AT_ONCE if data.images.is_cuda else 1
    with tqdm(total=len(todo), desc=study) as bar:
        for start in range(0, len(todo), at_once):
            runs = run_together(study, todo[start : start + at_once], data)
            utils.put_rows(RUNS, [one.row for one in runs])
            bar.update(len(runs))


def run_together(study, jobs, data):
    """Train several nets at the same time on one device: a `Run` for each (net, settings) of `jobs`."""
    clock = time.perf_counter()
    nets = [utils.build(name, settings) for name, settings in jobs]
    trainers = [utils.Trainer(net, data, settings) for net, (_, settings) in zip(nets, jobs, strict=True)]
    for epoch in range(max(settings.epochs for _, settings in jobs)):
        for trainer in trainers:
            if epoch < trainer.settings.epochs:
                for _ in trainer.epoch():
                    pass
    for trainer in trainers:
        trainer.means()
    seconds = (time.perf_counter() - clock) / len(jobs)
    return [
        utils.finish(name, net, data, settings, [], study, seconds)
        for net, (name, settings) in zip(nets, jobs, strict=True)
    ]


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
        f"{'. '.join(differences)}.\n\n"
        "![Test accuracy of each seed of each net, without and with augmentation](img/accuracy.png)"
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
    """Markdown: what a run takes and reaches, by machine: main on a GPU, short on a CPU, one after another."""
    lines = []
    for study, does in (("main", "3 seeds a net"), ("short", "1 seed a net, said to be short")):
        chosen = rows[rows["study"] == study]
        means = chosen.groupby("net")["test_accuracy"].mean()
        lines.append(
            {
                "machine": chosen["device"].iloc[0] + (", 2 cores" if study == "short" else ""),
                "torch": chosen["torch"].iloc[0].split("+")[0],
                "runs by default": f"{does}, {chosen['epochs'].iloc[0]} epochs",
                "seconds a run": f"{chosen['seconds'].min():.0f} to {chosen['seconds'].max():.0f}",
                "test accuracy, %": ", ".join(f"{net} {mean:.1f}" for net, mean in means.items()),
                "n": " and ".join(str(n) for n in sorted(chosen.groupby("net").size().unique())),
            }
        )
    return markdown(pd.DataFrame(lines).set_index("machine"))


def speed_table():
    """Markdown: seconds an epoch by machine and path, and how many times as fast as the plain loop, from bench.py."""
    bench = pd.read_csv(RUNS.with_name("bench.csv"))
    lines = []
    for (device, path), rows in bench.groupby(["device", "path"]):
        if path not in PATHS:
            continue
        seconds = rows.set_index("net")["seconds_per_epoch"]
        line = {"machine": device, "path": path} | {
            net: f"{seconds[net]:.3g}" if net in seconds else "-" for net in NETS
        }
        for plain, name in (("ratio_plain_4", "plain-4 takes"), ("ratio_plain_0", "plain-0 takes")):
            ratios = rows[plain].dropna()
            line[name] = f"{ratios.min():.3g} to {ratios.max():.3g} times" if len(ratios) else "-"
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
    mistakes = pd.read_csv(RUNS.with_name("mistakes.csv"))
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


def fill(text, blocks):
    """`text` with what stands between <!-- name --> and <!-- end --> replaced by blocks[name]; KeyError for others."""

    def block(match):
        return f"<!-- {match[1]} -->\n{blocks[match[1]]}\n<!-- end -->"

    return re.sub(r"<!-- ([\w-]+) -->\n.*?<!-- end -->", block, text, flags=re.DOTALL)


def report():
    """Rewrite the generated parts of README.md and of the notebook, and img/accuracy.png, from results/."""
    rows = utils.read_rows(RUNS)
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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=STUDIES, help="run this list alone")
    parser.add_argument("--dry-run", action="store_true", help="say what is missing, run nothing")
    parser.add_argument("--report", action="store_true", help="rewrite what is made from results/, run nothing")
    options = parser.parse_args()
    if options.report:
        report()
        return
    chosen = [options.only] if options.only else list(STUDIES)
    if options.dry_run:
        for study in chosen:
            print(f"{study}: {len(missing(study, utils.read_rows(RUNS)))} of {len(STUDIES[study][1])} runs missing")
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    data = utils.load_data(utils.pick_device(), "cifar10")
    for study in chosen:
        run_study(study, data)
    if "tune" in chosen and not missing("tune", utils.read_rows(RUNS)):
        rows = utils.read_rows(RUNS)
        print("best learning rates on the validation split:", best_rates(rows))
        print("with flip and crop:", tuned(rows, "weight_decay", "flip+crop"), sep="\n")


if __name__ == "__main__":
    main()
