"""The sweeps, as lists of experiments.

A sweep is a function of the rows so far (results/runs.csv, all values as text) that returns its experiments. The
validation split is for choices, the test split for what is published.
"""

import itertools
import random
from dataclasses import fields, replace

import numpy as np
import pandas as pd

import models
from engine import records
from experiments import ROOT
from experiments.tuning import MOMENTUM, Cell, check_seeds, in_order, key, means_of, tuning, validation_means
from experiments.variants import Experiment
from utils import NETS, Settings

RUNS = ROOT / "results" / "runs.csv"
WITH_CONTROL = (*NETS, "Net")
# The recipe that was published before, from which the sweeps made by `experiments` depart.
EARLIER = {"batch_size": 500, "weight_decay": 0.5}
EARLIER_RATES = {"NetA": 0.06, "NetB": 0.03, "NetC": 0.03, "Net": 0.03}
EARLIER_AUGMENTED = {"weight_decay": 0.1, "augment": "flip+crop"}
AUGMENTED = {"weight_decay": 0.05, "augment": "flip+crop"}  # the published settings with flip and crop

# Grids of learning rates, half a decade apart, and weight decays for each optimizer.
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
GHOST_BATCHES = (2, 4, 8, 16, 32, "")  # images; "": the whole batch, 512 here, which they divide
WIDTHS = {  # parameters: output channels
    9_410: (8, 16, 8, 8, 8, 8, 8, 16, 16, 16),
    19_758: (12, 20, 16, 16, 16, 16, 12, 20, 20, 20),
    34_918: (12, 28, 20, 20, 20, 20, 20, 28, 28, 28),
}
LAYER_WIDTHS = (2, 4, 8, 8, 8, 8, 16, 24, 24, 24)  # what 50,000 parameters leave to nn.LayerNorm([C, H, W]): 49,880
CHOICES = {  # of draw_recipes, beside learning rate and weight decay
    "batch_size": (64, 125, 250, 500),
    "momentum": (0.8, 0.9, 0.95, 0.98),
    "label_smoothing": (0.0, 0.05, 0.1, 0.2),
    "warmup": (0.05, 0.1, 0.2, 0.4),
    "crop": (1, 2, 3, 4),
}
RECIPE = ["learning_rate", "weight_decay", *CHOICES]
TYPES = {name: int if name in ("batch_size", "crop") else float for name in RECIPE}
SETTING = ["optimizer", "net", "learning_rate", "weight_decay"]


def experiments(nets, seeds, changes=({},), variants=({},)):
    """List an Experiment for each of the first seeds, variants, changes to the EARLIER settings, and nets."""
    return [
        Experiment(**({"net": net, "learning_rate": EARLIER_RATES[net], "seed": seed} | EARLIER | change | variant))
        for seed, variant, change, net in itertools.product(range(seeds), variants, changes, nets)
    ]


def recipe(rows):
    """List three seeds of the published settings with one of them changed, for all nets alike."""
    plain = [{}, {"weight_decay": 0.1}, {"weight_decay": 0.25}, {"momentum": 0.9}, {"momentum": 0.98}]
    plain += [{"label_smoothing": share} for share in (0.0, 0.05, 0.2)] + [{"warmup": share} for share in (0.1, 0.4)]
    augmented = [{"weight_decay": decay, "augment": "flip+crop"} for decay in (0.02, 0.05, 0.1, 0.167)]
    augmented += [{"weight_decay": 0.05, "augment": "flip+crop", "label_smoothing": share} for share in (0.0, 0.05)]
    return [
        Experiment(net=net, seed=seed, **change)
        for seed, change, net in itertools.product(range(3), plain + augmented, NETS)
    ]


def augment(rows):
    """List ten seeds of the published settings with flip and crop."""
    return [Experiment(net=net, seed=seed, **AUGMENTED) for seed, net in itertools.product(range(10), NETS)]


def captured(rows):
    """List twenty seeds of the earlier recipes, which `experiments.run` trains without the fused step here."""
    return experiments(NETS, 20, [{}, EARLIER_AUGMENTED])


