"""What the tables compute, held against plain arithmetic and SciPy."""

import itertools
from decimal import Decimal

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from engine import records
from engine.statistics import contrast
from experiments import figures, sweeps, tables, tuning
from experiments.tables import decimal_round, show

ROWS = tables.read_results()
NETS = {"NetA": "batch", "NetB": "layer", "NetC": "group", "Net": "none"}


@pytest.mark.parametrize(
    ("table", "study"),
    [
        (tables.ghost_batches, "batch"),
        (tables.groups, "groups"),
        (tables.layer_kinds, "layer"),
        (tables.parts, "part"),
        (tables.steps, "step"),
    ],
)
def test_no_mean_leaves_out_a_run_that_diverged(table, study):
    whole = table(ROWS)
    name = "none" if table is tables.steps else "test accuracy"
    assert whole[name].notna().all()
    first = ROWS.index[(ROWS["study"] == study) & ((ROWS["norm"] == "none") | (table is not tables.steps))][0]
    changed = ROWS.assign(test_accuracy=ROWS["test_accuracy"].mask(ROWS.index == first))
    assert table(changed)[name].isna().sum() == 1


def test_moments_leave_out_no_run_that_diverged():
    moments = tables.moments(pd.Series([86.0, np.nan]))
    assert np.isnan(moments["test accuracy"])
    assert np.isnan(moments["std"])
    assert moments["n"] == 2


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        ((87.7 + 87.75 + 87.45) / 3 - (86.2 + 86.35 + 86.3) / 3, 1, "1.4"),  # 1.35, in floats below it
        (1.35, 1, "1.4"),
        (0.775, 2, "0.78"),
        (2.675, 2, "2.68"),
        (-1.35, 1, "-1.4"),
        (0.774999, 2, "0.77"),
        (-0.001, 2, "0.00"),
        (86.7, 2, "86.70"),
    ],
)
def test_ties_are_rounded_by_their_decimal_value(value, digits, text):
    assert str(decimal_round(value, digits)) == text


def test_ties_of_the_published_rows():
    """Exact sums of the rows' own digits: the leads that binary floats rounded down."""

    def mean(**settings):
        values = [Decimal(str(value)) for value in tables.select(ROWS, **settings)["test_accuracy"]]
        return sum(values) / len(values)

    late, augmented = (
        {"study": "epochs", "epochs": 40},
        {"study": "captured", "augment": "flip+crop", "seed": [*range(10)]},
    )
    assert mean(norm="batch", **late) - mean(norm="layer", **late) == Decimal("1.35")
    assert mean(norm="batch", **augmented) - mean(norm="layer", **augmented) == Decimal("0.775")
    epochs = show(tables.leads(tables.budget(ROWS, "epochs"), "epochs"), 1)
    assert epochs["batch minus layer (95% interval)"].iloc[-1].startswith("+1.4 (")
    shown = show(tables.differences(tables.select(ROWS, **augmented), ["captured"]))
    assert shown.loc[("captured", "batch minus layer")].iloc[0].startswith("+0.78 (")


def test_a_claim_prints_its_sentence_or_raises(capsys):
    tables.claim("two is more than one", np.bool_(2 > 1))
    assert capsys.readouterr().out == "✓ two is more than one\n"
    with pytest.raises(AssertionError, match="the rows do not support: one is more than two"):
        tables.claim("one is more than two", np.bool_(1 > 2))
    with pytest.raises(ValueError, match="ambiguous"):
        tables.claim("each of them is", pd.Series([True, False]))


def test_holm_multiplies_by_the_number_that_is_left():
    assert tables.holm([0.01, np.nan, 0.04, 0.03]) == pytest.approx([0.03, np.nan, 0.06, 0.06], nan_ok=True)


def test_a_seed_that_is_there_twice_is_refused():
    runs = pd.DataFrame({"norm": "batch", "seed": [0, 1, 1], "test_accuracy": [1.0, 2.0, 3.0]})
    with pytest.raises(ValueError, match="seed 1 of batch is there twice"):
        tables.samples(runs)


@pytest.mark.parametrize(
    "table", [tables.results, tables.differences, tables.augmentation_gain, tables.correlations, figures.plot_accuracy]
)
@pytest.mark.parametrize("change", [{"learning_rate": 0.5}, {"dataset": "CIFAR-100"}, {"split": "validation"}])
def test_a_new_seed_of_another_setting_is_not_pooled(table, change):
    """The study main is no sweep, which would list its runs."""
    other = ROWS[(ROWS["study"] == "main") & (ROWS["net"] == "NetB")].iloc[:1].assign(seed=10, **change)
    with pytest.raises(ValueError, match=rf"^runs differ in {next(iter(change))}; give runs of one setting$"):
        table(pd.concat([ROWS, other]))


