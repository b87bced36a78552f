"""What the sweeps list: which experiments, on which split, after which others, and what is still missing."""

import math
from dataclasses import asdict, replace

import pandas as pd
import pytest

import models
import utils
from engine import records
from experiments import sweeps, tuning
from experiments.sweeps import SWEEPS, missing, planned, waits
from experiments.variants import Experiment

PARTS = ("rate", "decay", "seeds", "edges")  # of tuning


def rows_of(sweep, experiments, accuracy=lambda one: 70):
    """Rows, all values as text, of finished experiments with made-up validation accuracies; None: it diverged."""
    scores = [accuracy(one) for one in experiments]
    return pd.DataFrame(
        one.columns()
        | {
            "study": sweep,
            "split": SWEEPS.get(sweep, ["test"])[0],
            "validation_accuracy": "" if score is None else str(score),
        }
        for one, score in zip(experiments, scores, strict=True)
    )


def count_pairs(experiments):
    return pd.Series([(one.net, one.optimizer) for one in experiments]).value_counts()


def of_pair(experiments, net, optimizer):
    return [one for one in experiments if (one.net, one.optimizer) == (net, optimizer)]


def test_each_sweep_lists_each_run_once_and_starts_without_rows(tmp_path):
    rows = sweeps.read_texts(tmp_path / "runs.csv")
    assert rows.empty
    for sweep, (split, _, needed) in SWEEPS.items():
        todo = missing(sweep, rows)
        assert len(set(todo)) == len(todo), f"{sweep} lists a run twice"
        assert todo == planned(sweep, rows)
        assert bool(todo) != bool(needed), f"{sweep} waits for {needed}"
        assert split in ("test", "validation")
        if needed:
            assert list(SWEEPS).index(needed) < list(SWEEPS).index(sweep)


def test_choices_are_made_on_the_validation_split_alone():
    assert {sweep for sweep, (split, _, _) in SWEEPS.items() if split == "validation"} == {
        *("recipe", "rate", "rate-seeds", "initial", "batch-rate", "long-tune"),
        *("search", "search-seeds", "search-augment", "search-augment-seeds"),
        *(f"{name}-{part}" for name in ("lead", "lead-100", "step", "part") for part in PARTS),
    }
    assert all(SWEEPS[needed][0] == "validation" for _, _, needed in SWEEPS.values() if needed)


def test_all_nets_get_the_same_random_recipes():
    recipes = [
        {one.net: replace(one, net="NetA", initial_weights="") for one in sweeps.search(None)[start : start + 4]}
        for start in range(0, 240, 4)
    ]
    assert all(set(recipe) == set(sweeps.WITH_CONTROL) and len(set(recipe.values())) == 1 for recipe in recipes)
    assert len({recipe["NetA"] for recipe in recipes}) == 60
    assert {one.initial_weights for one in sweeps.search(None) if one.net == "Net"} == {"he"}
    assert all(0.005 <= one.learning_rate <= 0.15 and 0.03 <= one.weight_decay <= 3 for one in sweeps.search(None))


def test_the_best_five_recipes_of_each_net_get_three_new_seeds():
    """The accuracy of a recipe is its rate here, and none for NetB's highest, which diverged."""
    experiments = sweeps.search(None)
    highest = max(one.learning_rate for one in experiments)

    def accuracy(one):
        return None if (one.net, one.learning_rate) == ("NetB", highest) else one.learning_rate

    found = planned("search-seeds", rows_of("search", experiments, accuracy))
    rates = sorted({one.learning_rate for one in experiments})
    assert {one.learning_rate for one in found if one.net == "NetA"} == set(rates[-5:])
    assert {one.learning_rate for one in found if one.net == "NetB"} == set(rates[-6:-1])
    assert len(found) == 60
    few = planned(
        "search-seeds", rows_of("search", experiments, lambda one: accuracy(one) if one.net == "Net" else None)
    )
    assert count_pairs(few).to_dict() == {("Net", "muon"): 15}, "a recipe that diverged was chosen"
    assert {one.seed for one in found} == {1, 2, 3}

    rows = pd.concat([rows_of("search", experiments, accuracy), rows_of("search-seeds", found, accuracy)])
    best = [one for one in planned("search-best", rows) if one.net == "NetB"]
    assert {one.learning_rate for one in best} == {rates[-2]}
    assert [one.seed for one in best] == list(range(10))


