"""The sweeps behind the findings, as lists of settings, and the tables that README.md shows.

    python study.py                 run what results/runs.csv does not hold yet
    python study.py --only tune     the same for one list
    python study.py --dry-run       say what is missing
    python study.py --report        rewrite the tables in README.md from results/
    RANK=0 WORLD_SIZE=2 python study.py    the first half of it, as torchrun would ask

Needs CIFAR-10. A run that is finished is in results/runs.csv at once, and skipped the next time.
"""

import argparse
import os
import time
from pathlib import Path

import torch
from tqdm import tqdm

import utils
from utils import LEARNING_RATES, Settings

RUNS = Path("results/runs.csv")
NETS = ("NetA", "NetB", "NetC")
AT_ONCE = 3  # runs that share a GPU: while one waits for its small kernels, another computes

# name: (split, list of (net, settings)); the test split is for what is published, the validation split for choices
STUDIES = {
    "tune": (
        "validation",
        [
            (net, Settings(learning_rate=rate, seed=seed))
            for net in NETS
            for rate in (0.015, 0.03, 0.06)
            for seed in (0, 1)
        ],
    ),
    "augment": (
        "test",
        [
            (net, Settings(learning_rate=LEARNING_RATES[net], augment="flip+crop", seed=seed))
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
    todo = missing(study, utils.read_rows(RUNS))[rank::world]
    if split == "validation":
        data = utils.validation_split(data)
    at_once = AT_ONCE if data.images.is_cuda else 1
    with tqdm(total=len(todo), desc=study) as bar:
        for start in range(0, len(todo), at_once):
            runs = run_together(study, todo[start : start + at_once], data)
            utils.add_rows(RUNS, [one.row for one in runs])
            bar.update(len(runs))


def run_together(study, jobs, data):
    """Train several nets at the same time on one device: a `Run` for each (net, settings) of `jobs`."""
    torch.backends.cudnn.deterministic = True
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
    """The learning rate of each net with the highest mean accuracy on the validation split, from the tune rows."""
    means = rows[rows["study"] == "tune"].groupby(["net", "learning_rate"])["validation_accuracy"].mean()
    return {net: means[net].idxmax() for net in NETS}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=STUDIES, help="run this list alone")
    parser.add_argument("--dry-run", action="store_true", help="say what is missing, run nothing")
    parser.add_argument("--report", action="store_true", help="rewrite README.md's tables, run nothing")
    options = parser.parse_args()
    if options.report:
        report()
        return
    chosen = [options.only] if options.only else list(STUDIES)
    if options.dry_run:
        for study in chosen:
            print(f"{study}: {len(missing(study, utils.read_rows(RUNS)))} of {len(STUDIES[study][1])} runs missing")
        return
    data = utils.load_data(utils.pick_device(), "cifar10")
    for study in chosen:
        run_study(study, data)
    if "tune" in chosen and not missing("tune", utils.read_rows(RUNS)):
        print("best learning rates on the validation split:", best_rates(utils.read_rows(RUNS)))


if __name__ == "__main__":
    main()
