"""What is committed agrees with itself: rows, histories, mistakes, weights, pictures, README, requirements."""

import importlib.metadata
import json
import re
import sys
from dataclasses import asdict

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, tracked
from PIL import Image

import hubconf
import models
import utils
from engine import records
from engine.probe import mean_spread
from engine.records import NON_KEY_COLUMNS, read_rows
from engine.trainer import schedule
from experiments import tables
from experiments.sweeps import AUGMENTED

RESULTS = ROOT / "results"
ROWS = read_rows(RESULTS / "runs.csv")
MAIN = ROWS[ROWS["study"] == "main"]
README = (ROOT / "README.md").read_text(encoding="utf-8")
NOTEBOOKS = [ROOT / "s8.ipynb", ROOT / "experiments" / "findings.ipynb"]


def first_run(net):
    """The row of the net's seed 0, whose weights and mistakes are published."""
    return MAIN[(MAIN["net"] == net) & (MAIN["seed"] == 0)].iloc[0]


# ---------------------------------------------------------------------------------------------------------------------
# Rows
# ---------------------------------------------------------------------------------------------------------------------


def test_published_rows_are_ten_seeds_of_twenty_epochs_of_one_clean_commit():
    assert sorted(MAIN["net"].unique()) == list(utils.NETS)
    for _, rows in MAIN.groupby("net"):
        assert sorted(rows["seed"]) == list(range(10))
    same = {"epochs": 20, "augment": "none", "split": "test", "status": "done", "parameters": 48_042}
    same |= {"train_images": 50_000, **asdict(utils.Settings())}
    del same["seed"]
    for column, value in same.items():
        assert set(MAIN[column]) == {value}
    for column in ("commit", "device", "torch"):
        assert MAIN[column].nunique() == 1
    assert not ROWS["study"].str.startswith("synthetic").any()


def test_every_row_is_there_once_and_names_a_clean_commit():
    settings = [name for name in ROWS if name not in NON_KEY_COLUMNS]
    assert not ROWS.duplicated(settings).any()
    assert ROWS["commit"].astype(str).str.fullmatch("[0-9a-f]{7,40}").all()
    assert set(ROWS["status"]) == {"done", "diverged"}
    columns = ["train_accuracy", "test_accuracy", "validation_accuracy"]
    assert ROWS.loc[ROWS["status"] == "diverged", [*columns, "test_loss"]].isna().all(axis=None)
    done = ROWS[ROWS["status"] == "done"]
    assert done["train_accuracy"].between(0, 100).all()
    for split, other in (("test", "validation"), ("validation", "test")):
        own = done[done["split"] == split]
        assert own[f"{split}_accuracy"].between(0, 100).all()
        assert own[f"{other}_accuracy"].isna().all()


def test_the_augmented_weight_decay_is_the_best_of_equal_trials():
    tried = ROWS[(ROWS["study"] == "recipe") & (ROWS["augment"] == "flip+crop") & (ROWS["label_smoothing"] == 0.1)]
    assert set(tried["split"]) == {"validation"}
    assert set(tried.groupby(["net", "weight_decay"]).size()) == {3}
    best = tried.groupby("weight_decay")["validation_accuracy"].mean().idxmax()
    assert {best} == set(ROWS[ROWS["study"] == "augment"]["weight_decay"]) == {AUGMENTED["weight_decay"]}


def test_histories_end_at_the_rows():
    history = pd.read_csv(RESULTS / "history.csv")
    runs = MAIN.set_index(["net", "seed"])
    assert len(history) == 20 * len(runs)
    for key, epochs in history.groupby(["net", "seed"]):
        row, last = runs.loc[key], epochs.iloc[-1]
        assert epochs["epoch"].tolist() == list(range(1, 21))
        assert last["test_accuracy"] == pytest.approx(row["test_accuracy"], abs=1e-3)
        assert last["elapsed"] == pytest.approx(row["seconds"], abs=0.01)
        assert epochs["elapsed"].is_monotonic_increasing
        assert epochs["seconds"].sum() < last["elapsed"]
        rates = schedule(4000, row["learning_rate"])[199::200]
        assert epochs["learning_rate"].tolist() == pytest.approx(rates.tolist(), abs=1e-5)
        assert 0 < row["train_accuracy"] - last["train_accuracy"] < 5  # of the last weights, and while training