def test_no_choice_rests_on_rows_of_an_earlier_plan():
    """Here of a recipe that is drawn no more, the best of all, which has its seeds, too."""
    experiments = sweeps.search(None)
    earlier = [replace(one, label_smoothing=0.15) for one in experiments[:4]]
    rows = rows_of("search", experiments)
    seeds = planned("search-seeds", rows)
    assert planned("search-seeds", pd.concat([rows, rows_of("search", earlier, lambda one: 90)])) == seeds

    rows = pd.concat([rows, rows_of("search-seeds", seeds)])
    best = planned("search-best", rows)
    more = [replace(one, seed=seed) for one in earlier for seed in (1, 2, 3)]
    rows = pd.concat([rows, rows_of("search-seeds", more, lambda one: 90), rows_of("main", earlier)])
    assert planned("search-best", rows) == best
    kept = sweeps.plan(rows)[1]
    assert kept["study"].value_counts().to_dict() == {"search": 240, "search-seeds": 60, "main": 4}
    assert set(kept[kept["study"] != "main"]["label_smoothing"]) <= {"0.0", "0.05", "0.1", "0.2"}


def finish(rows, score, last="lead"):
    """Run what is missing of a sweep and of those it needs with made-up accuracies, as `experiments.run` does."""
    for sweep in sweeps.chain(last):
        while todo := missing(sweep, rows):
            rows = pd.concat([rows, rows_of(sweep, todo, score)], ignore_index=True)
    return rows


@pytest.mark.parametrize(
    ("of", "optimizer", "value"),
    [("FIRST_RATES", "sgdw", (0.003, 0.01, 0.03, 0.1, 0.3)), ("FIRST_DECAY", "adamw", 1.0)],
)
def test_an_earlier_plan_of_tuning_changes_no_choice(monkeypatch, of, optimizer, value):
    """What one part lists now was a run of another part before: it is run again and counts once."""
    published = sweeps.read_texts()
    published = published[published["study"].isin(sweeps.chain("lead"))]
    tried = published[published["split"] == "validation"].drop_duplicates(tuning.KEYS)
    known = tried.set_index(tuning.KEYS)["validation_accuracy"].to_dict()

    def score(one):
        return known.get(tuning.key(one), 50 - abs(math.log(one.learning_rate / 0.03))) or None

    monkeypatch.setitem(getattr(tuning, of), optimizer, value)
    fresh = finish(published[:0], score)
    again = finish(published.assign(validation_accuracy=[known.get(key, "") for key in keys_of(published)]), score)
    assert planned("lead", again) == planned("lead", fresh)
    for sweep in sweeps.chain("lead"):
        assert not missing(sweep, again)
        counting = sweeps.plan(again)[1]["study"].eq(sweep).sum()
        assert counting == fresh["study"].eq(sweep).sum()


def test_seeds_of_an_earlier_edge_do_not_steer_the_search_for_another(monkeypatch):
    """The rate .3 and decay .3 were beyond an edge, with three seeds; now they are tried with one."""
    accuracies = {
        **{(0.03, 0.3): (80, 76, 76), (0.1, 0.3): (79, 80, 80), (0.3, 0.3): (78, 86, 86), (0.1, 1.0): (70, 70, 70)},
        **{(0.3, 1.0): (80, 80, 80), (1.0, 1.0): (79.9, 82, 82), (3.0, 1.0): (90, 90, 90), (10.0, 1.0): (50, 50, 50)},
    }

    def score(one):
        return accuracies.get((one.learning_rate, tuning.decay_of(one)), (60, 60, 60))[min(one.seed, 2)]

    def choose(rows, rates, decay):
        monkeypatch.setitem(tuning.FIRST_RATES, "sgdw", rates)
        monkeypatch.setitem(tuning.FIRST_DECAY, "sgdw", decay)
        rows = finish(rows, score, "own")
        return rows, {(one.learning_rate, tuning.decay_of(one)) for one in planned("own", rows)}

    for name, sweep in tuning.tuning("own", [tuning.Cell("sgdw", 500, nets=("NetA",), seeds=1)]).items():
        monkeypatch.setitem(SWEEPS, name, sweep)
    none = rows_of("own", [Experiment()])[:0]
    earlier, chosen = choose(none, (0.01, 0.03, 0.1), 0.3)
    assert chosen == {(0.3, 0.3)}
    plans = [choose(rows, (0.03, 0.1, 0.3, 1.0), 1.0) for rows in (none, earlier)]
    assert [chosen for _, chosen in plans] == [{(3.0, 1.0)}] * 2
    fresh, again = ({*keys_of(sweeps.plan(rows)[1])} for rows, _ in plans)
    assert fresh == again


