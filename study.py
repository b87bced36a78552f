"""The sweeps behind the findings, as lists of settings, run by one process or by many.

    python study.py                 run what results/runs.csv does not hold yet
    python study.py --only tune     the same for one list, or for several
    python study.py --dry-run       say what is missing
    python study.py --report        rewrite what README.md, s8.ipynb and five pictures in img/ show of results/
    torchrun --nproc-per-node=2 study.py    the same by two processes, each on its own GPU

Needs CIFAR-10. A run that is finished is in results/runs.csv at once, and skipped the next time.
"""

import argparse
import collections
import datetime
import itertools
import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn
from tqdm import tqdm

import models
import report
import utils
from utils import LEARNING_RATES, NETS, Settings

RUNS = Path("results/runs.csv")
ALL = (*NETS, "Net")  # with the control, which has no statistics
# Runs share a GPU, so that one computes while another waits for its small kernels: three of the published batch, as
# bench.py measures, and the more the smaller the batch is. Not measured: where more than 12 stop paying.
IMAGES_AT_ONCE, AT_ONCE = 1_500, (3, 12)
COMPILE_FROM = 15  # runs of a study, a process, that share a net: with fewer, compiling it takes longer than it saves
AUGMENTED_WEIGHT_DECAY = 0.1  # with flip and crop: best over the three nets in the study tune


# ---------------------------------------------------------------------------------------------------------------------
# Variants of the published nets and of their training
# ---------------------------------------------------------------------------------------------------------------------


def sgd(net, learning_rate, weight_decay, momentum, dtype):
    """SGD with Nesterov momentum; only the convolutions decay, as an L2 term in the gradient."""
    # Of PyTorch's kinds only the fused one reads a learning rate on the device without waiting for it.
    return torch.optim.SGD(groups(net, weight_decay), learning_rate, momentum, nesterov=True, fused=True)


def adamw(net, learning_rate, weight_decay, momentum, dtype):
    """AdamW (Loshchilov & Hutter 2019); only the convolutions decay. `momentum` is its beta 1."""
    return torch.optim.AdamW(
        groups(net, weight_decay), learning_rate, (momentum, 0.999), capturable=learning_rate.is_cuda, fused=True
    )


def groups(net, weight_decay):
    """Parameter groups for torch.optim: convolutions but c11, which decay as under Muon, and the rest, which do not."""
    convolutions = [p for p in net.parameters() if p.ndim == 4 and p is not net.c11.weight]
    rest = [p for p in net.parameters() if p.ndim != 4 or p is net.c11.weight]
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


