"""CIFAR-10, CIFAR-100, people's votes on CIFAR-10's test images, synthetic data, and how images become a batch.

Images are (N, 32, 32, 3) uint8 on the device that trains; a batch is cut, augmented and normalized there.
A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.
"""

import functools
import hashlib
import io
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torchvision.datasets import CIFAR10, CIFAR100

import models
from engine.download import download, download_lock, fetch, read

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR100_CLASSES = tuple(
    """apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
    castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant
    flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree
    motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate
    poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider
    squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle
    wardrobe whale willow_tree wolf woman worm""".split()  # noqa: SIM905
)
SOURCES = ("auto", "cifar10", "cifar100", "synthetic")
CIFAR10H_URL = "https://raw.githubusercontent.com/jcpeterson/cifar-10h/master/data/cifar10h-counts.npy"
CIFAR10H_SHA256 = "9b36b4550349af56c79083356312eb4af856cc5fd3caf1f669d40b9d0bbb69ff"
HOW_TO_GET = "download {} on a machine with a network, put it, or what it unpacks to, into {}/ and run it again"


@dataclass(frozen=True)
class Data:
    """A training and a test split on one device: images (N, 32, 32, 3) uint8, labels (N,) int64 below len(classes).

    Tensors that are not contiguous, such as every second image, are copied.
    """

    images: torch.Tensor
    labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    classes: tuple = CIFAR10_CLASSES
    name: str = "CIFAR-10"  # written into titles
    split: str = "test"  # what test_images are: "test", or "validation" when they come from the training images

    def __post_init__(self):
        check_images(self.images, self.labels, "images", len(self.classes))
        check_images(self.test_images, self.test_labels, "test_images", len(self.classes))
        if self.test_images.device != self.images.device:
            raise ValueError(f"test_images are on {self.test_images.device}, images on {self.images.device}; move one")
        for text in (self.name, *self.classes):
            check_text("a name", text)
        models.choose("split", self.split, ("test", "validation"))
        for name in ("images", "labels", "test_images", "test_labels"):
            object.__setattr__(self, name, getattr(self, name).contiguous())

    @property
    def synthetic(self):
        """Whether the images were drawn by `synthetic_data`, so that accuracies on them are no results."""
        return self.name.startswith("SYNTHETIC")


def check_text(name, text):
    """Raise ValueError unless a text, as it is or of an object, can go into tables, which don't keep all others."""
    if str(text) != str(text).strip() or not str(text).isprintable():
        raise ValueError(f"{name} is {str(text)!r}; give text in one line, without space around it")


def check_images(images, labels, name="images", classes=10):
    """Raise ValueError, in one line, unless images and labels have `Data`'s form and there is at least one image."""
    for what, value in ((name, images), (f"the labels of {name}", labels)):
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"{what} are of type {type(value).__name__}; give a torch.Tensor")
    shape = tuple(images.shape)
    if images.dtype != torch.uint8 or len(shape) != 4 or shape[1:] != (32, 32, 3):
        raise ValueError(f"{name} are {images.dtype} of shape {shape}; give torch.uint8 of (N, 32, 32, 3)")
    if len(images) == 0:
        raise ValueError(f"{name} are empty; give at least one")
    if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
        form = f"{labels.dtype} of shape {tuple(labels.shape)}"
        raise ValueError(f"the labels of {name} are {form}; give torch.int64 of ({len(images)},)")
    if labels.device != images.device:
        raise ValueError(f"{name} are on {images.device}, their labels on {labels.device}; move one")
    low, high = labels.min().item(), labels.max().item()
    if low < 0 or high >= classes:
        raise ValueError(f"the labels of {name} go from {low} to {high}; 0 to {classes - 1} are allowed")


def load_data(device, source="auto", root="data"):
    """Load a data set onto `device`, after fetching it into the folder `root` if it is not there.

    source  "cifar10", "cifar100", "synthetic", or "auto": CIFAR-10 if it is in `root` or can be fetched, else synthetic

    Raises ValueError for another source, TypeError for a root that is no path, and OSError, in one line, for a data set
    that is absent and can't be fetched, a file that can't be read, and one damaged or missing beside others that can't
    be fetched anew.
    """
    models.choose("data source", source, SOURCES)
    if not isinstance(root, str | Path):
        raise TypeError(f"root is {models.show(root)}; give a str or a Path")
    if source == "synthetic":
        print("As asked for, training on synthetic data. These are not results.")
        return synthetic_data(device)
    root = Path(root).expanduser()
    dataset, name, classes = CIFAR10, "CIFAR-10", CIFAR10_CLASSES
    if source == "cifar100":
        dataset, name, classes = CIFAR100, "CIFAR-100", CIFAR100_CLASSES
    advice = HOW_TO_GET.format(dataset.url, root)
    try:
        arrays = read(dataset, root)
    except PermissionError as error:
        raise OSError(f"{error.filename} can't be read: change its permissions, or delete it and {advice}") from None
    except (OSError, RuntimeError) as fault:  # torchvision raises the latter
        try:
            arrays = fetch(dataset, root)
        except Exception as error:  # a server can cause any, and its text can be as long as it likes
            if not isinstance(fault, FileNotFoundError):
                raise OSError(f"{fault} {advice}") from None
            reason = textwrap.shorten(str(getattr(error, "reason", error)) or type(error).__name__, 200)
            problem = f"{name} is not in {root}/ and can't be fetched ({reason})"
            if source != "auto":
                raise OSError(f"{problem}: {advice}") from None
            print(f"{problem}.\nTraining on synthetic data instead. These are not results.\nFor {name}, {advice}.")
            return synthetic_data(device)
    return Data(*(torch.from_numpy(array).to(device) for array in arrays), classes, name)


