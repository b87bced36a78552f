"""What is committed agrees with itself: README, notebook, rows, weights."""

import itertools
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from scipy import stats

import hubconf
import models
import report
import study
import utils

ROWS = utils.read_rows(ROOT / "results" / "runs.csv")
MAIN = ROWS[ROWS["study"] == "main"]
README = (ROOT / "README.md").read_text(encoding="utf-8")
NOTEBOOK = json.loads((ROOT / "s8.ipynb").read_text(encoding="utf-8"))


def test_readme_has_every_generated_part():
    parts = [part for part in re.findall(r"<!-- ([\w-]+) -->\n", README) if part != "end"]
    nets = [f"{part}-{net}" for part in ("finding", "mistakes") for net in utils.NETS]
    tables = [
        "results",
        "expect",
        "speed",
        "tune",
        "tune-augment",
        "augment",
        "pairs",
        "claims",
        "headline",
        "minutes",
        "advice",
        "protections",
    ]
    sweeps = [f"sweep-{name}" for name in ("rate", "optimizer", "statistics", "axes", "augment", "budget")]
    assert sorted(parts) == sorted([*tables, *sweeps, *nets])
    assert not re.search(r"<!-- ([\w-]+) -->\s*<!-- end -->", README), "a part is empty"


def test_report_changes_nothing(tmp_path):
    for name in ("README.md", "s8.ipynb", "models.py", "utils.py", "study.py", "report.py"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "results", tmp_path / "results")
    subprocess.run([sys.executable, "study.py", "--report"], cwd=tmp_path, check=True)
    for name in ("README.md", "s8.ipynb"):
        assert (tmp_path / name).read_text(encoding="utf-8") == (ROOT / name).read_text(encoding="utf-8"), (
            f"{name} is not what results/ say: run python study.py --report"
        )


def test_notebook_is_saved_as_executed():
    cells = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 10
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    text = json.dumps(NOTEBOOK)
    assert "application/vnd.jupyter.widget" not in text
    assert "\r" not in "".join("".join(output.get("text", "")) for output in outputs)
    assert not re.search(r"/(home|root|tmp|Users)/\w", text)


def test_learning_rates_are_the_best_of_equal_trials():
    tune = ROWS[ROWS["study"] == "tune"]
    assert set(tune["split"]) == {"validation"}
    assert tune["test_accuracy"].isna().all()
    assert tune.groupby("net").size().nunique() == 1
    assert tune["seed"].nunique() == 2  # as the generated sentences say
    assert report.best_rates(ROWS) == utils.LEARNING_RATES
    texts = pd.read_csv(ROOT / "results" / "runs.csv", dtype=str, keep_default_na=False)
    assert study.missing("tune", texts) == []
    assert study.missing("augment", texts) == []
    assert report.tuned(ROWS, "weight_decay", "flip+crop").mean().idxmax() == study.AUGMENTED_WEIGHT_DECAY


def test_prose_says_what_the_rows_do():
    """README's conclusion in words, claim by claim."""
    tune = ROWS[(ROWS["study"] == "tune") & (ROWS["augment"] == "none")]
    by_rate = tune.pivot_table(index="learning_rate", columns="net", values="validation_accuracy")
    assert (by_rate.idxmax(axis=1) == "NetA").all()
    means = {name: ROWS[ROWS["study"] == name].groupby("net")["test_accuracy"].mean() for name in ("main", "augment")}
    for by_net in means.values():
        assert by_net.idxmax() == "NetA"
        assert by_net.max() - by_net.min() < 1
    for name in ("main", "augment"):
        apart = utils.compare(ROWS[ROWS["study"] == name], "NetC", "NetB")
        low, high = map(float, re.search(r"interval (\S+) to (\S+),", apart).groups())
        assert low < 0 < high
    assert (means["augment"] > means["main"] + 1).all()
    assert ROWS[ROWS["study"] == "augment"].groupby("net").size().tolist() == [10, 10, 10]