@pytest.mark.parametrize(
    "change",
    [
        {"epochs": 400, "learning_rate": 0.02},
        {"augment": "flip", "weight_decay": 0.3},
        {"optimizer": "adamw", "learning_rate": 0.003, "momentum": 0.9},
    ],
)
def test_the_longest_runs_are_of_the_setting_that_was_best(monkeypatch, change):
    [best] = sweeps.experiments(["NetB"], 1, [sweeps.LONG | {"learning_rate": 0.03, "weight_decay": 0.1} | change])
    monkeypatch.setattr(sweeps, "LONG_SETTINGS", [*sweeps.LONG_SETTINGS, sweeps.LONG_SETTINGS[0] | change])
    rows = rows_of("long-tune", sweeps.long_tune(None), lambda one: 95 if one == best else 90)
    assert [one for one in planned("long", rows) if one.net == "NetB"] == [replace(best, seed=n) for n in range(3)]


def keys_of(rows):
    return rows[tuning.KEYS].itertuples(index=False, name=None)


def test_runs_on_another_split_do_not_count(monkeypatch):
    rows = sweeps.read_texts()
    _, function, needed = SWEEPS["initial"]
    monkeypatch.setitem(SWEEPS, "initial", ("test", function, needed))
    assert missing("initial", rows) == sweeps.initial(None)
    assert "initial" not in set(sweeps.plan(rows)[1]["study"])


def test_a_sweep_that_can_not_be_planned_is_named(monkeypatch):
    one = Experiment(net="NetC")
    monkeypatch.setitem(SWEEPS, "groups", ("test", lambda rows: [one, replace(one, groups=4)], None))
    with pytest.raises(ValueError, match=r"^sweep groups lists a run twice: Experiment\("):
        missing("groups", rows_of("groups", [one]))
    rows = rows_of("batch-rate", sweeps.batch_rate(None), lambda one: None)
    with pytest.raises(ValueError, match=r"^sweep batch-size: "):
        planned("batch-size", rows)


def test_runs_of_a_sweep_that_waits_do_not_count():
    rows = rows_of("search", sweeps.search(None))
    rows = pd.concat([rows, rows_of("search-seeds", planned("search-seeds", rows))])
    listed, kept = sweeps.plan(rows[1:])
    assert listed["search-seeds"] is listed["search-best"] is None
    assert set(kept["study"]) == {"search"}


def test_published_rows_leave_nothing_to_run():
    rows = sweeps.read_texts()
    assert {sweep: missing(sweep, rows) for sweep in SWEEPS} == {sweep: [] for sweep in SWEEPS}
    assert sweeps.unfinished(*sweeps.plan(rows)) == []
    fewer = rows.drop(rows.index[(rows["study"] == "part-rate")][0])
    assert sweeps.unfinished(*sweeps.plan(fewer)) == ["part-rate", "part-decay", "part-seeds", "part-edges", "part"]
    last = set(SWEEPS) - {needed for _, _, needed in SWEEPS.values()}  # one that waits keeps all after it waiting
    assert not any(waits(sweep, rows) for sweep in last)


@pytest.mark.parametrize("program", ["pandas", "a spreadsheet"])
def test_a_file_that_another_program_saved_leaves_nothing_to_run(tmp_path, program):
    path = tmp_path / "runs.csv"
    if program == "pandas":
        pd.read_csv(sweeps.RUNS).to_csv(path, index=False)  # 4 among empty cells becomes 4.0
    else:
        rows = pd.read_csv(sweeps.RUNS, dtype=str, keep_default_na=False)
        for name in ("learning_rate", "weight_decay", "momentum"):
            rows[name] = [f"{float(text):E}" for text in rows[name]]
        rows.to_csv(path, index=False)
    assert path.read_bytes() != sweeps.RUNS.read_bytes()
    settings = list(Experiment().columns())
    texts = sweeps.read_texts()[settings]
    pd.testing.assert_frame_equal(sweeps.read_texts(path)[settings], texts)


