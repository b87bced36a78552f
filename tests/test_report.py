import itertools

import numpy as np
import pandas as pd
import pytest

import report
import utils


def test_fill():
    text = "a\n<!-- one -->\nold\n<!-- end -->\nb\n<!-- two -->\n<!-- end -->\n"
    filled = report.fill(text, {"one": "1", "two": "2"})
    assert filled == "a\n<!-- one -->\n1\n<!-- end -->\nb\n<!-- two -->\n2\n<!-- end -->\n"
    assert report.fill(filled, {"one": "1", "two": "2"}) == filled
    with pytest.raises(KeyError):
        report.fill(text, {"one": "1"})


@pytest.fixture
def published():
    """Rows as a ten-seed run would leave them, with made-up accuracies."""
    rows = [
        {"study": name, "net": net, "norm": utils.NORM_OF[net], "split": "test", "seed": seed, "status": "done"}
        | {"epochs": 20, "parameters": 48_042, "train_accuracy": 95.0, "seconds": 5.0, "augment": augment}
        | {"weight_decay": 0.1 if gain else 0.5}
        | {"test_accuracy": base + 0.1 * (seed * step % 10), "device": "gpu", "precision": "bfloat16", "torch": "2.0"}
        for name, augment, gain in (("main", "none", 0), ("augment", "flip+crop", 1))
        for net, base, step in (("NetA", 86 + gain, 1), ("NetB", 85 + gain, 3), ("NetC", 84 + gain, 7))
        for seed in range(10)
    ]
    tune = [
        {
            "study": "tune",
            "net": net,
            "seed": 0,
            "split": "validation",
            "augment": "none",
            "learning_rate": rate,
            "validation_accuracy": 80 + rate,
        }
        | {"epochs": 20, "parameters": 48_042}
        for net in utils.NETS
        for rate in (1, 2)
    ]
    return pd.DataFrame(rows + tune)


def test_published_tables(published):
    text = report.results_table(published)
    assert "| NetB | layer | 20 | 48,042 | 95.00 | 85.45 | 0.30 | 10 | 5.0 |" in text
    assert "NetA minus NetC: +2.00 points" in text
    assert "gpu, bfloat16, torch 2.0" in text
    assert "| NetB | layer | 20 | 48,042 | 95.00 | 86.45 | 0.30 | 10 |" in report.augment_table(published)
    assert "It reaches 84.45 % on the test set (standard deviation 0.30, n = 10)." in report.finding("NetC", published)
    assert "from 81.00 to 82.00 %" in report.finding("NetC", published)
    assert report.tuned(published).loc["NetC", 1] == 81
    assert report.best_rates(published) == {"NetA": 2, "NetB": 2, "NetC": 2}


def test_versions_are_listed_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    pd.DataFrame({"protection": ["a", "b"], "test": ["c", "d"]}).to_csv(tmp_path / "takeouts.csv")
    versions = [{"python": "3.11.7", "torch": torch} for torch in ("2.14.1", "2.9.0")]
    versions = [one | {"torchvision": "1", "passed": 3, "failed": 0, "skipped": 1} for one in versions]
    pd.DataFrame(versions).to_csv(tmp_path / "versions.csv")
    text = report.protections_text()
    assert "took 2 protections out" in text
    assert text.index("| 2.9.0 |") < text.index("| 2.14.1 |")


def test_accuracy_plot_shows_every_run(published):
    figure = report.plot_accuracy(published)
    for axis, gain in zip(figure.axes, (0, 1), strict=True):
        points = [collection.get_offsets() for collection in axis.collections if len(collection.get_offsets()) == 10]
        assert [round(p[:, 1].mean(), 2) for p in points] == [86.45 + gain, 85.45 + gain, 84.45 + gain]
        assert [text.get_text() for text in axis.texts] == [f"{base + gain + 0.45:.1f}" for base in (86, 85, 84)]


@pytest.mark.parametrize(
    ("accuracies", "decades"),
    [
        (
            [70, 80, 80.5, 80, 70],
            2 + 2 * 0.5 / 10,
        ),  # within a point from 79.5: two whole decades and a bit of two others
        ([80, 79, 60, 81, 79], 1 / 21 + 1 / 2),  # in one piece around the best
        ([60, 70, 80, 90, 100], 1 / 10),
        ([100, 50, 0, 0, 0], 1 / 50),
        ([80, 80, 80, 80, 80], 4),
    ],
)
def test_decades_within_a_point(accuracies, decades):
    rates = np.array([1e-4, 1e-3, 1e-2, 1e-1, 1.0])
    assert report.decades_within(rates, accuracies) == pytest.approx(decades)