def test_a_variant_is_set_beside_runs_without_it():
    """Which have nan in its column."""
    runs = tables.part_runs(ROWS)
    runs = runs[(runs["optimizer"] == "Muon") & (runs["layer_variant"].isin(["C,H,W"]) | (runs["norm"] != "layer"))]
    found = tables.leads(runs, ["convolution"])
    assert len(found) == 2
    assert found.index.get_level_values(0).isna().tolist() == [False, True]
    assert len(tables.spread(runs[runs["norm"] == "batch"], "convolution")) == 2
    numbers = runs.assign(dropout=np.where(runs["convolution"].isna(), np.nan, 0.1), convolution="")
    assert tables.leads(numbers, ["dropout"]).to_numpy().tolist() == found.to_numpy().tolist()
    assert len(tables.select(ROWS, study="part", convolution="")) == len(ROWS.query("study == 'part'")) - len(
        tables.select(ROWS, study="part", convolution="standardized")
    )
    alone = pd.DataFrame({"k": [np.nan, "a", "a", "a"], "seed": [0, 0, 1, 2], "validation_accuracy": [80.0, 1, 2, 3]})
    assert tuning.validation_means(alone, ["k"]).tolist() == [2.0, 80.0]
    with pytest.raises(ValueError, match=r"^nan has 1 of 3 seeds; run what is missing of its sweep first$"):
        tuning.check_seeds(alone, ["k"], 3)


def test_rates_are_shown_whole_whatever_the_column_is_called():
    frame = pd.DataFrame({"learning_rate": [0.003], "weight decay": [0.167], "other": [0.167]})
    assert show(frame).iloc[0].tolist() == ["0.003", "0.167", "0.17"]


def test_repeats_of_two_settings_are_not_pooled():
    rows = ROWS.copy()
    rows.loc[(rows["study"] == "optimizer-h200") & (rows["seed"] >= 5), "epochs"] = 40
    tables.repeated(ROWS)
    with pytest.raises(ValueError, match=r"^runs differ in epochs; give runs of one setting$"):
        tables.repeated(rows)


@pytest.mark.parametrize(
    ("table", "study"),
    [
        (tables.parts, "part"),
        (tables.part_contrasts, "part"),
        (tables.part_leads, "part"),
        (tables.ghost_batches, "batch"),
        (tables.groups, "groups"),
        (tables.layer_kinds, "layer"),
        (tables.recipe_changes, "recipe"),
        (tables.random_recipes, "search-best"),
    ],
)
def test_no_table_pools_two_settings_of_a_net(table, study):
    other = ROWS[ROWS["study"] == study].iloc[:1].assign(learning_rate=0.5)
    table(ROWS)
    with pytest.raises(ValueError, match=r"^seed \d of .* is there twice; give runs of one setting$"):
        table(pd.concat([ROWS, other]))


def test_tables_take_no_rows_of_an_earlier_plan(tmp_path, monkeypatch):
    """Nor of a sweep that is not finished; what needs it says so in one line."""
    whole = records.read_rows(tables.RESULTS / "runs.csv")
    other = whole[whole["study"] == "part"].iloc[:1].assign(learning_rate=0.5)
    records.upsert(tmp_path / "runs.csv", pd.concat([whole, other]).astype(object).fillna(""))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    rows = tables.read_results()
    assert len(whole) - len(rows) == 72  # of rate-seeds, at decays that are not chosen
    assert 0.5 not in set(rows[rows["study"] == "part"]["learning_rate"])
    pd.testing.assert_frame_equal(tables.parts(rows), tables.parts(ROWS))
    first = whole.index[whole["study"] == "part"][0]
    records.upsert(tmp_path / "fewer" / "runs.csv", whole.drop(first).astype(object).fillna(""))
    monkeypatch.setattr(tables, "RESULTS", tmp_path / "fewer")
    rows = tables.read_results()
    assert set(ROWS["study"]) - set(rows["study"]) == {"part"}
    with pytest.raises(ValueError, match=r"^part has no finished runs; python -m experiments.run --dry-run says what"):
        tables.parts(rows)


def test_tables_and_the_runner_agree_on_what_is_finished(tmp_path, monkeypatch):
    """Also where a variant's texts look like numbers, which a table reads as such."""
    whole = records.read_rows(tables.RESULTS / "runs.csv", texts=True)
    layers = sweeps.layer(None)
    monkeypatch.setitem(sweeps.SWEEPS, "layer", ("test", lambda rows: layers, None))
    for number, one in enumerate(layers):
        object.__setattr__(one, "convolution", str(number % 3))
    first = whole[whole["study"] == "layer"].iloc[0].to_dict()
    rows = pd.DataFrame([first | one.columns() for one in layers])
    records.upsert(tmp_path / "runs.csv", pd.concat([whole[whole["study"] != "layer"], rows]))
    assert sweeps.missing("layer", sweeps.read_texts(tmp_path / "runs.csv")) == []
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert (tables.read_results()["study"] == "layer").sum() == len(layers)


