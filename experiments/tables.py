"""Tables of what results/ holds: functions from rows to pandas DataFrames of numbers.

`rows` are those of results/runs.csv that count (`read_results`), one training run each. Accuracies are in percent,
differences in percentage points. A difference in column `x` has its 95% interval in the columns `x, low` and `x, high`;
`show` joins the three. Intervals and p values are Welch's: runs of two nets with the same seed are no more alike than
any others (`correlations`), so pairing them would gain nothing.
"""

import itertools
from decimal import ROUND_HALF_UP, Decimal

import numpy as np
import pandas as pd
from scipy import stats

from engine import records
from engine.files import read_bytes
from engine.statistics import contrast
from experiments import ROOT
from experiments.sweeps import (
    RECIPE,
    SETTING,
    STEPS,
    TYPES,
    best_settings,
    in_our_form,
    plan,
    rate_runs,
    select,
    unfinished,
)
from experiments.tuning import check_seeds, validation_means
from models import NORM_OF

RESULTS = ROOT / "results"
NORMS = ("batch", "layer", "group")
ALL = (*NORMS, "none")  # with the control: scale and shift, no statistics
OPTIMIZERS = {"sgd": "SGD", "adamw": "AdamW", "muon": "Muon"}
TUNED = {"sgdw": "SGD", "adamw": "AdamW", "muon": "Muon"}  # of the sweeps lead and lead-100: decoupled decay in all
CORNERS = [  # pairs whose leads `surface_contrasts` compares, as PLAN.md lists them
    (("SGD", 500), ("Muon", 500)),
    (("SGD", 64), ("Muon", 64)),
    (("SGD", 500), ("SGD", 64)),
    (("Muon", 500), ("Muon", 64)),
]
CHANCE = 10.0  # percent, with ten classes
LEADS = (("batch", "layer"), ("batch", "group"))


def read_results(name="runs"):
    """Read a CSV file of results/ as a DataFrame; of runs.csv what counts (`sweeps.plan`) of finished sweeps.

    OSError when it is absent, ValueError unless it is whole.
    """
    path = RESULTS / f"{name}.csv"
    if not path.exists():
        raise OSError(f"{path} is not there")
    content = read_bytes(path)
    rows = records.parse_rows(path, content)
    if name != "runs":
        return rows
    listed, counting = plan(in_our_form(records.parse_rows(path, content, texts=True)))
    return rows.loc[counting.index[~counting["study"].isin(unfinished(listed, counting))]]


def claim(text, condition):
    """Print `text` with a check mark when the rows support it; raise AssertionError with `text` when they do not."""
    if not bool(condition):
        raise AssertionError(f"the rows do not support: {text}")
    print(f"✓ {text}")


def present(tables):
    """Display tables in a notebook, each under its title: {title: table}."""
    from IPython.display import Markdown, display  # here: sweeps need neither

    for title, table in tables.items():
        display(Markdown(f"*{title}*"), table)


# ---------------------------------------------------------------------------------------------------------------------
# Numbers as text
# ---------------------------------------------------------------------------------------------------------------------

DIGITS = {
    "std": 2,
    "correlation": 2,
    "seconds per run": 1,
    "minutes": 0,
    "times faster, from": 1,
    "to": 1,
}  # of some columns, whatever `show` is told


def decimal_round(value, digits):
    """Round a number half up by its decimal value: 1.35 to 1.4, 0.775 to 0.78. Returns a Decimal, never -0.

    A mean of accuracies is a decimal, too, but the nearest binary number may lie just below a tie, and `round` and
    `format` then round it down. So what is beyond nine decimals counts as such an error.
    """
    rounded = Decimal(f"{value:.9f}").quantize(Decimal(1).scaleb(-digits), ROUND_HALF_UP)
    return rounded if rounded else abs(rounded)


def show(frame, digits=2):
    """Format a table for reading: numbers rounded to `digits` decimals, a difference and its interval in one column."""
    columns = {}
    for name in frame:
        if str(name).endswith((", low", ", high")):
            continue
        if f"{name}, low" in frame:
            triples = zip(frame[name], frame[f"{name}, low"], frame[f"{name}, high"], strict=True)
            columns[f"{name} (95% interval)"] = [interval_text(*triple, digits) for triple in triples]
        else:
            columns[name] = [number_text(name, value, DIGITS.get(name, digits)) for value in frame[name]]
    index = frame.index
    if index.nlevels > 1:
        index = index.set_levels([level.map(label_text) for level in index.levels])
    else:
        index = index.map(label_text)
    index = index.set_names([str(name or "").replace("_", " ") for name in frame.index.names])
    shown = pd.DataFrame(columns, index=index).rename(columns=label_text)
    return shown.rename_axis(columns=frame.columns.name and frame.columns.name.replace("_", " "))


def markdown(frame):
    """Write a DataFrame of text as a Markdown table."""
    frame = frame.reset_index().astype(str)
    head, *lines = ("| " + " | ".join(line) + " |" for line in [list(frame.columns), *frame.to_numpy().tolist()])
    return "\n".join([head, "|---" * frame.shape[1] + "|", *lines])


def interval_text(value, low, high, digits):
    """Format a difference and its interval, "+0.67 (+0.43 to +0.91)"; a dash for nan."""
    if np.isnan(value):
        return "-"
    value, low, high = (f"{decimal_round(one, digits):+}" if np.isfinite(one) else "" for one in (value, low, high))
    return f"{value} ({low} to {high})" if low else value