def draw_he(net, seed):
    """Draw the convolutions' weights so that the signal keeps its size from layer to layer (He et al. 2015).

    https://arxiv.org/abs/1502.01852; before an activation PyTorch's own draw is smaller by the square root of 6.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d):
            follows = "relu" if name.endswith(".conv") else "linear"  # c3, c7 and c11 have no activation
            nn.init.kaiming_normal_(module.weight, nonlinearity=follows, generator=generator)


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
    initial_weights: str = ""  # "he": as `draw_he` does; "": PyTorch's

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
        if self.initial_weights == "he":
            draw_he(net, self.settings.seed)
        return net

    def columns(self):
        """What tells this job apart in results/runs.csv, as {column: text}."""
        published = utils.norm_columns(utils.NORM_OF[self.net], 4, self.settings.batch_size)
        own = {name: getattr(self, name) or value for name, value in published.items()}
        own |= {"net": self.net, "optimizer": self.optimizer, "widths": " ".join(map(str, self.widths))}
        own["initial_weights"] = self.initial_weights
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
DECAYS = {
    "sgd": (0.0, 0.0005, 0.005, 0.015, 0.05),
    "adamw": (0.01, 0.1, 1.0, 3.0, 10.0),
    "muon": (0.05, 0.5, 1.5, 5.0, 15.0),
}
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
    decays = [{"weight_decay": decay, "augment": "flip+crop"} for decay in (0.05, 0.1, 0.2, 0.5)]
    return jobs(NETS, 2, rates + decays)


def augment(rows):
    return jobs(NETS, 10, [{"weight_decay": AUGMENTED_WEIGHT_DECAY, "augment": "flip+crop"}])


def tuning(net, name, learning_rate, decay, seeds, **variant):
    """Jobs of a net under the optimizer of that name, one for each of the first seeds."""
    change = {"learning_rate": float(learning_rate), "weight_decay": float(decay), "momentum": MOMENTUM[name]}
    return jobs([net], seeds, [change], [{"optimizer": name} | variant])


def rate(rows):
    """All of the grid with one seed, each pair of optimizer and net alike."""
    return [
        job
        for name, net in itertools.product(OPTIMIZERS, ALL)
        for learning_rate, decay in itertools.product(RATES[name], DECAYS[name])
        for job in tuning(net, name, learning_rate, decay, 1)
    ]


def rate_seeds(rows):
    """Two seeds more at each learning rate, with the decay that was best in `rate`; none until that is finished."""
    if waits("rate-seeds", rows):
        return []
    best = report.best_decays(rows)
    return [job for name, net, *setting in best for job in tuning(net, name, *setting, 3) if job.settings.seed > 0]


def optimizer(rows):
    """Ten seeds of each optimizer and net at what was best of all three seeds; none until those are finished."""
    if waits("optimizer", rows):
        return []
    best = report.best_settings(rows)
    return [job for name, net, *setting in best for job in tuning(net, name, *setting, 10)]


def initial(rows):
    """The control from initial weights that suit it, at the rates of `rate` and the second of its decays."""
    return [
        job
        for name in OPTIMIZERS
        for learning_rate in RATES[name]
        for job in tuning("Net", name, learning_rate, DECAYS[name][1], 3, initial_weights="he")
    ]


def batch(rows):
    slices = [{"statistics_batch": size} for size in STATISTICS]
    return jobs(["NetA"], 3, [{"batch_size": 512}], slices) + jobs(("NetB", "NetC"), 3, [{"batch_size": 512}])


def batch_rate(rows):
    """Learning rates at both ends of the optimizer's batch sizes, as multiples of the published ones; one seed."""
    factors = {32: (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2), 1024: (1 / 2, 1, 2, 4)}
    return [
        Job(net, Settings(learning_rate=factor * LEARNING_RATES[net], batch_size=size))
        for size in factors
        for factor, net in itertools.product(factors[size], NETS)
    ]


def batch_size(rows):
    """The optimizer's batch sizes, each end at its best rate, what lies between interpolated; none until those are."""
    if waits("batch-size", rows):
        return []
    means = report.means(rows[rows["study"] == "batch-rate"], ["net", "batch_size", "learning_rate"])
    found = []
    for size, net in itertools.product((32, 64, 128, 256, 1024), NETS):
        ends = [float(means[net, str(end)].idxmax()) for end in (32, 1024)]
        rate = np.interp(np.log([size]), np.log([32, 500, 1024]), np.log([ends[0], LEARNING_RATES[net], ends[1]]))
        found += jobs([net], 3, [{"batch_size": size, "learning_rate": float(f"{np.exp(rate[0]):.3g}")}])
    return sorted(found, key=lambda job: (job.settings.batch_size, job.settings.seed))  # alike ones at the same time


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
    small = [{"weight_decay": AUGMENTED_WEIGHT_DECAY, "augment": name} for name in ("none", "flip")]
    large = [{"weight_decay": 0.5, "augment": name} for name in ("flip", "flip+crop")]
    return jobs(NETS, 3, small + large)