def test_of_two_best_settings_that_which_was_tested_is_shown():
    tried = tables.select_tuning(ROWS, "lead", optimizer="muon", batch_size=250, norm="batch", augment="none")
    seeds = tried.groupby("weight_decay").filter(lambda own: len(own) >= 3)
    other = tried.index.isin(seeds.index) & (tried["weight_decay"] < 0.167)
    assert other.sum() == 3
    best = seeds[seeds["weight_decay"] == 0.167]["validation_accuracy"]
    changed = ROWS.copy()
    changed.loc[tried.index[other], "validation_accuracy"] = best.to_numpy()
    pd.testing.assert_frame_equal(tables.tuned(changed), tables.tuned(ROWS))


def test_differences_of_the_published_rows():
    """Plain sums, SciPy's Welch test and Holm's steps by hand."""
    table, p_values = tables.differences(ROWS), []
    for (title, pair), line in table.iterrows():
        study = {"no augmentation": "main", "flip and crop": "augment"}[title]
        first, second = (
            ROWS[(ROWS["study"] == study) & (ROWS["norm"] == norm)]["test_accuracy"] for norm in pair.split(" minus ")
        )
        test = stats.ttest_ind(first, second, equal_var=False)
        low, high = test.confidence_interval()
        assert line["points"] == pytest.approx(sum(first) / 10 - sum(second) / 10)
        assert (line["points, low"], line["points, high"]) == pytest.approx((low, high))
        p_values.append(test.pvalue)
    largest = 0
    for rank, place in enumerate(np.argsort(p_values)):
        largest = max(largest, min(1, p_values[place] * (6 - rank)))
        assert table["p, Holm"].iloc[place] == pytest.approx(largest)


def test_results_of_the_published_rows():
    table = tables.results(ROWS)
    for norm in ("batch", "layer", "group"):
        own = ROWS[(ROWS["study"] == "main") & (ROWS["norm"] == norm)]
        values = own["test_accuracy"].tolist()
        mean = sum(values) / 10
        std = (sum((value - mean) ** 2 for value in values) / 9) ** 0.5
        assert table.loc[norm, ["test accuracy", "std", "n"]].tolist() == pytest.approx([mean, std, 10])
        assert f"| {decimal_round(mean, 2)} ± {decimal_round(std, 2)} |" in tables.readme_table(ROWS)


def test_results_of_several_kinds_of_device_name_them():
    """Their times can't be compared."""
    assert "device" not in tables.results(ROWS)
    devices = tables.results(ROWS, "long")["device"]
    assert devices["batch"] == devices["layer"] == "NVIDIA H200" != devices["group"]
    one = ROWS.assign(device=ROWS["device"].where(ROWS["seed"] != 1, "a GPU"))
    assert tables.results(one)["device"].tolist() == ["NVIDIA H100 80GB HBM3, a GPU"] * 3


def test_leads_are_taken_setting_by_setting():
    runs = pd.DataFrame(
        {"epochs": epochs, "norm": norm, "seed": seed, "test_accuracy": base + lead * epochs + seed}
        for epochs, (norm, base, lead), seed in itertools.product(
            (1, 2), (("batch", 80, 2), ("layer", 80, 1), ("group", 79, 1)), range(3)
        )
    )
    table = tables.leads(runs, "epochs")
    assert table["batch minus layer"].tolist() == pytest.approx([1, 2])
    assert table["batch minus group"].tolist() == pytest.approx([2, 3])
    assert table["group"].tolist() == pytest.approx([81, 82])
    assert table["n"].tolist() == [3, 3]


def test_a_table_is_shown_with_its_intervals_joined():
    frame = pd.DataFrame(
        {
            "n": [3, 12_345],
            "lead": [1.35, np.nan],
            "lead, low": [0.951, np.nan],
            "lead, high": [1.75, np.nan],
            "std": [0.125, np.nan],
            "p, Holm": [0.0004, 0.0451],
            "open": [True, False],
            "learning rate": [0.0005, 1.0],
        },
        index=pd.Index([0.5, 1.0], name="weight_decay"),
    )
    shown = show(frame, 1)
    assert shown.index.tolist() == ["0.5", "1"]
    assert shown.index.name == "weight decay"
    assert shown.iloc[0].tolist() == ["3", "+1.4 (+1.0 to +1.8)", "0.13", "< 0.001", "yes", "0.0005"]
    assert shown.iloc[1].tolist() == ["12,345", "-", "-", "0.045", "no", "1"]
    assert shown.columns[1] == "lead (95% interval)"
    assert tables.markdown(shown[["n"]]) == "| weight decay | n |\n|---|---|\n| 0.5 | 3 |\n| 1 | 12,345 |"


