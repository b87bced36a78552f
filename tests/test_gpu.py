"""What needs a CUDA GPU: the captured step, and the time that scoring takes."""

import time
from dataclasses import replace

import pytest
import torch

import utils
from utils import Settings

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
SHORT = Settings(epochs=2, batch_size=500)


@pytest.fixture(scope="module")
def data():
    return utils.draw_stand_in(torch.device("cuda"))


def weights(name, data, settings):
    net = utils.build(name, settings)
    utils.train(net, data, settings, track=False)
    return torch.cat([value.flatten().float() for value in net.state_dict().values()])


@pytest.mark.parametrize("name", list(utils.NORMS))
def test_captured_eager_and_repeated_runs_agree_bit_for_bit(name, data, monkeypatch):
    settings = replace(SHORT, augment="flip+crop")
    first = weights(name, data, settings)
    assert torch.equal(first, weights(name, data, settings))
    monkeypatch.setattr(utils.Trainer, "capture", lambda trainer: trainer.step)
    assert torch.equal(first, weights(name, data, settings))


def test_one_step_an_epoch(data):
    weights("NetA", data, replace(SHORT, batch_size=10_000))


def test_scoring_is_fast(data):
    images, labels = data.images[:10_000], data.labels[:10_000]
    for name in ("NetA", "NetC"):
        net = utils.build(name, SHORT).to("cuda", memory_format=torch.channels_last)
        utils.test(net, images, labels)
        started = time.perf_counter()
        utils.test(net, images, labels)
        assert time.perf_counter() - started < 0.5
