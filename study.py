"""The sweeps behind the findings, as lists of settings, and the tables that README.md shows.

    python study.py                 run what results/runs.csv does not hold yet
    python study.py --only tune     the same for one list
    python study.py --dry-run       say what is missing
    python study.py --report        rewrite what README.md, s8.ipynb and img/accuracy.png show of results/
    torchrun --nproc-per-node=2 study.py    the same by two processes, each on its own GPU

Needs CIFAR-10. A run that is finished is in results/runs.csv at once, and skipped the next time.
"""

import argparse
import itertools
import math
import os
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import torch
from torch import nn
from tqdm import tqdm

import models
import utils
from utils import LEARNING_RATES, Settings

RUNS = Path("results/runs.csv")
NETS = ("NetA", "NetB", "NetC")
ALL = (*NETS, "Net")  # with the control, which has no statistics
PATHS = ("plain-0", "plain-4", "eager", "captured", "captured-3", "compiled")  # of bench.py, as the README lists them
AT_ONCE = 3  # runs that share a GPU: while one waits for its small kernels, another computes
AUGMENTED_WEIGHT_DECAY = (
    0.1  # with flip and crop: best on the validation split, over the three nets; see the study tune
)


# ---------------------------------------------------------------------------------------------------------------------
# Variants of the published nets and of their training
# ---------------------------------------------------------------------------------------------------------------------


def sgd(net, learning_rate, weight_decay, momentum, dtype):
    """SGD with Nesterov momentum; only the convolutions decay, as an L2 term in the gradient."""
    return torch.optim.SGD(groups(net, weight_decay), learning_rate, momentum, nesterov=True)


def adamw(net, learning_rate, weight_decay, momentum, dtype):
    """AdamW (Loshchilov & Hutter 2019); only the convolutions decay. `momentum` is its beta 1."""
    betas = (momentum, 0.999)
    return torch.optim.AdamW(groups(net, weight_decay), learning_rate, betas, capturable=learning_rate.is_cuda)