def fused(rows):
    """List seeds 10 to 19 of the earlier recipes, with the fused step."""
    return [one for one in captured(rows) if one.seed >= 10]


def of_setting(optimizer, net, learning_rate, decay, seeds, **variant):
    """List the experiments of one optimizer, net and setting, one for each of the first seeds."""
    momentum = MOMENTUM.get(optimizer, Settings.momentum)
    change = {"learning_rate": float(learning_rate), "weight_decay": float(decay)}
    return experiments([net], seeds, [change | {"optimizer": optimizer, "momentum": momentum}], [variant])


def draw_recipes(count=60):
    """Draw settings for `search` from the space of PLAN.md, the same each time."""
    draw, recipes = random.Random(20), []
    for _ in range(count):
        recipe = {"learning_rate": 0.005 * 30 ** draw.random(), "weight_decay": 0.03 * 100 ** draw.random()}
        recipe = {name: float(f"{value:.3g}") for name, value in recipe.items()}
        recipes.append(recipe | {name: draw.choice(values) for name, values in CHOICES.items()})
    return sorted(recipes, key=lambda recipe: recipe["batch_size"])  # alike ones at the same time


def search(rows, augment="none"):
    """List random recipes, the same for each net; without augmentation their crops play no part."""
    fixed = {"augment": augment} | ({"crop": Settings.crop} if augment == "none" else {})
    return [
        Experiment(net=net, initial_weights="he" if net == "Net" else "", **recipe | fixed)
        for recipe, net in itertools.product(draw_recipes(), WITH_CONTROL)
    ]


def best_of(rows, study, experiments, count, seeds):
    """List these seeds of each net's best `experiments` by their mean accuracy in a study; none that diverged."""
    means, found = means_of(rows, [study]), []
    for net in dict.fromkeys(one.net for one in experiments):
        own = [one for one in experiments if one.net == net and means.get(key(one), -1) >= 0]
        best = sorted(own, key=lambda one: -means[key(one)])[:count]
        found += [replace(one, seed=seed) for one in best for seed in seeds]
    return in_order(found)


def searching(name, augment):
    """Return the three sweeps of a random search, as entries of SWEEPS.

    Random recipes, three new seeds of each net's best five, and on the test set ten seeds of the best of these.
    """
    seeds = f"{name}-seeds"
    return {
        name: ("validation", lambda rows: search(rows, augment), None),
        seeds: ("validation", lambda rows: best_of(rows, name, search(rows, augment), 5, (1, 2, 3)), name),
        f"{name}-best": ("test", lambda rows: best_of(rows, seeds, search(rows, augment), 1, range(10)), seeds),
    }


def rate(rows):
    """List all of the grid with one seed, each pair of optimizer and net alike."""
    return [
        experiment
        for name, net in itertools.product(RATES, WITH_CONTROL)
        for learning_rate, decay in itertools.product(RATES[name], DECAYS[name])
        for experiment in of_setting(name, net, learning_rate, decay, 1)
    ]


def rate_seeds(rows):
    """List two seeds more at each learning rate, with the decay that was best in `rate`."""
    return [one for setting in best_decays(rows) for one in of_setting(*setting, 3) if one.seed > 0]


def optimizer(rows):
    """List ten seeds of each optimizer and net at what was best of all three seeds."""
    return [one for setting in best_settings(rows) for one in of_setting(*setting, 10)]


def initial(rows):
    """List the control from Kaiming initial weights, at the rates of `rate` and the second of its decays."""
    return [
        one
        for name in RATES
        for learning_rate in RATES[name]
        for one in of_setting(name, "Net", learning_rate, DECAYS[name][1], 3, initial_weights="he")
    ]


def batch(rows):
    ghosts = [{"statistics_batch": size} for size in GHOST_BATCHES]
    return experiments(["NetA"], 3, [{"batch_size": 512}], ghosts) + experiments(
        ("NetB", "NetC"), 3, [{"batch_size": 512}]
    )