def number_text(name, value, digits):
    """Format one number of the column `name`; text stays as it is, and nan is a dash."""
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    if pd.isna(value):
        return "-"
    if str(name).startswith("p,"):
        return "< 0.001" if value < 0.001 else f"{decimal_round(value, 3)}"
    if str(name).replace("_", " ") in ("learning rate", "weight decay", "momentum", "label smoothing", "warmup"):
        return f"{value:g}"
    return f"{value:,}" if isinstance(value, int | np.integer) else f"{decimal_round(value, digits):,}"


def label_text(label):
    """Format a label of an axis: 48,042 and 0.1, text as it is."""
    if isinstance(label, int | np.integer):
        return f"{label:,}"
    return f"{label:g}" if isinstance(label, float) else label


# ---------------------------------------------------------------------------------------------------------------------
# Statistics
# ---------------------------------------------------------------------------------------------------------------------


def holm(p_values):
    """Correct p values for their number by Holm's method; nan stay nan and do not count."""
    from statsmodels.stats.multitest import multipletests  # here: sweeps need not wait for it to load

    corrected = np.array(p_values, dtype=float)
    known = ~np.isnan(corrected)
    if known.any():
        corrected[known] = multipletests(corrected[known], method="holm")[1]
    return corrected


def one_setting(runs):
    """Return runs. ValueError unless those of a norm are of one setting and each seed is there once."""
    check_seeds(runs, ["norm"])
    if mixed := records.mixed_settings(runs.drop(columns="study", errors="ignore"), "norm"):
        raise ValueError(f"runs differ in {', '.join(mixed)}; give runs of one setting")
    return runs


def samples(runs, column="test_accuracy"):
    """Collect a column of runs of `one_setting` as {norm: values}."""
    return {norm: own[column].to_numpy(float) for norm, own in one_setting(runs).groupby("norm")}


def moments(accuracies):
    """Mean, standard deviation and number of test accuracies; the first two are nan where a run diverged."""
    mean, std = accuracies.mean(skipna=False), accuracies.std(skipna=False)
    return {"test accuracy": mean, "std": std, "n": len(accuracies)}


def select_tuning(rows, sweep, **settings):
    """Select the runs on held-out images that chose the settings of one of `tuning`'s sweeps."""
    parts = [f"{sweep}-{part}" for part in ("rate", "decay", "seeds", "edges")]
    return select(rows[rows["study"].isin(parts)], **settings)


def columns_of(found, name):
    """Name the parts of a Contrast as a table's columns."""
    return {name: found.points, f"{name}, low": found.low, f"{name}, high": found.high}


# ---------------------------------------------------------------------------------------------------------------------
# The published recipe
# ---------------------------------------------------------------------------------------------------------------------

STUDIES = {"main": "no augmentation", "augment": "flip and crop"}  # of the published recipe
SEARCHES = {"search": "no augmentation", "search-augment": "flip and crop"}  # random recipes


def results(rows, study="main"):
    """Accuracy, parameters and time of each norm in a study of one setting, over its seeds.

    Times of several kinds of device can't be compared: then a column names each norm's.
    """
    lines, several = {}, (rows := select(rows, study=study))["device"].nunique() > 1
    for norm, runs in rows.groupby("norm"):
        test = samples(runs)[norm]
        lines[norm] = {
            "parameters": runs["parameters"].iloc[0],
            "test accuracy": test.mean(),
            "std": test.std(ddof=1) if len(test) > 1 else np.nan,
            "n": len(test),
            "train accuracy": runs["train_accuracy"].mean(skipna=False),
            "seconds per run": runs["seconds"].median(),
        }
        if several:
            lines[norm]["device"] = ", ".join(sorted(runs["device"].unique()))
    return pd.DataFrame.from_dict(lines, "index").reindex(NORMS).rename_axis("norm")


def readme_table(rows):
    """Write the results of the study main as README.md shows them, a Markdown table."""
    nets = {"batch": "NetA", "layer": "NetB", "group": "NetC"}
    shown = show(results(rows))
    lines = {
        "norm": [f"{norm} (`{nets[norm]}`)" for norm in shown.index],
        "parameters": shown["parameters"],
        "test accuracy, %": shown["test accuracy"] + " ± " + shown["std"],
        "training accuracy, %": shown["train accuracy"],
        "seconds per run": shown["seconds per run"],
    }
    return markdown(pd.DataFrame(lines).set_index("norm"))


def differences(rows, studies=tuple(STUDIES)):
    """Differences in test accuracy between the norms, with Holm's correction over all of the table."""
    lines = []
    for study, (first, second) in itertools.product(studies, (*LEADS, ("layer", "group"))):
        of = samples(select(rows, study=study))
        found = contrast(of[first], of[second])
        title = (STUDIES | SEARCHES).get(study.removesuffix("-best"), study)
        line = {"runs": title, "difference": f"{first} minus {second}"}
        lines.append(line | columns_of(found, "points") | {"n": len(of[first]), "p, Holm": found.p})
    table = pd.DataFrame(lines)
    table["p, Holm"] = holm(table["p, Holm"])
    return table.set_index(["runs", "difference"])


def augmentation_gain(rows):
    """How much flip and crop, with their own weight decay, add to each norm's test accuracy."""
    plain, augmented = (samples(select(rows, study=study)) for study in STUDIES)
    lines = {norm: columns_of(contrast(augmented[norm], plain[norm]), "points gained") for norm in NORMS}
    return pd.DataFrame.from_dict(lines, "index").rename_axis("norm")