# results/runs.csv has two more, which ran before: optimizer-h200, on another GPU, batch-size-first, at higher rates.
# A study: the one whose rows it needs whole.
WAITS = {"rate-seeds": "rate", "optimizer": "rate-seeds", "batch-size": "batch-rate"}
STUDIES = {
    "tune": ("validation", tune),
    "augment": ("test", augment),
    "rate": ("validation", rate),
    "rate-seeds": ("validation", rate_seeds),
    "optimizer": ("test", optimizer),
    "initial": ("validation", initial),
    "batch": ("test", batch),
    "batch-rate": ("validation", batch_rate),
    "batch-size": ("test", batch_size),
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


def waits(study, rows):
    """Whether a study still has no jobs, because `rows` do not hold all of the one that it needs."""
    needed = WAITS.get(study)
    return needed is not None and (waits(needed, rows) or bool(missing(needed, rows)))


def missing(study, rows):
    """The jobs of a study that `rows` (of `read_texts`) do not hold."""
    wanted = {job: job.columns() for job in STUDIES[study][1](rows)}
    if not wanted:
        return []
    names = list(next(iter(wanted.values())))
    done = set(rows[rows["study"] == study].reindex(columns=names, fill_value="").itertuples(index=False, name=None))
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
    mine = STUDIES[study][1](rows)
    alike = collections.Counter(map(program, mine))  # finished ones too, so that all of a study are trained alike
    mine = mine[rank::world]
    todo = [job for job in missing(study, rows) if job in mine]
    if STUDIES[study][0] == "validation":
        data = utils.validation_split(data)
    with tqdm(total=len(todo), desc=study) as bar:
        for part in parts(todo) if data.images.is_cuda else ([job] for job in todo):
            compile = [data.images.is_cuda and alike[program(job)] >= COMPILE_FROM * world for job in part]
            runs = run_together(study, part, data, compile)
            utils.put_rows(RUNS, [one.row for one in runs])
            bar.update(len(runs))


def parts(todo):
    """Lists of the jobs that run at the same time, which have the same batch size: small batches, many jobs."""
    least, most = AT_ONCE
    for size, alike in itertools.groupby(todo, key=lambda job: job.settings.batch_size):
        at_once = min(max(IMAGES_AT_ONCE // size, least), most)
        while part := list(itertools.islice(alike, at_once)):
            yield part


def program(job):
    """What the jobs have in common that one compiled program serves."""
    return job.net, job.widths, job.groups, job.layer_variant, job.statistics_batch, job.settings.batch_size


def run_together(study, todo, data, compile):
    """Train several nets at the same time on one device, compiled or not: a `Run` for each of the jobs `todo`."""
    clock = time.perf_counter()
    nets = [job.build() for job in todo]
    trainers = [
        utils.Trainer(net, data, job.settings, compile=one, optimizer=OPTIMIZERS[job.optimizer], stream=number)
        for number, (net, job, one) in enumerate(zip(nets, todo, compile, strict=True))
    ]
    for _ in itertools.zip_longest(*map(epochs_of, trainers)):
        pass  # a step of each in turn: all of an epoch would fill the GPU's queue, and the other nets would wait
    for trainer in trainers:
        trainer.means()
    seconds = (time.perf_counter() - clock) / len(todo)
    return [
        utils.finish(
            job.net,
            net,
            data,
            job.settings,
            [],
            study,
            seconds,
            job.columns() | asdict(job.settings),
            diverged=bool(trainer.diverged),
        )
        for net, job, trainer in zip(nets, todo, trainers, strict=True)
    ]


def epochs_of(trainer):
    """Generator: all epochs of a run, a step at each turn, but none after that in which it diverged."""
    for _ in range(trainer.settings.epochs):
        yield from trainer.epoch()
        with trainer.on_stream():
            if trainer.diverged:
                return


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=STUDIES, help="run these lists alone")
    parser.add_argument("--dry-run", action="store_true", help="say what is missing, run nothing")
    parser.add_argument("--report", action="store_true", help="rewrite what is made from results/, run nothing")
    options = parser.parse_args()
    if options.report:
        report.report()
        return
    chosen = [study for study in STUDIES if study in (options.only or STUDIES)]
    if options.dry_run:
        rows = read_texts()
        for study in chosen:
            todo = missing(study, rows)
            total = len(STUDIES[study][1](rows))
            seconds = seconds_of(todo, rows)
            minutes = f"about {seconds / 60:.1f} minutes on one GPU, as the rows so far took"
            if math.isnan(seconds):
                minutes = "no GPU run so far to tell the time by"
            print(
                f"{study}: {len(todo)} of {total} runs missing, {minutes}"
                if total
                else f"{study}: waits for {WAITS[study]}"
            )
        return
    if not torch.cuda.is_available() and options.only is None:
        parser.error("there is no GPU here, where all lists would take days: choose one with --only")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    # All nets share one forward, of which torch.compile keeps 8 kinds and would then go on without compiling.
    torch._dynamo.config.recompile_limit = 64
    data = utils.load_data(utils.pick_device(), "cifar10")
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if several:
        torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(days=1))
    for study in chosen:
        if several and study in WAITS:
            torch.distributed.barrier()  # another process may still be at what this study waits for
        if waits(study, read_texts()):
            print(f"{study}: waits for {WAITS[study]}")
        run_study(study, data)
    if "tune" in chosen and not missing("tune", read_texts()):
        rows = utils.read_rows(RUNS)
        print("best learning rates on the validation split:", report.best_rates(rows))
        print("with flip and crop:", report.tuned(rows, "weight_decay", "flip+crop"), sep="\n")


if __name__ == "__main__":
    main()