def test_a_whole_number_for_another_is_the_same_run(tmp_path):
    one = Experiment(weight_decay=0, learning_rate=1)
    records.upsert(tmp_path / "runs.csv", one.columns() | {"study": "recipe", "split": "validation"})
    assert sweeps.without_row("recipe", [one], sweeps.read_texts(tmp_path / "runs.csv")) == []


def test_rows_from_before_a_column_count_as_finished():
    rows = rows_of("recipe", sweeps.recipe(None))
    assert missing("recipe", rows) == []
    assert missing("recipe", rows.drop(columns="initial_weights")) == []
    assert missing("recipe", rows[3:]) == sweeps.recipe(None)[:3]
    assert len(missing("recipe", rows.assign(study="augment"))) == len(rows)


def test_rows_are_read_as_they_were_written(tmp_path):
    experiments = sweeps.width(None) + sweeps.batch(None) + sweeps.batch_rate(None)
    experiments += [one for one in sweeps.group_counts(None) if one.groups != 4]  # which `width` has
    path = tmp_path / "runs.csv"
    records.upsert(path, [{"study": "width", **one.columns()} for one in experiments])
    names = list(experiments[0].columns())
    assert sweeps.read_texts(path)[names].to_dict("records") == [one.columns() for one in experiments]


def test_every_pair_of_optimizer_and_net_gets_the_same_trials():
    trials = sweeps.rate(None)
    per_pair = count_pairs(trials)
    assert len(per_pair) == 12
    assert set(per_pair) == {35}
    momenta = {one.optimizer: one.momentum for one in trials}
    assert momenta == {"sgd": 0.9, "adamw": 0.9, "muon": utils.Settings.momentum}
    assert {one.seed for one in trials} == {0}
    assert dict(count_pairs(sweeps.initial(None))) == {("Net", name): 21 for name in sweeps.RATES}
    assert {one.initial_weights for one in sweeps.initial(None)} == {"he"}


def test_narrow_nets_have_the_parameters_that_they_are_listed_with():
    for parameters, widths in sweeps.WIDTHS.items():
        assert sum(p.numel() for p in models.NetC(widths=widths).parameters()) == parameters
    [one] = sweeps.experiments(["NetB"], 1, variants=[{"layer_variant": "[C,H,W]", "widths": sweeps.LAYER_WIDTHS}])
    assert sum(p.numel() for p in one.build().parameters()) == 49_880


def test_optimizers_start_from_the_best_of_their_rates():
    """The first seed picks the decay at each rate, all three the rate; what diverged is not picked."""

    def accuracy(one):
        setting = one.net, one.optimizer, one.learning_rate, one.weight_decay
        if setting[:3] == ("NetB", "sgd", 3.0):
            return None
        lucky = {("NetB", "sgd", 0.1, 0.0005): 75, ("NetB", "sgd", 0.3, 0.005): 80}.get(setting, 70)
        return 70 if one.seed > 0 and lucky == 80 else lucky

    first = rows_of("rate", sweeps.rate(None), accuracy)
    assert planned("rate-seeds", first[1:]) == []
    seeds = planned("rate-seeds", first)
    per_pair = count_pairs(seeds)
    assert per_pair.pop(("NetB", "sgd")) == 12  # no run of rate 3.0 has an accuracy
    assert set(per_pair) == {14}
    own = of_pair(seeds, "NetB", "sgd")
    assert {one.weight_decay for one in own if one.learning_rate == 0.1} == {0.0005}
    assert {one.seed for one in own} == {1, 2}
    second = rows_of("rate-seeds", seeds, accuracy)
    assert waits("optimizer", pd.concat([first, second[:-1]]))
    assert planned("optimizer", pd.concat([first, second[:-1]])) == []
    assert waits("optimizer", pd.concat([first[1:], second])), "what is needed waits itself"
    chosen = of_pair(planned("optimizer", pd.concat([first, second])), "NetB", "sgd")
    assert [one.seed for one in chosen] == list(range(10))
    assert {(one.learning_rate, one.weight_decay) for one in chosen} == {(0.1, 0.0005)}


@pytest.fixture(scope="module")
def rates():
    """Rows of `rate` and `rate-seeds`: NetA with muon is best at 0.1 and 1.5, second at 0.03 and 1.5."""

    def accuracy(one):
        best = {0.1: 90, 0.03: 85}.get(one.learning_rate, 70) if (one.net, one.optimizer) == ("NetA", "muon") else 70
        return best if one.weight_decay == 1.5 else 60

    first = rows_of("rate", sweeps.rate(None), accuracy)
    return pd.concat([first, rows_of("rate-seeds", sweeps.rate_seeds(first), accuracy)], ignore_index=True)


