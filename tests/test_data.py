import hashlib
import time
import urllib.error
import urllib.request

import pytest
import torch
import torchvision.transforms.v2.functional as TF

import utils
from utils import Data


def test_crop_and_flip_against_torchvision(stand_in):
    images = stand_in.images[:40]
    generator = torch.Generator().manual_seed(0)
    shift = torch.randint(-4, 5, (40, 2), generator=generator)
    shift[:4] = torch.tensor([[-4, -4], [4, 4], [-4, 4], [0, 0]])
    flip = torch.arange(40) % 2 == 1
    ours = utils.crop_and_flip(images, shift, flip)
    for image, (down, right), mirrored, result in zip(images, shift.tolist(), flip, ours, strict=True):
        padded = TF.pad(image.permute(2, 0, 1), [4], padding_mode="reflect")
        expected = TF.crop(padded, 4 + down, 4 + right, 32, 32)
        if mirrored:
            expected = TF.horizontal_flip(expected)
        assert torch.equal(result, expected.permute(1, 2, 0))


def test_standardise(stand_in):
    ours = utils.standardise(stand_in.images[:5])
    scaled = TF.to_dtype(stand_in.images[:5].permute(0, 3, 1, 2), torch.float32, scale=True)
    expected = TF.normalize(scaled, [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616])
    assert ours.dtype == torch.float32
    assert torch.allclose(ours, expected, atol=1e-5)


def test_augmentation_is_drawn_per_image_and_only_when_asked(small):
    def batches(augment):
        trainer = utils.Trainer(
            utils.build("NetA", utils.Settings()), small, utils.Settings(batch_size=200, augment=augment)
        )
        next(trainer.epoch())
        trainer.now.zero_()
        return trainer, trainer.batch()[0].float()

    plain, images = batches("none")
    chosen = plain.order[0]
    expected = utils.standardise(small.images[chosen]).to(plain.dtype).float()
    assert torch.equal(images, expected)
    flipped, images = batches("flip")
    mirrored = flipped.flip[flipped.order[0]]
    assert 60 < mirrored.sum() < 140
    expected = utils.standardise(small.images[flipped.order[0]]).to(plain.dtype).float()
    assert torch.equal(images[mirrored], expected[mirrored].flip(3))
    assert torch.equal(images[~mirrored], expected[~mirrored])
    before = flipped.flip.clone()
    next(flipped.epoch())
    assert torch.equal(flipped.flip, ~before)  # the other half of the images
    both, _ = batches("flip+crop")
    assert len({tuple(shift) for shift in both.shift.tolist()}) == (2 * utils.CROP + 1) ** 2


def test_validation_split(stand_in):
    split = utils.validation_split(stand_in, per_class=50)
    assert split.split == "validation"
    assert split.test_labels.bincount().tolist() == [50] * 10
    assert len(split.images) == len(stand_in.images) - 500
    hashes = [
        {hashlib.sha1(image.numpy().tobytes()).digest() for image in images}
        for images in (split.images, split.test_images, stand_in.test_images, stand_in.images)
    ]
    kept, held_out, test, all_training = hashes
    assert not held_out & kept
    assert not held_out & test
    assert held_out | kept == all_training
    assert torch.equal(utils.validation_split(stand_in, per_class=50).test_images, split.test_images)


def test_validation_split_of_cifar10_is_fixed(real):
    split = utils.validation_split(real)
    assert (len(split.images), len(split.test_images)) == (45_000, 5_000)
    assert split.test_labels.bincount().tolist() == [500] * 10
    first = [(real.images == image).flatten(1).all(1).nonzero().item() for image in split.test_images[:5]]
    assert first == [1, 11, 23, 39, 44]


def test_stand_in(stand_in, cpu):
    assert tuple(stand_in.images.shape) == (10_000, 32, 32, 3)
    assert tuple(stand_in.test_images.shape) == (2_000, 32, 32, 3)
    assert stand_in.labels.unique().tolist() == list(range(10))
    assert not stand_in.real
    assert "NOT RESULTS" in stand_in.name
    assert torch.equal(utils.draw_stand_in(cpu).images, stand_in.images)


def test_cifar10(real):
    assert tuple(real.images.shape) == (50_000, 32, 32, 3)
    assert real.labels.bincount().tolist() == [5_000] * 10
    assert real.test_labels.bincount().tolist() == [1_000] * 10
    assert real.real
    # A picture and its label that anybody can check: the first test image is a cat, the second a ship.
    assert [real.classes[label] for label in real.test_labels[:2]] == ["cat", "ship"]


