import contextlib
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "agg")  # no windows, whichever system this is

import matplotlib.pyplot as plt
import pytest
import torch
from hypothesis import settings

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import models  # noqa: E402
import utils  # noqa: E402
from engine.data import load_data, synthetic_data  # noqa: E402
from engine.trainer import OPTIMIZERS  # noqa: E402

RATES = dict.fromkeys(OPTIMIZERS, 0.03) | {"sgd": 0.1, "sgdw": 0.1, "adamw": 0.003}  # that train, by optimizer

settings.register_profile("here", deadline=None, derandomize=True, database=None)  # the same examples on every machine
settings.load_profile("here")


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))


@pytest.fixture(autouse=True)
def closed_figures():
    """Close the figures that a test leaves open."""
    yield
    plt.close("all")


@pytest.fixture(autouse=True)
def checkpoint_after_each_epoch(monkeypatch):
    """Let runs of a fraction of a second have checkpoints to resume from."""
    monkeypatch.setattr(utils, "CHECKPOINT_SECONDS", 0)


@pytest.fixture(scope="session")
def cpu():
    return torch.device("cpu")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """A test with it runs on the CPU and, where there is one, on a CUDA GPU."""
    return torch.device(request.param)


@pytest.fixture(scope="session")
def synthetic(cpu):
    return synthetic_data(cpu)


@pytest.fixture(scope="session")
def real(cpu):
    """CIFAR-10, or a skip that says why it is not here."""
    try:
        return load_data(cpu, "cifar10", ROOT / "data")
    except OSError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def small(synthetic):
    """600 training and 200 test images of the synthetic data."""
    return first_images(synthetic, 600, 200)


@pytest.fixture(autouse=True)
def same_number_of_threads():
    """Give the next test as many threads as this one had: fingerprints count them."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def first_images(data, count, test_count):
    """Take so many training and test images of the data."""
    splits = {"images": count, "labels": count, "test_images": test_count, "test_labels": test_count}
    return replace(data, **{name: getattr(data, name)[:end] for name, end in splits.items()})


def tracked(*options):
    """List the files that git tracks; options are those of git ls-files."""
    try:
        command = ["git", "ls-files", "-z", *options]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def copy_checkout(folder):
    """Copy what git tracks, or would track if it were added, to `folder`."""
    for path in tracked("--cached", "--others", "--exclude-standard"):
        target = folder / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)


def child(call):
    """Call in a forked process; return its id. It exits with 1 when anything is raised."""
    if pid := os.fork():
        return pid
    with contextlib.suppress(BaseException):
        call()
        os._exit(0)
    os._exit(1)


def run_together(*calls):
    """Run commands at the same time, each with variables of its own in its environment; return what each prints."""
    options = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, env=os.environ | variables, **options) for command, variables in calls]
    printed = [process.communicate() for process in processes]
    for process, (output, errors) in zip(processes, printed, strict=True):
        assert process.returncode == 0, output[-3000:] + errors[-1000:]
    return [output for output, _ in printed]


class Evil:
    """Pickled, a call that makes the folder `path`."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def same(first, second):
    """Return whether two state dicts hold the same names, in order, and the same bits."""
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


def refused(call, error, *parts):
    """Call, and check that it raises `error` with one line that has all `parts`."""
    with pytest.raises(error, match=r"\A[^\n]+\Z") as caught:
        call()
    for part in parts:
        assert str(part) in str(caught.value)


def as_nobody(call):
    """Call as a user whom permissions hold back, as they don't root."""
    if os.geteuid():
        return call()
    os.seteuid(65534)
    try:
        return call()
    finally:
        os.seteuid(0)


def make_net(norm, device="cpu", **options):
    """Make a net whose scales and shifts are not all alike."""
    torch.manual_seed(1)
    net = models.Net(norm, **options).to(device, memory_format=torch.channels_last)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "norm" in name or name == "c11.bias":
                parameter.add_(0.2 * torch.randn_like(parameter))
    return net


def draw_batch(count, images, seed, device="cpu"):
    """Draw which of so many images make up a batch, and how each is moved and flipped."""
    generator = torch.Generator(device).manual_seed(seed)
    return (
        torch.randperm(images, device=device, generator=generator)[:count],
        torch.randint(-2, 3, (count, 2), device=device, generator=generator),
        torch.rand(count, device=device, generator=generator) < 0.5,
    )


def poison(fused):
    """Fill with NaN what each step of an engine.kernels.FusedNet has to write before it reads it."""
    buffers = [fused.partials, fused.totals, fused.float16_weights]
    for layer in fused.layers:
        buffers += [layer.x, layer.dy, layer.sums, layer.t_sums, layer.mean_rstd]
        buffers += [layer.pooled_sums, layer.pooled_t_sums]
    for buffer in buffers:
        buffer.fill_(torch.nan)