def best_of(rows, net="NetA", optimizer="muon"):
    return [setting[2:] for setting in sweeps.best_settings(rows) if setting[:2] == (optimizer, net)]


def test_a_setting_that_diverged_once_is_not_the_best(rates):
    assert best_of(rates) == [("0.1", "1.5")]
    best = (rates["net"] == "NetA") & (rates["optimizer"] == "muon") & (rates["learning_rate"] == "0.1")
    one = best & (rates["study"] == "rate-seeds") & (rates["seed"] == "1")
    assert one.sum() == 1
    diverged = rates.assign(validation_accuracy=rates["validation_accuracy"].where(~one, ""))
    assert best_of(diverged) == [("0.03", "1.5")]


def test_while_a_setting_lacks_seeds_none_is_the_best(rates):
    """Nor is it an overflow, which a missing mean would look like in tables and figures."""
    pair = (rates["net"] == "NetA") & (rates["learning_rate"] == "0.1") & (rates["optimizer"] == "muon")
    for seeds, count in ((("2",), 2), (("1", "2"), 1)):
        with pytest.raises(ValueError, match=rf"^muon, NetA, 0.1, .* has {count} of 3 seeds; run what is missing"):
            best_of(rates[~(pair & rates["seed"].isin(seeds))])


def test_other_momenta_are_not_pooled(rates):
    with pytest.raises(ValueError, match=r"^seed 0 of sgd, NetA, .* is there twice; give runs of one setting$"):
        best_of(pd.concat([rates, rates.assign(momentum="0.5")]))


def test_a_pair_that_always_diverged_has_no_best_setting(rates):
    pair = (rates["net"] == "NetC") & (rates["optimizer"] == "adamw")
    rows = rates.assign(validation_accuracy=rates["validation_accuracy"].where(~pair, ""))
    assert best_of(rows, "NetC", "adamw") == []
    assert len(sweeps.best_settings(rows)) == 11
    assert [setting for setting in sweeps.best_decays(rows) if setting[:2] == ("adamw", "NetC")] == []


def test_a_decay_that_is_better_now_counts_when_its_seeds_are_there(rates):
    """And what the old one led to does not count any more: all pairs get the same trials."""
    [old] = of_pair([one for one in sweeps.rate(None) if one.learning_rate == 0.1], "NetA", "muon")[2:3]
    new = replace(old, weight_decay=2.0)
    rows = pd.concat([rates, rows_of("rate", [new], lambda one: 95)])
    assert ("muon", "NetA", "0.1", "2.0") in sweeps.best_decays(rows)
    with pytest.raises(ValueError, match=r"has 1 of 3 seeds"):
        best_of(rows)
    seeds = [replace(new, seed=seed) for seed in (1, 2)]
    assert best_of(pd.concat([rows, rows_of("rate-seeds", seeds, lambda one: 88)])) == [("0.1", "2.0")]


def test_batch_sizes_start_from_the_best_of_their_ends():
    best = {32: 0.03 / 16, 1024: 2 * 0.03}

    def chosen(accuracy):
        rows = rows_of("batch-rate", sweeps.batch_rate(None), accuracy)
        assert planned("batch-size", rows[1:]) == []
        return {one.batch_size: one.learning_rate for one in planned("batch-size", rows) if one.net == "NetC"}

    def lucky(one):
        return one.net == "NetC" and one.learning_rate == best[one.batch_size]

    rates = chosen(lambda one: 80 if lucky(one) else 70)
    assert rates[32] == pytest.approx(best[32], rel=0.01)
    assert rates[1024] == pytest.approx(best[1024], rel=0.01)
    assert 0.03 / 16 < rates[64] < rates[128] < rates[256] < 0.03
    diverged = chosen(lambda one: (None if one.batch_size == 32 else 80) if lucky(one) else 70)
    assert diverged[32] != pytest.approx(best[32], rel=0.01)


def test_experiments_of_a_list_differ_by_seed_net_and_change():
    found = sweeps.experiments(("NetA", "NetC"), 2, [{"epochs": 5}], [{"widths": sweeps.WIDTHS[9_410]}])
    common = {"epochs": 5, "widths": sweeps.WIDTHS[9_410], **sweeps.EARLIER}
    assert found == [
        Experiment(net=net, learning_rate=sweeps.EARLIER_RATES[net], seed=seed, **common)
        for seed in (0, 1)
        for net in ("NetA", "NetC")
    ]