def test_published_runs():
    assert sorted(MAIN["net"].unique()) == ["NetA", "NetB", "NetC"]
    for net, rows in MAIN.groupby("net"):
        assert sorted(rows["seed"]) == list(range(10))
        assert (rows["epochs"] <= 20).all()
        assert set(rows["learning_rate"]) == {utils.LEARNING_RATES[net]}
        assert set(rows["commit"].str.contains("+", regex=False)) == {False}
    assert set(MAIN["augment"]) == {"none"}
    assert set(MAIN["parameters"]) == {48_042}


@pytest.mark.parametrize("net", utils.NETS)
def test_weights_score_what_is_published(net, real):
    made = getattr(hubconf, net)(pretrained=True)
    row = MAIN[(MAIN["net"] == net) & (MAIN["seed"] == 0)].iloc[0]
    assert abs(utils.test(made, real.test_images, real.test_labels).accuracy - row["test_accuracy"]) <= 0.05


@pytest.mark.parametrize("net", utils.NETS)
def test_readme_shows_the_rows(net):
    rows = MAIN[MAIN["net"] == net]["test_accuracy"]
    shown = "".join(str(cell.get("outputs")) for cell in NOTEBOOK["cells"])
    assert f"<td>{rows.sum() / len(rows):.2f}</td>" in shown
    assert f"| {rows.sum() / len(rows):.2f} |" in README
    variance = sum((value - rows.sum() / len(rows)) ** 2 for value in rows) / (len(rows) - 1)
    assert f"| {variance**0.5:.2f} |" in README


