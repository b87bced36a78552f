import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pandas as pd
import pytest
import torch
from conftest import ROOT
from torch import nn

import models
import study
import utils
from study import Job

TINY = utils.Settings(epochs=1, batch_size=100)


@pytest.fixture
def tiny(monkeypatch, tmp_path, small):
    """Studies of three short runs on few images, with their rows in tmp_path."""
    jobs = [Job("NetC", replace(TINY, seed=seed)) for seed in range(3)]
    monkeypatch.setattr(
        study, "STUDIES", {"tune": ("validation", lambda rows: jobs), "augment": ("test", lambda rows: jobs)}
    )
    monkeypatch.setattr(study, "RUNS", tmp_path / "results" / "runs.csv")
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return replace(small, real=True), jobs


def test_runs_what_is_missing_and_no_more(tiny, monkeypatch):
    data, jobs = tiny
    monkeypatch.setitem(study.STUDIES, "augment", ("test", lambda rows: jobs[:1]))
    study.run_study("augment", data)
    first = study.read_texts()
    assert study.missing("augment", first) == []
    assert study.missing("augment", first.drop(columns="initial_weights")) == []  # rows from before that column
    monkeypatch.setitem(study.STUDIES, "augment", ("test", lambda rows: jobs))
    assert study.missing("augment", first) == jobs[1:]
    study.run_study("augment", data)
    rows = utils.read_rows(study.RUNS)
    assert rows["seed"].tolist() == [0, 1, 2]
    assert str(rows["seconds"].iloc[0]) == first["seconds"].iloc[0]
    assert rows["test_accuracy"].notna().all()


def test_validation_runs_do_not_touch_the_test_set(tiny, monkeypatch):
    data, jobs = tiny
    data = replace(data, images=data.images.repeat(12, 1, 1, 1), labels=data.labels.repeat(12))  # to hold 500 a class
    monkeypatch.setitem(study.STUDIES, "tune", ("validation", lambda rows: jobs[:1]))
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


def test_small_batches_run_many_at_a_time():
    sizes = [32] * 14 + [256] * 6 + [500] * 4 + [1024]
    todo = [Job("NetA", replace(TINY, batch_size=size, seed=seed)) for seed, size in enumerate(sizes)]
    parts = list(study.parts(todo))
    assert [job for part in parts for job in part] == todo
    assert [(len(part), part[0].settings.batch_size) for part in parts] == [
        *((12, 32), (2, 32), (5, 256), (1, 256), (3, 500), (1, 500), (1, 1024))
    ]


def test_together_as_alone(tiny):
    """Runs that share a device get the weights that each would get by itself, also when one is longer."""
    data, _ = tiny
    jobs = [Job("NetC", replace(TINY, seed=epochs, epochs=epochs)) for epochs in (2, 3)]
    together = study.run_together("augment", jobs, data, [False, False])
    alone = [utils.run("NetC", data, job.settings, track=False) for job in jobs]
    assert [run.scores.loss for run in together] == [run.scores.loss for run in alone]


DRIVER = """
import sys; sys.path.insert(0, {root!r})
from pathlib import Path
import torch, study, utils
stand_in = utils.draw_stand_in(torch.device("cpu"))
data = utils.replace(stand_in, real=True, images=stand_in.images[:500], labels=stand_in.labels[:500],
    test_images=stand_in.test_images[:500], test_labels=stand_in.test_labels[:500])
jobs = study.jobs(["NetA", "NetB"], 3, [{{"epochs": 2, "batch_size": 100}}])
study.STUDIES = {{"epochs": ("test", lambda rows: jobs)}}
study.RUNS = Path({runs!r})
study.run_study("epochs", data)
"""


def start(runs, **environment):
    """A process of its own that runs a study of six short runs, with its rows in `runs`."""
    command = [sys.executable, "-c", DRIVER.format(root=str(ROOT), runs=str(runs))]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment  # the same thread count, the same bits
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def accuracies(runs):
    return utils.read_rows(runs).set_index(["net", "seed"])["test_accuracy"].sort_index().to_dict()