def correlations(rows):
    """Correlation of two norms' test accuracies over the seeds, in each study with ten of them."""
    chosen = {f"published, {title}": select(rows, study=study) for study, title in STUDIES.items()}
    chosen |= {
        f"{OPTIMIZERS[name]}, its best setting": runs for name, runs in optimizer_runs(rows).groupby("optimizer")
    }
    lines = []
    for name, runs in chosen.items():
        accuracy = one_setting(runs).pivot(index="seed", columns="norm", values="test_accuracy")
        for first, second in itertools.combinations(NORMS, 2):
            found = stats.pearsonr(accuracy[first], accuracy[second])
            line = {"runs": name, "norms": f"{first} and {second}", "correlation": found.statistic}
            lines.append(line | {"n": len(accuracy), "p, Holm": found.pvalue})
    table = pd.DataFrame(lines)
    table["p, Holm"] = holm(table["p, Holm"])
    return table.set_index(["runs", "norms"])


def tuned(rows):
    """Each norm's best mean of three seeds on held-out images under Muon, by batch size, and where it was reached."""
    muon = {"norm": NORMS, "optimizer": "muon", "augment": "none"}
    runs, tried = select(rows, study="lead", **muon), select_tuning(rows, "lead", **muon)
    best = held_out(tried, runs, ["batch_size", "norm"])
    table = best["held-out"].unstack()[list(NORMS)]
    table["mean"] = table.mean(axis=1, skipna=False)
    for norm in NORMS:
        settings = best.xs(norm, level="norm")[["learning_rate", "weight_decay"]].to_numpy()
        table[f"{norm}: rate, decay"] = [f"{rate:g}, {decay:g}" for rate, decay in settings]
    return table


def held_out(tried, runs, keys):
    """Learning rate and weight decay of `runs` by `keys`, and their mean held-out accuracy, from `tried`.

    nan where that has fewer than three seeds of them. ValueError when `runs` are of two settings.
    """
    check_seeds(runs, keys)
    setting = [*keys, "learning_rate", "weight_decay"]
    means = validation_means(tried.groupby(setting, dropna=False).filter(lambda own: len(own) >= 3), setting)
    found = runs.drop_duplicates(keys)[setting].join(means.rename("held-out"), on=setting)
    return found.set_index(keys).sort_index()


def recipe_changes(rows):
    """Mean validation accuracy by norm and over norms, with the published settings changed one at a time, n = 3."""
    settings = ["augment", "weight_decay", "momentum", "label_smoothing", "warmup"]
    table = validation_means(select(rows, study="recipe"), [*settings, "norm"], seeds=3).unstack()
    table = table[list(NORMS)].rename_axis(index=lambda name: name.replace("_", " "))
    return table.assign(mean=table.mean(axis=1, skipna=False)).sort_values(
        ["augment", "mean"], ascending=[False, False]
    )


def fused_step(rows):
    """Test accuracy by the fused step minus that by PyTorch's kernels, in the earlier recipes, n seeds of each.

    The last line is the mean of the lines above, each a stratum of its own.
    """
    pairs = {}
    for augment, title in {"none": "no augmentation", "flip+crop": "flip and crop"}.items():
        of, captured = (
            samples(select(rows, study=studies, augment=augment))
            for studies in (("main-500", "augment-500", "fused"), "captured")
        )
        pairs |= {(title, norm): (of[norm], captured[norm]) for norm in NORMS}
    weights = [sign / len(pairs) for _ in pairs for sign in (1, -1)]
    found = {name: contrast(*pair) for name, pair in pairs.items()}
    found["all", "mean"] = contrast(*itertools.chain(*pairs.values()), weights=weights)
    table = pd.DataFrame([columns_of(one, "fused minus CUDA graph") for one in found.values()])
    table["n"] = [*(len(of) for of, _ in pairs.values()), sum(len(of) for of, _ in pairs.values())]
    return table.set_index(pd.MultiIndex.from_tuples(found, names=["runs", "norm"]))


def random_recipes(rows, search="search"):
    """Each net's best recipe of one of SEARCHES: three seeds on held-out images chose it, n have its test accuracy."""
    lines = []
    for norm in ALL:
        tried, seeds, best = (select(rows, study=f"{search}{part}", norm=norm) for part in ("", "-seeds", "-best"))
        check_seeds(best, ["norm"])
        recipe = best[RECIPE].iloc[0]
        line = {"norm": norm} | {name.replace("_", " "): TYPES[name](value) for name, value in recipe.items()}
        line["validation"] = validation_means(seeds, RECIPE, seeds=3).get(tuple(recipe), np.nan)
        line |= moments(best["test_accuracy"])
        lines.append(line | {"overflow": f"{(tried['status'] == 'diverged').sum()} of {len(tried)}"})
    table = pd.DataFrame(lines).set_index("norm")
    return table.drop(columns="crop") if search == "search" else table  # without augmentation it plays no part


def other_images(right, draws=10_000):
    """The published leads with three intervals: over seeds (Welch's), over test images, and over both.

    The last two are bootstraps, which draw images, or seeds and images, with replacement. Drawing both counts twice
    what a single seed does on a single image, so that interval is wider than need be.

    right  {net: bool of (seeds, N images)}, as `engine.records.read_right` returns it
    """
    generator = np.random.default_rng(0)
    right = {NORM_OF[net]: 100.0 * own for net, own in right.items()}
    stacked = np.concatenate(list(right.values()))
    images = stacked.shape[1]
    fixed, both = ({norm: np.empty(draws) for norm in right} for _ in range(2))
    for draw in range(draws):
        weights = np.bincount(generator.integers(images, size=images), minlength=images) / images
        for accuracies, (norm, own) in zip(np.split(stacked @ weights, len(right)), right.items(), strict=True):
            fixed[norm][draw] = accuracies.mean()
            both[norm][draw] = accuracies[generator.integers(len(own), size=len(own))].mean()
    lines = {}
    for first, second in (*LEADS, ("layer", "group")):
        line = columns_of(contrast(right[first].mean(1), right[second].mean(1)), "over seeds")
        for name, means in (("over images", fixed), ("over seeds and images", both)):
            low, high = np.quantile(means[first] - means[second], [0.025, 0.975])
            line |= {name: line["over seeds"], f"{name}, low": low, f"{name}, high": high}
        lines[f"{first} minus {second}"] = line
    return pd.DataFrame.from_dict(lines, "index").rename_axis("difference")


