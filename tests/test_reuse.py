"""The nets outside of this project: by README's snippets, in plain PyTorch, exported, on other images."""

import os
import re
import shutil
import struct
import subprocess
import sys

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

import hubconf
import models
import utils

SHORT = utils.Settings(epochs=3, batch_size=100, learning_rate=0.01)
README = (ROOT / "README.md").read_text(encoding="utf-8")


def snippets(text):
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def execute(code, folder):
    """Execute Python source in `folder`, without this project on the path."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture
def published(real):
    """The published NetB's logits of 20 test images, as `utils.test` computes them."""
    net = hubconf.NetB(pretrained=True).eval()
    with torch.no_grad():
        return real.test_images[:20].permute(0, 3, 1, 2), net(utils.standardise(real.test_images[:20]))


def test_snippet_with_the_weights(tmp_path, published):
    """In an empty folder but for models.py and weights/, as README says."""
    images, logits = published
    shutil.copy(ROOT / "models.py", tmp_path)
    shutil.copytree(ROOT / "weights", tmp_path / "weights")
    torch.save(images, tmp_path / "images.pt")
    (code,) = (code for code in snippets(README) if "weights/NetB.pt" in code)
    assert len([line for line in code.splitlines() if line and "import" not in line]) <= 5
    execute(f"import torch; images = torch.load('images.pt')\n{code}\ntorch.save(logits, 'logits.pt')", tmp_path)
    assert torch.allclose(torch.load(tmp_path / "logits.pt"), logits, atol=1e-4)


def test_snippet_with_torch_hub(tmp_path, published):
    images, logits = published
    torch.save((images / 255 - models.MEAN) / models.STD, tmp_path / "x.pt")
    (code,) = (code for code in snippets(README) if "torch.hub" in code)
    assert "path/to/checkout" in code
    code = code.replace("path/to/checkout", str(ROOT)) + "\ntorch.save(net.eval()(torch.load('x.pt')), 'logits.pt')"
    execute(code, tmp_path)
    assert torch.allclose(torch.load(tmp_path / "logits.pt"), logits, atol=1e-4)


def test_hub_refuses_options_with_the_weights():
    with pytest.raises(
        ValueError, match=r"^groups given with pretrained=True; the published weights allow no options$"
    ):
        torch.hub.load(str(ROOT), "NetC", source="local", pretrained=True, groups=2)
    assert torch.hub.load(str(ROOT), "NetC", source="local", groups=2).groups == 2


def test_snippet_on_another_dataset(tmp_path):
    """On files in FashionMNIST's format that hold 300 bright and dark squares: no network."""
    shutil.copy(ROOT / "models.py", tmp_path)
    folder = tmp_path / "data" / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    random, labels = np.random.default_rng(0), np.arange(300, dtype=np.uint8) % 10
    images = (25 * labels[:, None, None] + random.integers(0, 25, (300, 28, 28))).astype(np.uint8)
    for split in ("train", "t10k"):
        for kind, values in (("images-idx3-ubyte", images), ("labels-idx1-ubyte", labels)):
            header = struct.pack(f">I{values.ndim}I", 0x0800 + values.ndim, *values.shape)
            (folder / f"{split}-{kind}").write_bytes(header + values.tobytes())
    (code,) = (code for code in snippets(README) if "FashionMNIST" in code)
    assert len([line for line in code.splitlines() if line]) <= 14
    code = code.replace("step % 100 == 0", "True")  # there are three steps
    losses = [float(line) for line in execute(f"import torch\ntorch.manual_seed(0)\n{code}", tmp_path).split()]
    assert 0 < losses[-1] < losses[0]


@pytest.mark.parametrize("norm", models.NORMS)
def test_a_plain_loop_trains_them(norm):
    """Plain steps of PyTorch, on images of ten colours."""
    torch.manual_seed(0)
    labels = torch.arange(50) % 10
    images = 2 * torch.randn(10, 3, 1, 1)[labels] + 0.5 * torch.randn(50, 3, 32, 32)
    net = models.Net(norm)
    optimizer = torch.optim.AdamW(net.parameters(), 0.01)
    losses = []
    for _ in range(30):
        loss = F.cross_entropy(net(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < (0.95 if norm == "none" else 0.7) * losses[0]


@pytest.mark.parametrize("name", utils.NETS)
def test_export_and_onnx(name, tmp_path):
    """float32, eval mode, any number of images."""
    net, batch = getattr(hubconf, name)(pretrained=True).eval(), ({0: torch.export.Dim("images")},)
    exported = torch.export.export(net, (torch.randn(4, 3, 32, 32),), dynamic_shapes=batch)
    torch.onnx.export(exported, dynamo=True, verbose=False).save(tmp_path / "net.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    for count in (1, 4, 7, 100):
        images = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(count))
        with torch.no_grad():
            expected = net(images)
        (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        assert (exported.module()(images) - expected).abs().max() < 1e-5
        assert np.abs(found - expected.numpy()).max() < 1e-5


@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")
@pytest.mark.parametrize("name", utils.NETS)
def test_compile(name):
    net, images = getattr(hubconf, name)(pretrained=True).eval(), torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(torch.compile(net)(images), net(images), atol=1e-4)


def test_the_norm_of_contributing(small, monkeypatch):
    """CONTRIBUTING.md's RMS norm trains, and makes each image's mean square 1."""
    (code,) = snippets((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    monkeypatch.setattr(utils, "load_data", lambda device: small)
    monkeypatch.setattr(utils, "Settings", lambda **options: SHORT)
    monkeypatch.setattr(models, "NORMS", dict(models.NORMS))
    names = {}
    exec(code, names)
    net, history = names["net"], names["history"]
    assert net.norm == "rms"
    assert history[-1]["loss"] < history[0]["loss"]
    layer, x = names["RMSNorm"](6), 3 * torch.randn(5, 6, 4, 4) + 2
    assert torch.allclose(layer(x).square().mean((1, 2, 3)), torch.ones(5), atol=1e-4)
    assert torch.allclose(layer(x) * x.square().mean((1, 2, 3), keepdim=True).sqrt(), x, atol=1e-3)