def human_votes(root="data"):
    """Load how many people chose each class for each of CIFAR-10's test images: (10000, 10) int64.

    None if they are not in `root` and can't be fetched; OSError, in one line, for a file damaged or not to be read.
    CIFAR-10H, about 51 people an image: J. Peterson et al., Human uncertainty makes classification more robust, ICCV
    2019, https://arxiv.org/abs/1908.07086. Its license, CC BY-NC-SA 4.0, keeps the file out of this repository.
    """
    path, advice = Path(root).expanduser() / "cifar10h-counts.npy", HOW_TO_GET.format(CIFAR10H_URL, root)
    if not path.exists():
        try:
            with download_lock(path.parent):
                if not path.exists():
                    download(CIFAR10H_URL, path, "sha256", CIFAR10H_SHA256)
        except Exception:  # as in load_data
            return None
    try:
        content = path.read_bytes() if path.is_file() else b""
    except PermissionError:
        raise OSError(f"{path} can't be read: change its permissions, or delete it and {advice}") from None
    if hashlib.sha256(content).hexdigest() != CIFAR10H_SHA256:
        raise OSError(f"{path} is damaged (its checksum is wrong): delete it, then {advice}")
    return torch.from_numpy(np.load(io.BytesIO(content), allow_pickle=False))


def synthetic_data(device, seed=0):
    """Draw 10,000 + 2,000 images of gratings in `Data`'s form, to be learned, but not perfectly.

    A class is the angle between the bright lines and the vertical, to either side, so that flipping and cropping keep
    it. The angle of each image is off by about 3 degrees; the best guess is right for 91% of them.
    """
    random = np.random.default_rng(seed)
    n = 12_000
    labels = random.permutation(n) % 10

    def uniform(low, high, channels=1):
        return random.uniform(low, high, (n, 1, 1, channels)).astype(np.float32)

    angle = random.choice((-1, 1), n) * np.deg2rad(random.normal(10 * labels, 3))
    angle = angle.astype(np.float32).reshape(n, 1, 1, 1)
    y, x = np.mgrid[:32, :32].astype(np.float32)[..., None]
    wave = np.sin(uniform(0.5, 0.9) * (x * np.cos(angle) + y * np.sin(angle)) + uniform(0, 2 * np.pi))
    noise = 40 * random.standard_normal((n, 32, 32, 3), np.float32)
    images = uniform(70, 185, 3) + uniform(-50, 50, 3) * wave + noise
    images = torch.from_numpy(images.clip(0, 255).astype(np.uint8)).to(device)
    labels = torch.from_numpy(labels).to(device)
    classes = tuple(f"{10 * k} degrees" for k in range(10))
    return Data(
        images[:10_000], labels[:10_000], images[10_000:], labels[10_000:], classes, "SYNTHETIC DATA, NOT RESULTS"
    )


def validation_split(data, per_class=500):
    """Replace the test split by `per_class` training images of each class, the same ones every time."""
    classes = len(data.classes)
    fewest = data.labels.bincount(minlength=classes).min().item()
    if not isinstance(per_class, int | np.integer) or not 0 < per_class < fewest:
        raise ValueError(f"per_class is {per_class!r}; give 1 or more, but fewer than the smallest class has: {fewest}")
    order = torch.randperm(len(data.labels), generator=torch.Generator().manual_seed(0))
    labels = data.labels.cpu()[order]
    held_out = torch.zeros(len(order), dtype=torch.bool)
    for c in range(classes):
        held_out[order[labels == c][:per_class]] = True
    held_out = held_out.to(data.images.device)
    return replace(
        data,
        images=data.images[~held_out],
        labels=data.labels[~held_out],
        test_images=data.images[held_out],
        test_labels=data.labels[held_out],
        split="validation",
    )


def crop_and_flip(images, shift, flip):
    """Shift and mirror each image: (B, 32, 32, 3) of any type to the same.

    shift  (B, 2) int64, rows and columns: the crop of 32x32 pixels that starts there, padded by reflection
    flip   (B,) bool: mirror the crop left to right
    """
    line = torch.arange(32, device=images.device)
    rows = line + shift[:, :1]
    columns = torch.where(flip[:, None], 31 - line, line) + shift[:, 1:]
    rows, columns = (31 - (31 - at.abs()).abs() for at in (rows, columns))  # reflected at both ends
    image = torch.arange(len(images), device=images.device)
    return images[image[:, None, None], rows[:, :, None], columns[:, None, :]]


@functools.cache  # copied to the device once: a CUDA graph can't hold a copy from the host
def color_statistics(device):
    """Return mean and standard deviation of each color over CIFAR-10, (3, 1, 1), for values 0..255."""
    return 255 * models.MEAN.to(device), 255 * models.STD.to(device)


def normalize(images):
    """Turn uint8 images (B, 32, 32, 3) into float32 (B, 3, 32, 32), each color standardized as over CIFAR-10.

    ValueError for images of another type.
    """
    if images.dtype != torch.uint8:
        raise ValueError(f"images are {images.dtype}; give torch.uint8, 0 to 255")
    mean, std = color_statistics(images.device)
    return (images.permute(0, 3, 1, 2) - mean) / std