def test_mistakes_are_those_of_the_first_seed():
    mistakes = pd.read_csv(RESULTS / "mistakes.csv")
    assert set(mistakes["net"]) == set(utils.NETS)
    assert set(mistakes["true"]) == set(mistakes["predicted"])
    assert len(set(mistakes["true"])) == 10
    assert (mistakes["true"] != mistakes["predicted"]).all()
    assert mistakes["confidence"].between(0.1, 1).all()
    texts = pd.read_csv(RESULTS / "mistakes.csv", dtype=str)["confidence"]
    assert texts.str.fullmatch(r"[01]\.\d{1,4}").all(), "more than four digits"
    for net, own in mistakes.groupby("net"):
        assert len(own) == round(100 * (100 - first_run(net)["test_accuracy"]))
        assert own["index"].is_monotonic_increasing
        assert own["index"].is_unique
        assert own["index"].between(0, 9999).all()


def test_measurements_inside_the_nets_are_of_all_layers():
    inside = pd.read_csv(RESULTS / "inside.csv")
    layers = [name for name in models.CONVOLUTIONS if name.startswith("C")]
    found = {key: own["layer"].tolist() for key, own in inside.groupby(["net", "images"])}
    sizes = {"NetA": (2, 10, 50, 250), "NetB": (1,), "NetC": (1,)}
    assert found == {(net, size): layers for net, of_net in sizes.items() for size in of_net}
    assert inside["spread"].between(0, 2).all()


# ---------------------------------------------------------------------------------------------------------------------
# Weights
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("net", utils.NETS)
def test_weights_load_and_are_finite_float32(net):
    path = ROOT / "weights" / f"{net}.pt"
    assert path.stat().st_size < 400_000
    weights = torch.load(path, weights_only=True)
    getattr(models, net)().load_state_dict(weights)
    for name, tensor in weights.items():
        assert tensor.dtype == (torch.int64 if name.endswith("num_batches_tracked") else torch.float32)
        assert tensor.isfinite().all()
        assert tensor.device.type == "cpu"


@pytest.mark.parametrize("net", utils.NETS)
def test_weights_score_and_err_as_published(net, real):
    scores = utils.test(getattr(hubconf, net)(pretrained=True), real.test_images, real.test_labels)
    row = first_run(net)
    assert abs(scores.accuracy - row["test_accuracy"]) <= 0.05  # on another device a few images are decided by rounding
    assert abs(scores.loss - row["test_loss"]) < 1e-3
    mistakes = pd.read_csv(RESULTS / "mistakes.csv")
    mistakes = mistakes[mistakes["net"] == net].set_index("index")
    assert [real.classes[i] for i in real.test_labels[mistakes.index.tolist()]] == mistakes["true"].tolist()
    found = {
        i: real.classes[scores.predictions[i]]
        for i in (scores.predictions != real.test_labels).nonzero().flatten().tolist()
    }
    published = mistakes["predicted"].to_dict()
    assert len(found.items() ^ published.items()) <= 10
    both = sorted(found.keys() & published.keys())
    assert np.allclose(scores.confidences[both], mistakes.loc[both, "confidence"], atol=0.01)