def batch_rate(rows):
    """List learning rates at both ends of the batch sizes, as multiples of the earlier ones; one seed."""
    factors = {32: (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2), 1024: (1 / 2, 1, 2, 4)}
    found = []
    for size in factors:
        for factor, net in itertools.product(factors[size], NETS):
            found += experiments([net], 1, [{"learning_rate": factor * EARLIER_RATES[net], "batch_size": size}])
    return found


def batch_size(rows):
    """List the batch sizes, each end at its best rate, what lies between interpolated."""
    keys, found = ["net", "batch_size", "learning_rate"], []
    best = validation_means(rows[rows["study"] == "batch-rate"], keys).groupby(keys[:2]).idxmax()
    for size, net in itertools.product((32, 64, 128, 256, 1024), NETS):
        ends = [float(best[net, str(end)][-1]) for end in (32, 1024)]
        rate = np.interp(np.log([size]), np.log([32, 500, 1024]), np.log([ends[0], EARLIER_RATES[net], ends[1]]))
        found += experiments([net], 3, [{"batch_size": size, "learning_rate": float(f"{np.exp(rate[0]):.3g}")}])
    return sorted(found, key=lambda one: (one.batch_size, one.seed))  # alike ones at the same time


def group_counts(rows):
    return experiments(["NetC"], 3, variants=[{"groups": count} for count in (1, 2, 4, 8, "C")])


def layer(rows):
    narrow = {"layer_variant": "[C,H,W]", "widths": LAYER_WIDTHS}
    return experiments(["NetB"], 3, variants=[{}, {"layer_variant": "C"}, {"layer_variant": "[C,H,W]"}, narrow])


def width(rows):
    return experiments(NETS, 3, variants=[{"widths": widths} for widths in (*WIDTHS.values(), models.WIDTHS)])


def epochs(rows):
    return experiments(NETS, 3, [{"epochs": count} for count in (5, 10, 20, 40)])


def flip(rows):
    small = [EARLIER_AUGMENTED | {"augment": name} for name in ("none", "flip")]
    large = [{"augment": name} for name in ("flip", "flip+crop")]
    return experiments(NETS, 3, small + large)


def time(rows):
    """List five seeds of four times as many epochs, at the settings of the sweep lead for batches of 500."""
    found = [one for one in SWEEPS["lead"][1](rows) if (one.augment, one.batch_size) == ("none", 500)]
    found = [one for one in found if one.optimizer in ("sgdw", "muon") and one.net in NETS and one.seed < 5]
    return [replace(one, epochs=80) for one in found]


LONG = {"epochs": 200, "augment": "flip+crop"}
LONG_SETTINGS = [  # one change after the other, then changes that helped batch norm together
    {"learning_rate": 0.03, "weight_decay": 0.1} | change
    for change in (
        {},
        {"weight_decay": 0.05},
        {"weight_decay": 0.2},
        {"learning_rate": 0.06},
        {"label_smoothing": 0.0},
        {"label_smoothing": 0.05},
        {"crop": 4},
        {"batch_size": 250},
        {"label_smoothing": 0.0, "weight_decay": 0.2},
        {"label_smoothing": 0.0, "learning_rate": 0.06},
        {"label_smoothing": 0.0, "crop": 4},
        {"label_smoothing": 0.0, "crop": 4, "weight_decay": 0.2},
    )
]


def long_tune(rows):
    """List runs of 200 epochs on held-out images, one for each net and each of LONG_SETTINGS."""
    return sorted(experiments(NETS, 1, [LONG | change for change in LONG_SETTINGS]), key=lambda one: one.batch_size)


def long(rows):
    """List three seeds of each net at its best setting of 200 epochs."""
    return best_of(rows, "long-tune", long_tune(rows), 1, range(3))


