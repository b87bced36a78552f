"""The notebook's figures, by what they show."""

import math
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import same_color, to_hex
from PIL import Image

import utils
from engine import figures
from engine.figures import COLORS, save_figure, title
from engine.probe import confusion

NET_OF = {"batch": "NetA", "layer": "NetB", "group": "NetC"}


def make_run(data, norm, predictions, seed=7, history=()):
    accuracy = 100 * (predictions == data.test_labels).float().mean().item()
    scores = utils.Scores(0.0, accuracy, predictions, torch.ones(len(predictions)))
    return utils.Run(None, list(history), scores, {"norm": norm, "net": NET_OF[norm], "seed": seed})


@pytest.fixture
def runs(small):
    """A run per norm that gets each k-th image wrong, by one class."""
    found = {}
    for norm, k in (("batch", 4), ("layer", 3), ("group", 2)):
        wrong = torch.arange(200) % k == 0
        found[norm] = make_run(small, norm, torch.where(wrong, (small.test_labels + 1) % 10, small.test_labels))
    return found


def mistakes_of(runs, data):
    tables = []
    for norm, run in runs.items():
        wrong = (run.scores.predictions != data.test_labels).nonzero().flatten()
        tables.append(pd.DataFrame({"net": NET_OF[norm], "index": wrong.numpy()}))
    return pd.concat(tables)


SPREAD = pd.DataFrame(
    [
        {"net": net, "images": size, "layer": layer, "spread": 0.01 * number}
        for number, (net, size, layer) in enumerate(
            [("NetA", 2, "C1"), ("NetA", 2, "C2"), ("NetA", 10, "C1"), ("NetA", 10, "C2"), ("NetB", 1, "C1"),
             ("NetB", 1, "C2"), ("NetC", 1, "C1"), ("NetC", 1, "C2")], 1)
    ]
)  # fmt: skip


def epochs_of(*values):
    return [
        {"epoch": n, "loss": 3 - value, "train_accuracy": 10 * value, "test_accuracy": 9 * value}
        for n, value in enumerate(values, 1)
    ]


def all_figures(data, runs):
    histories = {
        norm: [make_run(data, norm, run.scores.predictions, history=epochs_of(1, 2))] for norm, run in runs.items()
    }
    return [
        figures.plot_samples(data),
        figures.plot_curves(histories, data),
        figures.plot_confusions(runs, data),
        figures.plot_classes(runs, data),
        figures.plot_overlap(mistakes_of(runs, data), data),
        figures.plot_mean_spread(SPREAD, data),
    ]


def titles(figure):
    return figure.get_suptitle() + "".join(axis.get_title() for axis in figure.axes)


def test_synthetic_data_are_named_in_every_title(small, runs):
    assert small.synthetic
    assert title("Text", small) == f"Text\n{small.name}"
    for figure in all_figures(small, runs):
        assert "SYNTHETIC DATA, NOT RESULTS" in titles(figure)
    real = replace(small, name="CIFAR-10")
    assert title("Text", real) == "Text"
    for figure in all_figures(real, runs):
        assert titles(figure)
        assert "SYNTHETIC" not in titles(figure)


def test_the_seed_of_the_runs_is_named(small, runs):
    for plot in (figures.plot_confusions, figures.plot_classes):
        assert "seed 7" in titles(plot(runs, small))
        assert "seed 0" not in titles(plot(runs, small))
        runs["layer"] = make_run(small, "layer", runs["layer"].scores.predictions, seed=3)
        assert "seeds 3, 7" in titles(plot(runs, small))
        runs["layer"] = make_run(small, "layer", runs["layer"].scores.predictions)


def test_every_figure_draws_without_a_warning(small, runs, tmp_path, recwarn):
    for number, figure in enumerate(all_figures(small, runs)):
        save_figure(tmp_path / f"{number}.png", figure)
    assert not list(recwarn)


def test_samples_are_two_images_of_each_class(small):
    figure = figures.plot_samples(small)
    assert len(figure.axes) == 20
    for place, axis in enumerate(figure.axes):
        row, label = divmod(place, 10)
        index = (small.labels == label).nonzero().flatten()[row]
        assert np.array_equal(axis.images[0].get_array(), small.images[index].numpy())
        assert axis.get_title() == (small.classes[label] if row == 0 else "")