@pytest.mark.parametrize(("net", "size"), [("NetA", 250), ("NetC", 1)])
def test_weights_have_the_published_means_inside(net, size, real):
    inside = pd.read_csv(RESULTS / "inside.csv")
    published = inside[(inside["net"] == net) & (inside["images"] == size)]["spread"]
    found = mean_spread(getattr(hubconf, net)(pretrained=True), net, real.test_images[:2000], size)
    assert [row["spread"] for row in found] == pytest.approx(published.tolist(), rel=0.01, abs=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------


def shown():
    """Names of the files in img/ that README or a notebook shows."""
    notebooks = [nbformat.read(path, as_version=4) for path in NOTEBOOKS]
    markdown = [README, *(cell.source for one in notebooks for cell in one.cells if cell.cell_type == "markdown")]
    return set(re.findall(r"img/([\w-]+\.\w+)", "\n".join(markdown)))


def test_every_picture_that_is_shown_is_there():
    for name in shown():
        with Image.open(ROOT / "img" / name) as image:
            image.verify()


def test_img_holds_nothing_else():
    assert {path.name for path in tracked() if path.parent == ROOT / "img"} == shown()


@pytest.mark.parametrize("path", sorted((ROOT / "img").glob("*.png")), ids=lambda path: path.stem)
def test_pictures_are_png_files_as_wide_as_the_others(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.width == 1760
    assert path.stat().st_size < 700_000


@pytest.mark.parametrize("norm", ["batch", "layer", "group"])
def test_grids_hold_five_rows_of_two_images(norm):
    """The size that `utils.plot_mistakes` draws, and no cell of it blank."""
    with Image.open(ROOT / "img" / f"{norm}.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.shape[:2] == (1738, 1760)
    painted = (pixels < 255).any(2)[138:]  # below the title; an airplane's white sky is nearly 255
    cells = painted.reshape(5, 320, 2, 880).mean((1, 3))
    assert (cells > 0.1).all(), cells.round(2)


# ---------------------------------------------------------------------------------------------------------------------
# README, paths, requirements
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("net", utils.NETS)
def test_right_images_are_as_many_as_the_rows_say(net):
    right, own = records.read_right(ROOT / "results" / "right.csv")[net], MAIN[MAIN["net"] == net].sort_values("seed")
    assert right.shape == (10, 10_000)
    assert (100 * right.mean(1)).round(3).tolist() == own["test_accuracy"].tolist()


def test_no_predictions_are_published():
    """They hold the data set's labels."""
    assert not (ROOT / "results" / "predictions.npz").exists()


def test_readme_has_one_generated_table_which_is_computed():
    parts = re.findall(r"<!-- results -->\n(.*?)\n<!-- end -->", README, re.DOTALL)
    assert parts == [tables.readme_table(ROWS)]
    assert README.count("<!--") == 2


@pytest.mark.parametrize("net", utils.NETS)
def test_readme_and_s8_show_the_means_by_plain_sums(net):
    values = MAIN[MAIN["net"] == net]["test_accuracy"].tolist()
    mean = sum(values) / 10
    std = (sum((value - mean) ** 2 for value in values) / 9) ** 0.5
    assert f"| {mean:.2f} ± {std:.2f} |" in README
    cells = "".join(str(cell.get("outputs")) for cell in json.loads(NOTEBOOKS[0].read_text(encoding="utf-8"))["cells"])
    assert f"<td>{mean:.2f}</td>" in cells
    assert f"<td>{std:.2f}</td>" in cells


def test_links_of_the_documents_lead_somewhere():
    for path in (path for path in tracked() if path.suffix == ".md"):
        for target in re.findall(r"\]\(([^)#\s]+)|src=\"([^\"]+)\"", path.read_text(encoding="utf-8")):
            target = "".join(target)
            assert target.startswith("https://") or (path.parent / target).exists(), f"{path.name}: {target}"


def test_no_tracked_text_names_a_path_of_a_machine():
    found = []
    for path in tracked():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{path.name}: {one[0]}" for one in re.finditer(r"(?<![\w.])/(home|root|tmp|work|Users)/\w+", text)]
        found += [path.name] * (len(str(ROOT)) > 5 and str(ROOT) + "/" in text)
    assert not found


def pins():
    """{distribution: version} of both files of requirements."""
    found = {}
    for name in ("requirements.txt", "requirements-dev.txt"):
        for line in (ROOT / name).read_text().splitlines():
            if line != "-r requirements.txt":
                pin = re.fullmatch(r"([\w-]+)==(\d[\w.]*)", line)
                assert pin, f"{name}: {line!r} is not pinned"
                assert pin[1] not in found, f"{pin[1]} is there twice"
                found[pin[1]] = pin[2]
    return found


def test_requirements_are_pinned_and_used():
    used = {"jupyter", "onnx", "onnxscript"}  # the notebook's server; torch.onnx needs the others
    sources = [path.read_text(encoding="utf-8") for path in tracked() if path.suffix == ".py"]
    sources += [
        c.source for path in NOTEBOOKS for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"
    ]
    imported = set(re.findall(r"^\s*(?:import|from) (\w+)", "\n".join(sources), re.MULTILINE))
    imported |= set(re.findall(r"importorskip\(\"(\w+)\"", "\n".join(sources)))
    for module, distributions in importlib.metadata.packages_distributions().items():
        used |= {name.lower() for name in distributions if module in imported}
    ways = [".ci/run", ".pre-commit-config.yaml", "README.md", "CONTRIBUTING.md"]
    commands = "\n".join((ROOT / name).read_text(encoding="utf-8") for name in ways)
    used |= {name for name in pins() if re.search(rf"\.venv/bin/{name}\b", commands)}
    used |= {"pytest-cov"} if "--cov" in commands else set()
    assert set(pins()) <= used, f"not used: {sorted(set(pins()) - used)}"


def test_what_is_imported_is_pinned_or_comes_along():
    along = {"filelock", "triton", "torchgen", "PIL", "nbformat", "nbclient", "IPython"}  # with torch and Jupyter
    own = {path.stem for path in tracked() if path.suffix == ".py"} | {
        p.name for p in (*ROOT.iterdir(), *(ROOT / "tests").iterdir()) if p.is_dir()
    }
    for path in (path for path in tracked() if path.suffix == ".py"):
        for module in re.findall(r"^(?:import|from) (\w+)", path.read_text(encoding="utf-8"), re.MULTILINE):
            if module not in own | along | set(sys.stdlib_module_names):
                assert {"yaml": "pyyaml"}.get(module, module) in pins(), f"{path.name} imports {module}"
