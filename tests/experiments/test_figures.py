"""What the figures show, held against the rows, the nets and the norms themselves."""

from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

import models
from engine.probe import class_activation_maps
from experiments import figures, tables
from experiments.sweeps import rate_runs
from experiments.tables import select

ROWS = tables.read_results()
CLASSES = ("airplane", "automobile", "bird", "cat")


def points_of(axis):
    return [offsets for one in axis.collections if len(offsets := one.get_offsets()) > 1]


def test_accuracy_shows_every_run_and_the_means():
    figure = figures.plot_accuracy(ROWS)
    for axis, study in zip(figure.axes, ("main", "augment"), strict=True):
        for points, text, norm in zip(points_of(axis), axis.texts, tables.NORMS, strict=True):
            values = select(ROWS, study=study, norm=norm)["test_accuracy"]
            assert sorted(points[:, 1]) == sorted(values)
            assert float(text.get_text()) == pytest.approx(values.mean(), abs=0.00501)


def test_lead_shows_each_lead_with_its_interval():
    table = tables.surface(ROWS)
    for axis, data in zip(figures.plot_lead(ROWS).axes, ("CIFAR-10", "CIFAR-100"), strict=True):
        drawn = {one.get_label(): one for one in axis.containers}
        assert set(drawn) == set(table.loc[data].index.unique("optimizer"))
        for name, one in drawn.items():
            line, _, (bars,) = one
            wanted = table.xs((data, name), level=("dataset", "optimizer"))
            assert line.get_ydata() == pytest.approx(wanted["batch minus layer"].to_numpy())
            ends = np.array([bar[:, 1] for bar in bars.get_segments()])
            assert ends == pytest.approx(wanted[["batch minus layer, low", "batch minus layer, high"]].to_numpy())


def test_rate_shows_means_and_crosses_where_a_run_is_not_in_the_panel():
    figure = figures.plot_rate(ROWS)
    runs = rate_runs(ROWS)
    panels, strips = figure.axes[:3], figure.axes[3:]
    for axis, strip, optimizer in zip(panels, strips, tables.OPTIMIZERS, strict=True):
        for line, crosses, norm in zip(axis.lines, strip.collections, tables.ALL, strict=True):
            own = select(runs, optimizer=optimizer, norm=norm)
            means, lowest = tables.by_rate(own), axis.get_ylim()[0]
            drawn = dict(zip(line.get_xdata(), line.get_ydata(), strict=True))
            assert {rate: drawn[rate] for rate in means.index} == pytest.approx(means.to_dict(), nan_ok=True)
            low = {rate for rate, value in drawn.items() if not value >= lowest}
            hidden = set(own["learning_rate"][own["validation_accuracy"] < lowest])
            assert {x for x, _ in crosses.get_offsets()} == low | hidden
    assert [axis.get_title() for axis in panels] == ["SGD", "AdamW", "Muon"]


@pytest.mark.parametrize(("place", "column"), list(enumerate(figures.BUDGETS)))
def test_budget_shows_means_by_norm(place, column):
    axis = figures.plot_budget(ROWS).axes[place]
    for line, norm in zip(axis.lines, tables.NORMS, strict=True):
        means = select(tables.budget(ROWS, column), norm=norm).groupby(column)["test_accuracy"].mean()
        assert line.get_ydata() == pytest.approx(means.to_numpy())


def test_every_figure_names_norms_and_not_nets():
    """Legends and titles, too; a panel is titled by what varies, never by a GPU."""
    for figure in figures.plot_rows().values():
        texts = " ".join(text.get_text() for text in figure.findobj(plt.Text))
        for name in ("NetA", "NetB", "NetC", "H100", "H200"):
            assert name not in texts


def test_statistics_draws_a_point_per_run_and_layer():
    inside = tables.read_results("inside")
    left, right = figures.plot_statistics(ROWS, inside).axes
    assert len(left.collections[0].get_offsets()) == (inside["net"] == "NetA").sum()
    assert sum(len(points) for points in points_of(right)) == 18


def test_axes_draws_a_point_per_run():
    left, right = figures.plot_axes(ROWS).axes
    assert sum(len(points) for points in points_of(left)) == 15
    assert sum(len(points) for points in points_of(right)) == 12


def test_chain_shows_shapes_and_parameters():
    texts = [text.get_text() for text in figures.plot_chain().axes[0].texts]
    names = list(dict(models.NetA().named_children()))
    assert [text for text in texts if text in names] == names
    assert sum(int(text.replace(",", "")) for text in texts if text.replace(",", "").isdigit()) == 48_042
    assert texts.count("24x16x16") == 5


@pytest.mark.parametrize(
    ("number", "layer"),
    [
        (0, models.NORMS["batch"](8, 4)),
        (1, models.NORMS["layer"](8, 4)),
        (2, models.NORMS["group"](8, 4)),
        (3, torch.nn.GroupNorm(8, 8)),
    ],
)
def test_drawn_means_are_what_the_norms_take(number, layer):
    """Where a change of one activation changes what the first one is normalized to."""
    _, _, shared = figures.shared_means()[number]
    x = torch.randn(4, 8, 6, 1)
    reaches = np.zeros(shared.shape, bool)
    for place in np.ndindex(*shared.shape):
        moved = x.clone()
        moved[(*place, 0)] += 1
        reaches[place] = not torch.equal(layer(moved)[0, 0, 0], layer(x)[0, 0, 0])
    assert (reaches == shared).all()


def score(predictions, confidences):
    return SimpleNamespace(predictions=torch.tensor(predictions), confidences=torch.tensor(confidences))


