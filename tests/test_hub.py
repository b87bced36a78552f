"""The nets by torch.hub, and beyond PyTorch's eager mode: exported, in ONNX, compiled."""

import shutil
import subprocess
import sys

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import ROOT

import hubconf
import models
import utils

HUB = """
import sys, torch
x, found = torch.load("x.pt"), {}
for name in ("NetA", "NetB", "NetC"):
    net = torch.hub.load(sys.argv[1], name, source="local", pretrained=True)
    found[name] = net.eval()(x).detach()
torch.save(found, "logits.pt")
"""


def images(count=4):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(count))


def test_published_nets_by_torch_hub(tmp_path):
    """From another folder: hubconf's nets, with the weights that were published."""
    torch.save(images(), tmp_path / "x.pt")
    command = [sys.executable, "-c", HUB, str(ROOT)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = torch.load(tmp_path / "logits.pt")
    for name in utils.NETS:
        net = getattr(models, name)()
        net.load_state_dict(torch.load(ROOT / "weights" / f"{name}.pt", weights_only=True))
        with torch.no_grad():
            assert torch.allclose(found[name], net.eval()(images()), atol=1e-5)
    assert not any(torch.allclose(found["NetC"], found[name]) for name in ("NetA", "NetB"))


def test_torch_hub_lists_the_nets_and_has_help_for_each():
    """As torch.hub.list and torch.hub.help look for them, which take no local folder."""
    listed = [name for name in dir(hubconf) if callable(getattr(hubconf, name)) and not name.startswith("_")]
    assert listed == list(utils.NETS)
    for name in listed:
        build = getattr(hubconf, name)
        assert build.__name__ == name
        assert build.__doc__.startswith(f"Build the network with {models.NORM_OF[name]} norm.\n")


@pytest.mark.parametrize("name", utils.NETS)
def test_options_go_to_the_net(name):
    net = getattr(hubconf, name)(classes=7, in_channels=1)
    assert (net.c11.out_channels, net.C1.conv.in_channels) == (7, 1)
    assert net.norm == models.NORM_OF[name]


def test_options_with_the_weights_are_refused():
    message = r"^groups given with pretrained=True; the published weights allow no options$"
    with pytest.raises(ValueError, match=message):
        torch.hub.load(str(ROOT), "NetC", source="local", pretrained=True, groups=2)
    assert torch.hub.load(str(ROOT), "NetC", source="local", groups=2).groups == 2


@pytest.mark.parametrize("damage", ["bit", "cut", "empty"])
def test_damaged_weights_are_refused(tmp_path, monkeypatch, damage):
    (tmp_path / "weights").mkdir()
    content = bytearray((ROOT / "weights" / "NetA.pt").read_bytes())
    if damage == "bit":
        content[len(content) // 2] ^= 1
    else:
        del content[9000 if damage == "cut" else 0 :]
    (tmp_path / "weights" / "NetA.pt").write_bytes(content)
    monkeypatch.setattr(hubconf, "__file__", str(tmp_path / "hubconf.py"))
    with pytest.raises(ValueError, match=r"^.*NetA.pt is damaged; download it again$"):
        hubconf.NetA(pretrained=True)


@pytest.mark.parametrize("name", utils.NETS)
def test_export_and_onnx(name, tmp_path):
    """float32, eval mode, any number of images."""
    net, batch = getattr(hubconf, name)(pretrained=True).eval(), ({0: torch.export.Dim("images")},)
    exported = torch.export.export(net, (images(),), dynamic_shapes=batch)
    torch.onnx.export(exported, dynamo=True, verbose=False).save(tmp_path / "net.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    for count in (1, 4, 7, 100):
        with torch.no_grad():
            expected = net(images(count))
        (found,) = session.run(None, {session.get_inputs()[0].name: images(count).numpy()})
        assert (exported.module()(images(count)) - expected).abs().max() < 1e-5
        assert np.abs(found - expected.numpy()).max() < 1e-5


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")
@pytest.mark.parametrize("name", utils.NETS)
def test_compile(name):
    net = getattr(hubconf, name)(pretrained=True).eval()
    with torch.no_grad():
        assert torch.allclose(torch.compile(net)(images()), net(images()), atol=1e-4)