RATES = [1e-4, 1e-3, 1e-2, 1e-1, 1.0]


@pytest.mark.parametrize(
    ("accuracies", "decades"),
    [
        ([70, 80, 80.5, 80, 70], 2 + 2 * 0.5 / 10),  # above 79.5: two whole decades and a bit of two others
        ([80, 79, 60, 81, 79], 1 / 21 + 1 / 2),  # in one piece around the best
        ([60, 70, 80, 90, 100], 1 / 10),
        ([100, 50, 0, 0, 0], 1 / 50),
        ([80, 80, 80, 80, 80], 4),
        ([70, 80, 80, 80, -np.inf], 2 + 1 / 10),  # where runs overflowed it ends
    ],
)
def test_ridge_length(accuracies, decades):
    assert tables.ridge_length(RATES, accuracies) == pytest.approx(decades)


def test_a_ridge_is_open_at_either_end_of_the_rates():
    assert tables.ridge_is_open([70, 75, 80])
    assert tables.ridge_is_open([80, 75, 70])
    assert not tables.ridge_is_open([70, 80, 70])
    assert not tables.ridge_is_open([70, 75, 80, -np.inf])


@pytest.fixture
def swept():
    """Made-up rows of the sweeps of optimizers: batch norm leads layer norm by 5 under SGD, by 1 under Muon.

    The best rate is 0.1, the best decay 0, but 0.5 under SGD at a rate of 1. The control stays at chance under SGD.
    """
    lead = {("sgd", "NetA"): 5.0, ("muon", "NetA"): 1.0, ("sgd", "NetC"): 2.0}

    def accuracy(net, name, rate, decay):
        if (net, name) == ("Net", "sgd"):
            return 10.0
        better = 0.5 if (name, rate) == ("sgd", 1.0) else 0.0
        return 80 + lead.get((name, net), 0) - 2 * abs(np.log10(rate) + 1) - abs(decay - better)

    def run(study, net, name, rate, decay, seed, **accuracies):
        row = {"study": study, "net": net, "norm": NETS[net], "optimizer": name, "learning_rate": rate}
        return row | {"weight_decay": decay, "seed": seed, "status": "done"} | accuracies

    rates = (0.01, 0.1, 1.0)
    rows = [
        run("rate", *setting, 0, validation_accuracy=accuracy(*setting))
        for setting in itertools.product(NETS, tables.OPTIMIZERS, rates, (0.0, 0.5))
    ]
    for net, name, rate, seed in itertools.product(NETS, tables.OPTIMIZERS, rates, (1, 2)):
        decay = 0.5 if (name, rate) == ("sgd", 1.0) and net != "Net" else 0.0
        value = accuracy(net, name, rate, decay)
        rows.append(run("rate-seeds", net, name, rate, decay, seed, validation_accuracy=value))
    order = np.random.default_rng(0)
    for net, name in itertools.product(NETS, tables.OPTIMIZERS):
        rate, stuck = (0.01, True) if (net, name) == ("Net", "sgd") else (0.1, False)
        for seed, extra in enumerate(order.permutation(10)):
            score = 10.0 if stuck else 80 + lead.get((name, net), 0) + 0.1 * extra
            scores = {"test_accuracy": score, "train_accuracy": score + 10}
            rows.append(run("optimizer", net, name, rate, 0.0, seed, **scores))
    return pd.DataFrame(rows)


def test_each_optimizer_is_shown_at_its_best_setting(swept):
    table = tables.optimizers(swept)
    line = table.loc[("SGD", "batch")]
    assert line[["learning rate", "weight decay", "validation", "test accuracy", "n"]].tolist() == pytest.approx(
        [0.1, 0, 85, 85.45, 10]
    )
    assert line["std"] == pytest.approx(np.std(np.arange(10) / 10, ddof=1))
    assert table.loc[("SGD", "none"), "validation"] == 10
    assert np.isnan(table.loc[("SGD", "none"), "learning rate"])  # it learned nothing at any


def test_leads_by_optimizer_and_how_they_differ(swept):
    points = tables.optimizer_leads(swept)["points"]
    assert points["batch minus layer"].to_dict() == pytest.approx(
        {"SGD": 5, "AdamW": 0, "Muon": 1, "SGD minus Muon": 4, "AdamW minus Muon": -1}, abs=1e-9
    )
    assert set(points["layer minus none"].index) == {
        "AdamW",
        "Muon",
        "AdamW minus Muon",
    }  # it learned nothing under SGD