CORNERS = tuple(itertools.product(("sgdw", "muon"), (64, 500)))  # of PLAN.md's contrasts
CELLS = [
    Cell(*pair, nets=WITH_CONTROL, seeds=10) if pair in CORNERS else Cell(*pair)
    for pair in itertools.product(("sgdw", "adamw", "muon"), (64, 125, 250, 500, 1000))
]
CELLS.append(Cell("muon", 500, augment="flip+crop", seeds=10))
STEPS = {  # optimizers: titles, from momentum to Muon, one part after the other
    "sgdw": "momentum",
    "tensor-norm": "normalized per matrix",
    "filter-norm": "normalized per filter",
    "muon-one-rate": "Muon",
}
CELLS_STEP = [
    Cell(step, size, nets=WITH_CONTROL, variant=(("momentum", Settings.momentum),))
    for size, step in itertools.product((500, 125), STEPS)
]
CELLS_PART = [
    Cell(optimizer, 500, nets=nets, seeds=3, variant=variant)
    for optimizer, (nets, variant) in itertools.product(
        ("sgdw", "muon"),
        (
            (WITH_CONTROL, ()),
            (WITH_CONTROL, (("convolution", "standardized"),)),
            (("NetB",), (("layer_variant", "RMS"),)),
            (("NetB",), (("layer_variant", "tanh"), ("initial_weights", "he"))),  # as the control
        ),
    )
]
CELLS_100 = [Cell(*pair, dataset="CIFAR-100", seeds=10) for pair in CORNERS]

PYTORCH_STEP = ("captured", *tuning("part", []))  # without the fused step, which does not know all of their nets

# Sweep: the split that it is scored on, its function, and the sweep whose rows it needs first.
# results/runs.csv has others, too: main and short, of s8.ipynb; main-500, augment-500, short-500 and tune, of the
# earlier recipe; optimizer-h200 and main-h100, repeats on another GPU; batch-size-first, at higher rates;
# earlier-choice, at settings that more tuning replaced. rate-seeds has 72 runs at decays that are not chosen; `plan`
# leaves them out.
SWEEPS = {
    "recipe": ("validation", recipe, None),
    "augment": ("test", augment, None),
    "captured": ("test", captured, None),
    "fused": ("test", fused, None),
    **searching("search", "none"),
    **searching("search-augment", "flip+crop"),
    "rate": ("validation", rate, None),
    "rate-seeds": ("validation", rate_seeds, "rate"),
    "optimizer": ("test", optimizer, "rate-seeds"),
    **tuning("lead", CELLS),
    **tuning("lead-100", CELLS_100),
    **tuning("step", CELLS_STEP),
    **tuning("part", CELLS_PART),
    "time": ("test", time, "lead-edges"),
    "long-tune": ("validation", long_tune, None),
    "long": ("test", long, "long-tune"),
    "initial": ("validation", initial, None),
    "batch": ("test", batch, None),
    "batch-rate": ("validation", batch_rate, None),
    "batch-size": ("test", batch_size, "batch-rate"),
    "groups": ("test", group_counts, None),
    "layer": ("test", layer, None),
    "width": ("test", width, None),
    "epochs": ("test", epochs, None),
    "flip": ("test", flip, None),
}


# ---------------------------------------------------------------------------------------------------------------------
# What is there, what is missing, what was best
# ---------------------------------------------------------------------------------------------------------------------


def read_texts(path=RUNS):
    """Return the rows of results/runs.csv with all values as texts, `in_our_form`."""
    return in_our_form(records.read_rows(path, texts=True))


def in_our_form(rows):
    """Return rows of texts with the numbers of settings as `Experiment.columns` has them.

    pandas or a spreadsheet may have written 4.0 or 3E-05 for 4 or 3e-05.
    """
    for name, kind in [("train_images", int), *((field.name, field.type) for field in fields(Experiment))]:
        if name in rows and kind in (int, int | str, float, float | str):
            kind = int if kind in (int, int | str) else float
            rows[name] = [records.number_text(text, kind) for text in rows[name]]
    return rows