def test_killed_and_started_again_as_undisturbed(tmp_path):
    undisturbed, killed, shared = (tmp_path / name / "runs.csv" for name in ("undisturbed", "killed", "shared"))
    assert start(undisturbed).wait() == 0
    expected = accuracies(undisturbed)
    assert len(expected) == 6

    process = start(killed)
    while not killed.exists():
        time.sleep(0.05)
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 1 <= len(accuracies(killed)) < 6
    assert start(killed).wait() == 0
    assert accuracies(killed) == expected

    both = [start(shared, RANK=str(rank), WORLD_SIZE="2") for rank in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert accuracies(shared) == expected


def test_studies_are_what_they_say():
    rows = pd.DataFrame(columns=["study"])
    for name in study.STUDIES:
        todo = study.missing(name, rows)
        assert len(set(todo)) == len(todo), f"{name} lists a run twice"
    assert study.rate_seeds(rows) == study.optimizer(rows) == []  # until the study rate is finished
    per_pair = pd.Series([(job.net, job.optimizer) for job in study.rate(rows)]).value_counts()
    assert len(per_pair) == 12
    assert set(per_pair) == {35}
    momenta = {job.optimizer: job.settings.momentum for job in study.rate(rows)}
    assert momenta == {"sgd": 0.9, "adamw": 0.9, "muon": utils.Settings.momentum}
    for parameters, widths in study.WIDTHS.items():
        assert sum(p.numel() for p in models.NetC(widths=widths).parameters()) == parameters
    [job] = study.jobs(["NetB"], 1, variants=[{"layer_variant": "[C,H,W]", "widths": study.LAYER_WIDTHS}])
    assert sum(p.numel() for p in job.build().parameters()) == 49_880


def test_optimizers_start_from_the_best_of_their_rates():
    """The first seed picks the decay at each rate, all three the rate; what diverged is not picked."""

    def scored(name, job):
        setting = job.net, job.optimizer, job.settings.learning_rate, job.settings.weight_decay
        lucky = {("NetB", "sgd", 0.1, 0.0005): 75, ("NetB", "sgd", 0.3, 0.005): 80}.get(setting, 70)
        accuracy = 70 if job.settings.seed > 0 and lucky == 80 else lucky
        if setting[:3] == ("NetB", "sgd", 3.0):
            accuracy = ""
        return job.columns() | {"study": name, "validation_accuracy": str(accuracy)}

    first = [scored("rate", job) for job in study.rate(None)]
    assert study.rate_seeds(pd.DataFrame(first[1:])) == []
    seeds = study.rate_seeds(pd.DataFrame(first))
    per_pair = pd.Series([(job.net, job.optimizer) for job in seeds]).value_counts()
    assert per_pair.pop(("NetB", "sgd")) == 12  # no run of rate 3.0 has an accuracy
    assert set(per_pair) == {14}
    own = [job for job in seeds if (job.net, job.optimizer) == ("NetB", "sgd")]
    assert {job.settings.weight_decay for job in own if job.settings.learning_rate == 0.1} == {0.0005}
    assert {job.settings.seed for job in own} == {1, 2}
    rows = [*first, *(scored("rate-seeds", job) for job in seeds)]
    assert study.optimizer(pd.DataFrame(rows[:-1])) == []
    chosen = [job for job in study.optimizer(pd.DataFrame(rows)) if (job.net, job.optimizer) == ("NetB", "sgd")]
    assert [job.settings.seed for job in chosen] == list(range(10))
    assert {(job.settings.learning_rate, job.settings.weight_decay) for job in chosen} == {(0.1, 0.0005)}


def test_the_control_from_other_initial_weights():
    own, he, again = (study.Job("Net", TINY, initial_weights=draw) for draw in ("", "he", "he"))
    torch.manual_seed(7)
    nets = own.build(), he.build(), again.build()
    assert all(torch.equal(a, b) for a, b in zip(nets[1].parameters(), nets[2].parameters(), strict=True))
    for name, follows in (("C4.conv", 2), ("c7", 1), ("c11", 1)):
        weight = nets[1].get_submodule(name).weight
        assert weight.std().item() == pytest.approx((follows / weight[0].numel()) ** 0.5, rel=0.1)
    images = torch.randn(100, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    fading, kept = (net(images).std(0).mean().item() for net in nets[:2])
    assert fading < 1e-5 < 1e-3 < kept
    assert own.columns() | {"initial_weights": "he"} == he.columns()
    trials = pd.Series([(job.net, job.optimizer) for job in study.initial(None)]).value_counts()
    assert dict(trials) == {("Net", name): 21 for name in study.OPTIMIZERS}


def test_batch_sizes_start_from_the_best_of_their_ends():
    rows = [job.columns() | {"study": "batch-rate", "validation_accuracy": "70"} for job in study.batch_rate(None)]
    assert study.batch_size(pd.DataFrame(rows[1:])) == []
    best = {"32": str(0.03 / 16), "1024": str(2 * 0.03)}
    for row in rows:
        if row["net"] == "NetC" and row["learning_rate"] == best[row["batch_size"]]:
            row["validation_accuracy"] = "80"
    chosen = {
        job.settings.batch_size: job.settings for job in study.batch_size(pd.DataFrame(rows)) if job.net == "NetC"
    }
    assert chosen[32].learning_rate == pytest.approx(0.03 / 16, rel=0.01)
    assert chosen[1024].learning_rate == pytest.approx(2 * 0.03, rel=0.01)
    diverged = [row | {"validation_accuracy": ""} if row["learning_rate"] == best["32"] else row for row in rows]
    other = {
        job.settings.batch_size: job.settings for job in study.batch_size(pd.DataFrame(diverged)) if job.net == "NetC"
    }
    assert other[32].learning_rate != pytest.approx(0.03 / 16, rel=0.01)
    assert 0.03 / 16 < chosen[64].learning_rate < chosen[128].learning_rate < chosen[256].learning_rate < 0.03


@pytest.mark.parametrize(("size", "slices"), [(8, 5), (40, 1)])
def test_slices_of_batch_norm(size, slices):
    """Against PyTorch's batch norm, slice by slice."""
    torch.manual_seed(0)
    x = torch.randn(40, 6, 5, 5) * 3 + 1
    ours, theirs = study.SliceBatchNorm(6, size), nn.BatchNorm2d(6)
    nn.init.normal_(ours.weight)
    theirs.weight.data.copy_(ours.weight)
    expected = torch.cat([theirs.train()(part) for part in x.split(size)])
    assert (ours.train()(x) - expected).abs().max() < 1e-5
    if slices == 1:
        assert (ours.running_var - theirs.running_var).abs().max() < 1e-5
        assert (ours.eval()(x) - theirs.eval()(x)).abs().max() < 1e-5
    with pytest.raises(RuntimeError):
        ours.train()(x[:13])


def test_variants_differ_in_their_norm_alone():
    plain = Job("NetB", TINY).build()
    for variant in ({"layer_variant": "C"}, {"layer_variant": "[C,H,W]"}):
        other = Job("NetB", TINY, **variant).build()
        assert torch.equal(other.C9.conv.weight, plain.C9.conv.weight)
    x = torch.randn(4, 3, 32, 32)
    elementwise = Job("NetB", TINY, layer_variant="[C,H,W]").build()
    assert (elementwise(x) - plain(x)).abs().max() < 1e-4  # the same until scales and shifts are trained
    assert (
        sum(p.numel() for p in elementwise.parameters()) - sum(p.numel() for p in plain.parameters()) == 147_456 - 432
    )
    pixel = Job("NetB", TINY, layer_variant="C").build().C4.norm
    y = pixel(torch.randn(2, 24, 5, 5))
    assert y.mean(1).abs().max() < 1e-5
    assert (y.std(1, correction=0) - 1).abs().max() < 1e-3
    instance = Job("NetC", TINY, groups="C").build()
    assert [instance.get_submodule(f"{name}.norm").num_groups for name in study.SIDES] == [
        16,
        32,
        24,
        24,
        24,
        32,
        32,
        32,
    ]


@pytest.mark.parametrize("name", study.OPTIMIZERS)
@pytest.mark.parametrize("variant", [{}, {"layer_variant": "[C,H,W]"}, {"groups": "C"}, {"statistics_batch": 4}])
def test_every_optimizer_trains_every_variant(small, name, variant):
    net = "NetC" if "groups" in variant else "NetA" if "statistics_batch" in variant else "NetB"
    rate = {"muon": 0.03, "sgd": 0.1, "adamw": 0.003}[name]
    job = Job(net, replace(TINY, learning_rate=rate, epochs=3), name, **variant)
    net = job.build()
    trainer = utils.Trainer(net, small, job.settings, optimizer=study.OPTIMIZERS[name])
    losses = []
    for _ in range(3):
        for _ in trainer.epoch():
            pass
        losses.append(trainer.means()[0])
    assert losses[2] < losses[0]


def test_the_rate_reaches_every_optimizer(small):
    """All optimizers take the learning rate of the moment: with a rate of 0, no weight moves."""
    for make in study.OPTIMIZERS.values():
        net = utils.build("NetB", TINY)
        trainer = utils.Trainer(net, small, TINY, optimizer=make)
        trainer.rates.zero_()
        before = [p.detach().clone() for p in net.parameters()]
        next(trainer.epoch())
        assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
        trainer.rates.fill_(0.01)
        next(trainer.epoch())
        assert not any(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


@pytest.mark.parametrize("name", study.OPTIMIZERS)
def test_only_convolutions_decay(name):
    """With no gradient at all, what decays shrinks and the rest stays: the same weights under every optimizer."""
    net = utils.build("NetA", TINY)
    before = {key: p.detach().clone() for key, p in net.named_parameters()}
    optimizer = study.OPTIMIZERS[name](net, torch.tensor(0.1), 0.5, 0.9, torch.float32)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for key, parameter in net.named_parameters():
        if parameter.ndim == 4 and not key.startswith("c11"):
            assert parameter.norm() < 0.97 * before[key].norm(), key
        else:
            assert torch.equal(parameter, before[key]), key


def test_commands(tiny, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["study.py", "--dry-run"])
    study.main()
    assert capsys.readouterr().out.startswith("tune: 3 of 3 runs missing, no GPU run so far to tell the time by")
    monkeypatch.setattr(sys, "argv", ["study.py"])
    with pytest.raises(SystemExit):
        study.main()
    assert "there is no GPU here, where all lists would take days: choose one with --only" in capsys.readouterr().err