def test_readme_holds_the_command_that_ci_runs():
    grep = re.search(r"\$\((grep .*README.md)\)", (ROOT / ".ci" / "run").read_text())[1]
    found = subprocess.run(["bash", "-c", grep], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert found.strip().endswith(".venv/bin/python -m pytest")
    assert README.count(found) == 1


def test_requirements_are_pinned():
    for name in ("requirements.txt", "requirements-dev.txt"):
        for line in (ROOT / name).read_text().splitlines():
            assert line.startswith("-r ") or re.fullmatch(r"[\w-]+==[\w.]+", line), line


def sweep(name):
    return ROWS[ROWS["study"] == name]


def test_prose_says_what_the_sweeps_do():
    """The words, verdicts and advice around the numbers of the sweeps."""
    runs = sweep("batch").groupby(["net", "statistics_batch"], dropna=False)["test_accuracy"]
    lowest, highest = runs.min(), runs.max()
    theirs = [extreme.drop("NetA", level="net") for extreme in (lowest, highest)]
    assert highest["NetA"].loc[2] < theirs[0].min()
    for size in (4, 8):
        assert lowest["NetA"].loc[size] < theirs[1].max()
        assert highest["NetA"].loc[size] > theirs[0].min()
    assert lowest["NetA"].loc[16:].min() > theirs[1].max()
    groups = sweep("groups").groupby("groups")["test_accuracy"].mean()
    assert groups.drop("C").max() - groups.drop("C").min() < 0.5 < groups.drop("C").min() - groups["C"]
    own, pixel, wide, narrow = (variant.accuracies.mean() for variant in report.layer_variants(ROWS))
    assert own > wide > pixel > narrow
    assert [variant.parameters for variant in report.layer_variants(ROWS)] == [48_042, 48_042, 195_066, 49_880]
    width = sweep("width").groupby(["parameters", "net"])["test_accuracy"].mean().unstack("net")
    leads = width["NetA"] - width[["NetB", "NetC"]].max(axis=1)
    assert leads.is_monotonic_decreasing
    assert leads.idxmax() == 9_410  # "In the smallest net"
    normed = [width for name, width in zip(models.CONVOLUTIONS, study.WIDTHS[9_410], strict=True) if name[0] == "C"]
    assert 2 * sum(width == 4 * 2 for width in normed) == len(normed)  # "Half of NetC's norms have only two channels"
    apart = width.iloc[-1] - MAIN[MAIN["seed"] < 3].groupby("net")["test_accuracy"].mean()  # on two kinds of GPU
    assert apart.abs().max() < 0.5
    falls = report.tuned(ROWS).max(axis=1) - report.tuned(ROWS).min(axis=1)
    assert falls["NetB"] > falls["NetC"] > falls["NetA"]
    assert width.index.tolist() == [9_410, 19_758, 34_918, 48_042]
    for name in ("batch", "groups", "layer", "width"):
        keys = ["net", "statistics_batch", "groups", "layer_variant", "widths"]
        assert set(sweep(name).groupby(keys, dropna=False).size()) == {3}


def test_minutes_of_all_runs():
    seconds = [row.seconds for row in ROWS.itertuples() if "NVIDIA" in row.device]
    assert (
        f"The {len(seconds):,} runs on GPUs that `results/runs.csv` holds took {sum(seconds) / 60:.0f} minutes"
        in README
    )


def test_pairs_by_independent_arithmetic():
    """README's differences, intervals and p values against plain sums and SciPy's t distribution."""
    values, starts, shown = [], [], report.pairs_table(ROWS)
    for name in ("main", "augment"):
        by_net = sweep(name).pivot(index="seed", columns="net", values="test_accuracy")
        for first, second in (("NetA", "NetB"), ("NetA", "NetC"), ("NetC", "NetB")):
            differences = [a - b for a, b in zip(by_net[first], by_net[second], strict=True)]
            mean = sum(differences) / 10
            error = (sum((d - mean) ** 2 for d in differences) / 9 / 10) ** 0.5
            reach = 2.262157 * error  # the 97.5 % point of Student's t with 9 degrees of freedom
            starts.append(
                f"| {first} minus {second} | {mean:+.2f} | {mean - reach:+.2f} to {mean + reach:+.2f} | 10 | "
            )
            values.append(2 * stats.t.sf(abs(mean / error), 9))
    holm = 0
    for rank, place in enumerate(np.argsort(values)):
        holm = max(holm, min(1, values[place] * (6 - rank)))
        line = next(line for line in shown.splitlines() if starts[place] in line)
        assert line.endswith(f"| {holm:.2g} |")
        ahead = "NetA" in starts[place]  # README: batch norm is ahead, layer and group norm can't be told apart
        assert (holm < 0.05) == ahead
    assert shown in README


def test_prose_says_what_the_sweeps_of_optimizers_do(real):
    runs = report.rate_runs(ROWS)
    assert set(runs.groupby(report.SETTING).size()) == {3}
    control = ROWS[ROWS["study"].isin(["rate", "rate-seeds"]) & (ROWS["net"] == "Net") & (ROWS["optimizer"] == "sgd")]
    assert control["validation_accuracy"].max() <= report.CHANCE + 0.5  # "stays at chance"
    above = report.means(runs[(runs["net"] == "Net") & (runs["optimizer"] == "muon")], ["learning_rate"])
    assert above.idxmax() == 0.03
    grid = sweep("rate")
    higher = grid[(grid["net"] == "Net") & (grid["optimizer"] == "muon") & (grid["learning_rate"] == 0.1)]
    assert len(higher) == 5  # "diverges or learns nothing, whatever the weight decay", as the advice says
    assert not (higher["validation_accuracy"] > report.CHANCE + 0.5).any()
    assert len(set(report.optimizer_runs(ROWS)["device"])) == 1  # "All of these ran on an"
    gaps = report.differences_table(ROWS)
    for pair in ("NetA minus NetB", "NetB minus Net"):  # "depends on the optimizer": the interval is above 0
        assert float(re.search(r"\((\S+) to", gaps.loc[pair, "AdamW less Muon"])[1]) > 0
    accuracy, train = report.finished(ROWS), report.finished(ROWS, "train_accuracy").mean()
    for optimizer in ("sgd", "adamw"):
        assert train[optimizer]["NetA"] > train[optimizer][["NetB", "NetC"]].max() + 3  # "fit the training images less"
    assert {accuracy[optimizer].mean().idxmax() for optimizer in report.OPTIMIZER_TITLES} == {"NetA"}
    net = utils.build("Net", utils.Settings(seed=0)).eval()
    logits = net(utils.standardise(real.test_images[:500]))
    assert logits.std(0).mean().item() < 5e-6  # "hardly differ"
    table = report.rate_table(ROWS)
    assert not table["weight decay"].str.endswith("(at an edge)").any()  # or the limits would have to say so
    best = pd.DataFrame(report.best_decays(ROWS), columns=report.SETTING)
    best = best.merge(runs.groupby(report.SETTING, as_index=False)["validation_accuracy"].mean())
    at_edge = []
    for _, own in best[(best["net"] != "Net") & (best["validation_accuracy"] > 20)].groupby(["optimizer", "net"]):
        decays = own.sort_values("learning_rate")["weight_decay"]
        assert decays.is_monotonic_decreasing  # "the best decay falls or stays as the rate grows"
        at_edge.append(decays.iloc[0] == study.DECAYS[own["optimizer"].iloc[0]][-1])
    assert sum(at_edge) == len(at_edge) - 1  # "mostly the largest that was tried"


def test_prose_on_tuning_holds_at_each_threshold():
    """Where layer norm has fewer good rates than the others, by how near the best counts as good."""
    runs, fewer, fewer_than_group = report.rate_runs(ROWS), {}, set()
    for points in (0.5, 1, 2):
        fewer[points] = set()
        for optimizer in report.OPTIMIZER_TITLES:
            wide = {}
            for net in utils.NETS:
                own = runs[(runs["optimizer"] == optimizer) & (runs["net"] == net)]
                tried = sorted(runs[runs["optimizer"] == optimizer]["learning_rate"].unique())
                values = report.by_rate(own).reindex(tried).fillna(-np.inf)
                wide[net] = report.decades_within(tried, values.to_numpy(), points)
            if wide["NetB"] < wide["NetA"]:
                fewer[points].add(optimizer)
            fewer_than_group.add(wide["NetB"] < wide["NetC"])
    assert fewer == {0.5: {"sgd"}, 1: {"sgd", "adamw", "muon"}, 2: {"sgd", "adamw"}}
    table = report.rate_table(ROWS).reset_index().set_index(["optimizer", "net"])
    for title in report.OPTIMIZER_TITLES.values():
        number = {net: float(table.loc[title, net].iloc[3].split()[-1]) for net in ("NetA, batch", "NetB, layer")}
        seeds = [float(text.split()[-1]) for text in table.loc[title, "NetA, batch"].iloc[4].split(",")]
        assert max(seeds) - min(seeds) > number["NetA, batch"] - number["NetB, layer"]  # "seeds ... differ by more"
    diverged = sweep("rate").groupby(["optimizer", "net"])["status"].agg(lambda status: (status == "diverged").sum())
    more = {
        optimizer for optimizer in report.OPTIMIZER_TITLES if diverged[optimizer]["NetB"] > diverged[optimizer]["NetA"]
    }
    assert more == {"sgd", "muon"}


def test_prose_on_other_initial_weights(real):
    """What `report.rate_text` says of the study initial, by plain arithmetic."""
    apart = []
    for change in (lambda net: None, lambda net: study.draw_he(net, 0)):
        net = utils.build("Net", utils.Settings(seed=0)).eval()
        change(net)
        apart.append(net(utils.standardise(real.test_images[:500])).std(0).mean().item())
    assert 50_000 < apart[1] / apart[0] < 200_000  # "far more"
    best = {}
    for (optimizer, _), own in sweep("initial").groupby(["optimizer", "learning_rate"]):
        assert len(own) == 3
        if (own["status"] == "done").all():
            best[optimizer] = max(best.get(optimizer, 0), sum(own["validation_accuracy"]) / 3)
    assert best["sgd"] > report.CHANCE + 50  # so the initial weights are what kept it there
    beyond = sweep("initial").query("optimizer == 'adamw' and learning_rate == 0.03")
    assert sorted(beyond["status"]) == ["diverged", "done", "done"]  # "two seeds of three"
    shown = f"reaches {best['sgd']:.1f} % under SGD, {best['adamw']:.1f} under AdamW and {best['muon']:.1f} under Muon"
    assert shown in " ".join(README.split())


def test_prose_on_epochs_batches_and_augmentation():
    apart = sweep("epochs").groupby(["epochs", "net"])["test_accuracy"]
    for count in (5, 10, 20, 40):  # "every run of NetA above all of the others'"
        assert apart.min()[count, "NetA"] > apart.max()[count].drop("NetA").max()
    late = sweep("epochs")[sweep("epochs")["epochs"] == 40].groupby("net")[["train_accuracy", "test_accuracy"]].mean()
    assert late["train_accuracy"].idxmin() == "NetA" == late["test_accuracy"].idxmax()
    sizes = report.batch_sizes(ROWS)
    assert set(sizes.groupby(["net", "batch_size"]).size()) == {3}
    by_batch = sizes.groupby(["net", "batch_size"])["test_accuracy"].mean()
    ahead = pd.DataFrame({net: by_batch["NetA"] - by_batch[net] for net in ("NetB", "NetC")})
    assert list(ahead.index) == [32, 64, 128, 256, 500, 1024]
    others = ahead.drop(500)  # "ahead at every size"
    assert f"by {others.min(axis=None):.1f} to {others.max(axis=None):.1f} points (n = 3, not in every seed)" in README
    assert others.min(axis=None) > 0
    assert set(ahead.idxmax()) == {1024}  # "furthest with 1,024 images"
    main = MAIN.groupby("net")["test_accuracy"].mean()
    low, high = sorted(main["NetA"] - main[net] for net in ("NetB", "NetC"))
    assert f"ahead of both others, by {low:.2f} and {high:.2f} points" in README
    for (_, size), own in sweep("batch-rate").groupby(["net", "batch_size"]):
        assert len(own) == {32: 6, 1024: 4}[size]
        best = own.loc[own["validation_accuracy"].idxmax(), "learning_rate"]
        assert own["learning_rate"].min() < best < own["learning_rate"].max()  # no edge to tell of
    rates = {
        name: sweep(name).query("batch_size == 32").groupby("net")["learning_rate"].first()
        for name in ("batch-size", "batch-size-first")
    }
    larger = rates["batch-size-first"] / rates["batch-size"]
    assert larger.round().min() == 2  # "two to four times as large"
    assert larger.round().max() == 4
    per_epoch = sweep("batch-size").groupby(["net", "batch_size"])["learning_rate"].first().unstack()
    per_epoch = per_epoch.div(pd.Series(utils.LEARNING_RATES), axis=0) * 500 / per_epoch.columns
    assert per_epoch[32].between(0.45, 0.55).all()  # "half as much of it with 32 images"
    assert per_epoch[1024].round(2).tolist() == [0.49, 0.49, 0.98]  # "again half for NetA and NetB"
    shown, leads, gaps, test_of = README[README.index("<!-- sweep-augment -->") :], {}, {}, {}
    for decay, augment in itertools.product((0.1, 0.5), ("none", "flip", "flip+crop")):
        runs = ROWS[ROWS["study"].isin(["main", "flip", "augment"])]
        runs = runs[(runs["weight_decay"] == decay) & (runs["augment"] == augment)]
        test, train = {}, {}
        for net in utils.NETS:
            own = runs[runs["net"] == net]
            test[net], train[net] = (sum(own[f"{split}_accuracy"]) / len(own) for split in ("test", "train"))
        cells = [str(len(own)), *(f"{test[net]:.2f}, {train[net] - test[net]:.1f}" for net in utils.NETS)]
        cells += [f"{test['NetA'] - test[net]:+.1f}" for net in ("NetB", "NetC")]
        assert f"| {decay:g} | {augment} | {report.gpus(runs)} | {' | '.join(cells)} |" in shown
        leads[decay, augment] = cells[-2:]
        gaps[decay, augment] = [train[net] - test[net] for net in utils.NETS]
        test_of[decay, augment] = [test[net] for net in utils.NETS]
    little = leads.pop((0.1, "none"))
    for column in zip(*gaps.values(), strict=True):
        assert max(column) == column[list(gaps).index((0.1, "none"))]  # "With little decay and no augmentation"
    assert all(float(lead) < float(most) for own in leads.values() for lead, most in zip(own, little, strict=True))
    decay, flips = (" and ".join(leads[one]) for one in ((0.5, "none"), (0.1, "flip")))
    prose = " ".join(README.split())
    assert f"decay leaves {decay} points of it over NetB and NetC, flips leave {flips}; both" in prose
    both = sorted((cell for augment in ("flip", "flip+crop") for cell in leads[0.5, augment]), key=float)
    assert f"both together, with crops or without, {both[0]} to {both[-1]} (means, n in the table)" in prose
    for augment in ("flip", "flip+crop"):  # "no net gains by the larger decay"
        for small, large in zip(test_of[0.1, augment], test_of[0.5, augment], strict=True):
            assert large - small < 0.01


def test_sentences_on_budgets_by_plain_sums():
    """What is gained and lost by parameters, epochs and batches."""

    def mean(name, net, which, **setting):
        own = [row for row in ROWS.itertuples() if (row.study, row.net) == (name, net)]
        values = [getattr(row, which) for row in own if all(getattr(row, key) == at for key, at in setting.items())]
        assert len(values) == 3
        return sum(values) / len(values)

    text, test = " ".join(README.split()), "test_accuracy"
    lost = [
        mean("width", net, test, parameters=48_042) - mean("width", net, test, parameters=9_410) for net in utils.NETS
    ]
    assert f"NetA loses {lost[0]:.1f} points, NetB {lost[1]:.1f} and NetC {lost[2]:.1f}." in text
    gained = [mean("epochs", net, test, epochs=40) - mean("epochs", net, test, epochs=20) for net in utils.NETS]
    assert f"NetA gains {gained[0]:.1f} points, NetB {gained[1]:.1f} and NetC {gained[2]:.1f};" in text
    trained = [mean("epochs", net, "train_accuracy", epochs=40) for net in utils.NETS]
    assert f"{trained[1]:.1f} and {trained[2]:.1f} to {trained[0]:.1f} %, and the test images worse" in text
    ranges = []
    for net in utils.NETS:
        means = [mean("batch-size", net, test, batch_size=size) for size in (32, 64, 128, 256)]
        ranges.append(f"{min(means):.1f} to {max(means):.1f}")
    assert f"stay within {ranges[0]} % for NetA, {ranges[1]} for NetB and {ranges[2]} for NetC." in text
    first = [
        mean("batch-size-first", "NetA", test, batch_size=size)
        - mean("batch-size-first", "NetC", test, batch_size=size)
        for size in (32, 64, 128, 256)
    ]
    shown = re.search(r"NetA's lead over NetC was (.*?) from 32 to 256 images\.", text)[1]
    assert [float(lead) for lead in shown.split(", ")] == pytest.approx(first, abs=0.0501)


@pytest.mark.parametrize(
    ("name", "column"), [("width", "parameters"), ("epochs", "epochs"), ("batch-size", "batch_size")]
)
def test_leads_by_plain_sums(name, column):
    """The small tables of batch norm's lead, run by run."""
    scores = {}
    for row in ROWS.itertuples():
        published_batch = name == "batch-size" and row.study == "epochs" and row.epochs == 20
        if row.study == name or published_batch:
            scores.setdefault((row.net, getattr(row, column)), []).append(row.test_accuracy)
    values = sorted({value for _, value in scores})
    assert all(len(own) == 3 for own in scores.values())
    for net in ("NetB", "NetC"):
        leads = [sum(scores["NetA", value]) / 3 - sum(scores[net, value]) / 3 for value in values]
        header = " | ".join(f"{value:,}" for value in values)
        line = re.search(rf"{re.escape(header)} \|\n.*\n(?:.*\n)?\| NetA minus {net} \| (.*) \|\n", README)[1]
        assert [float(lead) for lead in line.split(" | ")] == pytest.approx(leads, abs=0.0501)
    for net in utils.NETS:  # and what the points and lines of the figure are
        axis = report.plot_budget(ROWS).axes[list(report.BUDGETS).index(name)]
        line = next(line for line in axis.lines if line.get_label().startswith(net))
        assert line.get_ydata() == pytest.approx([sum(scores[net, value]) / 3 for value in values])


def test_differences_by_optimizer_by_independent_arithmetic():
    """The optimizers' table of differences against plain sums and Student's t."""
    shown = README[README.index("<!-- sweep-optimizer -->") :]
    best = {}  # the tables: optimizer, net, learning rate, weight decay
    for line in README[README.index("<!-- sweep-rate -->") :].splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) == 8 and cells[2] != "-" and cells[0] in report.OPTIMIZER_TITLES.values():
            best[cells[0], cells[1].split(",")[0]] = float(cells[2]), float(cells[3].split()[0])
    runs, by_seed = sweep("optimizer"), {}
    for optimizer, title in report.OPTIMIZER_TITLES.items():
        for net in utils.NORM_OF:
            own = runs[(runs["optimizer"] == optimizer) & (runs["net"] == net)]
            rate, decay = best.get((title, net), (None, None))
            own = own[(own["learning_rate"] == rate) & (own["weight_decay"] == decay)]
            if sorted(own["seed"]) == list(range(10)):
                by_seed[title, net] = dict(zip(own["seed"], own["test_accuracy"], strict=True))

    def text(values):
        mean = sum(values) / 10
        reach = 2.262157 * (sum((v - mean) ** 2 for v in values) / 9 / 10) ** 0.5
        return f"{mean:+.2f} ({mean - reach:+.2f} to {mean + reach:+.2f})"

    found = 0
    for first, second in (("NetA", "NetB"), ("NetA", "NetC"), ("NetA", "Net"), ("NetB", "Net"), ("NetC", "Net")):
        gaps = {
            title: [by_seed[title, first][seed] - by_seed[title, second][seed] for seed in range(10)]
            for title in report.OPTIMIZER_TITLES.values()
            if {(title, first), (title, second)} <= set(by_seed)
        }
        cells = [text(gaps[title]) if title in gaps else "-" for title in ("SGD", "AdamW", "Muon")]
        for title in ("SGD", "AdamW"):
            both = {title, "Muon"} <= set(gaps)
            cells.append(text([a - b for a, b in zip(gaps[title], gaps["Muon"], strict=True)]) if both else "-")
        assert f"| {first} minus {second} | {' | '.join(cells)} |" in shown
        found += len(gaps)
    assert found >= 8
    earlier = sweep("optimizer-h200")
    apart = []
    for (optimizer, net), own in earlier.groupby(["optimizer", "net"]):
        same = runs[(runs["optimizer"] == optimizer) & (runs["net"] == net)]
        if len(own) == 10 and own["learning_rate"].iloc[0] == same["learning_rate"].iloc[0]:
            by_seed["H200", optimizer, net] = dict(zip(own["seed"], own["test_accuracy"], strict=True))
            apart.append(abs(own["test_accuracy"].mean() - same["test_accuracy"].mean()))
    assert len(apart) == 6
    assert max(apart) <= 0.2  # "differ by at most 0.2 points over ten seeds"
    for optimizer, other in (("adamw", "NetB"), ("muon", "Net")):
        first, second = by_seed["H200", optimizer, "NetA"], by_seed["H200", optimizer, other]
        assert text([first[seed] - second[seed] for seed in range(10)]) in shown
    published = MAIN[MAIN["net"] == "NetC"].set_index("seed")["test_accuracy"]
    more = [by_seed["Muon", "NetC"][seed] - published[seed] for seed in range(10)]
    assert f"here it scores {sum(more) / 10:+.2f} points" in " ".join(shown.split())


@pytest.mark.parametrize("text", [README, "".join("".join(cell["source"]) for cell in NOTEBOOK["cells"])])
def test_what_is_not_run_yet_is_named(text):
    texts = pd.read_csv(ROOT / "results" / "runs.csv", dtype=str, keep_default_na=False)
    left = {name for name in study.STUDIES if study.waits(name, texts) or study.missing(name, texts)}
    sentence = re.search(r"Listed in `study.py`\s+and not run yet: (.*?\.) The runs", text, re.DOTALL)
    assert left == (set(re.findall(r"`([\w-]+)`", sentence[1])) if sentence else set())