def test_samples_of_a_class_with_fewer_images(small):
    few = replace(small, images=small.images[:20], labels=torch.tensor([0] + [1] * 19))
    figure = figures.plot_samples(few)
    assert [len(axis.images) for axis in figure.axes[::10]] == [1, 0]
    assert sum(len(axis.images) for axis in figure.axes) == 1 + 2


def test_curves_are_means_with_bands_from_lowest_to_highest(small):
    group = [
        make_run(small, "batch", small.test_labels, seed, epochs_of(*values))
        for seed, values in enumerate([(1, 2), (2, 4)])
    ]
    alone = [make_run(small, "layer", small.test_labels, 0, epochs_of(0.5, 1.5))]
    figure = figures.plot_curves({"batch": group, "layer": alone}, small)
    loss, accuracy, late = figure.axes
    assert "n = 1 or 2" in figure.get_suptitle()
    assert late.get_ylabel() == f"{small.split} accuracy, %"
    assert [line.get_xdata().tolist() for line in late.lines] == [[2], [2]]
    assert [line.get_label() for line in loss.lines] == ["batch norm", "layer norm"]
    assert loss.lines[0].get_xdata().tolist() == [1, 2]
    assert loss.lines[0].get_ydata().tolist() == [1.5, 0]
    solid, dotted = [line for line in accuracy.lines if same_color(line.get_color(), COLORS["batch"])]
    assert (solid.get_linestyle(), dotted.get_linestyle()) == ("-", ":")
    assert solid.get_ydata().tolist() == [13.5, 27]
    assert dotted.get_ydata().tolist() == [15, 30]
    for axis, low, high in ((loss, [2, 1], [1, -1]), (accuracy, [9, 18], [18, 36])):
        (band,) = axis.collections  # of the norm with two runs alone
        assert same_color(to_hex(band.get_facecolor()[0]), COLORS["batch"])
        corners = {tuple(point) for point in band.get_paths()[0].vertices}
        assert {(x, y) for x in (1, 2) for y in (low[x - 1], high[x - 1])} <= corners


def test_no_test_curve_is_drawn_for_seeds_of_which_some_were_not_tested(small):
    tested, other = epochs_of(1, 2), [epoch | {"test_accuracy": math.nan} for epoch in epochs_of(2, 4)]
    runs = [make_run(small, "batch", small.test_labels, seed, epochs) for seed, epochs in enumerate([tested, other])]
    figure = figures.plot_curves({"batch": runs}, small)
    solid, dotted = figure.axes[1].lines[:2]
    assert np.isnan(solid.get_ydata()).all()
    assert dotted.get_ydata().tolist() == [15, 30]


def test_confusions_write_each_count_in_its_cell_on_one_scale(small, runs):
    figure = figures.plot_confusions(runs, small)
    highest = []
    for axis, (norm, run) in zip(figure.axes, runs.items(), strict=True):
        expected = confusion(run.scores.predictions, small.test_labels).fill_diagonal_(0)
        assert np.array_equal(axis.images[0].get_array(), expected.numpy())
        texts = {text.get_position()[::-1]: int(text.get_text()) for text in axis.texts}
        assert texts == {(i, j): expected[i, j].item() for i in range(10) for j in range(10) if i != j}
        assert axis.get_title() == f"{norm} norm"
        assert axis.get_xlabel() == "predicted"
        assert [label.get_text() for label in axis.get_xticklabels()] == list(small.classes)
        assert axis.images[0].get_clim()[0] == 0
        highest.append((axis.images[0].get_clim()[1], expected.max().item()))
    assert {scale for scale, _ in highest} == {max(count for _, count in highest)}
    assert figure.axes[0].get_ylabel() == "true"


def test_confusions_without_a_mistake(small):
    figure = figures.plot_confusions({"batch": make_run(small, "batch", small.test_labels)}, small)
    assert figure.axes[0].images[0].get_clim() == (0, 1)


