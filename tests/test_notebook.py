"""The notebook from top to bottom: on the stand-in, and for two epochs on CIFAR-10."""

import os
import re
import shlex
import shutil
import subprocess
import sys

import nbformat
import pandas as pd
import pytest
import torch
from conftest import ROOT
from PIL import Image

import hubconf
import models
import utils

# Runs a command and notes the most memory that one of its processes held: a process of its own, since what pytest held
# before would count as well. Without the capability CAP_DAC_OVERRIDE (1; prctl's option 24 drops it) permissions hold
# for root, too.
NOTE_PEAK = """
import ctypes, resource, subprocess, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(24, 1)
done = subprocess.run(sys.argv[2:])
open(sys.argv[1], "w").write(str(1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss))
sys.exit(done.returncode)
"""


def execute(tmp_path, folder, **settings):
    """Execute s8.ipynb in `folder` by README.md's command, one seed, environment `settings`: its cells and rows."""
    line = next(line for line in (ROOT / "README.md").read_text().splitlines() if "--execute" in line)
    command = [sys.executable, "-m", *shlex.split(line.split(".venv/bin/")[-1])]
    command[command.index("--output-dir") + 1] = str(tmp_path)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("S8_")} | {"S8_SEEDS": "1"} | settings
    environment |= {"S8_OUT": str(tmp_path), "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    # jupyter looks for nbconvert on the path, where another environment's may come first
    environment["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    command = [sys.executable, "-c", NOTE_PEAK, str(tmp_path / "peak"), *command]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "epoch 1, loss" in done.stdout + done.stderr, "no progress was shown"
    cells = nbformat.read(tmp_path / "s8.ipynb", as_version=4).cells
    made = tmp_path / "stand-in" if settings["S8_DATA"] == "synthetic" else tmp_path
    for norm in ("batch", "layer", "group"):
        with Image.open(made / "img" / f"{norm}.png") as image:
            assert min(image.size) > 900
    for net in ("NetA", "NetB", "NetC"):
        assert (made / "weights" / f"{net}.pt").stat().st_size < 400_000
    return cells, pd.read_csv(made / "results" / "runs.csv")


def git_status():
    return subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True).stdout


def test_stand_in(tmp_path):
    """In a folder with the three files that a reader may have uploaded, and nothing else, that can't be written."""
    folder = tmp_path / "drei Dateien, größer nicht"
    folder.mkdir()
    for name in ("s8.ipynb", "models.py", "utils.py"):
        shutil.copy(ROOT / name, folder)
    folder.chmod(0o555)
    try:
        cells, rows = execute(tmp_path, folder, S8_DATA="synthetic", S8_EPOCHS="5")
    finally:
        folder.chmod(0o755)
    assert len(list(folder.iterdir())) == 3
    assert rows["study"].unique().tolist() == ["stand-in"]
    assert rows["test_accuracy"].between(60, 97).all(), rows[["net", "test_accuracy"]]
    mistakes = pd.read_csv(tmp_path / "stand-in" / "results" / "mistakes.csv")
    assert (mistakes.groupby("net").size() >= 10).all()
    outputs = [output for cell in cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert "\r" not in "".join(output.get("text", "") for output in outputs), "a bar is saved with its past"
    texts = [output.get("text", "") for output in outputs]
    assert any("not results" in text for text in texts)
    spread = pd.read_csv(tmp_path / "stand-in" / "results" / "inside.csv").groupby(["net", "images"])["spread"].mean()
    assert spread["NetA"].is_monotonic_decreasing  # with images a batch


@pytest.mark.usefixtures("real")
def test_two_epochs_of_cifar10(tmp_path):
    before = git_status()
    _, rows = execute(tmp_path, ROOT, S8_DATA="cifar10", S8_EPOCHS="2")
    assert rows["net"].tolist() == ["NetA", "NetB", "NetC"]
    assert set(rows["study"]) == {"short"}
    assert (rows["test_accuracy"] >= 55).all(), rows[["net", "test_accuracy"]]
    assert git_status() == before, "a user's run changed the checkout"
    assert 200e6 < int((tmp_path / "peak").read_text()) < 2 * 2**30  # bytes


def test_answers_to_the_exercises(real, capsys):
    """Each folded answer's code, with the published weights in place of what the notebook trains."""
    cells = nbformat.read(ROOT / "s8.ipynb", as_version=4).cells
    answers = [re.search(r"<details>.*```python\n(.*?)```.*</details>", cell.source, re.DOTALL) for cell in cells]
    answers = [answer[1] for answer in answers if answer]
    few = utils.replace(real, images=real.images[:1000], labels=real.labels[:1000])
    names = {"data": few, "device": torch.device("cpu"), "settings": utils.Settings(epochs=1), "utils": utils}
    names |= {"NetA": models.NetA, "NetB": models.NetB, "NetC": models.NetC, "replace": utils.replace}
    for net, norm in zip(utils.NETS, ("batch", "layer", "group"), strict=True):
        names[norm] = [utils.Run(getattr(hubconf, net)(pretrained=True), [], None, {"net": net})]
    said = []
    for answer in answers:
        exec(answer, names)
        said.append(capsys.readouterr().out)
    assert len(answers) == 4
    assert "groups is 3" in said[0]
    (batch_pairs, batch_alone), (layer_pairs, layer_alone) = (
        map(float, re.findall(r"(?:pairs|alone) (\S+)", line)) for line in said[2].splitlines()
    )
    assert batch_pairs < batch_alone - 10
    assert layer_pairs == pytest.approx(layer_alone, abs=0.1)
    assert names["control"].row["norm"] == "none"