def test_a_pair_without_ten_seeds_is_left_out(swept):
    one = (swept["study"] == "optimizer") & (swept["net"] == "NetA") & (swept["optimizer"] == "sgd")
    rows = swept[~(one & (swept["seed"] == 7))]
    assert ("SGD", "batch") not in tables.optimizers(rows).index
    points = tables.optimizer_leads(rows)["points"]
    assert set(points["batch minus layer"].index) == {"AdamW", "Muon", "AdamW minus Muon"}


def test_ridges_take_the_best_decay_at_each_rate(swept):
    table = tables.ridges(swept)
    assert table.loc[("SGD", "batch"), ["validation", "ridge, decades"]].tolist() == pytest.approx([85, 1.0])
    assert (table.loc["Muon", "shortest of a seed"] == table.loc["Muon", "longest of a seed"]).all()
    assert np.isnan(table.loc[("SGD", "none"), "ridge, decades"])
    assert (table["tried"] == 6).all()


def test_a_run_that_overflowed_is_counted_and_ends_the_ridge(swept):
    first = (swept["study"] == "rate") & (swept["net"] == "NetC") & (swept["learning_rate"] == 1.0)
    rows = swept.assign(
        validation_accuracy=swept["validation_accuracy"].where(~first),
        status=swept["status"].where(~first, "diverged"),
    )
    line = tables.ridges(rows).loc[("Muon", "group")]
    assert (line["overflow"], line["ridge, decades"]) == pytest.approx((2, 0.5))


def test_seeds_are_weighed_against_nets_at_each_threshold(swept):
    one = swept["study"].str.startswith("rate") & (swept["net"] == "NetA") & (swept["optimizer"] == "muon")
    noisy = swept["validation_accuracy"].where(~(one & (swept["seed"] == 1) & (swept["learning_rate"] != 0.1)), 79.5)
    gaps = tables.ridge_gaps(swept.assign(validation_accuracy=noisy))
    assert gaps.loc[("AdamW", 1.0), ["batch minus layer, decades", "range over seeds"]].tolist() == pytest.approx(
        [0, 0]
    )
    assert gaps.loc[("Muon", 2.0), "seeds differ by more"] == (
        gaps.loc[("Muon", 2.0), "range over seeds"] > abs(gaps.loc[("Muon", 2.0), "batch minus layer, decades"])
    )
    assert gaps.loc[("Muon", 1.0), "range over seeds"] > 0
    assert gaps.index.get_level_values(0).unique().tolist() == ["SGD", "AdamW", "Muon"]


def test_augmentation_joins_three_studies_and_takes_distances():
    table = tables.augmentation(ROWS)
    own = ROWS[(ROWS["study"] == "flip") & (ROWS["augment"] == "none") & (ROWS["norm"] == "layer")]
    distance = (own["train_accuracy"] - own["test_accuracy"]).mean()
    assert table.loc[("none", 0.1), "layer, train minus test"] == pytest.approx(distance)
    assert table["n"].tolist() == [3, 20, 3, 3, 20, 3]


def test_ghost_batches_and_kinds_hold_three_runs_each():
    for table in (tables.ghost_batches(ROWS), tables.groups(ROWS), tables.layer_kinds(ROWS)):
        assert (table["n"] == 3).all()
        assert ((table["lowest"] < table["test accuracy"]) & (table["test accuracy"] < table["highest"])).all()
    assert tables.layer_kinds(ROWS)["parameters"].tolist() == [48_042, 48_042, 195_066, 49_880]


def test_mutations_are_counted_by_test_file():
    rows = pd.DataFrame({"test": ["test_a.py::test_x", "test_b.py", "test_a.py::test_y"]})
    assert tables.mutations(rows)["guards"].to_dict() == {"test_a.py": 2, "test_b.py": 1, "in all": 3}


def test_speed_is_compared_with_the_plain_loop():
    bench = pd.DataFrame(
        {"device": "gpu", "path": path, "net": net, "seconds_per_epoch": seconds, "ratio_plain_4": ratio}
        for path, net, seconds, ratio in (
            ("plain-4", "NetA", 3.0, np.nan),
            ("captured", "NetA", 0.2, 15.0),
            ("captured", "NetC", 0.3, 10.0),
            ("scale", "NetA", 0.1, np.nan),
        )
    )
    line = tables.speed(bench).loc[("gpu", "CUDA graph")]
    assert line[["batch", "group", "times faster, from", "to"]].tolist() == [0.2, 0.3, 10.0, 15.0]
    assert len(tables.speed(bench)) == 2


