import subprocess
import sys
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT
from matplotlib import pyplot as plt
from PIL import Image

import models
import utils
from utils import Scores


@pytest.fixture(scope="module")
def scored(small):
    """An untrained net, whose mistakes are many, and its scores on `small`."""
    torch.manual_seed(0)
    net = utils.models.NetC()
    return net, utils.test(net, small.test_images, small.test_labels)


def test_metrics_against_an_independent_count(small, scored):
    net, scores = scored
    with torch.no_grad():
        logits = net.eval()(utils.standardise(small.test_images)).double().numpy()
    odds = np.exp(logits - logits.max(1, keepdims=True))
    odds /= odds.sum(1, keepdims=True)
    labels = small.test_labels.numpy()
    right = sum(int(np.argmax(row) == label) for row, label in zip(odds, labels, strict=True))
    assert scores.accuracy == pytest.approx(100 * right / 200)
    assert scores.loss == pytest.approx(-np.log(odds[np.arange(200), labels]).mean(), abs=1e-5)
    assert np.allclose(scores.confidences, odds.max(1), atol=1e-5)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x, y: (x / 255.0, y), "images are torch.float32 of shape"),
        (lambda x, y: (x[:0], y[:0]), "images are empty"),
        (lambda x, y: (x, y + 9), "the labels of images go from 9 to 18"),
        (lambda x, y: (x.tolist(), y), "images are of type list; give a torch.Tensor"),
    ],
)
def test_wrong_images_are_not_scored(small, scored, change, said):
    with pytest.raises(ValueError, match=said):
        utils.test(scored[0], *change(small.test_images, small.test_labels))


def test_scoring_is_in_strict_float32(small):
    class Asks(torch.nn.Module):
        def forward(self, x):
            self.tf32 = torch.backends.cudnn.allow_tf32
            return x.flatten(1)[:, :10]

    net = Asks()
    utils.test(net, small.test_images, small.test_labels)
    assert net.tf32 is False
    assert torch.backends.cudnn.allow_tf32


def test_scoring_leaves_the_mode_and_the_statistics_alone(small):
    net = utils.models.NetA().train()
    before = net.C1.norm.running_mean.clone()
    utils.test(net, small.test_images, small.test_labels)
    assert net.training
    assert torch.equal(net.C1.norm.running_mean, before)


def test_most_confident_mistakes():
    predictions = torch.tensor([0, 1, 1, 2, 3, 3])
    labels = torch.tensor([0, 0, 2, 2, 0, 1])
    confidences = torch.tensor([0.9, 0.5, 0.8, 1.0, 0.8, 0.6])
    pick = utils.most_confident_mistakes
    assert pick(predictions, confidences, labels).tolist() == [2, 4, 5, 1]
    assert pick(predictions, confidences, labels, count=2).tolist() == [2, 4]
    assert pick(labels, confidences, labels).tolist() == []


def flat_colours(count):
    """`count` test images of one colour each, all labelled 0, and scores that call them all 1."""
    colours = torch.tensor([[20 * n + 10, 255 - 20 * n, (60 * n) % 256] for n in range(count)], dtype=torch.uint8)
    images = colours[:, None, None, :].expand(count, 32, 32, 3).contiguous()
    data = utils.Data(images, torch.zeros(count).long(), images, torch.zeros(count).long())
    scores = Scores(0.0, 0.0, torch.ones(count).long(), torch.linspace(0.9, 0.5, count))
    return colours.tolist(), data, scores


