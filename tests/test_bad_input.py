"""Wrong calls at the three doors, settings, net and data: each ends in one clear line that names the value."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT

import models
import utils
from utils import Settings

IMAGES = torch.zeros(4, 32, 32, 3, dtype=torch.uint8)
LABELS = torch.tensor([0, 1, 2, 9])
SERIES = pd.Series


def data(**changes):
    return utils.Data(**{"images": IMAGES, "labels": LABELS, "test_images": IMAGES, "test_labels": LABELS} | changes)


def settings(**changes):
    return lambda: Settings(**changes)


def net(**changes):
    return lambda: models.Net(**{"norm": "group", **changes})


def images(value, labels=LABELS):
    return lambda: data(images=value, labels=labels)


def train(**changes):
    chosen = Settings(**{"epochs": 1, "batch_size": 4, **changes})
    return lambda: utils.train(models.NetA(), data(), chosen)


WIDE = (16, 32, 24, 24, 24, 24, 24, 32, 32, 32)
WRONG = [
    # settings
    (settings(learning_rate=0), "learning_rate is 0"),
    (settings(learning_rate=-1.0), "learning_rate is -1.0"),
    (settings(learning_rate=11), "learning_rate is 11"),
    (settings(learning_rate=math.nan), "learning_rate is nan"),
    (settings(learning_rate=math.inf), "learning_rate is inf"),
    (settings(learning_rate="0.1"), "learning_rate is '0.1'"),
    (settings(learning_rate=None), "learning_rate is None"),
    (settings(learning_rate=True), "learning_rate is True"),
    (settings(learning_rate=[0.1]), "learning_rate is [0.1]"),
    (settings(learning_rate=1j), "learning_rate is 1j"),
    (settings(weight_decay=-0.1), "weight_decay is -0.1"),
    (settings(weight_decay=math.nan), "weight_decay is nan"),
    (settings(weight_decay=1000), "weight_decay is 1000"),
    (settings(weight_decay="none"), "weight_decay is 'none'"),
    (settings(momentum=1.01), "momentum is 1.01"),
    (settings(momentum=-0.5), "momentum is -0.5"),
    (settings(momentum=None), "momentum is None"),
    (settings(batch_size=0), "batch_size is 0"),
    (settings(batch_size=-5), "batch_size is -5"),
    (settings(batch_size=2.0), "batch_size is 2.0"),
    (settings(batch_size="500"), "batch_size is '500'"),
    (settings(batch_size=2**40), f"batch_size is {2**40}"),
    (settings(batch_size=False), "batch_size is False"),
    (settings(epochs=0), "epochs is 0"),
    (settings(epochs=1.5), "epochs is 1.5"),
    (settings(epochs=None), "epochs is None"),
    (settings(seed=-1), "seed is -1"),
    (settings(seed=0.0), "seed is 0.0"),
    (settings(seed=2**32), f"seed is {2**32}"),
    (settings(seed="0"), "seed is '0'"),
    (settings(augment="mixup"), "augment is 'mixup'; choose one of none, flip, flip+crop"),
    (settings(augment=None), "augment is None"),
    (settings(augment=True), "augment is True"),
    # net
    (net(norm="instance"), "norm is 'instance'; choose one of batch, layer, group, none"),
    (net(norm=None), "norm is None"),
    (net(norm=torch.nn.BatchNorm2d), "norm is <class"),
    (net(groups=0), "groups is 0"),
    (net(groups=-4), "groups is -4"),
    (net(groups=3), "groups is 3, which does not divide each of the widths"),
    (net(groups=64), "groups is 64, which does not divide"),
    (net(groups=2.0), "groups is 2.0"),
    (net(groups="4"), "groups is '4'"),
    (net(groups=True), "groups is True"),
    (net(widths=WIDE[:9]), "widths is (16, 32"),
    (net(widths=[*WIDE, 8]), "widths is [16, 32"),
    (net(widths=32), "widths is 32; give 10 numbers"),
    (net(widths=(0, *WIDE[1:])), "C1 is 0"),
    (net(widths=(16.0, *WIDE[1:])), "C1 is 16.0"),
    (net(widths="16 32 24"), "widths is '16 32 24'"),
    (net(classes=0), "classes is 0"),
    (net(classes=10.0), "classes is 10.0"),
    (net(in_channels=-3), "in_channels is -3"),
    (net(in_channels=None), "in_channels is None"),
    (lambda: utils.build("NetD", Settings()), "net is 'NetD'; choose one of NetA, NetB, NetC, Net"),
    (lambda: utils.build(models.NetA, Settings()), "net is <class"),
    (lambda: utils.build([], Settings()), "net is []"),
    # data
    (images(IMAGES.float()), "images are torch.float32 of shape (4, 32, 32, 3)"),
    (images(IMAGES.permute(0, 3, 1, 2)), "images are torch.uint8 of shape (4, 3, 32, 32)"),
    (images(IMAGES[0]), "images are torch.uint8 of shape (32, 32, 3)"),
    (images(IMAGES[:, :16]), "images are torch.uint8 of shape (4, 16, 32, 3)"),
    (images(IMAGES[..., :1]), "images are torch.uint8 of shape (4, 32, 32, 1)"),
    (images(IMAGES[:0], LABELS[:0]), "images are empty"),
    (images(IMAGES.numpy()), "images are of type ndarray; give a torch.Tensor"),
    (images(None), "images are of type NoneType"),
    (images(IMAGES, LABELS[:3]), "the labels of images are torch.int64 of shape (3,)"),
    (images(IMAGES, LABELS.int()), "the labels of images are torch.int32"),
    (images(IMAGES, LABELS.float() * math.nan), "the labels of images are torch.float32"),
    (images(IMAGES, LABELS[:, None]), "the labels of images are torch.int64 of shape (4, 1)"),
    (images(IMAGES, LABELS + 1), "the labels of images go from 1 to 10; 0 to 9 are allowed"),
    (images(IMAGES, LABELS - 1), "the labels of images go from -1 to 8"),
    (images(IMAGES, [0, 1, 2, 9]), "the labels of images are of type list"),
    (lambda: data(test_images=IMAGES[:2]), "the labels of test_images are torch.int64 of shape (4,)"),
    (lambda: data(test_labels=LABELS.bool()), "the labels of test_images are torch.bool"),
    (lambda: data(test_images=IMAGES.to("meta"), test_labels=LABELS), "test_images are on meta, their labels on cpu"),
    (lambda: utils.test(models.NetA(), IMAGES.float(), LABELS), "images are torch.float32"),
    (lambda: utils.test(models.NetA(), IMAGES, LABELS[:1]), "the labels of images are torch.int64 of shape (1,)"),
    (lambda: utils.validation_split(data(), 1), "per_class is 1"),
    (lambda: utils.validation_split(data(), 0), "per_class is 0"),
    (lambda: utils.load_data(torch.device("cpu"), "mnist"), "data source is 'mnist'; choose one of auto, cifar10"),
    (lambda: utils.load_data(torch.device("cpu"), None), "data source is None"),
    (lambda: utils.pick_device("tpu"), "device is 'tpu'; choose one of"),
    (lambda: utils.pick_device(0), "device is 0; choose one of"),
    # training
    (train(batch_size=5), "batch_size is 5; there are 4 training images"),
    (lambda: utils.paired(SERIES([1.0, 2.0], [0, 0]), SERIES([1.0], [0])), "a seed has more than one row"),
    (lambda: utils.paired(SERIES([1.0], [0]), SERIES([1.0], [1])), "no seed is in both"),
]


def test_there_are_enough():
    assert len(WRONG) >= 60
    assert f"{len(WRONG)} wrong calls" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize(("call", "said"), WRONG, ids=[said for _, said in WRONG])
def test_wrong_call(call, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"^[^\n]{1,300}$") as error:
        call()
    assert str(error.value).startswith(said), error.value
    assert not list(Path(tmp_path).iterdir()), "something was written"


def test_what_is_allowed_is_not_refused():
    """The largest, the smallest, and NumPy's numbers, which sweeps hand over."""
    Settings(learning_rate=10, weight_decay=0, momentum=0, batch_size=1, epochs=1, seed=2**32 - 1, augment="flip")
    Settings(learning_rate=float(np.float64(0.1)), momentum=1)
    replace(Settings(), learning_rate=np.float64(0.1))
    data(images=IMAGES[:1], labels=LABELS[:1])
    models.Net("group", groups=1, widths=[8] * 10, classes=1, in_channels=1)