def both_gpus(rows):
    """The earlier recipe's runs on two kinds of GPU: how many, and how many have the same test accuracy on both."""
    keys = ["norm", "seed"]
    here, there = (select(rows, study=study).set_index(keys)["test_accuracy"] for study in ("main-500", "main-h100"))
    return pd.DataFrame({"runs": here.groupby("norm").size(), "alike": here.eq(there).groupby("norm").sum()})


def cost(rows):
    """Runs and minutes of one device that all of the rows took, by device."""
    by_device = rows.groupby("device")["seconds"]
    return pd.DataFrame({"runs": by_device.size(), "minutes": by_device.sum() / 60})


# ---------------------------------------------------------------------------------------------------------------------
# Optimizers: what was tuned for each pair of optimizer and net, and what came out on the test set
# ---------------------------------------------------------------------------------------------------------------------


def by_rate(runs):
    """Mean validation accuracy at each learning rate, of runs of one optimizer and net."""
    return validation_means(runs, ["learning_rate"])


def optimizer_runs(rows):
    """The runs of the study optimizer at `best_settings`, of each optimizer and net that has ten seeds or more."""
    chosen = pd.DataFrame(best_settings(rows), columns=SETTING)
    runs = select(rows, study="optimizer").merge(chosen, on=SETTING)
    check_seeds(runs, SETTING)
    return runs.groupby(SETTING).filter(lambda own: len(own) >= 10)


def optimizers(rows):
    """Each optimizer and norm: its best setting, and the accuracy there on validation, test and training images."""
    runs, validation = optimizer_runs(rows), validation_means(rate_runs(rows), ["optimizer", "norm", *SETTING[2:]])
    lines = []
    for name, norm in itertools.product(OPTIMIZERS, ALL):
        own = select(runs, optimizer=name, norm=norm)
        if own.empty:
            continue
        rate, decay = own["learning_rate"].iloc[0], own["weight_decay"].iloc[0]
        line = {"optimizer": OPTIMIZERS[name], "norm": norm, "learning rate": rate, "weight decay": decay}
        line |= {"validation": validation[name, norm, rate, decay]}
        if line["validation"] <= CHANCE + 1:  # all settings are as good
            line |= {"learning rate": np.nan, "weight decay": np.nan}
        line |= moments(own["test_accuracy"])
        lines.append(line | {"train accuracy": own["train_accuracy"].mean(skipna=False)})
    return pd.DataFrame(lines).set_index(["optimizer", "norm"])


def optimizer_leads(rows):
    """How far norms are apart on the test set under each optimizer, and how the gaps differ from those under Muon.

    A net that learned nothing is left out. Holm's correction is over all of the table.
    """
    of = {OPTIMIZERS[name]: samples(runs) for name, runs in optimizer_runs(rows).groupby("optimizer")}
    of = {
        name: {norm: own[norm] for norm in ALL if norm in own and not own[norm].mean() <= CHANCE + 1}
        for name, own in of.items()
    }
    lines = []
    for first, second in (*LEADS, *((norm, "none") for norm in NORMS)):
        there = [name for name in OPTIMIZERS.values() if name in of and {first, second} <= set(of[name])]
        found = {name: contrast(of[name][first], of[name][second]) for name in there}
        for name in there:
            if name != "Muon" and "Muon" in there:
                four = (of[one][norm] for one in (name, "Muon") for norm in (first, second))
                found[f"{name} minus Muon"] = contrast(*four, weights=(1, -1, -1, 1))
        for name, one in found.items():
            line = {"difference": f"{first} minus {second}", "optimizer": name}
            lines.append(line | columns_of(one, "points") | {"p, Holm": one.p})
    table = pd.DataFrame(lines)
    table["p, Holm"] = holm(table["p, Holm"])
    return table.set_index(["difference", "optimizer"])


def repeated(rows):
    """The same settings on two kinds of GPU: how far their mean test accuracies are apart, ten seeds each."""
    there, here = select(rows, study="optimizer-h200"), select(rows, study="optimizer")
    lines = []
    for (name, norm, *setting), own in there.groupby(["optimizer", "norm", *SETTING[2:]]):
        other = select(here, optimizer=name, norm=norm, learning_rate=setting[0], weight_decay=setting[1])
        if len(one_setting(own)) == len(one_setting(other)) == 10:
            found = contrast(own["test_accuracy"], other["test_accuracy"])
            lines.append({"optimizer": OPTIMIZERS[name], "norm": norm} | columns_of(found, "H200 minus H100"))
    return pd.DataFrame(lines).set_index(["optimizer", "norm"])


def initial_weights(rows):
    """The control's best validation accuracy from PyTorch's initial weights and from Kaiming's, by optimizer.

    From Kaiming's there is one weight decay; the best is over learning rates at which no seed overflowed.
    """
    tuned = validation_means(rate_runs(rows).query("norm == 'none'"), SETTING).groupby("optimizer").max()
    kaiming = validation_means(select(rows, study="initial"), ["optimizer", "learning_rate"], seeds=3)
    kaiming = kaiming.groupby("optimizer")
    table = pd.DataFrame({"PyTorch's": tuned, "Kaiming's": kaiming.max()})
    table["learning rate"] = kaiming.idxmax().map(lambda key: key[1])
    return table.reindex(OPTIMIZERS).rename(OPTIMIZERS).rename_axis("optimizer")