@pytest.fixture
def no_network(monkeypatch):
    """No network: every request fails at once. Gives the list of the requests made."""
    asked = []

    def fail(request, *arguments, **options):
        asked.append(request)
        raise urllib.error.URLError("Network is unreachable")

    monkeypatch.setattr(urllib.request, "urlopen", fail)
    return asked


def test_absent_files_without_network(no_network, tmp_path, cpu, capsys):
    data = utils.load_data(cpu, "auto", tmp_path)
    assert not data.real
    said = capsys.readouterr().out
    assert "Network is unreachable" in said
    assert "not results" in said
    assert "cifar-10-python.tar.gz" in said
    assert len(no_network) == 1


def test_absent_files_are_an_error_when_asked_for(no_network, tmp_path, cpu):
    with pytest.raises(OSError, match="can't be fetched \\(Network is unreachable\\): download"):
        utils.load_data(cpu, "cifar10", tmp_path)


def test_silent_network(monkeypatch, tmp_path, cpu):
    monkeypatch.setattr(urllib.request, "urlopen", lambda *arguments, **options: time.sleep(60))
    started = time.monotonic()
    assert not utils.load_data(cpu, "auto", tmp_path).real
    assert time.monotonic() - started < 20


def test_stand_in_on_request_asks_nobody(no_network, tmp_path, cpu, capsys):
    assert not utils.load_data(cpu, "synthetic", tmp_path).real
    assert "not results" in capsys.readouterr().out
    assert no_network == []


def test_damaged_file(no_network, tmp_path, cpu):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "data_batch_3").write_bytes(b"half a file")
    with pytest.raises(OSError, match="data_batch_3 is damaged"):
        utils.load_data(cpu, "auto", tmp_path)
    assert (folder / "data_batch_3").read_bytes() == b"half a file"


def test_damaged_archive(no_network, tmp_path, cpu):
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"half an archive")
    with pytest.raises(OSError, match=r"cifar-10-python\.tar\.gz is damaged"):
        utils.load_data(cpu, "auto", tmp_path)
    assert len(no_network) == 1


def test_network_that_fails_during_the_download(monkeypatch, tmp_path, cpu, capsys):
    class Answer:
        def close(self):
            pass

    def answer(request, **options):
        if request.get_method() == "HEAD" and "torchvision" not in str(request.headers):
            return Answer()
        raise TimeoutError("timed out")

    monkeypatch.setattr(urllib.request, "urlopen", answer)
    assert not utils.load_data(cpu, "auto", tmp_path).real
    assert "timed out" in capsys.readouterr().out
    assert not list(tmp_path.rglob("*batch*"))


def test_validation_split_larger_than_a_class(stand_in):
    with pytest.raises(ValueError, match=r"per_class is 5000; give 1 to \d+"):
        utils.validation_split(stand_in, per_class=5000)


def test_unknown_source(cpu):
    with pytest.raises(ValueError, match="data source is 'mnist'; choose one of auto, cifar10, synthetic"):
        utils.load_data(cpu, "mnist")


IMAGES, LABELS = torch.zeros(4, 32, 32, 3, dtype=torch.uint8), torch.arange(4)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"images": IMAGES.permute(0, 3, 1, 2)}, r"images are torch.uint8 of shape \(4, 3, 32, 32\); give"),
        ({"images": IMAGES.float()}, "images are torch.float32 of shape"),
        ({"images": IMAGES[:0], "labels": LABELS[:0]}, "images are empty"),
        ({"test_images": IMAGES[0]}, "test_images are torch.uint8 of shape"),
        ({"images": [1, 2]}, "images are of type list; give a torch.Tensor"),
        ({"test_labels": [1, 2]}, "the labels of test_images are of type list"),
        ({"labels": LABELS[:3]}, r"the labels of images are torch.int64 of shape \(3,\); give torch.int64 of \(4,\)"),
        ({"labels": LABELS.float()}, "the labels of images are torch.float32"),
        ({"labels": LABELS + 7}, "the labels of images go from 7 to 10; 0 to 9 are allowed"),
        ({"test_labels": LABELS - 1}, "the labels of test_images go from -1 to 2"),
    ],
)
def test_wrong_data(change, said):
    right = {"images": IMAGES, "labels": LABELS, "test_images": IMAGES, "test_labels": LABELS}
    Data(**right)
    with pytest.raises(ValueError, match=said):
        Data(**(right | change))