@pytest.fixture
def swept():
    """Rows of the studies of rates and optimizers, made up: NetA leads NetB by 5 with sgd, by 1 with muon.

    The best rate is 0.1, the best decay 0, but 0.5 with sgd and a rate of 1.0. The control stays at chance with sgd.
    """
    lead = {("sgd", "NetA"): 5.0, ("muon", "NetA"): 1.0, ("sgd", "NetC"): 2.0}

    def accuracy(net, name, rate, decay):
        if (net, name) == ("Net", "sgd"):
            return 10.0
        better = 0.5 if (name, rate) == ("sgd", 1.0) else 0.0
        return 80 + lead.get((name, net), 0) - 2 * abs(np.log10(rate) + 1) - abs(decay - better)

    def run(study, net, name, rate, decay, seed, **accuracies):
        row = {"study": study, "net": net, "optimizer": name, "learning_rate": rate, "weight_decay": decay}
        return row | {"seed": seed, "status": "done"} | accuracies

    grid = itertools.product(utils.NORM_OF, report.OPTIMIZER_TITLES, (0.01, 0.1, 1.0), (0.0, 0.5))
    first = [run("rate", *setting, 0, validation_accuracy=accuracy(*setting)) for setting in grid]
    seeds = [
        run("rate-seeds", net, name, rate, decay, seed, validation_accuracy=accuracy(net, name, rate, decay))
        for net, name, rate, seed in itertools.product(utils.NORM_OF, report.OPTIMIZER_TITLES, (0.01, 0.1, 1.0), (1, 2))
        for decay in [0.5 if (name, rate) == ("sgd", 1.0) and net != "Net" else 0.0]
    ]
    initial = [
        run("initial", "Net", name, rate, 0.0, seed, validation_accuracy=70.0 + rate + 5 * (name == "sgd"))
        for name, rate, seed in itertools.product(report.OPTIMIZER_TITLES, (0.01, 0.1, 1.0), range(3))
    ]
    final = []
    order = np.random.default_rng(0)
    for net, name in itertools.product(utils.NORM_OF, report.OPTIMIZER_TITLES):
        rate = 0.01 if (net, name) == ("Net", "sgd") else 0.1
        for seed, extra in enumerate(order.permutation(10)):
            score = 80 + lead.get((name, net), 0) + 0.1 * extra
            scores = {"test_accuracy": score, "train_accuracy": score + 10}
            final.append(run("optimizer", net, name, rate, 0.0, seed, **scores))
    return pd.DataFrame(first + seeds + initial + final)


def rates(table, name, net):
    """The line of `report.rate_table` of an optimizer and a net."""
    both = (report.OPTIMIZER_TITLES[name], f"{net}, {utils.NORM_OF[net]}")
    return table.reset_index().set_index(["optimizer", "net"]).loc[both]


def test_sweeps_tables(swept):
    table = report.rate_table(swept)
    assert rates(table, "sgd", "NetA").tolist() == ["0.1", "0", "85.00", "1.0", "1.0, 1.0, 1.0", "0 of 6"]
    assert rates(table, "sgd", "Net").tolist() == ["-", "-", "10.00", "-", "-", "0 of 6"]
    assert [report.leads(swept, name) for name in report.OPTIMIZER_TITLES] == [
        "5.0 and 3.0",
        "0.0 and 0.0",
        "1.0 and 1.0",
    ]
    assert report.optimizer_table(swept).loc["Muon", "NetA, batch"] == "81.45 (0.30), 91.5"
    differences = report.differences_table(swept).loc["NetA minus NetC"]
    assert [text.split()[0] for text in differences] == ["+3.00", "+0.00", "+1.00", "+2.00", "-1.00"]


def test_the_largest_decay_is_marked_when_it_is_the_best(swept):
    rows = swept[swept["learning_rate"] == 1.0]
    assert rates(report.rate_table(rows), "sgd", "NetB")["weight decay"] == "0.5 (at an edge)"


def test_an_optimum_is_open_at_either_end():
    rates, rising = [0.01, 0.1, 1.0], pd.Series({0.01: 70.0, 0.1: 75.0, 1.0: 80.0})
    assert report.decades_text(rising, rates) == "at least 0.2"
    assert report.decades_text(pd.Series({0.01: 80.0, 0.1: 75.0, 1.0: 70.0}), rates) == "at least 0.2"
    assert report.decades_text(pd.Series({0.01: 70.0, 0.1: 80.0, 1.0: 70.0}), rates) == "0.2"
    assert report.decades_text(rising[:2], rates) == "0.2"  # at 1.0 it diverged