def lead_rows():
    """Made-up runs of the sweeps lead and lead-100: batch norm is ahead by 1 at 64 and by 4 at 500, by 2 with Muon."""
    found = []
    for study, data in (("lead", "CIFAR-10"), ("lead-100", "CIFAR-100")):
        for name, size, seed in itertools.product(("sgdw", "muon"), (64, 500), range(4)):
            ahead = 2 if name == "muon" else {64: 1, 500: 4}[size]
            for norm, level in {"batch": 70 + ahead, "layer": 70, "group": 70.5, "none": 69}.items():
                row = {"study": study, "dataset": data, "optimizer": name, "batch_size": size, "augment": "none"}
                row |= {"norm": norm, "seed": seed, "test_accuracy": level + 0.01 * (seed + len(norm)) ** 2 % 0.2}
                found.append(row | {"learning_rate": {"batch": 0.3}.get(norm, 0.03)})
    return pd.DataFrame(found)


def test_leads_by_optimizer_and_batch_size():
    rows = lead_rows()
    augmented = rows.assign(augment="flip+crop", test_accuracy=0.0)
    table = tables.surface(pd.concat([rows, augmented]))
    assert list(table.index.droplevel(2).unique()) == [
        (data, name) for data in ("CIFAR-10", "CIFAR-100") for name in ("SGD", "Muon")
    ]
    assert table["batch minus layer"].tolist() == pytest.approx([1, 4, 2, 2] * 2, abs=0.2)
    errors = (100 - table["layer"]) / (100 - table["batch"])
    assert table["errors, layer to batch"].tolist() == pytest.approx(errors.tolist())
    assert (table["n"] == 4).all()
    assert tables.chosen(rows)["batch"].unique().tolist() == ["0.3"]


def test_leads_are_compared_between_corners_with_holms_correction():
    table = tables.surface_contrasts(lead_rows())
    points = table["points"].xs("batch minus layer", level="lead").xs("CIFAR-100")
    assert points.round().tolist() == [2, -1, 3, 0]
    plain = table["p, Holm"].xs("CIFAR-10")
    assert len(plain) == 8
    runs = tables.surface_runs(lead_rows()).groupby(["dataset", "optimizer", "batch_size"])
    of = {key: tables.samples(own) for key, own in runs}
    one, other = of["CIFAR-10", "SGD", 500], of["CIFAR-10", "Muon", 500]
    alone = contrast(one["batch"], one["layer"], other["batch"], other["layer"], weights=(1, -1, -1, 1)).p
    assert alone < plain["SGD at 500 minus Muon at 500", "batch minus layer"] <= 8 * alone + 1e-12


def test_no_norm_is_compared_with_each_norm():
    table = tables.without_norm(tables.select(lead_rows(), study="lead", optimizer="muon", batch_size=64))
    assert table["none minus norm"].tolist() == pytest.approx([-3, -1, -1.5], abs=0.2)


def step_rows():
    """Made-up runs of the sweep step: the lead is 4 with momentum, 3 by matrix, 1.5 by filter, 1 with Muon.

    At batches of 125 half of that.
    """
    found, sizes = [], (125, 500)
    steps = zip(tables.STEPS, (4, 3, 1.5, 1), strict=True)
    for (name, lead), size, seed in itertools.product(steps, sizes, range(5)):
        for norm, level in {"batch": 70 + lead * size / 500, "layer": 70, "group": 70, "none": 69}.items():
            row = {"study": "step", "optimizer": name, "norm": norm, "seed": seed, "learning_rate": 0.1}
            found.append(row | {"batch_size": size, "test_accuracy": level + 0.01 * (seed + len(norm)) ** 2 % 0.2})
    for name, norm, size in itertools.product(tables.STEPS, tables.ALL, sizes):
        row = {"study": "step-rate", "optimizer": name, "norm": norm, "seed": 0, "batch_size": size}
        for rate, accuracy in ((0.1, 75), (0.3, 61), (1.0, None if name == "sgdw" else 62)):
            found.append(row | {"learning_rate": rate, "validation_accuracy": accuracy})
    return pd.DataFrame(found)


def test_parts_of_the_step_take_a_share_of_the_lead():
    table = tables.steps(step_rows())
    assert table["batch minus layer"].tolist() == pytest.approx([1, 0.75, 0.375, 0.25, 4, 3, 1.5, 1], abs=0.1)
    assert table["none"].tolist() == pytest.approx([69] * 8, abs=0.2)
    taken = tables.step_parts(step_rows()).xs("batch minus layer", level="lead").loc[500]
    assert taken["gap"].tolist() == pytest.approx([3, 3], abs=0.1)
    assert taken["taken"].tolist() == pytest.approx([1, 2.5], abs=0.1)
    assert taken["taken minus half"].tolist() == pytest.approx([-0.5, 1], abs=0.1)
    assert taken["taken minus a quarter"].tolist() == pytest.approx([0.25, 1.75], abs=0.1)
    runs = tables.select(tables.step_runs(step_rows()), batch_size=500).groupby("step")
    of = {name: tables.samples(own) for name, own in runs}
    four = [of[name][norm] for name in ("momentum", "normalized per matrix") for norm in ("batch", "layer")]
    low = contrast(*four, weights=(1, -1, -1, 1)).low
    assert taken["taken, low"]["normalized per matrix"] == pytest.approx(low)
    rates = tables.step_rates(step_rows())
    assert rates.loc[(500, "momentum"), "layer"].tolist() == ["0.1", "0.1", "0.3"]
    assert rates.loc[(125, "Muon"), "none"].tolist() == ["0.1", "0.1", "1"]