# ---------------------------------------------------------------------------------------------------------------------
# How wide an optimum is
# ---------------------------------------------------------------------------------------------------------------------


def ridge_length(rates, accuracies, points=1.0):
    """Length in decades of learning rate over which accuracy stays within `points` of its best, around the best.

    rates ascend; accuracies belong to them, -inf where runs overflowed. At each rate the weight decay is the best of
    those tried, so this is a length along the ridge of rate times decay, not a tolerance to the rate alone. Between
    two rates accuracy is taken to be linear in the rate's logarithm. Rates beyond the tried ones do not count.
    """
    logs, left = np.log10(rates), np.asarray(accuracies) - (np.max(accuracies) - points)
    low = high = int(np.argmax(left))
    while low > 0 and left[low - 1] >= 0:
        low -= 1
    while high < len(left) - 1 and left[high + 1] >= 0:
        high += 1
    start, end = logs[low], logs[high]
    if low > 0:
        start -= (logs[low] - logs[low - 1]) * left[low] / (left[low] - left[low - 1])
    if high < len(left) - 1:
        end += (logs[high + 1] - logs[high]) * left[high] / (left[high] - left[high + 1])
    return end - start


def ridge_is_open(accuracies, points=1.0):
    """Whether an end of the tried rates is on the ridge, so that `ridge_length` is a lower bound."""
    within = np.asarray(accuracies) >= np.max(accuracies) - points
    best = int(np.argmax(accuracies))
    return bool(within[: best + 1].all() or within[best:].all())


def ridges(rows, points=1.0):
    """How long each ridge of rate times decay is: by the mean of three seeds, and by each seed.

    "overflow" counts runs with a gradient beyond float16 in the grid of learning rates and weight decays, one seed.
    """
    runs, grid = rate_runs(rows), rows[rows["study"] == "rate"]
    lines = []
    for name, norm in itertools.product(OPTIMIZERS, ALL):
        own, tried = (select(part, optimizer=name, norm=norm) for part in (runs, grid))
        line = {"optimizer": OPTIMIZERS[name], "norm": norm, "validation": by_rate(own).max()}
        if line["validation"] > CHANCE + 1:
            rates = sorted(tried["learning_rate"].unique())
            curve, *of_seeds = (
                by_rate(part).reindex(rates).fillna(-np.inf).to_numpy()
                for part in (own, *(one for _, one in own.groupby("seed")))
            )
            lengths = [ridge_length(rates, one, points) for one in of_seeds]
            line |= {"ridge, decades": ridge_length(rates, curve, points), "open": ridge_is_open(curve, points)}
            line |= {"shortest of a seed": min(lengths), "longest of a seed": max(lengths)}
        lines.append(line | {"overflow": int((tried["status"] == "diverged").sum()), "tried": len(tried)})
    return pd.DataFrame(lines).set_index(["optimizer", "norm"])


def ridge_gaps(rows, thresholds=(0.5, 1.0, 2.0)):
    """How much longer batch norm's ridge is than layer norm's, beside how much the seeds of either differ."""
    lines = []
    for points in thresholds:
        table = ridges(rows, points)
        range_of = table["longest of a seed"] - table["shortest of a seed"]
        for name in OPTIMIZERS.values():
            gap = table["ridge, decades"][name, "batch"] - table["ridge, decades"][name, "layer"]
            seeds = max(range_of[name, "batch"], range_of[name, "layer"])
            line = {"optimizer": name, "within, points": points, "batch minus layer, decades": gap}
            lines.append(line | {"range over seeds": seeds, "seeds differ by more": seeds > abs(gap)})
    return pd.DataFrame(lines).set_index(["optimizer", "within, points"]).reindex(OPTIMIZERS.values(), level=0)


# ---------------------------------------------------------------------------------------------------------------------
# Sweeps under Muon
# ---------------------------------------------------------------------------------------------------------------------


def spread(runs, column):
    """Mean, lowest and highest test accuracy by a column, and the number of runs."""
    check_seeds(runs, [column])
    by_key = runs.groupby(column, sort=False, dropna=False)["test_accuracy"]
    means, lowest, highest = (by_key.agg(name, skipna=False) for name in ("mean", "min", "max"))
    return pd.DataFrame({"test accuracy": means, "lowest": lowest, "highest": highest, "n": by_key.size()})


def ghost_batches(rows):
    """Batch norm's accuracy by the images that its statistics are taken over; layer and group norm for comparison."""
    runs = select(rows, study="batch").sort_values(["statistics_batch", "net"])
    sizes = runs["statistics_batch"]
    names = runs["norm"].where(sizes.isna(), "batch, " + sizes.map("{:.0f} images".format))
    return spread(runs.assign(statistics=names), "statistics")


def groups(rows):
    """Group norm's accuracy by its number of groups; one for each channel is instance norm."""
    runs = select(rows, study="groups")
    return spread(runs.assign(groups=runs["groups"].astype(str)), "groups").sort_index().rename({"C": "one each"})


LAYER_KINDS = {  # (layer_variant of the rows, within 50,000 parameters): statistics over, scale and shift
    ("C,H,W", True): "C, H, W; per channel",
    ("C", True): "C of each pixel; per channel",
    ("[C,H,W]", False): "C, H, W; per position",
    ("[C,H,W]", True): "C, H, W; per position, narrower",
}


def layer_runs(rows):
    """The runs of the study layer, with one of `LAYER_KINDS` in the column kind."""
    runs = select(rows, study="layer")
    keys = zip(runs["layer_variant"], runs["parameters"] <= 50_000, strict=True)
    return runs.assign(kind=[LAYER_KINDS[key] for key in keys])