def test_what_has_no_ten_seeds_is_a_dash(swept):
    one = (swept["study"] == "optimizer") & (swept["net"] == "NetA") & (swept["optimizer"] == "sgd")
    rows = swept[~(one & (swept["seed"] == 7))]
    assert [text.split()[0] for text in report.optimizer_table(rows).loc["SGD"]] == ["-", "80.45", "82.45", "80.45"]
    differences = report.differences_table(rows)
    assert (differences.loc["NetA minus NetB", ["SGD", "SGD less Muon"]] == "-").all()
    assert "-" not in differences["AdamW less Muon"].tolist()


def test_a_decay_that_is_better_now_counts_when_its_seeds_are_there(swept):
    """And what the old one led to does not count any more: all pairs get the same trials."""
    pair = {"study": "rate", "net": "NetB", "optimizer": "muon", "learning_rate": 0.1, "weight_decay": 2.0}
    new = [pair | {"seed": 0, "status": "done", "validation_accuracy": 90.0}]
    rows = pd.concat([swept, pd.DataFrame(new)])
    assert ("muon", "NetB", 0.1, 2.0) in report.best_decays(rows)
    assert rates(report.rate_table(rows), "muon", "NetB").tolist()[:3] == ["0.01", "0", "78.00"]
    new += [new[0] | {"study": "rate-seeds", "seed": seed, "validation_accuracy": 84.0} for seed in (1, 2)]
    rows = pd.concat([swept, pd.DataFrame(new)])
    assert rates(report.rate_table(rows), "muon", "NetB").tolist()[:3] == ["0.1", "2 (at an edge)", "86.00"]
    assert ("muon", "NetB") not in report.finished(rows)


def test_rate_plot_shows_the_best_decay_and_each_seed(swept):
    figure = report.plot_rate(swept)
    assert [axis.get_title() for axis in figure.axes[:3]] == ["SGD", "AdamW", "Muon"]
    line = figure.axes[0].lines[0]
    assert line.get_xdata().tolist() == [0.01, 0.1, 1.0]
    assert line.get_ydata().tolist() == [83, 85, 83]  # at 1.0 with a decay of 0.5
    points = figure.axes[0].collections[0].get_offsets()
    for axis, more in zip(figure.axes[:3], (5, 0, 0), strict=True):  # other initial weights
        assert axis.lines[-1].get_ydata().tolist() == [70.01 + more, 70.1 + more, 71 + more]
    crosses = [len(points.get_offsets()) for points in figure.axes[3].collections]
    assert crosses == [0, 0, 0, 3, 0]  # the control at chance
    assert np.isnan(figure.axes[0].lines[3].get_ydata()).all()
    assert sorted(map(tuple, points)) == [(0.01, 83)] * 3 + [(0.1, 85)] * 3 + [(1.0, 83)] * 3


def test_a_setting_that_diverged_once_is_not_the_best(swept):
    """Neither in the table nor in the choice of what the study optimizer runs; there the optimum ends."""
    one = (swept["study"] == "rate-seeds") & (swept["net"] == "NetA") & (swept["optimizer"] == "sgd")
    one &= (swept["learning_rate"] == 0.1) & (swept["seed"] == 1)
    first = (swept["study"] == "rate") & (swept["net"] == "NetC") & (swept["learning_rate"] == 1.0)
    rows = swept.assign(
        validation_accuracy=swept["validation_accuracy"].where(~(one | first)),
        status=swept["status"].where(~(one | first), "diverged"),
    )
    table = report.rate_table(rows)
    assert rates(table, "sgd", "NetA").tolist()[2:4] == ["83.00", "at least 0.0"]
    assert rates(table, "muon", "NetC").tolist()[3:] == ["0.5", "0.5, 0.5, 0.5", "2 of 6"]
    panel, strip = (report.plot_rate(rows).axes[place] for place in (2, 5))
    assert sum(len(one.get_offsets()) for one in panel.collections) == 3 * 11 + 9  # 9 of other initial weights
    assert [len(one.get_offsets()) for one in strip.collections] == [0, 0, 1, 0, 0]
    kept = report.optimizer_runs(rows)
    assert kept[(kept["net"] == "NetA") & (kept["optimizer"] == "sgd")].empty
    assert len(kept[(kept["net"] == "NetC") & (kept["optimizer"] == "sgd")]) == 10


def test_a_pair_that_always_diverged_is_a_dash(swept):
    pair = (swept["study"] != "optimizer") & (swept["net"] == "NetC") & (swept["optimizer"] == "adamw")
    rows = swept.assign(validation_accuracy=swept["validation_accuracy"].where(~pair))
    assert rates(report.rate_table(rows), "adamw", "NetC").tolist()[:5] == ["-"] * 5
    assert ("adamw", "NetC") not in report.finished(rows)