def plan(rows, sweeps=SWEEPS):
    """Return {sweep: its experiments} of some sweeps, each after the one that it needs, and the rows that count.

    rows  as `read_texts` returns them

    Of a sweep only rows of experiments that it lists count, on its split: no choice rests on those of an earlier plan.
    Of studies that are no sweep all rows do. None stands for the experiments of a sweep that waits for another's runs.
    ValueError, which names the sweep, when it can't be planned or lists a run twice.
    """
    listed = {}
    for sweep in sweeps:
        split, experiments, needed = SWEEPS[sweep]
        if needed and (listed[needed] is None or without_row(needed, listed[needed], rows)):
            listed[sweep] = None
        else:
            listed[sweep] = experiments_of(sweep, experiments, rows[rows["study"].isin(chain(sweep))])
        wanted = [tuple(one.columns().values()) for one in listed[sweep] or ()]
        left_out = rows["study"] == sweep
        own = rows[left_out]
        left_out[left_out] = (~settings_of(own).isin(wanted) | (own["split"] != split)).to_numpy()
        rows = rows[~left_out]
    return listed, rows


def experiments_of(sweep, function, rows):
    """Return what a sweep's function lists for the rows of its `chain`; ValueError, see `plan`."""
    try:
        found = function(rows)
    except ValueError as error:
        raise ValueError(f"sweep {sweep}: {error}") from None
    seen = set()
    for one in found:
        columns = tuple(one.columns().values())
        if columns in seen:
            raise ValueError(f"sweep {sweep} lists a run twice: {one}")
        seen.add(columns)
    return found


def settings_of(rows):
    """Return what tells apart the experiments of some rows, as `Experiment.columns` lists it: tuples of texts."""
    rows = rows.reindex(columns=Experiment().columns(), fill_value="")
    return pd.Series(rows.itertuples(index=False, name=None), rows.index, dtype=object)


def chain(sweep):
    """List the sweeps that this one needs, and itself."""
    needed = SWEEPS[sweep][2]
    return [*(chain(needed) if needed else ()), sweep]


def planned(sweep, rows):
    """List a sweep's experiments; none while the sweep that it needs is not finished."""
    return plan(rows, chain(sweep))[0][sweep] or []


def waits(sweep, rows):
    """Return whether the sweep that this one needs still has runs to do."""
    return plan(rows, chain(sweep))[0][sweep] is None


def missing(sweep, rows):
    """List the experiments of a sweep that `rows` do not hold."""
    return without_row(sweep, planned(sweep, rows), rows)


def unfinished(listed, rows):
    """List the sweeps of a `plan` that wait for others or miss runs."""
    return [sweep for sweep, found in listed.items() if found is None or without_row(sweep, found, rows)]


def without_row(sweep, wanted, rows):
    """List those of the experiments `wanted` that have no row of the sweep, on its split."""
    done = set(settings_of(rows[(rows["study"] == sweep) & (rows["split"] == SWEEPS[sweep][0])]))
    return [one for one in wanted if tuple(one.columns().values()) not in done]


def select(rows, **settings):
    """Select the rows that have these settings, a value each or several: select(rows, study="main"); "" finds nan, too.

    ValueError for a study without rows.
    """
    for name, value in settings.items():
        values = value if isinstance(value, tuple | list) else [value]
        for study in set(values).difference(rows["study"]) if name == "study" else ():
            raise ValueError(f"{study} has no finished runs; python -m experiments.run --dry-run says what is missing")
        rows = rows[rows[name].isin(values) | (rows[name].isna() & ("" in values))]
    return rows


def best_decays(rows):
    """List a SETTING for each optimizer, net and learning rate of `rate`: that with the best weight decay.

    There is none where all runs diverged.
    """
    accuracy = validation_means(rows[rows["study"] == "rate"], SETTING).dropna()
    return list(accuracy.groupby(SETTING[:-1]).idxmax())


def rate_runs(rows):
    """Return the runs of the studies of rates at `best_decays`. ValueError while one has fewer than three seeds."""
    chosen = pd.DataFrame(best_decays(rows), columns=SETTING)
    runs = select(rows, study=("rate", "rate-seeds")).merge(chosen, on=SETTING)
    check_seeds(runs, SETTING, 3)
    return runs


def best_settings(rows):
    """List the SETTING of each optimizer and net with the best mean over three seeds, of which none diverged."""
    return list(validation_means(rate_runs(rows), SETTING).dropna().groupby(SETTING[:2]).idxmax())