def layer_kinds(rows):
    """Layer norm's accuracy by the axes of its statistics and of its scale and shift."""
    runs = layer_runs(rows)
    table = spread(runs, "kind").reindex(LAYER_KINDS.values())
    table.insert(0, "parameters", runs.groupby("kind")["parameters"].first())
    return table.rename_axis("statistics; scale and shift")


def leads(runs, keys, column="test_accuracy"):
    """Mean accuracy of each norm by `keys` (columns of settings), and batch norm's leads with intervals."""
    lines = {}
    for key, own in runs.groupby(keys, dropna=False):
        of = samples(own, column)
        line = {"n": len(of["batch"])} | {norm: of[norm].mean() for norm in NORMS}
        for first, second in LEADS:
            line |= columns_of(contrast(of[first], of[second]), f"{first} minus {second}")
        lines[key] = line
    # Not from_dict, which loses lines whose key holds nan.
    index = pd.Index(lines, name=keys) if isinstance(keys, str) else pd.MultiIndex.from_tuples(lines, names=keys)
    return pd.DataFrame(list(lines.values()), index)


def surface(rows):
    """Batch norm's leads by data set, optimizer and batch size, at each norm's own tuned rate and decay.

    Columns as in `leads`, and the ratio of layer norm's errors to batch norm's.
    """
    table = leads(surface_runs(rows), ["dataset", "optimizer", "batch_size"])
    table["errors, layer to batch"] = (100 - table["layer"]) / (100 - table["batch"])
    return table.reindex(list(TUNED.values()), level="optimizer")


def surface_runs(rows):
    """The runs of `surface`, with the optimizers' names, without the control."""
    runs = select(rows, study=("lead", "lead-100"), augment="none", norm=NORMS)
    return runs.assign(optimizer=runs["optimizer"].map(TUNED))


def surface_contrasts(rows):
    """How leads differ between the corners of `surface`, with Holm's correction for each data set."""
    lines = {}
    for data, runs in surface_runs(rows).groupby("dataset"):
        of = {key: samples(own) for key, own in runs.groupby(["optimizer", "batch_size"])}
        for (one, other), (first, second) in itertools.product(CORNERS, LEADS):
            parts = [of[corner][norm] for corner in (one, other) for norm in (first, second)]
            found = contrast(*parts, weights=(1, -1, -1, 1))
            name = f"{one[0]} at {one[1]} minus {other[0]} at {other[1]}"
            lines[data, name, f"{first} minus {second}"] = columns_of(found, "points") | {"p, Holm": found.p}
    table = pd.DataFrame.from_dict(lines, "index").rename_axis(["dataset", "contrast", "lead"])
    table["p, Holm"] = table.groupby("dataset")["p, Holm"].transform(holm)
    return table


def without_norm(runs):
    """The control's test accuracy minus each norm's, in runs of one setting or of each net's best one."""
    of = samples(runs)
    lines = {norm: columns_of(contrast(of["none"], of[norm]), "none minus norm") for norm in NORMS}
    return pd.DataFrame.from_dict(lines, "index").rename_axis("norm")


def lead_changes(rows):
    """How the lead over layer norm changes from one batch size to another on CIFAR-10, by optimizer."""
    lines = {}
    for name, runs in select(surface_runs(rows), dataset="CIFAR-10").groupby("optimizer"):
        of = {size: samples(own) for size, own in runs.groupby("batch_size")}
        for small, large in ((64, 125), (125, 500), (500, 1000)):
            parts = [of[size][norm] for size in (large, small) for norm in ("batch", "layer")]
            found = contrast(*parts, weights=(1, -1, -1, 1))
            lines[name, f"{small} to {large:,}"] = columns_of(found, "change of the lead")
    table = pd.DataFrame.from_dict(lines, "index").rename_axis(["optimizer", "batch size"])
    return table.reindex(list(TUNED.values()), level="optimizer")


def controls(rows):
    """The control's test accuracy minus each norm's, in each sweep, batch size and optimizer where all were tuned."""
    runs, keys = select(rows, study="lead", augment="none"), ["study", "batch_size", "optimizer"]
    runs = runs.assign(optimizer=runs["optimizer"].map(TUNED))
    runs = pd.concat([runs, step_runs(rows).assign(optimizer=lambda own: own["step"])])
    lines = {}
    for key, own in runs.groupby(keys, sort=False):
        if "none" in set(own["norm"]):
            found = without_norm(own)
            line = {"n": len(select(own, norm="none"))}
            for norm in NORMS:
                line |= {name.replace("norm", norm): value for name, value in found.loc[norm].items()}
            lines[key] = line
    return pd.DataFrame.from_dict(lines, "index").rename_axis(["sweep", *keys[1:]]).sort_index()


def chosen(rows):
    """The learning rate that was chosen for each line of `surface`."""
    runs, keys = surface_runs(rows), ["dataset", "optimizer", "batch_size"]
    check_seeds(runs, [*keys, "norm"])
    table = runs.pivot_table("learning_rate", keys, "norm")[list(NORMS)]
    return table.reindex(list(TUNED.values()), level="optimizer").map("{:g}".format)


# ---------------------------------------------------------------------------------------------------------------------
# Parts: of Muon's step, of the norm; more epochs
# ---------------------------------------------------------------------------------------------------------------------


def step_runs(rows):
    """The runs on the test set that compare parts of Muon's step, with the steps' names."""
    runs = select(rows, study="step")
    return runs.assign(step=runs["optimizer"].map(STEPS))


def steps(rows):
    """Batch norm's leads by batch size and step, and the control's accuracy."""
    runs, keys = step_runs(rows), ["batch_size", "step"]
    table = leads(runs, keys)
    table.insert(4, "none", select(runs, norm="none").groupby(keys)["test_accuracy"].mean(skipna=False))
    return table.reindex(STEPS.values(), level="step")