def test_settings_at_an_edge_of_what_was_tried_are_listed():
    columns = {"dataset": "CIFAR-10", "augment": "none", "optimizer": "muon", "batch_size": 500, "layer_variant": None}
    found = []
    for net, rate, decay in (("NetA", 0.1, 1), ("NetB", 0.03, 1), ("NetC", 0.1, 0.3), ("Net", 0.3, 1)):
        row = columns | {"net": net, "convolution": None, "seed": 0}
        for tried, share in ((0.03, 1), (0.1, 1), (0.3, 1), (0.1, 0.3), (0.1, 3)):
            study = "step-rate" if share == 1 else "step-decay"
            found.append(row | {"study": study, "learning_rate": tried, "weight_decay": share / tried / 100})
        if net == "Net":  # its best rate was at the edge: three seeds of the next one, with one decay
            found += [row | {"study": "step-edges", "learning_rate": 1.0, "weight_decay": 0.01}] * 3
        found.append(row | {"study": "step", "learning_rate": rate, "weight_decay": decay / rate / 100})
    table = tables.edges(pd.DataFrame(found), ["step"])
    assert table[["net", "at the edge"]].to_numpy().tolist() == [["NetB", "learning rate"], ["NetC", "weight decay"]]
    assert tables.edges(pd.DataFrame(found)[lambda rows: rows["net"].isin(["NetA", "Net"])], ["step"]).empty


def test_what_more_epochs_change():
    found = []
    for epochs, name, seed in itertools.product((20, 80), ("sgdw", "muon"), range(3)):
        for norm, level in {"batch": 72, "layer": 70, "group": 71}.items():
            gained = (epochs - 20) / 60 * (norm == "batch" and name == "muon")
            row = {"study": "lead" if epochs == 20 else "time", "optimizer": name, "epochs": epochs, "batch_size": 500}
            row |= {"augment": "none", "norm": norm, "seed": seed}
            found.append(row | {"test_accuracy": level + gained + (seed * len(norm)) % 4 / 10})
    table = tables.epochs_gained(pd.DataFrame(found))["80 minus 20 epochs"]
    assert table["Muon"].tolist() == pytest.approx([1, 0, 0, 1, 1])
    assert table["SGD"].tolist() == pytest.approx([0] * 5)


def test_parts_of_the_norm_are_compared_with_the_norm_without():
    found = []
    nets = [(norm, "", convolution) for norm in tables.ALL for convolution in (None, "standardized")]
    nets += [("layer", "RMS", None), ("layer", "tanh", None)]
    for (norm, variant, convolution), name, seed in itertools.product(nets, ("sgdw", "muon"), range(3)):
        level = 70 + (convolution is not None) + {"RMS": 0.5, "tanh": -2}.get(variant, 0) + seed / 100
        row = {"norm": norm, "layer_variant": variant, "convolution": convolution, "seed": seed, "train_accuracy": 80}
        chosen = {"optimizer": name, "learning_rate": 0.3, "weight_decay": 0.5}
        found.append(row | chosen | {"study": "part", "test_accuracy": level + (name == "muon")})
        for study, rate in (("part-rate", 0.1), ("part-edges", 0.3)):
            setting = {"optimizer": name, "learning_rate": rate, "weight_decay": 0.5}
            accuracy = level - 1 + rate + (name == "muon")
            found.append(row | setting | {"study": study, "validation_accuracy": accuracy})
    rows = pd.DataFrame(found)
    table = tables.part_contrasts(rows)
    for name in ("SGD", "Muon"):
        assert table["points"][name].tolist() == pytest.approx([1, 1, 1, 1, 0.5, -2])
        plain = [contrast(of[0], of[1]).p for of in (part_pair(rows, name, *pair) for pair in tables.PART_CONTRASTS)]
        assert table["p, Holm"][name].tolist() == pytest.approx(tables.holm(plain).tolist())
    leads = tables.part_leads(rows.assign(test_accuracy=rows["test_accuracy"] + (rows["norm"] == "batch")))
    assert leads.loc[("SGD", "batch minus layer"), ["without", "standardized", "goes"]].tolist() == pytest.approx(
        [1, 1, 0]
    )
    assert leads.loc[("Muon", "batch minus group"), "goes minus half"] == pytest.approx(-0.5)
    shown = tables.parts(rows)
    assert shown.loc[("Muon", "RMS"), ["held-out", "test accuracy"]].tolist() == pytest.approx([70.81, 71.51])
    assert shown.loc[("SGD", "tanh"), ["held-out", "test accuracy"]].tolist() == pytest.approx([67.31, 68.01])
    assert (shown["n"] == 3).all()
    other = rows["learning_rate"].mask((rows["study"] == "part") & (rows["layer_variant"] == "RMS"), 9)
    shown = tables.parts(rows.assign(learning_rate=other))
    assert shown["held-out"].isna().sum() == 2, "held-out accuracies of a setting that was not run on the test set"


