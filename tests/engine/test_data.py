"""Data and its files: what is loaded, what is refused, and what damage, hostile files and hostile servers can do."""

import contextlib
import hashlib
import io
import multiprocessing
import os
import pickle
import shutil
import socketserver
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from conftest import ROOT, Evil, as_nobody
from hypothesis import given
from hypothesis import strategies as st
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.utils import calculate_md5

import models
from engine import data, download
from engine.data import Data

CPU = torch.device("cpu")
SETS = {"cifar10": CIFAR10, "cifar100": CIFAR100}


# ---------------------------------------------------------------------------------------------------------------------
# Data in memory
# ---------------------------------------------------------------------------------------------------------------------

IMAGES, LABELS = torch.zeros(4, 32, 32, 3, dtype=torch.uint8), torch.tensor([0, 1, 2, 9])
RIGHT = {"images": IMAGES, "labels": LABELS, "test_images": IMAGES, "test_labels": LABELS}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": IMAGES.permute(0, 3, 1, 2)}, "images are torch.uint8 of shape (4, 3, 32, 32); give torch.uint8 of"),
        ({"images": IMAGES.float()}, "images are torch.float32 of shape (4, 32, 32, 3)"),
        ({"images": IMAGES[0]}, "images are torch.uint8 of shape (32, 32, 3)"),
        ({"images": IMAGES[:, :16]}, "images are torch.uint8 of shape (4, 16, 32, 3)"),
        ({"images": IMAGES[..., :1]}, "images are torch.uint8 of shape (4, 32, 32, 1)"),
        ({"images": IMAGES[:0], "labels": LABELS[:0]}, "images are empty; give at least one"),
        ({"images": IMAGES.numpy()}, "images are of type ndarray; give a torch.Tensor"),
        ({"images": None}, "images are of type NoneType"),
        ({"labels": LABELS[:3]}, "the labels of images are torch.int64 of shape (3,); give torch.int64 of (4,)"),
        ({"labels": LABELS.int()}, "the labels of images are torch.int32"),
        ({"labels": LABELS * torch.nan}, "the labels of images are torch.float32"),
        ({"labels": LABELS[:, None]}, "the labels of images are torch.int64 of shape (4, 1)"),
        ({"labels": LABELS + 1}, "the labels of images go from 1 to 10; 0 to 9 are allowed"),
        ({"labels": LABELS - 1}, "the labels of images go from -1 to 8"),
        ({"labels": [0, 1, 2, 9]}, "the labels of images are of type list"),
        ({"classes": ("a", "b", "c")}, "the labels of images go from 0 to 9; 0 to 2 are allowed"),
        ({"test_images": IMAGES[:2]}, "the labels of test_images are torch.int64 of shape (4,)"),
        ({"test_images": IMAGES[0]}, "test_images are torch.uint8 of shape (32, 32, 3)"),
        ({"test_labels": LABELS.bool()}, "the labels of test_images are torch.bool"),
        ({"test_labels": LABELS - 1}, "the labels of test_images go from -1 to 8"),
        ({"test_images": IMAGES.to("meta")}, "test_images are on meta, their labels on cpu; move one"),
        ({"classes": ("cat\n", *"bcdefghij")}, r"a name is 'cat\n'; give text in one line, without space around it"),
        ({"classes": ("c\nat", *"bcdefghij")}, r"a name is 'c\nat'; give text"),
        ({"classes": (*"abcdefghi", " cat")}, "a name is ' cat'; give text"),
        ({"name": "my data "}, "a name is 'my data '; give text"),
        ({"split": "dev"}, "split is 'dev'; choose one of test, validation"),
    ],
)
def test_data_of_another_form_is_refused_in_one_line(change, message):
    with pytest.raises(ValueError, match=r"^[^\n]{1,300}$") as error:
        Data(**RIGHT | change)
    assert str(error.value).startswith(message), error.value


def test_any_number_of_classes_is_allowed():
    assert Data(**RIGHT, classes=tuple(range(100))).classes[99] == 99
    ones = {"labels": torch.zeros_like(LABELS), "test_labels": torch.zeros_like(LABELS)}
    assert len(Data(**RIGHT | ones, classes=("one",)).classes) == 1


def test_the_name_tells_synthetic_data():
    assert Data(**RIGHT).name == "CIFAR-10"
    assert not Data(**RIGHT).synthetic
    assert Data(**RIGHT, name="SYNTHETIC DATA, NOT RESULTS").synthetic


def grating_angles(images):
    """Angles of the strongest waves in synthetic images, read from their spectra: degrees from -90 to 90."""
    x = images.permute(0, 3, 1, 2).float()
    power = torch.fft.fft2(x - x.mean((2, 3), keepdim=True)).abs().square().sum(1)
    frequency = torch.fft.fftfreq(32, 1 / 32)
    fy, fx = frequency[:, None], frequency[None]
    radius = (fx**2 + fy**2).sqrt().clamp(min=1)
    weight = (power * ((radius > 2) & (radius < 6))).square() / radius**2
    return torch.atan2((2 * weight * fx * fy).sum((1, 2)), (weight * (fx**2 - fy**2)).sum((1, 2))).rad2deg() / 2