def step_parts(rows):
    """The gap, momentum's lead minus Muon's; how much of it a step takes; that minus a half and a quarter of it."""
    lines = {}
    for size, runs in step_runs(rows).groupby("batch_size"):
        of = {step: samples(own) for step, own in runs.groupby("step")}
        for (first, second), step in itertools.product(LEADS, list(STEPS.values())[1:-1]):
            parts = [of[one][norm] for one in ("momentum", step, "Muon") for norm in (first, second)]
            line = columns_of(contrast(*parts[:2], *parts[-2:], weights=(1, -1, -1, 1)), "gap")
            for name, share in (("taken", 0.0), ("taken minus half", 0.5), ("taken minus a quarter", 0.25)):
                # momentum - step - share * (momentum - Muon), each of them first - second
                weights = [sign * one for one in (1 - share, -1, share) for sign in (1, -1)]
                line |= columns_of(contrast(*parts, weights=weights), name)
            lines[size, f"{first} minus {second}", step] = line
    return pd.DataFrame.from_dict(lines, "index").rename_axis(["batch_size", "lead", "step"])


def step_rates(rows):
    """Learning rates by step and norm: chosen, and the smallest and the largest tried that learned.

    To learn is not to overflow and to reach 60% on held-out images.
    """
    keys = ["batch_size", "optimizer", "norm"]
    tried = rows[rows["study"].isin(["step-rate", "step-edges"])]
    tried = tried[tried["validation_accuracy"] > 60].groupby(keys)["learning_rate"]
    chosen = step_runs(rows)
    check_seeds(chosen, keys)
    chosen = chosen.groupby(keys)["learning_rate"].first()
    table = pd.DataFrame({"chosen": chosen, "smallest": tried.min(), "largest": tried.max()}).unstack()
    table = table.swaplevel(axis=1)[list(ALL)].reindex(STEPS, level="optimizer").rename(STEPS, level="optimizer")
    return table.rename_axis(["batch size", "step"]).map("{:g}".format)


def edges(rows, sweeps=("lead", "lead-100", "step", "part")):
    """The chosen settings of `tuning`'s sweeps at an edge of what was tried: the smallest or the largest rate or decay.

    None, unless what lies beyond was not run. The decay of a rate at which only one was tried is not looked at.
    """
    keys = ["dataset", "augment", "optimizer", "batch_size", "net", "layer_variant", "convolution"]
    share = rows["weight_decay"] * rows["learning_rate"] * 50_000 / rows["batch_size"]
    rows = rows.assign(decay=share.map("{:.1g}".format).astype(float))
    rows[keys] = rows[keys].astype(object).where(rows[keys].notna(), "")
    lines = []
    for name in sweeps:
        runs, tried = select(rows, study=name), select_tuning(rows, name).groupby(keys)
        check_seeds(runs, keys)
        for key, own in runs.groupby(keys):
            rate, decay = own[["learning_rate", "decay"]].iloc[0]
            rates, decays = tried.get_group(key)["learning_rate"], tried.get_group(key)
            decays = decays[decays["learning_rate"] == rate]["decay"]
            at_edge = {
                "learning rate": rate in (rates.min(), rates.max()),
                "weight decay": decays.nunique() > 1 and decay in (decays.min(), decays.max()),
            }
            line = {"sweep": name, **dict(zip(keys, key, strict=True)), "learning rate": rate}
            lines += [line | {"at the edge": what} for what, found in at_edge.items() if found]
    return pd.DataFrame(lines)


PART_CONTRASTS = [(f"{norm}, standardized", norm) for norm in ALL] + [("RMS", "layer"), ("tanh", "none")]


def part_runs(rows):
    """The runs on the test set that compare parts of the norm, with `part_names`."""
    return part_names(select(rows, study="part"))


def part_names(runs):
    """Name runs of the sweep part or of its tuning by net: "layer", "layer, standardized", "RMS"."""
    runs = runs.assign(optimizer=runs["optimizer"].map(TUNED))
    names = runs["norm"].mask(runs["layer_variant"].isin(["RMS", "tanh"]), runs["layer_variant"])
    return runs.assign(net=names.mask(runs["convolution"].notna(), names + ", standardized"))


def parts(rows):
    """Accuracy of each net with a part of the norm, under Muon and SGD.

    Held-out: the mean of three seeds, which chose the setting; a dash where another setting was run on the test set.
    """
    keys = ["optimizer", "net"]
    runs, tried = part_runs(rows), part_names(select_tuning(rows, "part"))
    table, runs = held_out(tried, runs, keys)[["held-out"]], runs.groupby(keys)
    table["test accuracy"], table["std"] = (runs["test_accuracy"].agg(name, skipna=False) for name in ("mean", "std"))
    table["n"], table["train accuracy"] = runs.size(), runs["train_accuracy"].mean(skipna=False)
    return table.reindex([*ALL, *(name for name, _ in PART_CONTRASTS)], level="net")


def part_accuracies(rows):
    """Collect the test accuracies of `part_runs` as {optimizer: {net: values}}."""
    runs = part_runs(rows)
    check_seeds(runs, ["optimizer", "net"])
    return {
        name: {net: one["test_accuracy"].to_numpy() for net, one in own.groupby("net")}
        for name, own in runs.groupby("optimizer")
    }


