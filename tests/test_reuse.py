"""What README.md and CONTRIBUTING.md give to be copied works as it stands, and the nets train without this project."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

import engine.data
import hubconf
import models
import utils
from engine import figures
from engine.data import normalize


def snippets(name):
    return re.findall(r"^```python\n(.*?)^```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


BLOCKS = [(name, code) for name in ("README.md", "CONTRIBUTING.md") for code in snippets(name)]
# Few images and short epochs, so that a block that trains takes seconds.
SMALL = """
import functools, torch, engine.data, utils
images, labels = torch.randint(0, 256, (200, 32, 32, 3), dtype=torch.uint8), torch.arange(200) % 10
few = engine.data.Data(images, labels, images[:100], labels[:100])
engine.data.load_data = lambda *arguments, **options: few
utils.Settings = functools.partial(utils.Settings, batch_size=100)
del functools, torch, engine, utils, images, labels
"""


def execute(code, folder, path=None):
    """Execute Python source in `folder`, with `path` to import from or nothing but what is there."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"PYTHONPATH": str(path)} if path else {}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_both_documents_give_code():
    assert [name for name, _ in BLOCKS] == ["README.md", "CONTRIBUTING.md"]


@pytest.mark.parametrize(("name", "code"), [block for block in BLOCKS if block[0] != "README.md"])
def test_each_block_for_contributors_runs(tmp_path, name, code):
    """In an empty folder, with the checkout to import from."""
    output = execute(SMALL + code, tmp_path, ROOT)
    assert 0 <= float(output.split()[-1]) <= 100, "it ends by printing an accuracy"


@pytest.mark.parametrize(("name", "code"), [block for block in BLOCKS if block[0] == "README.md"])
def test_each_block_of_the_readme_runs_beside_the_files_to_copy(tmp_path, name, code, synthetic):
    """In an empty folder but for models.py and weights/; on given images it computes what `utils.test` would."""
    shutil.copy(ROOT / "models.py", tmp_path)
    shutil.copytree(ROOT / "weights", tmp_path / "weights")
    torch.save(synthetic.test_images[:8].permute(0, 3, 1, 2), tmp_path / "images.pt")
    assert len([line for line in code.splitlines() if line and "import" not in line]) <= 5
    code, replaced = re.subn(r"^images = .*$", "images = torch.load('images.pt')", code, flags=re.MULTILINE)
    assert replaced == 1
    assert re.search(r"^images = torch\.randint\(0, 256, \(8, 3, 32, 32\)\)", dict(BLOCKS)[name], re.MULTILINE)
    execute(f"{code}\ntorch.save(logits.detach(), 'logits.pt')", tmp_path)
    with torch.no_grad():
        expected = hubconf.NetB(pretrained=True).eval()(normalize(synthetic.test_images[:8]))
    assert torch.allclose(torch.load(tmp_path / "logits.pt"), expected, atol=1e-4)


@pytest.fixture(scope="module")
def rms(small):
    """The names that CONTRIBUTING's block leaves behind; its norm stays until the end of these tests."""
    few = replace(small, images=small.images[:300], labels=small.labels[:300])
    with pytest.MonkeyPatch.context() as staying:
        staying.setattr(models, "NORMS", dict(models.NORMS))
        names = {}
        with pytest.MonkeyPatch.context() as changed:
            changed.setattr(engine.data, "load_data", lambda device: few)
            changed.setattr(utils, "Settings", partial(utils.Settings, batch_size=100, learning_rate=0.01))
            changed.setattr(utils, "pick_device", lambda: torch.device("cpu"))
            exec(dict(BLOCKS)["CONTRIBUTING.md"], names)
        yield names


def test_a_norm_of_ones_own_trains_and_normalizes(rms):
    assert rms["net"].norm == "rms"
    assert len(rms["history"]) == 5
    assert rms["history"][-1]["loss"] < rms["history"][0]["loss"]
    layer, x = rms["RMSNorm"](6), 3 * torch.randn(5, 6, 4, 4) + 2
    assert torch.allclose(layer(x).square().mean((1, 2, 3)), torch.ones(5), atol=1e-4)
    assert torch.allclose(layer(x) * x.square().mean((1, 2, 3), keepdim=True).sqrt(), x, atol=1e-3)


@pytest.mark.usefixtures("rms")
def test_a_norm_of_ones_own_is_run_and_drawn_beside_the_others(small, monkeypatch, tmp_path):
    """With a line in models.NORM_OF and one in engine.figures.COLORS, as CONTRIBUTING says."""
    monkeypatch.setitem(models.NORM_OF, "NetR", "rms")
    monkeypatch.setitem(figures.COLORS, "rms", "#CC79A7")
    settings = utils.Settings(epochs=1, batch_size=100)
    small = replace(small, images=small.images[:100], labels=small.labels[:100])
    runs = {models.NORM_OF[name]: [utils.run(name, small, settings)] for name in ("NetC", "NetR")}
    assert utils.summarize(run.row for group in runs.values() for run in group)["norm"].tolist() == ["group", "rms"]
    utils.save_runs(runs["rms"], small, tmp_path)
    utils.plot_mistakes(runs["rms"][0], small, tmp_path / "rms.png")
    figures.plot_curves(runs, small)
    figures.plot_classes({norm: group[0] for norm, group in runs.items()}, small)


@pytest.mark.parametrize("norm", models.NORMS)
def test_a_plain_loop_trains_them(norm):
    """Plain steps of PyTorch, on images of ten colors."""
    torch.manual_seed(0)
    labels = torch.arange(50) % 10
    images = 2 * torch.randn(10, 3, 1, 1)[labels] + 0.5 * torch.randn(50, 3, 32, 32)
    losses = train_plainly(models.Net(norm), images, labels, 30)
    assert losses[-1] < (0.95 if norm == "none" else 0.8) * losses[0]


def test_a_plain_loop_trains_them_on_another_data_set():
    """Gray images of 28x28 pixels, bright and dark, in three classes, as FashionMNIST's would be."""
    torch.manual_seed(0)
    labels = torch.arange(60) % 3
    images = labels.view(-1, 1, 1, 1) - 1 + 0.3 * torch.randn(60, 1, 28, 28)
    losses = train_plainly(models.NetC(in_channels=1, classes=3), images, labels, 10)
    assert losses[-1] < 0.7 * losses[0]


def train_plainly(net, images, labels, steps):
    optimizer = torch.optim.AdamW(net.parameters(), 0.01)
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(net(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