def test_a_missing_column_never_makes_two_settings_look_alike():
    experiments = sweeps.group_counts(None)
    rows = rows_of("groups", experiments)
    assert missing("groups", rows) == []
    assert missing("groups", rows.drop(columns="groups")) == experiments


def test_what_a_sweep_does_not_vary_is_as_in_the_earlier_recipe():
    for sweep in ("groups", "layer", "width", "epochs", "flip", "batch"):
        for one in SWEEPS[sweep][1](None):
            assert (one.optimizer, one.momentum) == ("muon", utils.Settings.momentum)
            assert one.learning_rate == sweeps.EARLIER_RATES[one.net]
            assert one.batch_size == (512 if sweep == "batch" else 500)
            assert sweep == "flip" or one.weight_decay == sweeps.EARLIER["weight_decay"]
    for one in sweeps.augment(None):
        assert one == Experiment(net=one.net, seed=one.seed, **sweeps.AUGMENTED)


def test_the_recipe_is_changed_for_all_nets_alike():
    of = {net: [replace(one, net="NetA") for one in sweeps.recipe(None) if one.net == net] for net in utils.NETS}
    assert of["NetA"] == of["NetB"] == of["NetC"]
    assert len(of["NetA"]) == 3 * 16


def test_published_rows_of_choices_did_not_see_the_test_set():
    rows = sweeps.read_texts()
    for sweep, (split, _, _) in SWEEPS.items():
        own = rows[rows["study"] == sweep]
        assert set(own["split"]) == {split} or (own.empty and sweep.endswith("-edges"))
        assert split == "test" or set(own["test_accuracy"]) <= {""}


def test_each_norm_chose_the_published_setting_by_itself():
    """In the sweep lead at the published batch size, by plain sums over three seeds on held-out images."""
    settings = {**asdict(utils.Settings()), "dataset": "CIFAR-10"}
    del settings["seed"], settings["learning_rate"], settings["weight_decay"]
    rows = sweeps.read_texts()
    rows = rows[rows["study"].isin([f"lead-{part}" for part in PARTS])]
    for name, value in settings.items():
        rows = rows[rows[name] == str(value)]
    for net in utils.NETS:
        trials = {}
        for one in rows[rows["net"] == net].itertuples():
            trials.setdefault((one.learning_rate, one.weight_decay), []).append(one.validation_accuracy)
        sums = {choice: sum(map(float, found)) for choice, found in trials.items() if len(found) == 3}
        best = max(sums, key=sums.get)
        assert tuple(map(float, best)) == (utils.Settings.learning_rate, utils.Settings.weight_decay)


def test_the_published_batch_size_has_the_best_mean_on_held_out_images():
    rows = sweeps.read_texts()
    rows = rows[rows["study"].isin([f"lead-{part}" for part in PARTS]) & rows["net"].isin(utils.NETS)]
    rows = rows[(rows["optimizer"] == "muon") & (rows["augment"] == "none")]
    keys = ["batch_size", "net", "learning_rate", "weight_decay"]
    seeds = rows.assign(accuracy=pd.to_numeric(rows["validation_accuracy"])).groupby(keys)["accuracy"]
    means = seeds.mean()[seeds.size() == 3].groupby(keys[:2]).max().groupby("batch_size").mean()
    assert means.idxmax() == str(utils.Settings.batch_size)


def test_the_earlier_choices_are_the_best_of_equal_trials():
    """By plain sums: each net's learning rate, and the weight decay with augmentation that is best over the nets."""
    rates, decays = {}, {}
    for one in sweeps.read_texts().query("study == 'tune'").itertuples():
        trials = rates.setdefault(one.net, {}) if one.augment == "none" else decays
        choice = float(one.learning_rate) if one.augment == "none" else float(one.weight_decay)
        trials.setdefault(choice, []).append(float(one.validation_accuracy))
    for net in utils.NETS:
        assert [len(values) for values in rates[net].values()] == [2] * 4
        assert max(rates[net], key=lambda choice: sum(rates[net][choice])) == sweeps.EARLIER_RATES[net]
    assert [len(values) for values in decays.values()] == [6] * 4
    assert max(decays, key=lambda choice: sum(decays[choice])) == sweeps.EARLIER_AUGMENTED["weight_decay"]
