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