@pytest.mark.parametrize("norms", [("batch",), ("batch", "group"), ("batch", "layer", "group")])
def test_classes_are_a_point_per_norm(small, runs, norms):
    chosen = {norm: runs[norm] for norm in norms}
    (axis,) = figures.plot_classes(chosen, small).axes
    assert [line.get_label() for line in axis.lines] == [f"{norm} norm" for norm in norms]
    for line, run in zip(axis.lines, chosen.values(), strict=True):
        right = run.scores.predictions == small.test_labels
        expected = [100 * right[small.test_labels == c].float().mean().item() for c in range(10)]
        assert line.get_ydata() == pytest.approx(expected)
    middle = np.mean([line.get_xdata() for line in axis.lines], axis=0)
    assert middle == pytest.approx(np.arange(10))


def test_classes_that_the_test_split_lacks_are_left_out(small, runs):
    there = small.test_labels != 3
    few = replace(small, test_images=small.test_images[there], test_labels=small.test_labels[there])
    (axis,) = figures.plot_classes({"batch": make_run(few, "batch", few.test_labels)}, few).axes
    assert axis.lines[0].get_ydata().tolist() == [100.0] * 9
    assert [label.get_text() for label in axis.get_xticklabels()] == [c for c in few.classes if c != few.classes[3]]


def test_runs_of_other_images_are_refused(small, runs):
    other = replace(small, test_labels=small.test_labels.roll(1), name="other")
    for plot in (figures.plot_confusions, figures.plot_classes):
        with pytest.raises(ValueError, match=r"^data are not what batch norm .*seed 7 was tested on, but other, test"):
            plot(runs, other)
    with pytest.raises(ValueError, match=r"^data are not what layer norm"):
        figures.plot_curves({"layer": [runs["layer"]]}, other)
    with pytest.raises(ValueError, match=r"with seeds \[7, 7\]; give runs of one net, each seed once$"):
        figures.plot_curves({"layer": [runs["layer"]] * 2}, small)


def test_overlap_has_the_largest_bar_on_top(small):
    table = pd.DataFrame({"net": ["NetA"] * 4 + ["NetB"] * 3, "index": [1, 2, 3, 4, 4, 5, 6]})
    (axis,) = figures.plot_overlap(table, small).axes
    bars = [bar.get_width() for bar in axis.patches]
    assert bars == [1, 2, 3]  # from the bottom
    assert [label.get_text() for label in axis.get_yticklabels()] == ["batch and layer", "layer only", "batch only"]
    colors = [to_hex(bar.get_facecolor()) for bar in axis.patches]
    assert colors == [figures.GRAY, COLORS["layer"].lower(), COLORS["batch"].lower()]
    assert [text.get_text() for text in axis.texts] == ["1", "2", "3"]


def test_mean_spread_is_drawn_line_by_line(small):
    (axis,) = figures.plot_mean_spread(SPREAD, small).axes
    lines = {line.get_label(): line for line in axis.lines}
    assert list(lines) == [
        "batch norm, 2 images",
        "batch norm, 10 images",
        "layer norm, one image",
        "group norm, one image",
    ]
    assert list(lines["batch norm, 10 images"].get_xdata()) == ["C1", "C2"]
    assert list(lines["batch norm, 10 images"].get_ydata()) == pytest.approx([0.03, 0.04])
    assert [line.get_linestyle() for line in axis.lines] == ["-", "-", "--", "--"]
    assert lines["batch norm, 2 images"].get_color() != lines["batch norm, 10 images"].get_color()
    assert same_color(lines["group norm, one image"].get_color(), COLORS["group"])
    assert axis.get_yscale() == "log"


def test_figures_are_saved_whole_and_1760_pixels_wide(tmp_path, monkeypatch):
    path = tmp_path / "img" / "figure.png"
    for size in ((10, 4), (8, 9.2)):
        save_figure(path, plt.figure(figsize=size))
        assert Image.open(path).size == (1760, round(1760 * size[1] / size[0]))
    whole = path.read_bytes()

    def half(figure, temporary, **options):
        temporary.write_bytes(b"half a picture")
        raise OSError("disk full")

    monkeypatch.setattr(plt.Figure, "savefig", half)
    with pytest.raises(OSError, match="disk full"):
        save_figure(path, plt.figure())
    assert path.read_bytes() == whole
