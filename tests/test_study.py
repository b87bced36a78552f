from dataclasses import replace

import pandas as pd
import pytest

import study
import utils


@pytest.fixture
def tiny(monkeypatch, tmp_path, small):
    """Studies of three short runs on few images, with their rows in tmp_path."""
    settings = utils.Settings(epochs=1, batch_size=100)
    jobs = [("NetC", replace(settings, seed=seed)) for seed in range(3)]
    monkeypatch.setattr(study, "STUDIES", {"tune": ("validation", jobs), "augment": ("test", jobs)})
    monkeypatch.setattr(study, "RUNS", tmp_path / "results" / "runs.csv")
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    data = replace(small, real=True, images=small.images.repeat(12, 1, 1, 1), labels=small.labels.repeat(12))
    return data, jobs


def test_runs_what_is_missing_and_no_more(tiny, monkeypatch):
    data, jobs = tiny
    monkeypatch.setitem(study.STUDIES, "augment", ("test", jobs[:1]))
    study.run_study("augment", data)
    first = utils.read_rows(study.RUNS)
    assert study.missing("augment", first) == []
    monkeypatch.setitem(study.STUDIES, "augment", ("test", jobs))
    assert study.missing("augment", first) == jobs[1:]
    study.run_study("augment", data)
    rows = utils.read_rows(study.RUNS)
    assert rows["seed"].tolist() == [0, 1, 2]
    assert rows["seconds"].iloc[0] == first["seconds"].iloc[0]
    assert rows["test_accuracy"].notna().all()


def test_validation_runs_do_not_touch_the_test_set(tiny, monkeypatch):
    data, jobs = tiny
    monkeypatch.setitem(study.STUDIES, "tune", ("validation", jobs[:1]))
    seen, score = [], utils.test
    monkeypatch.setattr(utils, "test", lambda net, images, labels: seen.append(images) or score(net, images, labels))
    study.run_study("tune", data)
    assert seen
    assert all(images.data_ptr() != data.test_images.data_ptr() for images in seen)
    row = utils.read_rows(study.RUNS).iloc[0]
    assert row["split"] == "validation"
    assert pd.isna(row["test_accuracy"])
    assert pd.notna(row["validation_accuracy"])


def test_shards_cover_everything_once(tiny, monkeypatch):
    data, _ = tiny
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, seeds in (("0", [0, 2]), ("1", [0, 1, 2])):
        monkeypatch.setenv("RANK", rank)
        study.run_study("augment", data)
        assert sorted(utils.read_rows(study.RUNS)["seed"]) == seeds


def test_together_as_alone(tiny):
    """Runs that share a device get the weights that each would get by itself."""
    data, jobs = tiny
    together = study.run_together("augment", jobs[:2], data)
    alone = utils.run("NetC", data, jobs[1][1], track=False)
    assert together[1].scores.loss == alone.scores.loss


def test_fill():
    text = "a\n<!-- one -->\nold\n<!-- end -->\nb\n<!-- two -->\n<!-- end -->\n"
    filled = study.fill(text, {"one": "1", "two": "2"})
    assert filled == "a\n<!-- one -->\n1\n<!-- end -->\nb\n<!-- two -->\n2\n<!-- end -->\n"
    assert study.fill(filled, {"one": "1", "two": "2"}) == filled
    with pytest.raises(KeyError):
        study.fill(text, {"one": "1"})


@pytest.fixture
def published():
    """Rows as a ten-seed run would leave them, with made-up accuracies."""
    rows = [
        {"study": name, "net": net, "norm": utils.NORMS[net], "split": "test", "seed": seed, "status": "done"}
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
        for net in study.NETS
        for rate in (1, 2)
    ]
    return pd.DataFrame(rows + tune)


def test_published_tables(published):
    text = study.results_table(published)
    assert "| NetB | layer | 20 | 48,042 | 95.00 | 85.45 | 0.30 | 10 | 5.0 |" in text
    assert "NetA minus NetC: +2.00 points" in text
    assert "gpu, bfloat16, torch 2.0" in text
    assert "| NetB | layer | 20 | 48,042 | 95.00 | 86.45 | 0.30 | 10 |" in study.augment_table(published)
    assert "It reaches 84.45 % on the test set (standard deviation 0.30, n = 10)." in study.finding("NetC", published)
    assert "from 81.00 to 82.00 %" in study.finding("NetC", published)
    assert study.tuned(published).loc["NetC", 1] == 81
    assert study.best_rates(published) == {"NetA": 2, "NetB": 2, "NetC": 2}


def test_accuracy_plot_shows_every_run(published):
    figure = study.plot_accuracy(published)
    for axis, gain in zip(figure.axes, (0, 1), strict=True):
        points = [collection.get_offsets() for collection in axis.collections if len(collection.get_offsets()) == 10]
        assert [round(p[:, 1].mean(), 2) for p in points] == [86.45 + gain, 85.45 + gain, 84.45 + gain]
        assert [text.get_text() for text in axis.texts] == [f"{base + gain + 0.45:.1f}" for base in (86, 85, 84)]