LABELS = torch.tensor([0, 0, 0, 0, 0, 0])
SCORES = {
    "NetA": score([1, 0, 1, 1, 0, 1], [0.3, 0.9, 0.5, 0.7, 0.9, 0.8]),
    "NetB": score([0, 0, 2, 0, 0, 2], [0.9, 0.9, 0.6, 0.9, 0.9, 0.4]),
    "NetC": score([0, 3, 3, 0, 0, 0], [0.9, 0.9, 0.6, 0.9, 0.9, 0.4]),
}


@pytest.fixture
def data():
    images = torch.randint(0, 256, (6, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return SimpleNamespace(test_images=images, test_labels=LABELS, classes=CLASSES)


def test_who_is_wrong():
    found = {names: indices.tolist() for names, indices in figures.who_is_wrong(SCORES, LABELS).items()}
    assert found == {
        ("NetA",): [3, 0],
        ("NetB",): [],
        ("NetC",): [1],
        ("NetA", "NetB"): [5],
        ("NetA", "NetC"): [],
        ("NetB", "NetC"): [],
        ("NetA", "NetB", "NetC"): [2],
    }


def test_same_images_set_wrong_answers_in_bold(data):
    figure = figures.plot_same(SCORES, data, each=2)
    weights = {text.get_text(): text.get_weight() for axis in figure.axes for text in axis.texts}
    assert weights["batch: automobile 70%"] == "bold"
    assert weights["layer: airplane 90%"] == "normal"
    assert weights["label: airplane"] == "normal"
    assert sum(len(axis.images) for axis in figure.axes) == 5  # each image that is wrong for someone


def test_cam_is_red_where_the_wrong_class_gains(data):
    nets = {name: getattr(models, name)() for name in SCORES}
    figure = figures.plot_cam(nets, SCORES, data, count=1)
    titles = [axis.get_title() for axis in figure.axes]
    answers = ["batch norm:\nautomobile 50%", "layer norm:\nbird 60%", "group norm:\ncat 60%"]
    assert titles == ["label: airplane", *answers]
    for axis, (name, net) in zip(figure.axes[1:], nets.items(), strict=True):
        maps = class_activation_maps(net, data.test_images[2:3])[0]
        expected = maps[SCORES[name].predictions[2]] - maps[0]
        heat = axis.images[1]
        drawn = torch.tensor(heat.get_array())
        for part in (slice(None, 16), slice(16, None)):  # rows, then columns
            for shown, true in (
                (drawn[part], expected.repeat_interleave(4, 0)[part]),
                (drawn[:, part], expected.repeat_interleave(4, 1)[:, part]),
            ):
                assert shown.mean() == pytest.approx(true.mean().item(), abs=0.1 * expected.abs().max().item())
        assert heat.cmap.name == "RdBu_r"
        assert heat.norm.vmin == -heat.norm.vmax


def test_an_argument_is_refused(monkeypatch):
    monkeypatch.setattr(figures, "plot_rows", lambda: pytest.fail("it was drawn"))
    with pytest.raises(SystemExit):
        figures.main(["--nonsense"])


@pytest.mark.parametrize("there", [False, True])
def test_what_needs_images_is_drawn_where_they_are_and_else_said(tmp_path, monkeypatch, capsys, there):
    drawn = []
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    monkeypatch.setattr(figures, "plot_rows", lambda: {"lead": None})
    monkeypatch.setattr(figures, "plot_images", lambda: {"same": None, "cam": None})
    monkeypatch.setattr(figures, "save_figure", lambda path, figure: drawn.append(path.name))
    if there:
        (tmp_path / "data" / "cifar-10-batches-py").mkdir(parents=True)
    figures.main([])
    assert drawn == (["lead.png", "same.png", "cam.png"] if there else ["lead.png"])
    assert capsys.readouterr().out == (
        "" if there else "img/same.png and cam.png stay as they are: they need CIFAR-10 in data/\n"
    )


@pytest.mark.parametrize("content", [None, "", "study,net\nmain,NetA\n", "study,net\nmain,Ne"])
def test_rows_that_can_not_be_drawn_end_in_one_line(tmp_path, monkeypatch, capsys, content):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    if content is not None:
        (tmp_path / "runs.csv").write_text(content)
    with pytest.raises(SystemExit):
        figures.main([])
    assert "error: " in capsys.readouterr().err.splitlines()[-1]


def test_figures_say_how_many_runs_there_are():
    runs = pd.DataFrame({"net": ["NetA"] * 3 + ["NetB"] * 5, "groups": ["", "", ""] + ["4"] * 5, "seed": range(8)})
    assert figures.n_of(runs, "net") == figures.n_of(runs, "net", "groups") == "n = 3 or 5"
    rows = tables.read_results()
    more = rows[rows["study"] == "groups"].iloc[:1].assign(seed=7)
    assert figures.plot_axes(rows).axes[0].get_title() == "group norm, by number of groups (n = 3)"
    assert figures.plot_axes(pd.concat([rows, more])).axes[0].get_title().endswith("(n = 3 or 4)")


def test_a_rate_has_crosses_of_the_nets_that_were_run_at_it():
    rows = tables.read_results()
    one = select(rows, study="rate", optimizer="sgd", net="NetA").iloc[:1]
    more = one.assign(learning_rate=10.0, validation_accuracy=np.nan, status="diverged")
    strip = figures.plot_rate(pd.concat([rows, more])).axes[3]
    assert [10.0 in crosses.get_offsets()[:, 0] for crosses in strip.collections] == [True, False, False, False]
