"""Tuning of learning rate and weight decay, for many cells of a comparison and for each of their nets alike.

A cell is a place at which nets are compared: optimizer, batch size, data set, augmentation. Its tuning has five sweeps:

1. rate: five learning rates, half a decade apart, at the first decay. While a net's best is the smallest or the
   largest, the next one is tried, too, for all nets of the cell.
2. decay: at each net's best rate, decays half a decade apart around the first one, and on as with the rates.
3. seeds: two more seeds of each net's best two settings.
4. edges: while a net's best mean of three seeds has the smallest or the largest rate or decay tried, three seeds of
   the next one, for this net alone, until the best lies inside.
5. Each net's best mean of three seeds is its setting. It gets new runs, with all training images.

Decay is counted as the share of a weight that an epoch at the peak rate takes,

    decay = weight_decay * learning_rate * 50,000 / batch_size

because the best of it hardly depends on the rate: in the sweep `rate`, which tried each pair, accuracy has a ridge
along which it hardly changes.
"""

from dataclasses import fields, replace
from typing import NamedTuple

import pandas as pd

from engine import records
from experiments.variants import Experiment
from utils import NETS, Settings

MOMENTUM = {"sgd": 0.9, "sgdw": 0.9, "adamw": 0.9}  # Settings.momentum for the others
HALF_DECADES = tuple(float(f"{one}e{power}") for power in range(-5, 3) for one in (1, 3))
FIRST_RATES = {"sgdw": (0.01, 0.03, 0.1, 0.3, 1.0), "adamw": (0.001, 0.003, 0.01, 0.03, 0.1)}
FIRST_DECAY = {"sgdw": 0.3, "adamw": 0.3}
MUON = (0.003, 0.01, 0.03, 0.1, 0.3), 1.0  # first rates and decay of Muon and of the steps with parts of it
KEYS = [field.name for field in fields(Experiment) if field.name != "seed"]  # columns that tell settings apart


def check_seeds(runs, keys, least=1):
    """Raise ValueError unless runs that are alike in `keys` are of one setting: each seed once, `least` or more."""
    for key in runs[runs.duplicated([*keys, "seed"])][[*keys, "seed"]].to_numpy():
        *key, seed = map(str, key)
        raise ValueError(f"seed {seed} of {', '.join(key)} is there twice; give runs of one setting")
    for key, count in runs.groupby([*keys], dropna=False).size().items() if least > 1 else ():
        if count < least:
            name = ", ".join(map(str, key if isinstance(key, tuple) else [key]))
            raise ValueError(f"{name} has {count} of {least} seeds; run what is missing of its sweep first")


def validation_means(rows, keys, seeds=1):
    """Return the mean validation accuracy by `keys`, columns of settings; nan where a run diverged.

    In the keys' order as numbers, also where they are texts, so that of two best settings both choose the same.
    ValueError for runs of two settings, or with fewer than that many `seeds`.
    """
    check_seeds(rows, keys, seeds)
    accuracy = records.numbers(rows, "validation_accuracy").rename("accuracy")
    means = accuracy.groupby([rows[key] for key in keys], dropna=False).agg(lambda values: values.mean(skipna=False))
    return means.round(9).sort_index(key=as_numbers)  # what is beyond depends on the rows' order


def as_numbers(labels):
    """Return labels that are all numbers, or texts of numbers, as numbers, and others as they are."""
    try:
        return pd.to_numeric(labels)
    except ValueError:
        return labels


def extend(levels, scores):
    """Extend neighboring HALF_DECADES until the best of each of `scores` lies inside, or is not known yet.

    scores  functions from a level to an accuracy, None where it was not run
    """
    levels = list(levels)
    while True:
        table = [[score(level) for level in levels] for score in scores]
        if any(None in line for line in table):
            return levels
        best = {line.index(max(line)) for line in table}
        low, high = (HALF_DECADES.index(level) for level in (levels[0], levels[-1]))
        more = HALF_DECADES[low - 1 : low] if 0 in best else ()
        further = HALF_DECADES[high + 1 : high + 2] if len(levels) - 1 in best else ()
        if not more and not further:
            return levels
        levels = [*more, *levels, *further]


class Cell(NamedTuple):
    """A place at which nets are compared. `means` are of `means_of`."""

    optimizer: str
    batch_size: int
    dataset: str = "CIFAR-10"
    augment: str = "none"
    nets: tuple = NETS
    seeds: int = 5  # of the runs with all training images
    variant: tuple = ()  # pairs of a field of Experiment and its value

    @property
    def first(self):
        """The first rates and the first decay."""
        return FIRST_RATES.get(self.optimizer, MUON[0]), FIRST_DECAY.get(self.optimizer, MUON[1])

    def run(self, net, rate, decay, seed=0):
        """Make the experiment of a net at a learning rate and a decay, counted as above."""
        settings = {
            "dataset": self.dataset,
            "net": net,
            "optimizer": self.optimizer,
            "momentum": MOMENTUM.get(self.optimizer, Settings.momentum),
            "batch_size": self.batch_size,
            "augment": self.augment,
            "learning_rate": rate,
            "weight_decay": float(f"{decay * self.batch_size / 50_000 / rate:.3g}"),
            "initial_weights": "he" if net == "Net" else "",
            "seed": seed,
        }
        return Experiment(**(settings | dict(self.variant)))

    def rates(self, means):
        """Return the learning rates to try at the first decay, and a net's best one of them by its name."""
        rates, decay = self.first
        scores = {net: lambda rate, net=net: means.get(key(self.run(net, rate, decay))) for net in self.nets}
        rates = extend(rates, scores.values())
        known = all(score(rate) is not None for score in scores.values() for rate in rates)
        return rates, {net: max(rates, key=scores[net]) for net in self.nets} if known else {}

    def decays(self, means):
        """Return the decays to try at each net's best learning rate."""
        best, first = self.rates(means)[1], HALF_DECADES.index(self.first[1])
        scores = [
            lambda decay, net=net, rate=rate: means.get(key(self.run(net, rate, decay))) for net, rate in best.items()
        ]
        return extend(HALF_DECADES[first - 1 : first + 2], scores)

    def tried(self, means):
        """List all experiments of the first two sweeps."""
        rates, best = self.rates(means)
        first = self.first[1]
        found = [self.run(net, rate, first) for rate in rates for net in self.nets]
        decays = [decay for decay in self.decays(means) if decay != first]
        return found, [self.run(net, best[net], decay) for decay in decays for net in best]