def groups(net, weight_decay):
    """Parameter groups for torch.optim: convolutions, which decay, and the rest, which do not."""
    convolutions = [p for p in net.parameters() if p.ndim == 4]
    rest = [p for p in net.parameters() if p.ndim != 4]
    return [{"params": convolutions, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


OPTIMIZERS = {"muon": utils.Muon, "sgd": sgd, "adamw": adamw}


class SliceBatchNorm(nn.BatchNorm2d):
    """Batch norm that takes its statistics, when training, over each `size` images of the batch instead of over all."""

    def __init__(self, channels, size):
        super().__init__(channels)
        self.size = size

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        slices = x.float().unflatten(0, (-1, self.size))  # (slices, size, C, H, W)
        variance, mean = torch.var_mean(slices, (1, 3, 4), correction=0, keepdim=True)
        with torch.no_grad():
            count = slices[0, :, 0].numel()
            self.running_mean.lerp_(mean.mean(0).flatten(), self.momentum)
            self.running_var.lerp_(variance.mean(0).flatten() * count / (count - 1), self.momentum)
        scale, shift = self.weight.view(-1, 1, 1), self.bias.view(-1, 1, 1)
        return ((slices - mean) * (variance + self.eps).rsqrt() * scale + shift).flatten(0, 1).to(x.dtype)


class PixelLayerNorm(nn.LayerNorm):
    """Layer norm over the channels of each pixel, (N, C, H, W) to the same."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


SIDES = {"C1": 32, "C2": 32, "C4": 16, "C5": 16, "C6": 16, "C8": 8, "C9": 8, "C10": 8}  # pixels, height and width


@dataclass(frozen=True)
class Job:
    """One run: a published net and its settings, or a variant of them."""

    net: str
    settings: Settings
    optimizer: str = "muon"  # one of OPTIMIZERS
    widths: tuple = models.WIDTHS
    groups: int | str = ""  # of group norm; "C": as many as channels, which is instance norm; "": as published
    layer_variant: str = ""  # "C": per pixel; "[C,H,W]": nn.LayerNorm's scale and shift per position; "": as published
    statistics_batch: int | str = ""  # images that batch norm's statistics are taken over; "": the whole batch

    def build(self):
        """The net, its initial weights drawn from the settings' seed alone: variants of a net share them."""
        options = {"groups": self.groups} if isinstance(self.groups, int) else {}
        net = utils.build(self.net, self.settings, widths=self.widths, **options)
        for name, side in SIDES.items():
            block = getattr(net, name)
            channels = block.conv.out_channels
            if self.groups == "C":
                block.norm = nn.GroupNorm(channels, channels)
            if self.layer_variant == "C":
                block.norm = PixelLayerNorm(channels)
            if self.layer_variant == "[C,H,W]":
                block.norm = nn.LayerNorm([channels, side, side])
            if self.statistics_batch:
                block.norm = SliceBatchNorm(channels, self.statistics_batch)
        return net

    def columns(self):
        """What tells this job apart in results/runs.csv, as {column: text}."""
        norm = utils.NORMS[self.net]
        published = {
            "groups": {"layer": 1, "group": 4}.get(norm, ""),
            "layer_variant": "C,H,W" if norm == "layer" else "",
            "statistics_batch": self.settings.batch_size if norm == "batch" else "",
        }
        own = {name: getattr(self, name) or value for name, value in published.items()}
        own |= {"net": self.net, "optimizer": self.optimizer, "widths": " ".join(map(str, self.widths))}
        return {name: str(value) for name, value in (own | asdict(self.settings)).items()}


# ---------------------------------------------------------------------------------------------------------------------
# The sweeps: name: (split, function of the rows so far that gives the jobs)
# The test split is for what is published, the validation split for choices.
# ---------------------------------------------------------------------------------------------------------------------

# Half decades of learning rates, and weight decays, for each optimizer.
RATES = {
    "sgd": (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0),
    "adamw": (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1),
    "muon": (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0),
}
DECAYS = {"sgd": (0.0, 0.0005, 0.005), "adamw": (0.01, 0.1, 1.0), "muon": (0.05, 0.5, 1.5)}
MOMENTUM = {"sgd": 0.9, "adamw": 0.9, "muon": Settings.momentum}
STATISTICS = (2, 4, 8, 16, 32, "")  # images; "": the whole batch, 512 here, which they divide
WIDTHS = {  # parameters: output channels
    9_410: (8, 16, 8, 8, 8, 8, 8, 16, 16, 16),
    19_758: (12, 20, 16, 16, 16, 16, 12, 20, 20, 20),
    34_918: (12, 28, 20, 20, 20, 20, 20, 28, 28, 28),
}
LAYER_WIDTHS = (2, 4, 8, 8, 8, 8, 16, 24, 24, 24)  # what 50,000 parameters leave to nn.LayerNorm([C, H, W]): 49,880


def jobs(nets, seeds, changes=({},), variants=({},)):
    """A Job for each of the first seeds, of the variants, of the changes to the published settings, and of the nets."""
    return [
        Job(net, Settings(**({"learning_rate": LEARNING_RATES.get(net, 0.03), "seed": seed} | change)), **variant)
        for seed, variant, change, net in itertools.product(range(seeds), variants, changes, nets)
    ]


def tune(rows):
    rates = [{"learning_rate": rate} for rate in (0.015, 0.03, 0.06, 0.12)]
    decays = [{"weight_decay": decay, "augment": "flip+crop"} for decay in (0.1, 0.2, 0.5)]
    return jobs(NETS, 2, rates + decays)


def augment(rows):
    return jobs(NETS, 10, [{"weight_decay": AUGMENTED_WEIGHT_DECAY, "augment": "flip+crop"}])


def rate(rows):
    found = []
    for name in OPTIMIZERS:
        grid = itertools.product(RATES[name], DECAYS[name])
        changes = [{"learning_rate": r, "weight_decay": decay, "momentum": MOMENTUM[name]} for r, decay in grid]
        found += jobs(ALL, 3, changes, [{"optimizer": name}])
    return sorted(found, key=lambda job: job.settings.seed)  # so that the whole grid is there early, with one seed


def optimizer(rows):
    """Each optimizer and net at the setting that was best for the pair in `rate`; none until that is finished."""
    if missing("rate", rows):
        return []
    accuracy = rows[rows["study"] == "rate"].assign(accuracy=lambda part: part["validation_accuracy"].astype(float))
    means = accuracy.groupby(["net", "optimizer", "learning_rate", "weight_decay"])["accuracy"].mean()
    found = []
    for net, name in itertools.product(ALL, OPTIMIZERS):
        learning_rate, decay = map(float, means[net, name].idxmax())
        change = {"learning_rate": learning_rate, "weight_decay": decay, "momentum": MOMENTUM[name]}
        found += jobs([net], 10, [change], [{"optimizer": name}])
    return found


def batch(rows):
    slices = [{"statistics_batch": size} for size in STATISTICS]
    return jobs(["NetA"], 3, [{"batch_size": 512}], slices) + jobs(("NetB", "NetC"), 3, [{"batch_size": 512}])


def group_counts(rows):
    return jobs(["NetC"], 3, variants=[{"groups": count} for count in (1, 2, 4, 8, "C")])


def layer(rows):
    narrow = {"layer_variant": "[C,H,W]", "widths": LAYER_WIDTHS}
    return jobs(["NetB"], 3, variants=[{}, {"layer_variant": "C"}, {"layer_variant": "[C,H,W]"}, narrow])


def width(rows):
    return jobs(NETS, 3, variants=[{"widths": widths} for widths in (*WIDTHS.values(), models.WIDTHS)])


def epochs(rows):
    return jobs(NETS, 3, [{"epochs": count} for count in (5, 10, 20, 40)])


def flip(rows):
    return jobs(NETS, 3, [{"weight_decay": AUGMENTED_WEIGHT_DECAY, "augment": name} for name in ("none", "flip")])


STUDIES = {
    "tune": ("validation", tune),
    "augment": ("test", augment),
    "rate": ("validation", rate),
    "optimizer": ("test", optimizer),
    "batch": ("test", batch),
    "groups": ("test", group_counts),
    "layer": ("test", layer),
    "width": ("test", width),
    "epochs": ("test", epochs),
    "flip": ("test", flip),
}


# ---------------------------------------------------------------------------------------------------------------------
# Running them
# ---------------------------------------------------------------------------------------------------------------------


def read_texts():
    """The rows of results/runs.csv with all values as text, as `missing` compares them."""
    if not RUNS.exists():
        return pd.DataFrame(columns=["study"])
    return pd.read_csv(RUNS, dtype=str, keep_default_na=False)


def missing(study, rows):
    """The jobs of a study that `rows` (of `read_texts`) do not hold."""
    wanted = {job: job.columns() for job in STUDIES[study][1](rows)}
    if not wanted:
        return []
    names = list(next(iter(wanted.values())))
    done = set(rows[rows["study"] == study].reindex(columns=names).itertuples(index=False, name=None))
    return [job for job, columns in wanted.items() if tuple(columns[name] for name in names) not in done]


def steps(job):
    """Steps of a job's training, with all training images."""
    return job.settings.epochs * (50_000 // job.settings.batch_size)


def seconds_of(todo, rows):
    """Seconds that jobs should take on one GPU, at the median seconds a step of the GPU runs in `rows`; nan without."""
    seen = rows[~rows["device"].str.startswith("cpu")] if len(rows) else rows
    if seen.empty:
        return math.nan
    seconds, count, size, images = (
        seen[name].astype(float) for name in ("seconds", "epochs", "batch_size", "train_images")
    )
    return (seconds / (count * (images // size))).median() * sum(steps(job) for job in todo)


def run_study(study, data):
    """Run what is missing of a study, a few runs at a time, each written when it ends."""
    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    rows = read_texts()
    mine = STUDIES[study][1](rows)[rank::world]
    todo = [job for job in missing(study, rows) if job in mine]
    if STUDIES[study][0] == "validation":
        data = utils.validation_split(data)
    at_once = AT_ONCE if data.images.is_cuda else 1
    with tqdm(total=len(todo), desc=study) as bar:
        for start in range(0, len(todo), at_once):
            runs = run_together(study, todo[start : start + at_once], data)
            utils.put_rows(RUNS, [one.row for one in runs])
            bar.update(len(runs))


def run_together(study, todo, data):
    """Train several nets at the same time on one device: a `Run` for each of the jobs `todo`."""
    clock = time.perf_counter()
    nets = [job.build() for job in todo]
    trainers = [
        utils.Trainer(net, data, job.settings, compile=data.images.is_cuda, optimizer=OPTIMIZERS[job.optimizer])
        for net, job in zip(nets, todo, strict=True)
    ]
    for epoch in range(max(job.settings.epochs for job in todo)):
        for trainer in trainers:
            if epoch < trainer.settings.epochs:
                for _ in trainer.epoch():
                    pass
    for trainer in trainers:
        trainer.means()
    seconds = (time.perf_counter() - clock) / len(todo)
    return [
        utils.finish(job.net, net, data, job.settings, [], study, seconds, job.columns() | asdict(job.settings))
        for net, job in zip(nets, todo, strict=True)
    ]


# ---------------------------------------------------------------------------------------------------------------------
# What they say
# ---------------------------------------------------------------------------------------------------------------------


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
        f"A seed gives all nets the same initial weights and order of images; paired by seed, {'. '.join(differences)}.\n\n"
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
        rows = read_texts()
        for study in chosen:
            todo = missing(study, rows)
            said = f"{len(todo)} of {len(STUDIES[study][1](rows))} runs missing"
            print(f"{study}: {said}, about {seconds_of(todo, rows):.0f} s on one GPU as seen so far")
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    data = utils.load_data(utils.pick_device(), "cifar10")
    for study in chosen:
        run_study(study, data)
    if "tune" in chosen and not missing("tune", read_texts()):
        rows = utils.read_rows(RUNS)
        print("best learning rates on the validation split:", best_rates(rows))
        print("with flip and crop:", tuned(rows, "weight_decay", "flip+crop"), sep="\n")


if __name__ == "__main__":
    main()