@pytest.mark.parametrize("count", [10, 3])
def test_grid_shows_the_images_in_their_colours_and_place(tmp_path, count):
    colours, data, scores = flat_colours(count)
    figure = utils.plot_mistakes("NetB", scores, data, tmp_path / "layer.png")
    assert figure.get_suptitle() == f"NetB, layer norm: the {count} most confident mistakes of seed 0"
    pixels = np.asarray(Image.open(tmp_path / "layer.png").convert("RGB"))
    places = []
    for colour in colours:
        rows, columns = np.nonzero((pixels == colour).all(2))
        assert len(rows) > 150 * 150, "the image is not there, or not in its colours"
        places.append((round(rows.mean() / pixels.shape[0] * 5 - 0.5), columns.mean() > pixels.shape[1] / 2))
    assert places == [(n // 2, n % 2 == 1) for n in range(count)]
    texts = [text.get_text() for axis in figure.axes for text in axis.texts]
    assert texts[:6] == ["predicted", "automobile", "90 % confident", "true", "airplane", "test image 0"]
    plt.close(figure)


def test_stand_in_is_named_in_every_title(small, scored, tmp_path):
    run = utils.Run(scored[0], [], scored[1], {})
    runs = {norm: [run] for norm in ("batch", "layer", "group")}
    history = {"epoch": 1, "loss": 1.0, "train_accuracy": 1.0, "test_accuracy": 1.0}
    mistakes = pd.concat([utils.mistakes_of(net, scored[1], small) for net in ("NetA", "NetB", "NetC")])
    figures = [
        utils.plot_samples(small),
        utils.plot_mistakes("NetA", scored[1], small, tmp_path / "a.png"),
        utils.plot_curves({"batch": [utils.replace(run, history=[history])]}, small),
        utils.plot_confusions(runs, small),
        utils.plot_classes(runs, small),
        utils.plot_overlap(mistakes, small),
    ]
    for figure in figures:
        titles = figure.get_suptitle() + "".join(axis.get_title() for axis in figure.axes)
        assert small.name in titles
        plt.close(figure)


def test_confusion_against_an_independent_count():
    generator = np.random.default_rng(0)
    predictions, labels = generator.integers(0, 10, (2, 500))
    expected = pd.crosstab(labels, predictions).to_numpy()
    assert (utils.confusion(torch.from_numpy(predictions), torch.from_numpy(labels)).numpy() == expected).all()


def rows_of(net, accuracies):
    return [
        {"study": "main", "net": net, "norm": "batch", "split": "test", "seed": seed, "parameters": 48_042}
        | {"weight_decay": 0.5}
        | {"epochs": 20, "train_accuracy": 95.0, "test_accuracy": accuracy, "seconds": 5.0}
        for seed, accuracy in enumerate(accuracies)
    ]


def test_summary_and_comparison():
    rows = rows_of("NetA", [86.0, 87.0, 88.5]) + rows_of("NetB", [85.0, 86.5, 86.0])
    line = utils.summarise(rows).loc["NetA"]
    assert line["test accuracy, mean"] == "87.17"
    assert line["std"] == "1.26"  # of a sample: n - 1
    assert line["n"] == 3
    differences = np.array([1.0, 0.5, 2.5])
    half = 4.302653 * differences.std(ddof=1) / np.sqrt(3)  # the 97.5 % point of t with 2 degrees of freedom
    mean = differences.mean()
    expected = f"{mean:+.2f} points (95 % interval {mean - half:+.2f} to {mean + half:+.2f}, n = 3)"
    assert utils.compare(rows, "NetA", "NetB") == f"NetA minus NetB: {expected}"


def test_one_seed_shows_a_dash_and_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert utils.summarise(rows_of("NetA", [86.0])).loc["NetA", "std"] == "-"
        said = utils.compare(rows_of("NetA", [86.0]) + rows_of("NetB", [85.0]), "NetA", "NetB")
    assert said == "NetA minus NetB: +1.00 points (one seed: no interval)"


MISTAKES = pd.DataFrame(
    [
        ("NetA", 1, "cat", "dog"),
        ("NetA", 2, "dog", "cat"),
        ("NetA", 3, "ship", "truck"),
        ("NetA", 4, "cat", "frog"),
        ("NetB", 1, "cat", "dog"),
        ("NetB", 3, "ship", "truck"),
        ("NetC", 1, "cat", "bird"),
    ],
    columns=["net", "index", "true", "predicted"],
)


def test_overlap():
    assert utils.overlap(MISTAKES).to_dict() == {"NetA only": 2, "NetA and NetB": 1, "NetA, NetB and NetC": 1}


def test_stand_in_is_marked_in_text():
    rows = [row | {"study": "stand-in"} for row in rows_of("NetA", [86.0]) + rows_of("NetB", [85.0])]
    assert utils.compare(rows, "NetA", "NetB").endswith(" on STAND-IN DATA, NOT RESULTS")
    assert utils.describe_mistakes("NetA", MISTAKES, pd.DataFrame(rows)).startswith("STAND-IN DATA, NOT RESULTS. NetA")


def test_only_what_can_be_paired_is_paired():
    accuracies = pd.Series([86.0, 87.0, 88.0], index=[0, 1, 2])
    assert utils.paired(accuracies, accuracies - [1, 1.5, 0.5]).startswith("+1.00 points (95 % interval ")
    with pytest.raises(ValueError, match="a seed has more than one row"):
        utils.paired(accuracies.set_axis([0, 1, 0]), accuracies)
    with pytest.raises(ValueError, match="no seed is in both sets of rows"):
        utils.paired(accuracies, accuracies.set_axis([3, 4, 5]))


def test_three_sentences_are_counts():
    rows = pd.DataFrame(rows_of("NetA", [86.0, 87.0]))
    text = utils.describe_mistakes("NetA", MISTAKES, rows)
    assert "NetA (seed 0) gets 4 test images wrong; the pairs it confuses most are cat and dog (2)" in text
    assert "All three nets get 25 % of these images wrong, and 50 % NetA alone does." in text
    assert "improve most on cat (2 wrong) and" in text
    assert "95.0 % on the training images, 8.5 points more than on the test images (n = 2)." in text
    better = pd.concat([rows, rows.assign(study="augment", weight_decay=0.1, test_accuracy=[88.0, 89.5])])
    said = "flip and crop, with a weight decay of 0.1 instead of 0.5, change its test accuracy by +2.25 points "
    said += "(95 % interval -0.93 to +5.43, n = 2)."
    assert said in utils.describe_mistakes("NetA", MISTAKES, better)
    other = better.assign(epochs=[20, 20, 5, 5])
    assert "flip" not in utils.describe_mistakes("NetA", MISTAKES, other)


def test_sentences_on_few_mistakes():
    rows = pd.DataFrame(rows_of("NetA", [95.0, 95.0]))
    assert utils.describe_mistakes("NetA", MISTAKES[:0], rows) == "NetA (seed 0) gets no test image wrong."
    text = utils.describe_mistakes("NetA", MISTAKES[2:3], rows)
    assert "gets 1 test images wrong" in text
    assert "improve most on ship (1 wrong); it" in text
    assert "0.0 points more than on the test images (n = 2)" in text


def test_rows_are_replaced_by_their_settings(tmp_path):
    path = tmp_path / "runs.csv"
    first, second = {"net": "NetA", "seed": 0, "seconds": 1.5}, {"net": "NetA", "seed": 1, "seconds": 2.5}
    utils.put_rows(path, [first, second])
    utils.put_rows(path, [first | {"seconds": 9.5}])
    assert utils.read_rows(path).sort_values("seed")["seconds"].tolist() == [9.5, 2.5]
    utils.put_rows(path, [first | {"seed": 2}])
    assert len(utils.read_rows(path)) == 3
    utils.put_rows(path, [first | {"optimizer": "", "seconds": 8.5}])  # a column that the file does not have yet
    assert sorted(utils.read_rows(path)["seconds"]) == [1.5, 2.5, 8.5]
    utils.put_rows(path, [first | {"optimizer": "muon"}])
    assert len(utils.read_rows(path)) == 4
    utils.put_rows(path, [first | {"seed": 7}], key=["net"])
    assert utils.read_rows(path)["seed"].tolist() == [7]


def test_no_row_is_lost_between_processes(tmp_path):
    code = """
import utils
print("ready", flush=True)
input()
for n in range(100):
    utils.put_rows(utils.Path({!r}), [dict(process={}, row=n)])
"""
    path = str(tmp_path / "runs.csv")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    writers = [subprocess.Popen([sys.executable, "-c", code.format(path, n)], **pipes) for n in range(2)]
    assert [writer.stdout.readline() for writer in writers] == ["ready\n"] * 2
    for writer in writers:
        writer.stdin.write("go\n")
        writer.stdin.flush()
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0]
    assert len(pd.read_csv(path)) == 200


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "kept.txt"
    path.write_text("old")

    def fail(temporary):
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        utils.save(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_experiment_is_saved(small, tmp_path):
    settings = utils.Settings(epochs=1, batch_size=100)
    runs = [utils.run("NetA", small, utils.replace(settings, seed=seed)) for seed in (0, 1)]
    plan = utils.Plan((0, 1), 1, "synthetic", False, tmp_path)
    for _ in range(2):
        utils.save_experiment(runs, small, plan)
    rows = pd.read_csv(tmp_path / "results" / "runs.csv")
    assert rows["seed"].tolist() == [0, 1]
    assert rows["study"].unique().tolist() == ["stand-in"]
    assert rows["test_accuracy"].tolist() == [round(one.scores.accuracy, 3) for one in runs]
    assert len(pd.read_csv(tmp_path / "results" / "history.csv")) == 2
    mistakes = pd.read_csv(tmp_path / "results" / "mistakes.csv")
    assert len(mistakes) == round(200 * (1 - runs[0].scores.accuracy / 100))
    net = utils.models.NetA()
    net.load_state_dict(torch.load(tmp_path / "weights" / "NetA.pt", weights_only=True))
    assert torch.equal(utils.test(net, small.test_images, small.test_labels).predictions, runs[0].scores.predictions)


@pytest.mark.parametrize(("name", "size", "groups"), [("NetA", 4, 16), ("NetB", 1, 1), ("NetC", 1, 4)])
def test_spreads_by_plain_arithmetic(small, name, size, groups):
    """Of the first layer, group by group of channels and slice by slice of images, in float64."""
    net = utils.build(name, utils.Settings())
    images = small.test_images[:12]
    x = net.C1.conv(utils.standardise(images)).detach().double()
    means, variances = [], []
    for start in range(0, 12, size):
        parts = x[start : start + size].split(16 // groups, dim=1)
        means.append([part.mean().item() for part in parts])
        variances += [part.var(correction=0).item() for part in parts]
    by_group = list(zip(*means, strict=True))
    moved = sum(pd.Series(values).var() for values in by_group) / len(by_group)
    expected = (moved / (sum(variances) / len(variances))) ** 0.5
    row = utils.spreads(net, name, images, size)[0]
    assert row == {"net": name, "images": size, "layer": "C1", "spread": pytest.approx(expected, abs=2e-5)}


def test_spreads_are_drawn_line_by_line(small):
    rows = [row for size in (2, 10) for row in utils.spreads(models.NetA(), "NetA", small.test_images[:20], size)]
    rows += utils.spreads(models.NetB(), "NetB", small.test_images[:20])
    figure = utils.plot_spreads(pd.DataFrame(rows), small)
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    assert set(lines) == {"NetA, batch: of 2 images", "NetA, batch: of 10 images", "NetB, layer: an image's own"}
    drawn = lines["NetA, batch: of 10 images"].get_ydata()
    assert list(drawn) == [row["spread"] for row in rows if row["net"] == "NetA" and row["images"] == 10]
    assert "NOT RESULTS" in figure.axes[0].get_title()