def decay_of(experiment):
    """Return an experiment's decay, counted as above, as it is in HALF_DECADES."""
    return float(f"{experiment.weight_decay * experiment.learning_rate * 50_000 / experiment.batch_size:.1g}")


def next_level(levels, best):
    """Return the level beyond `best`, the first or the last of several `levels`; None elsewhere, or without one."""
    step = (best == max(levels)) - (best == min(levels))
    index = HALF_DECADES.index(best) + step
    return HALF_DECADES[index] if step and 0 <= index < len(HALF_DECADES) else None


def beyond(cell, tried, means):
    """List the settings beyond the edges of what one net tried, up to the first that `means` do not know.

    tried  experiments of one net; those in `means`, the means of three seeds, are what it can choose from
    """
    tried, found = list(tried), []
    while known := [one for one in tried if key(one) in means]:
        best = max(known, key=lambda one: means[key(one)])
        rate, decay = best.learning_rate, decay_of(best)
        further = next_level([one.learning_rate for one in tried], rate)
        if further:
            rate = further
        else:
            decay = next_level([decay_of(one) for one in tried if one.learning_rate == rate], decay)
        if decay is None:
            break
        found.append(cell.run(best.net, rate, decay))
        if key(found[-1]) not in means:
            break
        tried.append(found[-1])
    return found


def key(experiment):
    """Return the KEYS of an experiment, by which `means_of` finds its runs."""
    columns = experiment.columns()
    return tuple(columns[name] for name in KEYS)


def means_of(rows, studies, seeds=1):
    """Return the mean validation accuracy of each setting with that many seeds; -1 where a run diverged.

    studies  in the order in which they run
    """
    rows = rows[rows["study"].isin(studies)].reindex(columns=[*rows, *set(KEYS).difference(rows)], fill_value="")
    if rows.empty:
        return {}
    # An earlier plan may have had a run in another study, too; that of the first one counts.
    rows = rows.sort_values("study", key=lambda own: own.map(studies.index), kind="stable")
    rows = rows[rows["study"].eq(rows.groupby([*KEYS, "seed"])["study"].transform("first"))]
    rows = rows[rows.groupby(KEYS)["seed"].transform("size") >= seeds]
    return validation_means(rows, KEYS).fillna(-1).to_dict()


def in_order(experiments):
    """Sort experiments so that runs of the same batch size, which share a GPU, are neighbors."""
    return sorted(experiments, key=lambda one: one.batch_size)


def tuning(name, cells):
    """Return the five sweeps of some cells as entries of `sweeps.SWEEPS`; their names begin with `name`."""
    names = [f"{name}-{part}" for part in ("rate", "decay", "seeds", "edges")]

    def tried(rows, part):
        means = means_of(rows, names[:2])
        return in_order(one for cell in cells for one in cell.tried(means)[part])

    def by_net(rows):
        """Yield each net of each cell: its cell, what it tried, and what lies beyond, as experiments of seed 0."""
        first, three = means_of(rows, names[:2]), means_of(rows, names[:3], seeds=3)
        further = means_of(rows, names[3:], seeds=3)
        for cell in cells:
            tried = [one for part in cell.tried(first) for one in part]
            for net in cell.nets:
                own = [one for one in tried if one.net == net]
                # Of an earlier plan, what is tried now may have been beyond: those seeds do not count.
                outside = {one: mean for one, mean in further.items() if one not in set(map(key, own))}
                yield cell, own, beyond(cell, own, three | outside)

    def best(settings, means, count):
        return sorted((one for one in settings if key(one) in means), key=lambda one: -means[key(one)])[:count]

    def with_seeds(found):
        return in_order(replace(one, seed=seed) for one, seeds in found for seed in seeds)

    def more_seeds(rows):
        first = means_of(rows, names[:2])
        return with_seeds((one, (1, 2)) for _, tried, _ in by_net(rows) for one in best(tried, first, 2))

    def edges(rows):
        return with_seeds((one, (0, 1, 2)) for _, _, further in by_net(rows) for one in further)

    def final(rows):
        three = means_of(rows, names, seeds=3)
        return with_seeds(
            (one, range(cell.seeds))
            for cell, tried, further in by_net(rows)
            for one in best([*tried, *further], three, 1)
        )

    return {
        names[0]: ("validation", lambda rows: tried(rows, 0), None),
        names[1]: ("validation", lambda rows: tried(rows, 1), names[0]),
        names[2]: ("validation", more_seeds, names[1]),
        names[3]: ("validation", edges, names[2]),
        name: ("test", final, names[3]),
    }
