import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import utils  # noqa: E402


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))


@pytest.fixture(scope="session")
def cpu():
    return torch.device("cpu")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """A test with it runs on the CPU and, where there is one, on a CUDA GPU."""
    return torch.device(request.param)


@pytest.fixture(scope="session")
def stand_in(cpu):
    return utils.draw_stand_in(cpu)


@pytest.fixture(scope="session")
def real(cpu):
    """CIFAR-10, or a skip that says why it is not here."""
    try:
        return utils.load_data(cpu, "cifar10", ROOT / "data")
    except OSError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def small(stand_in):
    """600 training and 200 test images of the stand-in."""
    return utils.replace(
        stand_in,
        images=stand_in.images[:600],
        labels=stand_in.labels[:600],
        test_images=stand_in.test_images[:200],
        test_labels=stand_in.test_labels[:200],
    )