def test_synthetic_data_can_be_learned_but_not_perfectly(synthetic):
    assert tuple(synthetic.images.shape) == (10_000, 32, 32, 3)
    assert tuple(synthetic.test_images.shape) == (2_000, 32, 32, 3)
    assert synthetic.labels.bincount().min() > 900
    assert synthetic.name == "SYNTHETIC DATA, NOT RESULTS"
    assert synthetic.classes[:2] == ("0 degrees", "10 degrees")
    guess = (grating_angles(synthetic.test_images).abs() / 10).round()
    assert 0.7 < (guess == synthetic.test_labels).float().mean() < 0.9


def test_mirrored_synthetic_images_keep_their_class(synthetic):
    """As training with flips needs it: each class leans to both sides alike."""
    images = synthetic.test_images[synthetic.test_labels == 4]
    angles = grating_angles(images)
    assert 0.4 < (angles > 0).float().mean() < 0.6
    assert torch.allclose(grating_angles(images.flip(2)), -angles, atol=0.01)


def test_synthetic_data_is_fixed_by_its_seed(synthetic):
    assert torch.equal(data.synthetic_data(CPU).images, synthetic.images)
    assert not torch.equal(data.synthetic_data(CPU, seed=1).images, synthetic.images)


def test_crop_and_flip_agree_with_torchvision(synthetic):
    images = synthetic.images[:40]
    shift = torch.randint(-4, 5, (40, 2), generator=torch.Generator().manual_seed(0))
    shift[:4] = torch.tensor([[-4, -4], [4, 4], [-4, 4], [0, 0]])
    flip = torch.arange(40) % 2 == 1
    ours = data.crop_and_flip(images, shift, flip)
    for image, (down, right), mirrored, result in zip(images, shift.tolist(), flip, ours, strict=True):
        padded = TF.pad(image.permute(2, 0, 1), [4], padding_mode="reflect")
        expected = TF.crop(padded, 4 + down, 4 + right, 32, 32)
        if mirrored:
            expected = TF.horizontal_flip(expected)
        assert torch.equal(result, expected.permute(1, 2, 0))


@given(
    st.lists(st.tuples(st.integers(-8, 8), st.integers(-8, 8), st.booleans()), min_size=1, max_size=4),
    st.integers(0, 2**31),
)
def test_each_pixel_comes_from_where_shift_and_flip_say(moves, seed):
    images = torch.randint(0, 256, (len(moves), 32, 32, 3), generator=torch.Generator().manual_seed(seed))
    shift, flip = torch.tensor([move[:2] for move in moves]), torch.tensor([move[2] for move in moves])
    ours = data.crop_and_flip(images, shift, flip)
    again = data.crop_and_flip(ours, torch.zeros_like(shift), flip)
    assert torch.equal(again, data.crop_and_flip(images, shift, flip & False))
    row, column = (torch.randint(0, 32, (1,), generator=torch.Generator().manual_seed(seed + 1)).item() for _ in "yx")
    for image, result, (down, right, mirrored) in zip(images, ours, moves, strict=True):
        y, x = row + down, (31 - column if mirrored else column) + right
        y, x = (-at if at < 0 else 62 - at if at > 31 else at for at in (y, x))
        assert torch.equal(result[row, column], image[y, x])


def test_normalize_agrees_with_torchvision(synthetic):
    images = synthetic.images[:5].permute(0, 3, 1, 2)
    ours = data.normalize(synthetic.images[:5])
    scaled = TF.to_dtype(images, torch.float32, scale=True)
    expected = TF.normalize(scaled, [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616])
    assert ours.dtype == torch.float32
    assert torch.allclose(ours, expected, atol=1e-5)
    assert torch.equal(ours, (images.float() - 255 * models.MEAN) / (255 * models.STD))  # bit for bit


def test_a_view_of_images_is_copied_so_that_every_step_reads_the_same(synthetic):
    """The fused step reads memory as it lies; a dense tensor is taken as it is."""
    thinned = replace(synthetic, images=synthetic.images[::2], labels=synthetic.labels[::2])
    assert thinned.images.is_contiguous()
    assert thinned.labels.is_contiguous()
    assert torch.equal(thinned.images, synthetic.images[::2])
    assert torch.equal(thinned.labels, synthetic.labels[::2])
    assert replace(synthetic).images is synthetic.images


def test_color_statistics_stay_on_the_device():
    """A CUDA graph can't hold a copy from the host."""
    assert all(a is b for a, b in zip(data.color_statistics(CPU), data.color_statistics(CPU), strict=True))


def test_validation_split_takes_training_images_alone(synthetic):
    synthetic = replace(synthetic, images=synthetic.images[:3000], labels=synthetic.labels[:3000])
    split = data.validation_split(synthetic, per_class=50)
    assert (split.split, synthetic.split, split.name) == ("validation", "test", synthetic.name)
    assert split.test_labels.bincount().tolist() == [50] * 10
    kept, held_out, test, training = (
        [hashlib.sha1(image.numpy().tobytes() + bytes([label])).digest() for image, label in zip(*both, strict=True)]
        for both in (
            (split.images, split.labels),
            (split.test_images, split.test_labels),
            (synthetic.test_images, synthetic.test_labels),
            (synthetic.images, synthetic.labels),
        )
    )
    assert not set(held_out) & (set(kept) | set(test))
    assert kept == [image for image in training if image in set(kept)]  # in their order
    assert sorted(held_out + kept) == sorted(training)


