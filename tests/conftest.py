import os
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

from engine.data import load_data, synthetic_data  # noqa: E402

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
    return replace(
        synthetic,
        images=synthetic.images[:600],
        labels=synthetic.labels[:600],
        test_images=synthetic.test_images[:200],
        test_labels=synthetic.test_labels[:200],
    )


@pytest.fixture(autouse=True)
def same_number_of_threads():
    """Give the next test as many threads as this one had: fingerprints count them."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


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


def poison(fused):
    """Fill with NaN what each step of an engine.kernels.FusedNet has to write before it reads it."""
    buffers = [fused.partials, fused.totals, fused.float16_weights]
    for layer in fused.layers:
        buffers += [layer.x, layer.dy, layer.sums, layer.t_sums, layer.mean_rstd]
        buffers += [layer.pooled_sums, layer.pooled_t_sums]
    for buffer in buffers:
        buffer.fill_(torch.nan)