def part_contrasts(rows):
    """What each part of the norm changes, in points of test accuracy, with Holm's correction for each optimizer."""
    lines = {}
    for name, of in part_accuracies(rows).items():
        for one, other in PART_CONTRASTS:
            found = contrast(of[one], of[other])
            lines[name, f"{one} minus {other}"] = columns_of(found, "points") | {"p, Holm": found.p}
    table = pd.DataFrame.from_dict(lines, "index").rename_axis(["optimizer", "difference"])
    table["p, Holm"] = table.groupby("optimizer")["p, Holm"].transform(holm)
    return table


def part_leads(rows):
    """Batch norm's leads without and with weight standardization, how much goes, and that minus a half."""
    lines = {}
    for (optimizer, of), (first, second) in itertools.product(part_accuracies(rows).items(), LEADS):
        without, both = ([of[f"{norm}{end}"] for norm in (first, second)] for end in ("", ", standardized"))
        line = columns_of(contrast(*without), "without") | columns_of(contrast(*both), "standardized")
        for name, part in (("goes", 1), ("goes minus half", 0.5)):
            line |= columns_of(contrast(*without, *both, weights=(part, -part, -1, 1)), name)
        lines[optimizer, f"{first} minus {second}"] = line
    return pd.DataFrame.from_dict(lines, "index").rename_axis(["optimizer", "lead"])


def epoch_runs(rows):
    """The runs of 20 and of 80 epochs at batches of 500, at the settings tuned for 20."""
    runs = select(rows, study=("lead", "time"), batch_size=500, augment="none", norm=NORMS, optimizer=("sgdw", "muon"))
    return runs.assign(optimizer=runs["optimizer"].map(TUNED))


def more_epochs(rows):
    """Batch norm's leads after 20 and after 80 epochs."""
    return leads(epoch_runs(rows), ["optimizer", "epochs"])


def epochs_gained(rows):
    """What 80 epochs change against 20: each norm's accuracy, and batch norm's leads."""
    lines = {}
    for name, runs in epoch_runs(rows).groupby("optimizer"):
        late, early = (samples(select(runs, epochs=count)) for count in (80, 20))
        for norm in NORMS:
            lines[name, norm] = columns_of(contrast(late[norm], early[norm]), "80 minus 20 epochs")
        for first, second in LEADS:
            parts = late[first], late[second], early[first], early[second]
            found = contrast(*parts, weights=(1, -1, -1, 1))
            lines[name, f"{first} minus {second}"] = columns_of(found, "80 minus 20 epochs")
    return pd.DataFrame.from_dict(lines, "index").rename_axis(["optimizer", "of"])


def budget(rows, column):
    """The runs of a sweep: by "parameters", "epochs" or "batch_size"."""
    if column == "batch_size":  # those of 500 are the study epochs' own
        return pd.concat([select(rows, study="batch-size"), select(rows, study="epochs", epochs=20)])
    return select(rows, study={"parameters": "width", "epochs": "epochs"}[column])


def augmentation(rows):
    """Accuracy, distance between training and test accuracy, and leads, by weight decay and augmentation.

    All by PyTorch's kernels: the study flip is from before the fused step.
    """
    runs = select(rows, study=("captured", "flip"))
    keys = ["augment", "weight_decay"]
    gaps = (runs["train_accuracy"] - runs["test_accuracy"]).groupby([runs[name] for name in [*keys, "norm"]])
    gaps = gaps.agg(lambda values: values.mean(skipna=False)).unstack()[list(NORMS)]
    table = leads(runs, keys).join(gaps.add_suffix(", train minus test"))
    return table.reindex(["none", "flip", "flip+crop"], level=0).rename_axis(["augmentation", "weight decay"])


# ---------------------------------------------------------------------------------------------------------------------
# Speed and tests
# ---------------------------------------------------------------------------------------------------------------------

PATHS = {  # of results/bench.csv, in the order of the table
    "plain-0": "plain loop, no workers",
    "plain-4": "plain loop, 4 workers",
    "eager": "eager",
    "captured": "CUDA graph",
    "captured-3": "CUDA graph, 3 runs at once",
    "fused": "fused step",
    "fused-125": "fused step, batch 125",
    "fused-250": "fused step, batch 250",
    "fused-3": "fused step, 3 runs at once",
}


def speed(bench):
    """Seconds per epoch by device and way of training, and how many times faster than the plain loop of 4 workers."""
    bench = bench[bench["path"].isin(PATHS)]
    norms = {"NetA": "batch", "NetB": "layer", "NetC": "group"}
    table = bench.pivot(index=["device", "path"], columns="net", values="seconds_per_epoch").rename(columns=norms)
    by_path = bench.groupby(["device", "path"])["ratio_plain_4"]
    table = table.join(by_path.agg(["min", "max"]).set_axis(["times faster, from", "to"], axis=1))
    order = sorted(table.index, key=lambda key: (key[0].startswith("cpu"), list(PATHS).index(key[1])))
    return table.loc[order].rename(PATHS, level=1).rename_axis(columns=None)


def sweep_speed(bench):
    """Runs of 20 epochs a minute that `experiments.run` trains on one GPU and on two of one host, at batches of 64.

    Of the sweep lead, from the rows' arrival: twelve runs at a time on each GPU, compilation apart. Measured once.
    """
    bench = bench[bench["path"].str.startswith("sweep-")]
    minute = 60 / bench.set_index(bench["path"].str.removeprefix("sweep-").rename("GPUs"))["run_seconds"]
    return pd.DataFrame({"runs per minute": minute, "times one GPU": minute / minute["1"]})


def mutations(rows):
    """Guards that were taken out of the code one at a time, by the file of the test that then failed."""
    counts = rows["test"].str.split("::").str[0].value_counts().rename("guards").rename_axis("tests")
    return pd.concat([counts, pd.Series({"in all": len(rows)}, name="guards").rename_axis("tests")]).to_frame()