@pytest.mark.parametrize("classes", [1, 3, 10, 100])
def test_validation_split_agrees_with_plain_code(classes):
    labels = torch.randint(0, classes, (2000,), generator=torch.Generator().manual_seed(1))
    images = torch.arange(2000).view(-1, 1, 1, 1).expand(-1, 32, 32, 3)
    images = torch.cat([images[..., :1] % 256, images[..., :1] // 256, images[..., :1]], 3).to(torch.uint8)
    whole = Data(images, labels, images[:1], labels[:1], tuple(range(classes)))
    split = data.validation_split(whole, per_class=5)
    expected, left = [], dict.fromkeys(range(classes), 5)
    for i in torch.randperm(2000, generator=torch.Generator().manual_seed(0)).tolist():
        if left[labels[i].item()]:
            left[labels[i].item()] -= 1
            expected.append(i)
    expected.sort()
    number = split.test_images[:, 0, 0, 0].long() + 256 * split.test_images[:, 0, 0, 1].long()
    assert number.tolist() == expected
    assert torch.equal(split.test_labels, labels[expected])
    assert torch.equal(split.labels, labels[[i for i in range(2000) if i not in set(expected)]])


@pytest.mark.parametrize("per_class", [0, -1, 5000, 2.5, None, "50"])
def test_validation_split_of_another_size_is_refused(synthetic, per_class):
    with pytest.raises(ValueError, match=rf"^per_class is {per_class!r}; give 1 or more, but fewer than .*: \d+$"):
        data.validation_split(synthetic, per_class)


# ---------------------------------------------------------------------------------------------------------------------
# The true files
# ---------------------------------------------------------------------------------------------------------------------


def test_cifar10(real):
    assert tuple(real.images.shape) == (50_000, 32, 32, 3)
    assert real.labels.bincount().tolist() == [5_000] * 10
    assert real.test_labels.bincount().tolist() == [1_000] * 10
    assert (real.name, real.synthetic) == ("CIFAR-10", False)
    # A picture and its label that anybody can check: the first test image is a cat, the second a ship.
    assert [real.classes[label] for label in real.test_labels[:2]] == ["cat", "ship"]
    mean = real.images.double().mean((0, 1, 2)) / 255
    assert torch.allclose(mean.float(), models.MEAN.flatten(), atol=1e-4)


def test_validation_split_of_cifar10_is_fixed(real):
    split = data.validation_split(real)
    assert (len(split.images), len(split.test_images)) == (45_000, 5_000)
    assert split.test_labels.bincount().tolist() == [500] * 10
    first = [(real.images == image).flatten(1).all(1).nonzero().item() for image in split.test_images[:5]]
    assert first == [1, 11, 23, 39, 44]


def test_cifar100():
    if not (ROOT / "data" / CIFAR100.base_folder).exists():
        pytest.skip("CIFAR-100 is not in data/")
    loaded = data.load_data(CPU, "cifar100", ROOT / "data")
    assert (loaded.name, loaded.synthetic, len(loaded.classes)) == ("CIFAR-100", False, 100)
    assert loaded.labels.bincount().tolist() == [500] * 100
    assert [loaded.classes[label] for label in loaded.test_labels[:2]] == ["mountain", "forest"]
    content = pickle.loads((ROOT / "data" / CIFAR100.base_folder / "meta").read_bytes(), encoding="latin1")
    assert loaded.classes == tuple(content["fine_label_names"])
    published = (  # SHA-256 of pixels and labels, which the official files have, too
        (loaded.images, "de64658905c6b161606e3649ddafce7cf86c7634a0cf9116d518e64ef46a33c5"),
        (loaded.labels, "9f11b9f97aad759ba6df0a33e3218b01d8deaf4ed3a14aa1185d69b9ad7ebcb3"),
        (loaded.test_images, "83c56492b2c11211ad1bb2dbd4f2eef4170a0441e41a41f3039c3144b1f5a511"),
        (loaded.test_labels, "4dad7d09c7c97d33f6cb928d705cf4196221316fd6e31bdd978a08ed9103ee0b"),
    )
    for tensor, checksum in published:
        tensor = tensor.permute(0, 3, 1, 2).contiguous() if tensor.ndim == 4 else tensor.to(torch.uint8)
        assert hashlib.sha256(tensor.numpy()).hexdigest() == checksum


def test_human_votes(real):
    votes = data.human_votes(ROOT / "data")
    if votes is None:
        pytest.skip("CIFAR-10H is not in data/ and can't be fetched")
    assert (tuple(votes.shape), votes.dtype) == ((10_000, 10), torch.int64)
    assert 45 < votes.sum(1).min() <= votes.sum(1).max() < 65
    assert (votes.argmax(1) == real.test_labels).float().mean() > 0.98


def test_no_data_is_in_the_repository():
    listed = subprocess.run(["git", "ls-files", "--stage"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    modes, paths = zip(*((line.split()[0], line.split("\t")[1]) for line in listed.stdout.splitlines()), strict=True)
    assert not [path for path in paths if path.split("/")[0] == "data" or path.endswith(".npy")]
    assert set(modes) == {"100644", "100755"}, "a link would lead out of the checkout, or into someone's files"


# ---------------------------------------------------------------------------------------------------------------------
# Files on the disk
# ---------------------------------------------------------------------------------------------------------------------


def use_url(monkeypatch, url):
    """Let everything be fetched from `url`."""
    for dataset in SETS.values():
        monkeypatch.setattr(dataset, "url", f"{url}/{dataset.filename}")
    monkeypatch.setattr(data, "CIFAR10H_URL", f"{url}/cifar10h-counts.npy")


@pytest.fixture
def no_network(monkeypatch):
    """Nothing can be fetched, and synthetic data is not drawn: the tests below ask only whether it would be."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    use_url(monkeypatch, "http://127.0.0.1:9")  # where nobody listens
    monkeypatch.setattr(data, "synthetic_data", lambda device: "synthetic")


def cifar_file(path, seed, labels_key, n=10):
    """Write a small file of CIFAR's form; return its pixels and labels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (n, 3072), dtype=np.uint8)
    labels = [(seed + i) % 10 for i in range(n)]
    path.write_bytes(pickle.dumps({"data": pixels, labels_key: labels, "filenames": ["a.png"] * n}, protocol=2))
    return pixels, labels


@pytest.fixture(params=["cifar10", "cifar100"])
def source(request):
    return request.param


@pytest.fixture
def folder(source, tmp_path, monkeypatch, no_network):
    """A folder with small files that count as the true ones, under `tmp_path`/data."""
    dataset = SETS[source]
    folder = tmp_path / "data" / dataset.base_folder
    folder.mkdir(parents=True)
    checksums = {}
    for kind in ("train_list", "test_list"):
        listed = []
        for name, _ in getattr(dataset, kind):
            seed = len(list(folder.iterdir()))
            pixels, labels = cifar_file(folder / name, seed, "labels" if source == "cifar10" else "fine_labels")
            checksums[name] = hashlib.sha256(pixels.tobytes() + bytes(labels)).hexdigest()
            listed.append([name, calculate_md5(folder / name)])
        monkeypatch.setattr(dataset, kind, listed)
    monkeypatch.setattr(download, "CIFAR100_SHA256", checksums)
    meta = folder / dataset.meta["filename"]
    meta.write_bytes(pickle.dumps({dataset.meta["key"]: list(data.CIFAR10_CLASSES)}))
    monkeypatch.setattr(dataset, "meta", dataset.meta | {"md5": calculate_md5(meta)})
    return folder


def first_file(folder):
    return folder / ("train" if (folder / "train").exists() else "data_batch_2")


def test_small_files_are_loaded_in_their_order(folder, source):
    names = [name for name, _ in SETS[source].train_list]
    loaded = data.load_data(CPU, source, folder.parent)
    parts = [pickle.loads((folder / name).read_bytes()) for name in names]
    pixels = np.concatenate([part["data"] for part in parts]).reshape(-1, 3, 32, 32)
    assert torch.equal(loaded.images, torch.from_numpy(pixels).permute(0, 2, 3, 1))
    assert loaded.images.is_contiguous()
    assert loaded.labels.tolist() == [y for part in parts for y in part.get("labels", part.get("fine_labels"))]
    assert len(loaded.test_images) == 10


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-1])


def altered(path):
    content = bytearray(path.read_bytes())
    content[500] ^= 1
    path.write_bytes(content)


def another_file(path):
    test = "test" if path.name == "train" else "test_batch"
    path.write_bytes((path.parent / test).read_bytes())


def replaced_by_a_folder(path):
    path.unlink()
    path.mkdir()


def replaced_by_a_pipe(path):
    path.unlink()
    os.mkfifo(path)


def emptied(path):
    path.write_bytes(b"")


def labels_altered(path):
    content = pickle.loads(path.read_bytes())
    for key in {"labels", "fine_labels"} & set(content):
        content[key][3] = 10**6
    path.write_bytes(pickle.dumps(content))


def another_form(path):
    path.write_bytes(pickle.dumps([1, 2, 3]))


DAMAGES = [
    cut_off,
    altered,
    another_file,
    replaced_by_a_folder,
    replaced_by_a_pipe,
    emptied,
    labels_altered,
    another_form,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_with_a_way_out(folder, source, damage):
    path = first_file(folder)
    damage(path)
    for wish in {source, "auto"} if source == "cifar10" else {source}:
        with pytest.raises(OSError, match=r"^[^\n]+$") as error:
            data.load_data(CPU, wish, folder.parent)
        start = f"{path} is damaged (its checksum is wrong): delete it, then download http"
        assert str(error.value).startswith(start), error.value
    assert path.exists()


def test_a_damaged_archive_is_named(folder, source):
    shutil.rmtree(folder)
    archive = folder.parent / SETS[source].filename
    archive.write_bytes(b"half an archive")
    with pytest.raises(OSError, match=r"tar\.gz is damaged \(its checksum is wrong\): delete it, then download"):
        data.load_data(CPU, "auto" if source == "cifar10" else source, folder.parent)
    assert archive.read_bytes() == b"half an archive"


def test_a_file_missing_beside_others_is_named(folder, source):
    first_file(folder).unlink()
    with pytest.raises(OSError, match=r"(train|data_batch_2) is missing, others are there: download [^\n]+$"):
        data.load_data(CPU, "auto" if source == "cifar10" else source, folder.parent)


@pytest.fixture
def open_folder(folder):
    """`folder` where every user may enter; pytest's own folders are closed to others."""
    place = Path(tempfile.mkdtemp())
    place.chmod(0o755)
    shutil.copytree(folder.parent, place / "data")
    yield place / "data" / folder.name
    for path in place.rglob("*"):
        path.chmod(0o755)
    shutil.rmtree(place)


@pytest.mark.parametrize("closed", ["file", "folder"])
def test_a_file_without_permission_is_named_with_a_way_out(open_folder, source, closed):
    path = first_file(open_folder)
    (path if closed == "file" else open_folder).chmod(0)
    wish = "auto" if source == "cifar10" else source
    with pytest.raises(OSError, match=r"^[^\n]+$") as error:
        as_nobody(lambda: data.load_data(CPU, wish, open_folder.parent))
    assert f"{open_folder}/" in str(error.value)
    assert "can't be read: change its permissions, or delete it and download http" in str(error.value)


def test_a_folder_that_cannot_be_written(open_folder, source, capsys):
    loaded = as_nobody(lambda: data.load_data(CPU, source, open_folder.parent))
    assert len(loaded.images)
    assert sorted(path.name for path in open_folder.parent.iterdir()) == [open_folder.name]  # not even a lock
    shutil.rmtree(open_folder)
    with pytest.raises(OSError, match=r"can't be fetched .*Permission denied"):
        as_nobody(lambda: data.load_data(CPU, source, open_folder.parent))
    assert as_nobody(lambda: data.load_data(CPU, "auto", open_folder.parent)) == "synthetic"


@pytest.mark.parametrize("source", ["cifar100"], indirect=True)  # torchvision loads CIFAR-10
@pytest.mark.parametrize("where", ["alone", "among the pixels", "as an attribute"])
def test_the_code_in_a_file_of_cifar100_does_not_run(folder, tmp_path, where):
    content = pickle.loads((folder / "train").read_bytes())
    content = {
        "alone": Evil(tmp_path / "evil"),
        "among the pixels": content | {"data": np.array([Evil(tmp_path / "evil")], dtype=object)},
        "as an attribute": content | {"filenames": Evil(tmp_path / "evil")},
    }[where]
    (folder / "train").write_bytes(pickle.dumps(content))
    with pytest.raises(OSError, match="train is damaged"):
        data.load_data(CPU, "cifar100", folder.parent)
    assert not (tmp_path / "evil").exists()
    pickle.loads((folder / "train").read_bytes())  # which it does elsewhere
    assert (tmp_path / "evil").exists()


class Forged:
    """Pickled as a call."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


def test_a_forged_array_of_objects_does_not_crash(tmp_path):
    """Its bytes count as addresses, so that to look at it ends the process."""
    dtype = Forged(np.dtype, ("O",), (3, "|", None, None, None, -1, -1, 0))
    array = Forged(np.ndarray, ((4,), dtype, b"A" * 32))
    (tmp_path / "train").write_bytes(pickle.dumps({"data": array, "fine_labels": array}, protocol=2))
    code = "import pathlib; from engine import download; print(download.read_cifar100(pathlib.Path('train')))"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "None\n"), done.stderr


def test_a_forged_pickle_does_not_grow(tmp_path):
    """By codecs other than Latin-1 each step would double what the one before made."""
    content = b"\x80\x02c_codecs\nencode\nq\x000" + b"h\x00(X\x01\x00\x00\x00aX\x06\x00\x00\x00latin1tR"
    assert download.ArrayUnpickler(io.BytesIO(content + b".")).load() == b"a"
    forged = b"\x80\x02c_codecs\nencode\n(C\x01aX\x03\x00\x00\x00hextR."
    with pytest.raises(pickle.UnpicklingError, match=r"^hex is not what an array needs$"):
        download.ArrayUnpickler(io.BytesIO(forged)).load()
    (tmp_path / "train").write_bytes(forged)
    assert download.read_cifar100(tmp_path / "train") is None


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x04}" + b")" + b"\x85" * 10**6 + b"K\x01s.",  # a tuple in a tuple in ... as a key: its hash recurses
        b"\x80\x04Nr" + (2**27).to_bytes(4, "little") + b".",  # puts None at that index of a list: 2 GiB
    ],
)
def test_a_forged_pickle_neither_crashes_nor_fills_the_process(tmp_path, content):
    (tmp_path / "train").write_bytes(content)
    with pytest.raises(pickle.UnpicklingError, match=r"^(TUPLE1|LONG_BINPUT) is not what an array needs$"):
        download.check_pickle(content)
    assert download.read_cifar100(tmp_path / "train") is None


@pytest.mark.parametrize(
    "name",
    ["os.system", "builtins.eval", "builtins.getattr", "numpy.load", "_codecs.decode", "numpy.core.multiarray.scalar"],
)
def test_no_other_name_is_unpickled(name):
    module, _, name = name.rpartition(".")
    program = f"c{module}\n{name}\n.".encode()
    with pytest.raises(pickle.UnpicklingError, match="is not part of an array"):
        download.ArrayUnpickler(io.BytesIO(program)).load()


@pytest.mark.parametrize("source", ["cifar100"], indirect=True)  # torchvision loads CIFAR-10
def test_a_file_swapped_after_its_check_is_not_loaded(folder, tmp_path, monkeypatch):
    expected = data.load_data(CPU, "cifar100", folder.parent)
    true_hash = hashlib.sha256

    def swap(content):
        for name in ("train", "test"):
            (folder / name).write_bytes(pickle.dumps(Evil(tmp_path / "evil")))
        return true_hash(content)

    contents = {name: (folder / name).read_bytes() for name in ("train", "test")}
    read_bytes = Path.read_bytes

    def read_once(path):
        assert path.name in contents, f"{path} is read twice"
        path.write_bytes(contents.pop(path.name))
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", read_once)
    monkeypatch.setattr(hashlib, "sha256", swap)
    loaded = data.load_data(CPU, "cifar100", folder.parent)
    assert torch.equal(loaded.images, expected.images)
    assert torch.equal(loaded.test_labels, expected.test_labels)
    assert not (tmp_path / "evil").exists()


class Python2Pickler(pickle._Pickler):
    """Writes text and bytes alike as Python 2's strings, as the official files hold them."""

    dispatch = pickle._Pickler.dispatch.copy()

    def save_string(self, value):
        content = value.encode("latin1") if isinstance(value, str) else value
        self.write(pickle.BINSTRING + len(content).to_bytes(4, "little") + content)

    dispatch[str] = dispatch[bytes] = save_string


@pytest.mark.parametrize("source", ["cifar100"], indirect=True)  # torchvision loads CIFAR-10
def test_files_of_python_2_and_numpy_1_are_read(folder):
    expected = data.load_data(CPU, "cifar100", folder.parent)
    for name in ("train", "test"):
        file = io.BytesIO()
        Python2Pickler(file, protocol=2).dump(pickle.loads((folder / name).read_bytes()))
        official = file.getvalue().replace(b"cnumpy._core.", b"cnumpy.core.")
        assert b"_codecs" not in official
        (folder / name).write_bytes(official)
    assert torch.equal(data.load_data(CPU, "cifar100", folder.parent).images, expected.images)


def npy(array):
    """The bytes of a .npy file."""
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


@pytest.fixture
def votes(tmp_path, monkeypatch, no_network):
    """A small file of votes that counts as the true one."""
    path = tmp_path / "data" / "cifar10h-counts.npy"
    path.parent.mkdir()
    path.write_bytes(npy(np.arange(40).reshape(4, 10)))
    monkeypatch.setattr(data, "CIFAR10H_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def test_votes_are_read_once(votes, monkeypatch):
    content, true_hash = votes.read_bytes(), hashlib.sha256
    monkeypatch.setattr(hashlib, "sha256", lambda read: votes.write_bytes(b"swapped") and true_hash(read))
    assert data.human_votes(votes.parent).tolist() == np.arange(40).reshape(4, 10).tolist()
    assert votes.read_bytes() != content


@pytest.mark.parametrize("damage", [cut_off, altered, emptied, replaced_by_a_folder, replaced_by_a_pipe])
def test_damaged_votes_are_named(votes, damage):
    content = bytearray(npy(np.arange(400).reshape(40, 10)))
    votes.write_bytes(content)
    damage(votes)
    with pytest.raises(OSError, match=r"^[^\n]+npy is damaged \(its checksum is wrong\): delete it, then download"):
        data.human_votes(votes.parent)


def test_votes_without_permission_are_named(open_folder, monkeypatch):
    path = open_folder.parent / "cifar10h-counts.npy"
    path.write_bytes(b"closed")
    path.chmod(0)
    with pytest.raises(OSError, match=r"npy can't be read: change its permissions, or delete it and download [^\n]+$"):
        as_nobody(lambda: data.human_votes(path.parent))


def test_votes_that_are_a_pickle_are_not_loaded(votes, tmp_path, monkeypatch):
    votes.write_bytes(npy(np.array([Evil(tmp_path / "evil")], dtype=object)))
    monkeypatch.setattr(data, "CIFAR10H_SHA256", hashlib.sha256(votes.read_bytes()).hexdigest())
    with pytest.raises(ValueError, match="allow_pickle"):
        data.human_votes(votes.parent)
    assert not (tmp_path / "evil").exists()


def test_absent_votes_without_network_are_none(tmp_path, no_network, capsys):
    assert data.human_votes(tmp_path / "data") is None
    assert capsys.readouterr().out == ""


# ---------------------------------------------------------------------------------------------------------------------
# The network
# ---------------------------------------------------------------------------------------------------------------------


def test_absent_files_without_network(no_network, tmp_path, capsys):
    assert data.load_data(CPU, "auto", tmp_path) == "synthetic"
    printed = capsys.readouterr().out
    assert f"CIFAR-10 is not in {tmp_path}/ and can't be fetched ([Errno 111] Connection refused)." in printed
    assert "Training on synthetic data instead. These are not results." in printed
    assert (
        f"cifar-10-python.tar.gz on a machine with a network, put it, or what it unpacks to, into {tmp_path}/"
        in printed
    )


def test_absent_files_are_an_error_when_asked_for(no_network, tmp_path, source):
    with pytest.raises(OSError, match=r"^CIFAR-100? is not in .* can't be fetched \(.*refused\): download [^\n]+$"):
        data.load_data(CPU, source, tmp_path)


def test_synthetic_data_on_request_asks_nobody(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(data, "synthetic_data", lambda device: "synthetic")
    monkeypatch.setattr(data, "fetch", None)
    assert data.load_data(CPU, "synthetic", tmp_path / "data") == "synthetic"
    assert "These are not results" in capsys.readouterr().out
    assert not (tmp_path / "data").exists()


def test_a_root_that_is_no_path_is_refused_in_one_line():
    with pytest.raises(TypeError, match=r"^root is None; give a str or a Path$"):
        data.load_data(CPU, "cifar10", None)


@pytest.mark.parametrize("name", ["mnist", None, "CIFAR10", 10])
def test_an_unknown_source_is_refused(name, tmp_path):
    message = f"^data source is {name!r}; choose one of auto, cifar10, cifar100, synthetic$"
    with pytest.raises(ValueError, match=message):
        data.load_data(CPU, name, tmp_path / "data")
    assert not (tmp_path / "data").exists()


class Server(socketserver.ThreadingTCPServer):
    """A server on this machine that says what `answer`, a function of the connection, says; `requests` counts."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, answer):
        self.answer, self.requests = answer, 0
        super().__init__(("127.0.0.1", 0), None)
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def finish_request(self, request, client_address):
        self.requests += 1
        head = b""
        while b"\r\n\r\n" not in head:
            head += request.recv(4096) or b"\r\n\r\n"
        with contextlib.suppress(OSError):  # the other side has left
            self.answer(request)


@pytest.fixture
def serve(monkeypatch, no_network):
    """A function that starts a `Server` from which everything is fetched."""
    servers = []

    def start(answer):
        servers.append(Server(answer))
        use_url(monkeypatch, servers[-1].url)
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def http(content, status="200 OK", length=None, more=""):
    length = len(content) if length is None else length
    return f"HTTP/1.1 {status}\r\nContent-Length: {length}\r\n{more}\r\n".encode() + content


def evil_archive(dataset, target):
    """An archive whose members lie outside of its folder: ../, absolute, a link to elsewhere and what is in it."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        link = tarfile.TarInfo(f"{dataset.base_folder}/link")
        link.type, link.linkname = tarfile.SYMTYPE, str(target)
        archive.addfile(link)
        names = ("../evil", f"{target}/evil", f"{dataset.base_folder}/../../evil", f"{dataset.base_folder}/link/evil")
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = 4
            archive.addfile(member, io.BytesIO(b"evil"))
    return file.getvalue()


PAGE = b"<html>Please log in</html>"
HOSTILE = {
    "a page": lambda connection: connection.sendall(http(PAGE)),
    "a download that breaks off": lambda connection: connection.sendall(http(PAGE, length=170_498_071)),
    "an error": lambda connection: connection.sendall(http(PAGE, "503 Out of order")),
    "an error as long as a book": lambda connection: connection.sendall(http(PAGE, "500 " + "no " * 9_000)),
    "no answer": lambda connection: time.sleep(20),
    "half a header, then nothing": lambda connection: connection.sendall(b"HTTP/1.1 200") or time.sleep(20),
    "half a body, then nothing": lambda connection: connection.sendall(http(PAGE, length=999)) or time.sleep(20),
    "not HTTP": lambda connection: connection.sendall(b"\x00\xff\nSSH-2.0\r\n\r\n"),
    "nothing": lambda connection: None,
    "a redirect to itself": lambda connection: connection.sendall(http(b"", "302 Found", more="Location: /\r\n")),
    "a redirect to a file": lambda connection: connection.sendall(
        http(b"", "302 Found", more="Location: file:///etc/passwd\r\n")
    ),
    "a length that is none": lambda connection: connection.sendall(http(PAGE, length="many")),
    "chunks that are none": lambda connection: connection.sendall(
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nx\r\n"
    ),
    "an archive with ../": lambda connection: connection.sendall(http(evil_archive(CIFAR10, "/tmp"))),
}


@pytest.mark.parametrize("answer", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_server_counts_as_absent_and_leaves_nothing(serve, tmp_path, capsys, monkeypatch, answer):
    monkeypatch.setattr(download, "TIMEOUT", 0.3)
    server = serve(answer)
    root, started = tmp_path / "data", time.monotonic()
    assert data.load_data(CPU, "auto", root) == "synthetic"
    printed = capsys.readouterr().out
    problem = next(line for line in printed.splitlines() if "can't be fetched" in line)
    assert len(problem) < 400, problem
    assert [path.name for path in root.iterdir()] == [".download.lock"]
    with pytest.raises(OSError, match=r"^[^\n]{1,600}$"):
        data.load_data(CPU, "cifar100", root)
    assert data.human_votes(root) is None
    assert [path.name for path in root.iterdir()] == [".download.lock"]
    assert server.requests >= 3
    assert time.monotonic() - started < 15


def test_bytes_without_end_do_not_fill_the_disk(serve, tmp_path):
    sent = []

    def answer(connection):
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        while len(sent) < 400:
            connection.sendall(bytes(10**6))
            sent.append("a megabyte")

    serve(answer)
    assert data.load_data(CPU, "auto", tmp_path) == "synthetic"
    assert 180 < len(sent) < 300  # an archive has 170


def drip(content, left=()):
    """Answer with `left`, then with `content`, a byte each twentieth of a second."""

    def answer(connection):
        connection.sendall(bytes(left))
        for byte in content:
            connection.sendall(bytes([byte]))
            time.sleep(0.05)

    return answer


@pytest.mark.parametrize("left", [b"", http(b"", length=10**6)], ids=["its headers", "its content"])
def test_a_server_that_drips_is_given_up(serve, tmp_path, monkeypatch, left):
    monkeypatch.setattr(download, "STALL_SECONDS", 0.4)
    monkeypatch.setattr(download, "MIN_BYTES", 1000)
    server, started = serve(drip(b"HTTP/1.1 200 OK\r\n" + b"x" * 200, left)), time.monotonic()
    with pytest.raises(OSError, match=rf"^{server.url}/a sends less than 1,000 bytes in 0\.4 seconds$"):
        download.download(f"{server.url}/a", tmp_path / "a", "sha256", "0")
    assert time.monotonic() - started < 3
    assert not list(tmp_path.iterdir())


def test_a_server_that_is_slow_and_sends_enough_is_not_given_up(serve, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "STALL_SECONDS", 0.4)
    content = os.urandom(2_000_000)

    def answer(connection):
        connection.sendall(http(content[:400_000], length=len(content)))
        for start in range(400_000, len(content), 400_000):
            time.sleep(0.3)
            connection.sendall(content[start : start + 400_000])

    server = serve(answer)
    download.download(f"{server.url}/a", tmp_path / "a", "sha256", hashlib.sha256(content).hexdigest())
    assert (tmp_path / "a").read_bytes() == content


def test_the_timeouts_are_seconds():
    assert 1 <= download.TIMEOUT <= 10
    assert (download.STALL_SECONDS, download.MIN_BYTES) == (30, 300_000)


@pytest.fixture
def archive(folder, source, monkeypatch):
    """The archive of `folder`, which is gone: its bytes, which count as the true ones."""
    dataset, file = SETS[source], io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as packed:
        packed.add(folder, dataset.base_folder)
    monkeypatch.setattr(dataset, "tgz_md5", hashlib.md5(file.getvalue()).hexdigest())
    shutil.rmtree(folder.parent)
    return file.getvalue()


def test_what_is_absent_is_fetched_once(archive, folder, source, serve, capsys):
    server = serve(lambda connection: connection.sendall(http(archive)))
    for _ in range(2):
        assert data.load_data(CPU, source, folder.parent).test_labels.numel() == 10
    assert server.requests == 1
    names = {path.name for path in folder.parent.iterdir()}
    assert names == {".download.lock", SETS[source].filename, folder.name}


def test_what_is_damaged_is_fetched_anew(archive, folder, source, serve):
    folder.mkdir(parents=True)
    first_file(folder).write_bytes(b"damaged")
    (folder.parent / SETS[source].filename).write_bytes(b"half an archive")
    serve(lambda connection: connection.sendall(http(archive)))
    assert data.load_data(CPU, source, folder.parent).test_labels.numel() == 10


def test_an_archive_is_unpacked_without_network(archive, folder, source):
    folder.parent.mkdir()
    (folder.parent / SETS[source].filename).write_bytes(archive)
    assert data.load_data(CPU, source, folder.parent).test_labels.numel() == 10
    first_file(folder).write_bytes(b"damaged")
    assert data.load_data(CPU, source, folder.parent).test_labels.numel() == 10


def test_what_a_killed_download_left_is_removed(archive, folder, source, serve):
    stale = folder.parent / ".download-abc"
    stale.mkdir(parents=True)
    (stale / "part").write_bytes(b"half")
    serve(lambda connection: connection.sendall(http(archive)))
    data.load_data(CPU, source, folder.parent)
    assert not stale.exists()


def test_votes_are_fetched_once(votes, serve):
    content = votes.read_bytes()
    votes.unlink()
    server = serve(lambda connection: connection.sendall(http(content)))
    for _ in range(2):
        assert data.human_votes(votes.parent).shape == (4, 10)
    assert server.requests == 1
    assert {path.name for path in votes.parent.iterdir()} == {".download.lock", votes.name}


def test_no_member_of_an_archive_ends_up_elsewhere(folder, source, tmp_path, monkeypatch):
    """Were its MD5 the right one."""
    dataset = SETS[source]
    shutil.rmtree(folder)
    (tmp_path / "target").mkdir()
    archive = folder.parent / dataset.filename
    archive.write_bytes(evil_archive(dataset, tmp_path / "target"))
    monkeypatch.setattr(dataset, "tgz_md5", calculate_md5(archive))
    with pytest.raises(OSError, match="can't be fetched"):
        data.load_data(CPU, source, folder.parent)
    assert not list(tmp_path.rglob("evil"))
    assert not list(folder.iterdir())


def slowly(content):
    def answer(connection):
        time.sleep(0.3)
        connection.sendall(http(content))

    return answer


def load_and_leave(source, root):
    """In a process of its own: exit with 0 if the data was loaded."""
    torch.set_num_threads(1)
    try:
        os._exit(0 if len(data.load_data(CPU, source, root).images) else 1)
    except BaseException:
        os._exit(2)


def test_of_several_processes_one_downloads(archive, folder, source, serve):
    """As under torchrun."""
    server = serve(slowly(archive))
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=load_and_leave, args=(source, folder.parent)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0] * 4
    assert server.requests == 1


def test_what_another_process_fetched_meanwhile_is_taken(archive, folder, source):
    """Without a network, too: who waited for the lock looks again."""
    root, loaded = folder.parent, []
    with download.download_lock(root):
        thread = threading.Thread(target=lambda: loaded.append(data.load_data(CPU, source, root)))
        thread.start()
        time.sleep(0.3)
        assert not loaded
        with tarfile.open(fileobj=io.BytesIO(archive)) as packed:
            for member in packed:
                packed.extract(member, root)
    thread.join(10)
    assert loaded[0].test_labels.numel() == 10


def test_a_failed_download_leaves_what_another_process_writes(archive, folder, source, serve):
    path = folder.parent / SETS[source].filename

    def answer(connection):
        path.write_bytes(archive[:99])
        connection.sendall(http(PAGE))

    serve(answer)
    with pytest.raises(OSError, match="can't be fetched"):
        data.load_data(CPU, source, folder.parent)
    assert path.read_bytes() == archive[:99]