def part_pair(rows, optimizer, *names):
    runs = tables.select(tables.part_runs(rows), optimizer=optimizer)
    return [tables.select(runs, net=name)["test_accuracy"] for name in names]


def test_a_best_recipe_has_its_accuracies_and_how_many_overflowed():
    recipe = {"learning_rate": 0.1, "weight_decay": 0.5, "batch_size": 64, "momentum": 0.9, "label_smoothing": 0.1}
    recipe |= {"warmup": 0.1, "crop": 2, "status": "done"}
    other, found = recipe | {"batch_size": 250}, []
    for norm in tables.ALL:
        found += [{"study": "search", "norm": norm} | one for one in (recipe, other | {"status": "diverged"})]
        for seed in (1, 2, 3):
            for one, accuracy in ((recipe, 80), (other, 79)):
                found.append({"study": "search-seeds", "norm": norm, "validation_accuracy": accuracy + seed} | one)
                found[-1]["seed"] = seed
        best = {"study": "search-best", "norm": norm} | recipe
        found += [best | {"seed": seed, "test_accuracy": 85 + seed} for seed in range(10)]
    table = tables.random_recipes(pd.DataFrame(found))
    assert table.loc["layer", ["batch size", "validation", "test accuracy", "n"]].tolist() == [64, 82, 89.5, 10]
    assert (table["overflow"] == "1 of 2").all()


def test_the_fused_step_is_compared_over_both_sets_of_ten_seeds():
    table = tables.fused_step(ROWS)
    for augment, title in (("none", "no augmentation"), ("flip+crop", "flip and crop")):
        own = ROWS[(ROWS["augment"] == augment) & (ROWS["norm"] == "layer")]
        fused = own[own["study"].isin(["main-500", "augment-500", "fused"])]["test_accuracy"]
        captured = own[own["study"] == "captured"]["test_accuracy"]
        assert len(fused) == len(captured) == table["n"][title, "layer"] == 20
        test = stats.ttest_ind(fused, captured, equal_var=False).confidence_interval()
        columns = [f"fused minus CUDA graph, {end}" for end in ("low", "high")]
        assert table.loc[(title, "layer"), columns].tolist() == pytest.approx(list(test))


def test_intervals_over_seeds_and_images_are_wider():
    """Twenty images of which the nets get some right in every seed: the images alone make the lead uncertain."""
    right = {net: np.ones((3, 20), bool) for net in ("NetA", "NetB", "NetC")}
    for net, images in {"NetA": range(4), "NetB": range(2, 8), "NetC": range(6)}.items():
        right[net][:, list(images)] = False
        right[net][0, 19] = False
    table = tables.other_images(right, draws=2000).loc["batch minus layer"]
    assert table["over seeds"] == table["over images"] == table["over seeds and images"] == pytest.approx(10)
    reach = {name: table[f"{name}, high"] - table[f"{name}, low"] for name in ("over images", "over seeds and images")}
    error = 100 * np.std([1] * 4 + [-1] * 2 + [0] * 14) / 20**0.5  # of the images' differences
    assert reach["over images"] / (2 * 1.96) == pytest.approx(error, rel=0.2)
    right = {net: np.ones((2, 20), bool) for net in right}
    right["NetA"][0] = False  # no image matters, only which seeds are drawn
    table = tables.other_images(right, draws=2000).loc["batch minus layer"]
    assert table[["over images, low", "over images, high"]].tolist() == pytest.approx([-50, -50])
    assert table[["over seeds and images, low", "over seeds and images, high"]].tolist() == pytest.approx([-100, 0])


def test_speed_of_sweeps_is_in_runs_per_minute():
    bench = pd.DataFrame({"path": ["fused", "sweep-1", "sweep-2"], "run_seconds": [9.0, 2.0, 1.0]})
    table = tables.sweep_speed(bench)
    assert table.loc["2"].tolist() == [60, 2]
    assert list(table.index) == ["1", "2"]
