"""Data, training, scoring, misclassified images and plots for `s8.ipynb`, in this order.

Images are kept as (N, 32, 32, 3) uint8, on the device that trains; a batch is cut, augmented
and standardised there. Accuracies are percent, losses are nats per image, seconds are wall-clock.
"""

import contextlib
import copy
import ctypes
import functools
import gc
import hashlib
import math
import os
import pickle
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import zipfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from filelock import FileLock
from scipy import stats
from torch import nn
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import check_integrity
from tqdm import tqdm

import models

# ---------------------------------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------------------------------

NORM_OF = {"NetA": "batch", "NetB": "layer", "NetC": "group", "Net": "none"}
NETS = ("NetA", "NetB", "NetC")
LEARNING_RATES = {"NetA": 0.06, "NetB": 0.03, "NetC": 0.03}  # best on the validation split: study.py, tune
AUGMENTS = ("none", "flip", "flip+crop")
WARMUP = 0.2  # share of the steps in which the learning rate climbs; it falls to nearly 0 over the others
LABEL_SMOOTHING = 0.1
CROP = 2  # pixels by which random crops move an image, at most
LOSS_SCALE = 128  # keeps gradients within float16's range; gradients are divided by it, exactly, as a power of two


@dataclass(frozen=True)
class Settings:
    """What a run does, apart from its net and its data. The last epoch's net is the result."""

    learning_rate: float = 0.03  # at its peak; see Muon
    weight_decay: float = 0.5  # share of a weight taken off per step, in units of the learning rate
    momentum: float = 0.95
    batch_size: int = 500  # images; what does not fill a batch waits for another epoch
    epochs: int = 20
    augment: str = "none"  # one of AUGMENTS; see Trainer.epoch
    seed: int = 0  # of the initial weights, the order of the images and the augmentation

    def __post_init__(self):
        for name, low, high in (("learning_rate", 0, 10), ("weight_decay", 0, 100), ("momentum", 0, 1)):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
                raise ValueError(f"{name} is {value!r}; give a number from {low} to {high}")
        if self.learning_rate == 0:
            raise ValueError("learning_rate is 0; give a number above 0")
        for name, low in (("batch_size", 1), ("epochs", 1), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value < 2**32:
                raise ValueError(f"{name} is {value!r}; give a whole number from {low} to 4294967295")
        if self.augment not in AUGMENTS:
            raise ValueError(f"augment is {self.augment!r}; choose one of {', '.join(AUGMENTS)}")


@dataclass(frozen=True)
class Plan:
    """How much one execution of the notebook does and where it writes: `read_environment` fills it."""

    seeds: tuple  # of the runs of each net
    epochs: int
    data: str  # "auto", "cifar10" or "synthetic"
    publish: bool
    out: Path  # holds img/, results/ and weights/

    @property
    def checkpoints(self):
        """Folder for the checkpoints of unfinished runs, never a published one."""
        return (Path("out") if self.publish else self.out) / "checkpoints"

    def folder(self, name):
        """The folder `name` under `out`, made if absent."""
        path = self.out / name
        path.mkdir(parents=True, exist_ok=True)
        return path


def pick_device(name=None):
    """The torch.device called `name`, or the best of CUDA, MPS and CPU that is here. ValueError for any other."""
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    here = [device for device, available in here.items() if available]
    if name is not None and name not in here:
        raise ValueError(f"device is {name!r}; choose one of {', '.join(here)}")
    return torch.device(name or here[0])


def read_environment(device):
    """The `Plan` that S8_SEEDS, S8_EPOCHS, S8_DATA, S8_OUT and S8_PUBLISH ask for; makes its folders, with pictures.

    On a GPU 3 seeds of 20 epochs, on a CPU 1 seed of 5 unless they say otherwise; ValueError for what can't be.
    """

    def whole_number(name, default, highest):
        text = os.environ.get(name, str(default))
        if not text.isdecimal() or not 1 <= int(text) <= highest:
            raise ValueError(f"{name} is {text!r}; give a whole number from 1 to {highest}")
        return int(text)

    def choice(name, options):
        text = os.environ.get(name, options[0])
        if text not in options:
            raise ValueError(f"{name} is {text!r}; choose one of {', '.join(options)}")
        return text

    known = ("S8_SEEDS", "S8_EPOCHS", "S8_DATA", "S8_OUT", "S8_PUBLISH", "S8_COMMIT")
    for name in os.environ:
        if name.startswith("S8_") and name not in known:
            raise ValueError(f"{name} is not a setting; those are {', '.join(known)}")
    publish = choice("S8_PUBLISH", ("0", "1")) == "1"
    if publish and os.environ.get("S8_OUT"):
        raise ValueError(
            f"S8_OUT is {os.environ['S8_OUT']!r}; S8_PUBLISH=1 writes beside the notebook, unset one of them"
        )
    short = device.type == "cpu" and not publish
    epochs = whole_number("S8_EPOCHS", 5 if short else Settings.epochs, Settings.epochs)
    plan = Plan(
        seeds=tuple(range(whole_number("S8_SEEDS", 10 if publish else 1 if short else 3, 1000))),
        epochs=epochs,
        data=choice("S8_DATA", ("auto", "cifar10", "synthetic")),
        publish=publish,
        out=Path(".") if publish else Path(os.environ.get("S8_OUT") or "out"),
    )
    if not publish and plan.out.resolve() == Path(__file__).parent.resolve():
        raise ValueError(f"S8_OUT is {str(plan.out)!r}, the checkout itself; choose another folder, or S8_PUBLISH=1")
    if plan.publish:
        if plan.data == "synthetic":
            raise ValueError("S8_DATA is 'synthetic'; S8_PUBLISH=1 publishes CIFAR-10 alone")
        if epochs < Settings.epochs:
            raise ValueError(f"S8_EPOCHS is {epochs}; S8_PUBLISH=1 needs {Settings.epochs}")
        if len(plan.seeds) < 10:
            raise ValueError(f"S8_SEEDS is {len(plan.seeds)}; S8_PUBLISH=1 needs 10 or more")
        plan = replace(plan, data="cifar10")
    for name in ("results", "img", "weights"):
        try:
            with tempfile.TemporaryFile(dir=plan.folder(name)):
                pass
        except OSError as error:
            raise ValueError(
                f"{plan.out / name} can't be written ({error.strerror}); S8_OUT names the folder"
            ) from None
    if not plan.publish:
        copy_pictures(plan.folder("img"))
    return plan


def copy_pictures(folder):
    """Copy img/, beside this file, into `folder` for the notebook there; not the grids, which each run draws."""
    for picture in (Path(__file__).parent / "img").glob("*.png"):
        if picture.stem not in NORM_OF.values():
            save(folder / picture.name, lambda temporary, picture=picture: shutil.copyfile(picture, temporary))


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SHAPES = ("disc", "ring", "square", "frame", "triangle", "plus", "cross", "bars", "columns", "half disc")
HOW_TO_GET_CIFAR10 = (
    f"download {CIFAR10.url} on a machine with a network, put it, or the folder that it unpacks to, into a folder "
    "data/ beside the notebook and run it again"
)


@dataclass(frozen=True)
class Data:
    """A training and a test split on one device: images (N, 32, 32, 3) uint8, labels (N,) int64 in 0..9."""

    images: torch.Tensor
    labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    classes: tuple = CIFAR10_CLASSES
    real: bool = True  # False for the stand-in
    split: str = "test"  # what test_images are: "test", or "validation" when they come from the training images

    def __post_init__(self):
        check_images(self.images, self.labels, "images")
        check_images(self.test_images, self.test_labels, "test_images")
        if self.test_images.device != self.images.device:
            raise ValueError(f"test_images are on {self.test_images.device}, images on {self.images.device}; move one")

    @property
    def name(self):
        return "CIFAR-10" if self.real else "STAND-IN DATA, NOT RESULTS"


def check_images(images, labels, name="images"):
    """Raise ValueError, in one line, unless images are (N, 32, 32, 3) uint8 and labels (N,) int64 in 0..9, N >= 1."""
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
    if low < 0 or high > 9:
        raise ValueError(f"the labels of {name} go from {low} to {high}; 0 to 9 are allowed")


def load_data(device, source="auto", root="data"):
    """CIFAR-10 on `device`, fetched into `root` when it is not there, or a stand-in that is drawn.

    source  "auto": the stand-in when CIFAR-10 is absent and can't be fetched; "cifar10": OSError then;
            "synthetic": the stand-in. A damaged file that can't be fetched anew is an OSError that names it, and
            so is a file that is missing beside others.
    """
    if source not in ("auto", "cifar10", "synthetic"):
        raise ValueError(f"data source is {source!r}; choose one of auto, cifar10, synthetic")
    if source == "synthetic":
        print("As asked for, training on drawn shapes. These are not results.")
        return draw_stand_in(device)
    folder = Path(root) / CIFAR10.base_folder
    files = {folder / name: md5 for name, md5 in CIFAR10.train_list + CIFAR10.test_list}
    if not all(check_integrity(path, md5) for path, md5 in files.items()):
        absent = [path for path in files if not path.exists()]
        partly = 0 < len(absent) < len(files)
        files[Path(root) / CIFAR10.filename] = CIFAR10.tgz_md5
        damaged = [path for path, md5 in files.items() if path.exists() and not check_integrity(path, md5)]
        try:
            fetch_cifar10(root)
        except (OSError, RuntimeError) as error:
            if damaged:
                said = f"{damaged[0]} is damaged (its MD5 is wrong): delete it, then {HOW_TO_GET_CIFAR10}"
                raise OSError(said) from None
            if partly:
                raise OSError(f"{absent[0]} is missing, others are there: {HOW_TO_GET_CIFAR10}") from None
            if source == "cifar10":
                said = f"CIFAR-10 is not in {root}/ and can't be fetched ({error}): {HOW_TO_GET_CIFAR10}"
                raise OSError(said) from None
            print(f"CIFAR-10 is not in {root}/ and can't be fetched ({error}).")
            print("Training on drawn shapes instead. These are not results.")
            print(f"For CIFAR-10, {HOW_TO_GET_CIFAR10}.")
            return draw_stand_in(device)
    splits = []
    for names in (CIFAR10.train_list, CIFAR10.test_list):
        batches = [pickle.loads((folder / name).read_bytes(), encoding="latin1") for name, _ in names]
        images = np.concatenate([batch["data"] for batch in batches]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        labels = torch.tensor([label for batch in batches for label in batch["labels"]])
        splits += [torch.from_numpy(np.ascontiguousarray(images)).to(device), labels.to(device)]
    return Data(*splits)


def fetch_cifar10(root, seconds=5):
    """Download CIFAR-10 into `root` with torchvision, which shows a bar and checks the MD5. OSError if it can't.

    A server that does not answer within `seconds` counts as absent, also where a firewall drops packets in silence:
    the question is asked in a thread because looking up a name can't be given a time limit.
    """
    answer = []

    def ask():
        try:
            urllib.request.urlopen(urllib.request.Request(CIFAR10.url, method="HEAD"), timeout=seconds).close()
            answer.append(None)
        except Exception as error:  # whatever is wrong with the network, its reason is what the reader needs
            answer.append(error)

    archive = Path(root) / CIFAR10.filename
    was_there = archive.exists()
    if not check_integrity(archive, CIFAR10.tgz_md5):
        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(seconds)
        if not answer:
            raise OSError(f"no answer within {seconds} s")
        if answer[0] is not None:
            raise OSError(getattr(answer[0], "reason", answer[0]))
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        with contextlib.redirect_stderr(sys.stdout):  # where the other progress bars are
            CIFAR10(root, download=True)
    except BaseException:  # also of an interrupted cell: half an archive would be in the way of the next try
        if not was_there and not check_integrity(archive, CIFAR10.tgz_md5):
            archive.unlink(missing_ok=True)
        raise
    finally:
        socket.setdefaulttimeout(patience)


def draw_stand_in(device, seed=0):
    """10,000 + 2,000 images of ten drawn shapes in `Data`'s form: hard enough to be learned but not perfectly."""
    random = np.random.default_rng(seed)
    n = 12_000
    labels = np.arange(n) % 10
    random.shuffle(labels)

    def per_image(low, high, *size):
        return random.uniform(low, high, (n, *(size or (1, 1)))).astype(np.float32)

    y, x = np.mgrid[-1:1:32j, -1:1:32j].astype(np.float32)
    turn, size = per_image(-0.35, 0.35), per_image(0.35, 0.8)
    x, y = x - per_image(-0.3, 0.3), y - per_image(-0.3, 0.3)
    x, y = (x * np.cos(turn) + y * np.sin(turn)) / size, (y * np.cos(turn) - x * np.sin(turn)) / size
    radius, square = np.hypot(x, y), np.maximum(abs(x), abs(y))
    shapes = (
        radius < 1,
        (radius < 1) & (radius > 0.6),
        square < 0.85,
        (square < 0.85) & (square > 0.5),
        (y < 0.8) & (y > 2 * abs(x) - 0.9),
        (square < 1) & (np.minimum(abs(x), abs(y)) < 0.3),
        (square < 1) & (np.minimum(abs(x + y), abs(x - y)) < 0.4),
        (square < 0.9) & (np.sin(8 * y) > 0),
        (square < 0.9) & (np.sin(8 * x) > 0),
        (radius < 1) & (y < 0),
    )
    inside = np.choose(labels[:, None, None], shapes)[..., None]
    colours = [per_image(40, 215, 1, 1, 3) for _ in range(2)]
    images = np.where(inside, *colours) + random.normal(0, 47, (n, 32, 32, 3)).astype(np.float32)
    images = torch.from_numpy(images.clip(0, 255).astype(np.uint8)).to(device)
    labels = torch.from_numpy(labels).long().to(device)
    return Data(images[:10_000], labels[:10_000], images[10_000:], labels[10_000:], SHAPES, real=False)


def validation_split(data, per_class=500):
    """`data` with its test split replaced by `per_class` training images of each class, the same ones every time."""
    fewest = data.labels.bincount(minlength=10).min().item()
    if not 0 < per_class < fewest:
        raise ValueError(f"per_class is {per_class}; give 1 to {fewest - 1}, fewer than the images of each class")
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(data.labels), generator=generator)
    labels = data.labels.cpu()[order]
    held_out = torch.cat([order[labels == c][:per_class] for c in range(10)]).sort().values
    kept = torch.ones(len(order), dtype=torch.bool)
    kept[held_out] = False
    kept, held_out = kept.to(data.images.device), held_out.to(data.images.device)
    return replace(
        data,
        images=data.images[kept],
        labels=data.labels[kept],
        test_images=data.images[held_out],
        test_labels=data.labels[held_out],
        split="validation",
    )


def crop_and_flip(images, shift, flip):
    """Move and mirror each image: (B, 32, 32, 3) to the same, any type.

    shift  (B, 2) int64, rows and columns: the crop of 32x32 pixels that starts there in an image that is continued
           by reflection
    flip   (B,) bool: mirror the crop left to right
    """
    line = torch.arange(32, device=images.device)
    rows = line + shift[:, :1]
    columns = torch.where(flip[:, None], 31 - line, line) + shift[:, 1:]
    rows, columns = (31 - (31 - at.abs()).abs() for at in (rows, columns))  # reflected at both ends
    image = torch.arange(len(images), device=images.device)
    return images[image[:, None, None], rows[:, :, None], columns[:, None, :]]


@functools.cache  # copied to the device once: a CUDA graph can't hold a copy from the host
def colour_statistics(device):
    """Mean and standard deviation of each colour, (3, 1, 1), for values 0..255."""
    return 255 * models.MEAN.to(device), 255 * models.STD.to(device)


def standardise(images):
    """uint8 images (B, 32, 32, 3) to float32 (B, 3, 32, 32), each colour with mean 0 and deviation 1 over CIFAR-10."""
    mean, std = colour_statistics(images.device)
    return (images.permute(0, 3, 1, 2) - mean) / std


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


def orthogonalise(matrices, dtype, steps=4):
    """(K, m, n) to matrices with the same singular vectors and singular values near 1, computed in `dtype`.

    Four steps of the Newton-Schulz iteration of Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/ (its
    coefficients). Rows and columns of zeros stay zero, so matrices of several shapes can share one padded stack.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = (matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(dtype)
    for _ in range(steps):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x


class Muon:
    """Muon for the convolutions, SGD with Nesterov momentum for the rest (scales, shifts and the classifier c11).

    A convolution's step is its momentum with all singular values set to 1, times the learning rate; its weights
    decay by learning rate * weight decay. The rest steps with 10 times that learning rate and does not decay.

    learning_rate is a tensor on the net's device: writing to it changes it, also inside a CUDA graph. The singular
    values are computed in `dtype`. Own code rather than timm.optim.Muon, which takes one matrix after another where
    this takes all at once.
    """

    def __init__(self, net, learning_rate, weight_decay, momentum, dtype=torch.float32):
        self.weights = [module.weight for module in net.modules() if isinstance(module, nn.Conv2d)][:-1]
        rest = [p for p in net.parameters() if all(p is not weight for weight in self.weights)]
        self.parameters = self.weights + rest
        self.sizes = [p.numel() for p in self.parameters]
        self.learning_rate, self.weight_decay, self.momentum = learning_rate, weight_decay, momentum
        self.dtype, device = dtype, learning_rate.device
        self.momenta = torch.zeros(sum(self.sizes), device=device)
        self.state = {"all": {"momenta": self.momenta}}
        self.found_inf = None  # as in torch.optim: a tensor that stops the weights when it is not 0
        rows, columns = max(len(w) for w in self.weights), max(w[0].numel() for w in self.weights)
        self.stack = torch.zeros(len(self.weights), rows, columns, device=device)
        numbers = torch.arange(self.stack.numel(), device=device).view_as(self.stack)
        pairs = zip(numbers, self.weights, strict=True)
        self.places = torch.cat([matrix[: len(w), : w[0].numel()].flatten() for matrix, w in pairs])  # in the stack

    @torch.no_grad()
    def step(self):
        gradients = torch.cat([flat(p.grad) for p in self.parameters])
        self.momenta.mul_(self.momentum).add_(gradients)
        updates = gradients.add_(self.momenta, alpha=self.momentum)
        of_weights, of_rest = updates.split([len(self.places), len(updates) - len(self.places)])
        self.stack.view(-1)[self.places] = of_weights
        of_weights.copy_(orthogonalise(self.stack, self.dtype).view(-1)[self.places])
        of_rest.mul_(10)
        updates.mul_(self.learning_rate)
        if self.found_inf is not None:
            updates.masked_fill_(self.found_inf > 0, 0)
        torch._foreach_mul_(self.weights, 1 - self.learning_rate * self.weight_decay)
        pairs = zip(updates.split(self.sizes), self.parameters, strict=True)
        torch._foreach_sub_(self.parameters, [unflat(update, p) for update, p in pairs])


def flat(values):
    """All values in one row, a convolution's (out, in, k, k) in the order of channels last, as they lie in memory."""
    return values.permute(0, 2, 3, 1).flatten() if values.ndim == 4 else values.flatten()


def unflat(row, parameter):
    """What `flat` made a row of, in the shape of `parameter`."""
    if parameter.ndim < 4:
        return row.view_as(parameter)
    out, channels, height, width = parameter.shape
    return row.view(out, height, width, channels).permute(0, 3, 1, 2)


def pick_precision(device):
    """The 16-bit type that `device` computes with natively, float16 on GPUs and bfloat16 on CPUs, or torch.float32."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 0):
        return torch.float16  # as fast as bfloat16, more exact, on more GPUs, and cuDNN has a batch norm for it
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"):
            return torch.bfloat16
    return torch.float32


class PooledConvolution(nn.Module):
    """A 1x1 convolution and the 2x2 average pool after it, in the other order: the same function for less work."""

    def __init__(self, convolution):
        super().__init__()
        self.convolution = convolution

    def forward(self, x):
        if not x.is_cuda:
            return self.convolution(F.avg_pool2d(x, 2))
        # On CUDA the backward pass of avg_pool2d is slow with channels last.
        blocks = x.permute(0, 2, 3, 1).unflatten(2, (-1, 2)).unflatten(1, (-1, 2))
        return self.convolution(blocks.mean((2, 4)).permute(0, 3, 1, 2))


class ChannelsLastGroupNorm(nn.Module):
    """nn.GroupNorm's function and parameters (float32), for activations (N, C, H, W) in channels last.

    PyTorch's own copies to channels first and back on CUDA; on CPUs its backward pass is slow.
    """

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        weight, bias, groups, eps = self.norm.weight, self.norm.bias, self.norm.num_groups, self.norm.eps
        if groups > 1:
            return _GroupNorm.apply(x, weight, bias, groups, eps)
        # With one group an image's values lie in one row, for which PyTorch's layer norm is fast.
        rows = x.permute(0, 2, 3, 1)
        scale, shift = (values.repeat(rows[0, :, :, 0].numel()) for values in (weight, bias))
        if x.is_cuda:  # where it takes one type alone
            scale, shift = scale.to(x.dtype), shift.to(x.dtype)
        return F.layer_norm(rows.flatten(1), scale.shape, scale, shift, eps).view_as(rows).permute(0, 3, 1, 2)


class _GroupNorm(torch.autograd.Function):
    """The passes of `ChannelsLastGroupNorm`; float32 statistics, (N, groups, channels of a group) or (N, groups, 1).

    Small tensors cost a launch each on CUDA, so their arithmetic is kept to few operations.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, groups, eps):
        n, channels, height, width = x.shape
        size = x[0].numel() // groups
        weight, bias = weight.view(groups, -1), bias.view(groups, -1)
        if x.is_cuda:
            mean = channel_sums(x, groups).sum(2, keepdim=True) / size
            norms = torch.linalg.vector_norm(x, dim=(2, 3), dtype=torch.float32).view(n, groups, -1)
            variance = torch.addcmul(norms.square().sum(2, keepdim=True) / size, mean, mean, value=-1)
            rstd = (variance.clamp_(min=0) + eps).rsqrt_()
            scale = weight * rstd
            y = torch.addcmul(per_channel(torch.addcmul(bias, mean, scale, value=-1), x), x, per_channel(scale, x))
        elif height * width < 1024:  # where PyTorch's own takes several times as long
            values = x.float()
            mean = channel_sums(values, groups).sum(2, keepdim=True) / size
            values = values - per_channel(mean, values)
            variance = channel_sums(values.square(), groups).sum(2, keepdim=True) / size
            rstd = (variance + eps).rsqrt_()
            y = torch.addcmul(bias.view(-1, 1, 1), values, per_channel(weight * rstd, values)).to(x.dtype)
            x, mean = values.to(x.dtype), torch.zeros_like(mean)  # without its mean, as below
        else:
            y, mean, rstd = torch.native_group_norm(
                x, weight.flatten(), bias.flatten(), n, channels, height * width, groups, eps
            )
            # Without most of the mean, little is left for bfloat16 to round in the backward pass.
            rounded = mean[..., None].to(x.dtype)
            x, mean, rstd = x - per_channel(rounded, x), mean[..., None] - rounded.float(), rstd[..., None]
        ctx.save_for_backward(x, weight, mean, rstd)
        return y

    @staticmethod
    def backward(ctx, gradient):
        x, weight, mean, rstd = ctx.saved_tensors
        groups = mean.shape[1]
        total = channel_sums(gradient, groups)
        product = torch.addcmul(channel_products(gradient, x, groups), mean, total, value=-1) * rstd
        both = torch.stack([total, product])  # sums of the gradient, and of the gradient times the normalised x
        c, b = (weight * both).sum(3, keepdim=True) * (rstd / (-x[0].numel() // groups))
        b = b * rstd
        c = torch.addcmul(c, mean, b, value=-1)
        result = torch.addcmul(per_channel(c, x), x, per_channel(b, x))
        result.addcmul_(gradient, per_channel(weight * rstd, x))
        of_bias, of_weight = both.sum(1).flatten(1)
        return result, of_weight, of_bias, None, None


def channel_sums(x, groups):
    """(N, C, H, W) to float32 sums over H and W, (N, groups, C / groups)."""
    # On a CPU, asking for float32 would copy x first; it adds up in float32 all the same and rounds the sums.
    total = x.sum((2, 3), dtype=torch.float32) if x.is_cuda else x.sum((2, 3)).float()
    return total.view(len(x), groups, -1)


def channel_products(x, y, groups):
    """`channel_sums` of x * y."""
    if not x.is_cuda or torch.compiler.is_compiling():
        return channel_sums(x * y, groups)
    # All channels with all, of which the diagonal is wanted: still faster than to write x * y and to read it again.
    x, y = (values.permute(0, 2, 3, 1).flatten(1, 2) for values in (x, y))
    products = torch.bmm(x.mT, y, out_dtype=torch.float32) if x.dtype != torch.float32 else torch.bmm(x.mT, y)
    return products.diagonal(dim1=1, dim2=2).unflatten(1, (groups, -1))


def per_channel(values, x):
    """(N, groups, C / groups) or (N, groups, 1) to what (N, C, H, W) is added to or multiplied by, in the type of x."""
    n, channels = x.shape[:2]
    return values.to(x.dtype).expand(n, -1, channels // values.shape[1]).reshape(n, channels, 1, 1)


def working_copy(net, dtype):
    """What computes as `net` does, but faster: in `dtype`, but batch, layer and group norm with `net`'s float32 values.

    Other norms (the control's scale and shift, variants of layer norm) have their parameters in `dtype`, too.
    """
    copied = copy.deepcopy(net).to(dtype)
    for name, module in net.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            copied.set_submodule(name, module)
        elif isinstance(module, nn.GroupNorm):
            copied.set_submodule(name, ChannelsLastGroupNorm(module))
    copied.c3, copied.P1 = PooledConvolution(copied.c3), nn.Identity()
    copied.c7, copied.P2 = PooledConvolution(copied.c7), nn.Identity()
    return copied


def can_compile(device):
    """Whether torch.compile works on `device`; one line says so when it does not."""
    try:
        torch.compile(torch.sin)(torch.zeros(1, device=device))
    except Exception as error:  # of many kinds: no C compiler, no Triton, a GPU that is too old
        print(f"torch.compile does not work here, going on without it: {str(error).strip().splitlines()[0]}")
        return False
    return True


def keep_memory():
    """From now on let this process keep up to 2 GiB that it has freed, where the C library is glibc.

    By default it gives large tensors back, and each training step on a CPU waits for them, page by page.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD, bytes. Older versions refuse more than 32 MiB for the first; the second
        # alone would make it smaller than it is by default.
        if libc.mallopt(-3, 2**30) or libc.mallopt(-3, 2**25):
            libc.mallopt(-1, 2**31 - 1)


@functools.cache
def stream_of(device, number):
    """The CUDA stream of that number, always the same: cuBLAS keeps memory for each it has met, 64 MiB on an H100."""
    return torch.cuda.Stream(device)


STATE = ("net", "momenta", "now", "mirrored images", "generator")  # of a Trainer, in a checkpoint


class Trainer:
    """A net being trained: `step` is the whole step, from the indices of a batch to the new weights.

    Everything that changes lives in tensors on the device, so nothing has to come back to the host within an epoch,
    and on CUDA, unless `capture` is False, one step is recorded once as a graph and replayed. Weights are float32; a
    working copy in `dtype` computes logits and gradients. ValueError when a batch is larger than the training split.

    optimizer  makes one as Muon(net, rate, weight_decay, momentum, dtype) does; the rate is a tensor that changes
    stream     number of the CUDA stream: to overlap, nets that train at the same time need one each
    """

    def __init__(self, net, data, settings, compile=False, capture=True, optimizer=Muon, stream=0):
        torch.backends.cudnn.deterministic = True  # costs nothing measurable in float16
        device = data.images.device
        if device.type == "cpu":
            keep_memory()
        self.net, self.data, self.settings = net, data, settings
        self.steps = len(data.images) // settings.batch_size  # in an epoch
        if self.steps == 0:
            raise ValueError(f"batch_size is {settings.batch_size}; there are {len(data.images)} training images")
        net.to(device, memory_format=torch.channels_last).train()
        self.dtype = pick_precision(device)
        self.model = working_copy(net, self.dtype)
        self.copied = [(w, p) for w, p in zip(self.model.parameters(), net.parameters(), strict=True) if w is not p]
        total = self.steps * settings.epochs
        done = torch.arange(1, total + 1, device=device) / (total + 1)
        self.rates = settings.learning_rate * torch.minimum(done / WARMUP, (1 - done) / (1 - WARMUP))
        self.rate = self.rates[0].clone()
        self.optimizer = optimizer(net, self.rate, settings.weight_decay, settings.momentum, self.dtype)
        self.generator = torch.Generator(device).manual_seed(settings.seed)
        self.order = torch.zeros(self.steps, settings.batch_size, dtype=torch.int64, device=device)
        self.shift = torch.zeros(len(data.images), 2, dtype=torch.int64, device=device)
        self.flip = torch.rand(len(data.images), generator=self.generator, device=device) < 0.5
        self.now = torch.zeros(2, 1, dtype=torch.int64, device=device)  # step of the epoch, step of the run
        self.sums = torch.zeros(2, device=device)  # over the epoch so far: loss, share of right answers
        self.diverged = torch.zeros((), device=device)  # 1 from the first step on whose gradients are not finite
        self.optimizer.found_inf = self.diverged
        self.unscale = torch.full((), 1 / LOSS_SCALE, device=device)
        self.stream = stream_of(device, stream) if device.type == "cuda" else None
        self.on_stream = functools.partial(torch.cuda.stream, self.stream) if self.stream else contextlib.nullcontext
        if compile and can_compile(device):
            self.loss = torch.compile(self.loss, dynamic=False)
        self.replay = self.capture() if self.stream and capture else self.step

    def batch(self):
        """Standardised images (B, 3, 32, 32) and labels (B,) of the step that `now` tells."""
        chosen = self.order.index_select(0, self.now[0])[0]
        images = self.data.images.index_select(0, chosen)
        if self.settings.augment != "none":
            images = crop_and_flip(images, self.shift.index_select(0, chosen), self.flip.index_select(0, chosen))
        return standardise(images).to(self.dtype), self.data.labels.index_select(0, chosen)

    def step(self):
        images, labels = self.batch()
        for parameter in self.model.parameters():
            parameter.grad = None
        loss, share = self.loss(images, labels)
        (LOSS_SCALE * loss).backward()
        gradients = [working.grad.float() for working in self.model.parameters()]
        torch._amp_foreach_non_finite_check_and_unscale_(gradients, self.diverged, self.unscale)
        self.rate.copy_((self.rates.index_select(0, self.now[1]) * (1 - self.diverged))[0])
        for parameter, gradient in zip(self.net.parameters(), gradients, strict=True):
            parameter.grad = gradient
        self.optimizer.step()
        with torch.no_grad():
            if self.copied:
                torch._foreach_copy_(*map(list, zip(*self.copied, strict=True)))
            self.sums += torch.stack([loss, share])
            self.now += 1 - self.diverged.long()  # stays at the first step that diverged

    def loss(self, images, labels):
        """Loss and share of right answers, over a batch."""
        logits = self.model(images).float()
        share = (logits.detach().argmax(1) == labels).float().mean()
        return F.cross_entropy(logits, labels, label_smoothing=LABEL_SMOOTHING), share

    def capture(self):  # pragma: no cover - needs a GPU: tests/test_gpu.py
        """Record `step` as a CUDA graph, leave all as it was before, and return the graph's replay."""
        tensors = [*self.net.parameters(), *self.net.buffers(), *(w for w, _ in self.copied), self.now, self.diverged]
        before = [tensor.detach().clone() for tensor in tensors]
        graph = torch.cuda.CUDAGraph()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for _ in range(2):  # libraries set themselves up in their first calls, which can't be recorded
                self.step()
                self.now.zero_()
        torch.cuda.synchronize()
        collecting = gc.isenabled()
        gc.disable()  # to free another net's graph now would end the recording
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                self.step()
        finally:
            if collecting:
                gc.enable()
        with torch.no_grad():
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)
            for state in self.optimizer.state.values():  # momenta and the like all begin at 0
                for tensor in state.values():
                    tensor.zero_()
        torch.cuda.synchronize()
        return graph.replay

    def epoch(self):
        """Generator: one epoch, a step at each turn. On CUDA it runs ahead of the device, on this net's stream.

        Half of the images, drawn at first, are mirrored, and in the next epoch the other half: no image is seen the
        same way twice in a row (Jordan 2024, https://arxiv.org/abs/2404.00498). Crops are drawn anew in each epoch.
        """
        if self.stream:
            self.stream.wait_stream(torch.cuda.current_stream())  # what came before, such as `load`, was done there
        with self.on_stream():
            device, n = self.order.device, len(self.data.images)
            order = torch.randperm(n, generator=self.generator, device=device)
            self.order.copy_(order[: self.order.numel()].view_as(self.order))
            if "flip" in self.settings.augment:
                self.flip.logical_not_()
            if "crop" in self.settings.augment:
                shift = torch.randint(-CROP, CROP + 1, (n, 2), generator=self.generator, device=device)
                self.shift.copy_(shift)
            self.now[0] = 0
            self.sums.zero_()
        for _ in range(self.steps):
            with self.on_stream():
                self.replay()
            yield

    def means(self):
        """Loss and accuracy (percent) in training, over the epoch: waits for the device."""
        if self.stream:
            self.stream.synchronize()
        loss, share = (self.sums / self.steps).tolist()
        return loss, 100 * share

    def check_finite(self):
        """Raise FloatingPointError, which names the step, if a gradient was not finite: no weight moved since then."""
        if self.diverged.item():
            step = self.now[1].item()
            raise FloatingPointError(
                f"{self.net.norm} norm, seed {self.settings.seed}, diverged in epoch {step // self.steps + 1}, step "
                f"{step % self.steps + 1} of {self.steps}, at a learning rate of {self.rates[step].item():.3g} "
                f"(learning_rate is {self.settings.learning_rate}); try a lower one"
            )

    def state(self):
        """What a run under Muon needs to go on from the end of an epoch: its STATE, as tensors."""
        own = (self.net.state_dict(), self.optimizer.momenta, self.now, self.flip, self.generator.get_state())
        return dict(zip(STATE, own, strict=True))

    def load(self, state):
        """Go on from a `state` of the same settings, net and data."""
        self.net.load_state_dict(state["net"])
        with torch.no_grad():
            self.optimizer.momenta.copy_(state["momenta"])
            self.now.copy_(state["now"])
            self.flip.copy_(state["mirrored images"])
            for working, parameter in self.copied:
                working.copy_(parameter)
        self.generator.set_state(state["generator"])


def build(net, settings, **options):
    """The net called `net` (NetA, NetB, NetC or Net, the control), its initial weights drawn from settings.seed.

    options are those of `models.Net`. ValueError for another name, or for options that it can't be built from.
    """
    if not isinstance(net, str) or net not in NORM_OF:
        raise ValueError(f"net is {net!r}; choose one of {', '.join(NORM_OF)}")
    torch.manual_seed(settings.seed)
    if net in NETS:
        return getattr(models, net)(**options)
    return models.Net(NORM_OF[net], **options)


HISTORY = ("epoch", "loss", "train_accuracy", "test_accuracy", "learning_rate", "seconds", "elapsed")


def train(net, data, settings, label="", track=True, compile=False, checkpoint=None):
    """Train `net` in place on `data`, under one progress bar; it ends on the data's device.

    compile     use torch.compile: a faster epoch after some seconds that the first run of a net takes once
    checkpoint  a file that is written after each epoch; where it exists, training goes on from it and ends as if
                it had never stopped. ValueError when it is damaged, or of another net, other data or settings

    Returns its history, a dict per epoch: epoch (from 1), loss (with label smoothing) and train_accuracy (both while
    training), test_accuracy (nan unless `track`), learning_rate (of the last step), seconds (of training alone),
    elapsed (seconds from the start, without pauses). The same settings, machine, torch and thread count give the same
    weights, bit for bit; with `compile`, while the compiler's cache lasts. ValueError when a batch is larger than the
    training split, MemoryError when it takes more than a GPU's memory, FloatingPointError when gradients are not
    finite.
    """
    started = time.perf_counter()
    of = identity(net, data, settings) if checkpoint else {}
    saved = read_checkpoint(checkpoint, of) if checkpoint else None
    history = saved["history"] if saved else []
    if history:
        started -= history[-1]["elapsed"]
    try:
        trainer = Trainer(net, data, settings, compile)
    except torch.OutOfMemoryError:
        said = f"batch_size is {settings.batch_size}: that takes more than the memory of {data.images.device}"
        raise MemoryError(f"{said}; try {max(1, settings.batch_size // 2)}") from None
    if saved:
        trainer.load(saved["state"])
    form = "{desc} {percentage:3.0f}% |{bar:20}| {elapsed}<{remaining}{postfix}"
    total, done = trainer.steps * settings.epochs, trainer.steps * len(history)
    with tqdm(total=total, initial=done, desc=label, file=sys.stdout, bar_format=form) as bar:
        for epoch in range(len(history) + 1, settings.epochs + 1):
            began = time.perf_counter()
            for _ in trainer.epoch():
                bar.update()
            loss, accuracy = trainer.means()
            trainer.check_finite()
            seconds = time.perf_counter() - began
            tested = test(net, data.test_images, data.test_labels).accuracy if track else math.nan
            rate = trainer.rates[epoch * trainer.steps - 1].item()
            numbers = (epoch, loss, accuracy, tested, rate, seconds, time.perf_counter() - started)
            history.append(dict(zip(HISTORY, numbers, strict=True)))
            if checkpoint:
                write = {"run": of, "history": history, "state": trainer.state()}
                save(checkpoint, lambda temporary, write=write: torch.save(write, temporary))
            said = f"epoch {epoch}, loss {loss:.3f}, train {accuracy:.1f} %"
            bar.set_postfix_str(said + (f", {data.split} {tested:.1f} %" if track else ""))
    return history


def identity(net, data, settings):
    """What must be the same for a run to be the same, as numbers and texts."""
    code = b"".join(Path(module.__file__).read_bytes() for module in (models, sys.modules[__name__]))
    places = torch.arange(1, len(data.labels) + 1, device=data.labels.device)
    described = {
        "norm": net.norm,
        "groups": net.groups,
        "widths": list(net.widths),
        "code": hashlib.sha1(code).hexdigest()[:10],
        "torch": str(torch.__version__),
        "device": device_name(data.images.device),
        "precision": str(pick_precision(data.images.device)),
        "data": data.name,
        "split": data.split,
        "train_images": len(data.images),
        # Eight bytes at a time: one at a time they would be copied to a type of eight bytes first.
        "sum of the pixels": data.images.flatten().view(torch.int64).sum().item(),
        "sum of the labels, each times its place": (data.labels * places).sum().item(),
    }
    # NumPy's numbers, which sweeps hand over, can't be read back from a checkpoint.
    return described | {k: v.item() if isinstance(v, np.generic) else v for k, v in asdict(settings).items()}


def read_checkpoint(path, wanted):
    """What `train` wrote to `path`; None when nothing is there.

    ValueError, in one line, when it can't be read or its `identity` is not `wanted`.
    """
    if not Path(path).exists():
        return None
    advice = "delete it to start anew, or name another file"
    try:
        with zipfile.ZipFile(path) as file:
            if file.testzip():  # torch.load does not look at the check sums
                raise ValueError("its check sum is wrong")
        saved = torch.load(path, map_location="cpu", weights_only=True)
        of, _, _ = saved["run"], saved["history"], [saved["state"][name] for name in STATE]
    except Exception as error:  # of many kinds: cut off, altered, not a checkpoint at all
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"{path} can't be read as a checkpoint ({reason[0]}); {advice}") from None
    for name in {**wanted, **of}:
        if of.get(name) != wanted.get(name):
            said = f"{path} is a checkpoint with {name} {of.get(name)!r}, not {wanted.get(name)!r}"
            raise ValueError(f"{said}; {advice}")
    return saved


# ---------------------------------------------------------------------------------------------------------------------
# Scoring
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scores:
    """What `test` measures. predictions, confidences: (N,), on the CPU."""

    loss: float
    accuracy: float
    predictions: torch.Tensor
    confidences: torch.Tensor  # softmax probability of the prediction, 0 to 1


@torch.no_grad()
def test(net, images, labels):
    """Score `net` on uint8 images (N, 32, 32, 3) with labels (N,), one view each, in float32, without TF32."""
    check_images(images, labels)
    training = net.training
    net.eval()
    size = 100 if images.device.type == "cpu" else 2500  # images at once: on a CPU, what its cache holds
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        logits = torch.cat([net(standardise(part)) for part in images.split(size)])
    net.train(training)
    confidences, predictions = logits.softmax(1).max(1)
    return Scores(
        loss=F.cross_entropy(logits, labels).item(),
        accuracy=100 * (predictions == labels).float().mean().item(),
        predictions=predictions.cpu(),
        confidences=confidences.cpu(),
    )


@dataclass(frozen=True)
class Run:
    """A finished run: its net, history, scores on the test or validation split, and its row for results/runs.csv."""

    net: nn.Module
    history: list
    scores: Scores
    row: dict


def run(name, data, settings, study="main", track=True, checkpoints=None):
    """Build, train and score the net called `name`; see `build`, `train` and `test`.

    checkpoints  folder for the run's checkpoint; `save_experiment` clears it
    """
    net = build(name, settings)
    label = f"{name} {net.norm} norm, seed {settings.seed}" + ("" if data.real else f" [{data.name}]")
    checkpoint = checkpoints and Path(checkpoints) / f"{name}-{settings.seed}.pt"
    history = train(net, data, settings, label, track, checkpoint=checkpoint)
    return finish(name, net, data, settings, history, study, history[-1]["elapsed"])


def finish(name, net, data, settings, history, study, seconds, variant=None, diverged=False):
    """Score a trained net and make its `Run`; `seconds` is what its training took, `variant` columns that differ.

    The row of a run that diverged has no accuracies.
    """
    scores = test(net, data.test_images, data.test_labels)
    if study == "main" and settings.epochs < Settings.epochs:
        study = "short"
    row = {
        "study": study if data.real else "stand-in",
        "net": name,
        "norm": net.norm,
        **norm_columns(net.norm, net.groups, settings.batch_size),
        "widths": " ".join(map(str, net.widths)),
        "activation": "SiLU",
        "initial_weights": "",
        "optimizer": "muon",
        **asdict(settings),
        "train_images": len(data.images),
        "split": data.split,
        "precision": str(pick_precision(data.images.device)).removeprefix("torch."),
        "parameters": sum(p.numel() for p in net.parameters()),
        "train_accuracy": "" if diverged else round(test(net, data.images, data.labels).accuracy, 3),
        "test_accuracy": round(scores.accuracy, 3) if data.split == "test" and not diverged else "",
        "validation_accuracy": round(scores.accuracy, 3) if data.split == "validation" and not diverged else "",
        "test_loss": round(scores.loss, 5) if data.split == "test" and not diverged else "",
        "seconds": round(seconds, 2),
        "device": device_name(data.images.device),
        "torch": torch.__version__,
        "commit": commit(),
        "status": "diverged" if diverged else "done",
    } | (variant or {})
    return Run(net, history, scores, row)


def norm_columns(norm, groups, batch_size):
    """The columns of results/runs.csv that say over what a published net's norm takes its statistics."""
    return {
        "layer_variant": "C,H,W" if norm == "layer" else "",
        "groups": {"layer": 1, "group": groups}.get(norm, ""),
        "statistics_batch": batch_size if norm == "batch" else "",
    }


# The columns of results/runs.csv that a run measures or notes; all others are its settings and tell rows apart.
MEASURED = {"parameters", "train_accuracy", "test_accuracy", "validation_accuracy", "test_loss", "seconds", "device"}
MEASURED |= {"torch", "commit", "status", "precision"}


def device_name(device):
    """The name of the GPU, or "cpu" with its processor's name where it is known."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {torch.cpu.get_capabilities().get('cpu_name', '')}".strip()


@functools.cache  # what runs is what was there at the first run, whatever is written later
def commit():
    """The code's commit: S8_COMMIT, or git's with + when the code differs from it, or "unknown"."""
    if "S8_COMMIT" in os.environ:
        return os.environ["S8_COMMIT"]
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run(
            [*git, "status", "--porcelain", "--", "*.py"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if changes.stdout.strip() else "")


def save(path, write):
    """Call write(temporary path), then move the file to `path`: whatever fails, an older `path` stays whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_figure(path, figure):
    """`save` a Matplotlib figure, 1,760 pixels wide: about twice what a README's column has."""
    save(path, lambda temporary: figure.savefig(temporary, dpi=1760 / figure.get_figwidth()))


def put_rows(path, rows, key=None):
    """Put dicts into the CSV file `path`, in place of the rows there that share the `key` (all but MEASURED)."""
    new = pd.DataFrame(rows).map(str)
    key = key or [name for name in new if name not in MEASURED]
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):  # other processes may be writing rows as well
        if path.exists():
            old = pd.read_csv(path, dtype=str, keep_default_na=False)
            replaced = set(new[key].itertuples(index=False, name=None))
            kept = [
                row not in replaced
                for row in old.reindex(columns=key, fill_value="").itertuples(index=False, name=None)
            ]
            new = pd.concat([old[kept], new])
        save(path, lambda temporary: new.to_csv(temporary, index=False))


def read_rows(path="results/runs.csv"):
    """The rows of a results file as a DataFrame; without any when it is not there."""
    return pd.read_csv(path) if Path(path).exists() else pd.DataFrame(columns=["study", "net", "split"])


def save_experiment(runs, data, plan):
    """Write one net's runs under plan.out: rows, histories, the weights and the mistakes of the first seed."""
    results, name = plan.folder("results"), runs[0].row["net"]
    put_rows(results / "runs.csv", [one.row for one in runs])
    epochs = [{"net": name, "seed": one.row["seed"]} | epoch for one in runs for epoch in one.history]
    put_rows(results / "history.csv", pd.DataFrame(epochs).round(5), key=["net"])
    put_rows(results / "mistakes.csv", mistakes_of(name, runs[0].scores, data), key=["net"])
    weights = {k: v.cpu().contiguous() for k, v in runs[0].net.state_dict().items()}
    save(plan.folder("weights") / f"{name}.pt", lambda temporary: torch.save(weights, temporary))
    for one in runs:
        (plan.checkpoints / f"{name}-{one.row['seed']}.pt").unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------------------
# Misclassified images
# ---------------------------------------------------------------------------------------------------------------------


def most_confident_mistakes(predictions, confidences, labels, count=10):
    """Indices of at most `count` wrong predictions, the most confident first (the lower index first among equals).

    predictions, labels: (N,) int64; confidences: (N,), 0 to 1; all on the CPU.
    """
    wrong = (predictions != labels).nonzero().flatten()
    return wrong[confidences[wrong].argsort(descending=True, stable=True)][:count]


def plot_mistakes(net, scores, data, path):
    """Draw ten mistakes of `net` as 5 rows by 2 columns, or as many as there are, and save them as `path`."""
    norm, labels = NORM_OF[net], data.test_labels.cpu()
    chosen = most_confident_mistakes(scores.predictions, scores.confidences, labels).tolist()
    figure, axes = plt.subplots(5, 4, figsize=(8, 9.4), width_ratios=(1, 1.15, 1, 1.15), layout="constrained")
    figure.suptitle(
        title(f"{net}, {norm} norm: the {len(chosen) or 'no'} most confident mistakes of seed 0", data), fontsize=14
    )
    for axis in axes.flat:
        axis.axis("off")
    for (picture, text), index in zip(axes.reshape(10, 2), chosen, strict=False):
        picture.imshow(data.test_images[index].cpu().numpy(), interpolation="nearest")
        truth, guess = data.classes[labels[index]], data.classes[scores.predictions[index]]
        text.text(0, 0.80, "predicted", fontsize=10, color="#555555")
        text.text(0, 0.66, guess, fontsize=14, weight="bold", color=COLOURS[norm])
        text.text(0, 0.53, f"{100 * scores.confidences[index]:.0f} % confident", fontsize=10, color="#555555")
        text.text(0, 0.33, "true", fontsize=10, color="#555555")
        text.text(0, 0.19, truth, fontsize=14, weight="bold")
        text.text(0, 0.04, f"test image {index}", fontsize=10, color="#555555")
    save_figure(path, figure)
    return figure


def mistakes_of(net, scores, data):
    """One row per wrong test image: net, index, true and predicted (class names), confidence (0 to 1)."""
    labels = data.test_labels.cpu()
    wrong = (scores.predictions != labels).nonzero().flatten()
    return pd.DataFrame(
        {
            "net": net,
            "index": wrong.numpy(),
            "true": [data.classes[i] for i in labels[wrong]],
            "predicted": [data.classes[i] for i in scores.predictions[wrong]],
            "confidence": scores.confidences[wrong].numpy().round(4),
        }
    )


def describe_mistakes(net, mistakes, runs):
    """Sentences on one net's mistakes, as Markdown: its confused pairs, what it shares, where it could improve.

    mistakes  rows of `mistakes_of` for one net or for all three; the second of three sentences needs all three
    runs      rows of results/runs.csv; those of `net` back the third sentence
    """
    own = mistakes[mistakes["net"] == net]
    if len(own) == 0:
        return f"{net} (seed 0) gets no test image wrong."
    pairs = own.apply(lambda row: " and ".join(sorted((row["true"], row["predicted"]))), axis=1).value_counts()
    said = ", ".join(f"{pair} ({count})" for pair, count in pairs.head(3).items())
    sentences = [f"{net} (seed 0) gets {len(own):,} test images wrong; the pairs it confuses most are {said}."]
    if mistakes["net"].nunique() == 3:
        nets = mistakes.groupby("index")["net"].nunique()
        shared = 100 * (own["index"].map(nets) == 3).mean()
        alone = 100 * (own["index"].map(nets) == 1).mean()
        sentences.append(
            f"All three nets get {shared:.0f} % of these images wrong, and {alone:.0f} % {net} alone does."
        )
    own_runs = runs[(runs["net"] == net) & (runs["split"] == "test")]
    main = own_runs[own_runs["study"].isin(("main", "short", "stand-in"))]
    augmented = own_runs[(own_runs["study"] == "augment") & own_runs["epochs"].isin(main["epochs"])]
    hard = " and ".join(f"{name} ({count} wrong)" for name, count in own["true"].value_counts().head(2).items())
    trained, tested = (main[f"{split}_accuracy"].astype(float).mean() for split in ("train", "test"))
    text = f"It could improve most on {hard}; it scores {trained:.1f} % on the training images, {trained - tested:.1f}"
    text += f" points more than on the test images (n = {len(main)})"
    if len(augmented):
        by_seed = [part.set_index("seed")["test_accuracy"].astype(float) for part in (augmented, main)]
        decays = [part["weight_decay"].iloc[0] for part in (augmented, main)]
        text += ", and flip and crop, with a weight decay of {} instead of {}, change its test accuracy by ".format(
            *decays
        )
        text += paired(*by_seed)
    if "stand-in" in set(main["study"]):
        sentences.insert(0, "STAND-IN DATA, NOT RESULTS.")
    return " ".join([*sentences, text + "."])


# ---------------------------------------------------------------------------------------------------------------------
# Tables and plots
# ---------------------------------------------------------------------------------------------------------------------

NET_OF = {norm: net for net, norm in NORM_OF.items()}
COLOURS = {"batch": "#0072B2", "layer": "#D55E00", "group": "#009E73", "none": "#7F7F7F"}  # Okabe & Ito 2008


def title(text, data):
    """`text`, with a second line that says so when `data` are not CIFAR-10."""
    return text if data.real else f"{text}\n{data.name}"


def layer_table(net):
    """A line per layer of the chain for one 32x32 image: what it is, its output's shape and its parameters."""
    lines, x = [], torch.zeros(1, 3, 32, 32)
    for name, layer in copy.deepcopy(net).cpu().eval().named_children():
        x = layer(x)
        kind = "3x3 conv, norm, SiLU" if isinstance(layer, nn.Sequential) else type(layer).__name__
        if isinstance(layer, nn.Conv2d):
            kind = "1x1 conv"
        shape = "x".join(str(n) for n in x.shape[1:])
        lines.append(
            {"layer": name, "is": kind, "output": shape, "parameters": sum(p.numel() for p in layer.parameters())}
        )
    return pd.DataFrame(lines).set_index("layer")


def summarise(rows):
    """A line per net of rows of results/runs.csv: parameters, accuracies (percent), seeds and seconds per run."""
    frame = pd.DataFrame(rows)
    lines = []
    for net, group in frame.groupby("net"):
        tested = group["test_accuracy"].astype(float)
        lines.append(
            {
                "net": net,
                "norm": group["norm"].iloc[0] + (" (stand-in)" if "stand-in" in set(group["study"]) else ""),
                "epochs": group["epochs"].iloc[0],
                "parameters": f"{group['parameters'].iloc[0]:,}",
                "train accuracy": f"{group['train_accuracy'].mean():.2f}",
                "test accuracy, mean": f"{tested.mean():.2f}",
                "std": f"{tested.std():.2f}" if len(group) > 1 else "-",
                "n": len(group),
                "seconds a run, median": f"{group['seconds'].median():.1f}",
            }
        )
    return pd.DataFrame(lines).set_index("net")


def compare(rows, first, second):
    """Difference in test accuracy between two nets of the rows, as text; see `paired`."""
    rows = pd.DataFrame(rows)
    frame = rows.pivot(index="seed", columns="net", values="test_accuracy").astype(float)
    note = " on STAND-IN DATA, NOT RESULTS" if "stand-in" in set(rows["study"]) else ""
    return f"{first} minus {second}: {paired(frame[first], frame[second])}{note}"


def paired(first, second):
    """Mean of first minus second (Series by seed; shared seeds count), with its 95 % t interval, as text.

    ValueError when a seed is there twice, or none is shared.
    """
    if first.index.has_duplicates or second.index.has_duplicates:
        raise ValueError("a seed has more than one row; compare rows of the same settings")
    first, second = first.dropna().align(second.dropna(), join="inner")
    if len(first) == 0:
        raise ValueError("no seed is in both sets of rows")
    difference = (first - second).mean()
    if len(first) < 2:
        return f"{difference:+.2f} points (one seed: no interval)"
    low, high = stats.ttest_rel(first, second).confidence_interval()
    return f"{difference:+.2f} points (95 % interval {low:+.2f} to {high:+.2f}, n = {len(first)})"


def plot_samples(data):
    """Four training images of each class, a column per class."""
    figure, axes = plt.subplots(4, 10, figsize=(10, 4.4), layout="constrained")
    figure.suptitle(title("Training images", data))
    for label, column in enumerate(axes.T):
        column[0].set_title(data.classes[label], fontsize=10)
        for axis, index in zip(column, (data.labels == label).nonzero().flatten()[:4], strict=True):
            axis.imshow(data.images[index].cpu().numpy())
    for axis in axes.flat:
        axis.axis("off")
    return figure


def plot_curves(runs, data):
    """Loss and accuracy per epoch of {norm: list of Run}: a line per seed, test solid and training dotted."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    figure.suptitle(title("Training, epoch by epoch", data))
    for norm, group in runs.items():
        for number, one in enumerate(group):
            history = pd.DataFrame(one.history)
            style = {"color": COLOURS[norm], "alpha": 0.9 if len(group) == 1 else 0.5, "linewidth": 1.2}
            name = f"{NET_OF[norm]}, {norm}"
            left.plot(history["epoch"], history["loss"], label=None if number else name, **style)
            right.plot(history["epoch"], history["test_accuracy"], label=None if number else f"{name}, test", **style)
            right.plot(history["epoch"], history["train_accuracy"], linestyle=":", **style)
    left.set(xlabel="epoch", ylabel=f"loss (label smoothing {LABEL_SMOOTHING})")
    right.set(xlabel="epoch", ylabel="accuracy, % (dotted: training)")
    for axis in (left, right):
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend(frameon=False)
        axis.grid(alpha=0.3)
    return figure


def plot_confusions(runs, data):
    """The confusion matrix of the first seed of each net of {norm: list of Run}: mistakes counted, hits left out."""
    figure, axes = plt.subplots(1, len(runs), figsize=(5.2 * len(runs), 5.2), layout="constrained", squeeze=False)
    figure.suptitle(title("Mistakes by true and predicted class (test images, seed 0)", data))
    for axis, (norm, group) in zip(axes[0], runs.items(), strict=True):
        counts = confusion(group[0].scores.predictions, data.test_labels.cpu())
        off = counts.fill_diagonal_(0).numpy()
        axis.imshow(off, cmap="Greys", vmin=0, vmax=max(1, off.max()))
        for row, column in np.ndindex(10, 10):
            if row != column:
                dark = off[row, column] > off.max() / 2
                axis.text(
                    column, row, off[row, column], ha="center", va="center", fontsize=8, color="w" if dark else "k"
                )
        axis.set_title(f"{NET_OF[norm]}, {norm}", color=COLOURS[norm])
        axis.set_xticks(range(10), data.classes, rotation=60, ha="right")
        axis.set_yticks(range(10), data.classes)
        axis.set(xlabel="predicted", ylabel="true")
    return figure


def confusion(predictions, labels):
    """(10, 10) counts: row the true class, column the predicted one."""
    return torch.bincount(10 * labels + predictions, minlength=100).view(10, 10)


def plot_classes(runs, data):
    """Accuracy in each class, a group of bars per class, first seed of each net of {norm: list of Run}."""
    figure, axis = plt.subplots(figsize=(10, 3.6), layout="constrained")
    for number, (norm, group) in enumerate(runs.items()):
        counts = confusion(group[0].scores.predictions, data.test_labels.cpu())
        accuracy = (100 * counts.diagonal() / counts.sum(1)).numpy()
        axis.bar(
            np.arange(10) + 0.27 * (number - 1), accuracy, 0.25, color=COLOURS[norm], label=f"{NET_OF[norm]}, {norm}"
        )
    axis.set_xticks(range(10), data.classes)
    axis.set(ylabel="test accuracy, %", ylim=(0, 100), title=title("Accuracy by class (seed 0)", data))
    axis.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=3)
    axis.grid(axis="y", alpha=0.3)
    return figure


def overlap(mistakes):
    """How many test images each set of nets gets wrong, as a Series: "NetA only" ... "NetA, NetB and NetC"."""
    nets = mistakes.groupby("index")["net"].agg(lambda names: tuple(sorted(names)))
    names = {
        one: " and ".join([", ".join(one[:-1]), one[-1]]) if len(one) > 1 else f"{one[0]} only" for one in set(nets)
    }
    return nets.map(names).value_counts().rename("images")


@torch.no_grad()
def spreads(net, name, images, size=1):
    """How much the means that `net`'s norms subtract differ, in units of the standard deviations they divide by.

    name    of the net, for the rows
    images  uint8 (N, 32, 32, 3); statistics are taken over each `size` of them, as batch norm does when training; of
            layer and group norm each image has its own, size 1. RuntimeError unless `size` divides N
    Returns a row per layer: net, images (the size), layer, spread.
    """
    found = {}

    def look(layer, norm, x):
        groups = norm.num_groups if isinstance(norm, nn.GroupNorm) else x.shape[1]
        values = x.unflatten(1, (groups, -1)).unflatten(0, (-1, size))
        both = torch.var_mean(values, (1, 3, 4, 5), correction=0)  # each (images / size, groups)
        found.setdefault(layer, []).append(both)

    blocks = [(layer, block) for layer, block in net.named_children() if isinstance(block, nn.Sequential)]
    hooks = [
        block.norm.register_forward_pre_hook(lambda norm, inputs, layer=layer: look(layer, norm, inputs[0]))
        for layer, block in blocks
    ]
    for part in images.split(max(1, 500 // size) * size):  # some at a time, to spare memory
        net.eval()(standardise(part))
    for hook in hooks:
        hook.remove()
    rows = []
    for layer, parts in found.items():
        variance, mean = (torch.cat(values) for values in zip(*parts, strict=True))
        spread = (mean.var(0).mean() / variance.mean()).sqrt().item()
        rows.append({"net": name, "images": size, "layer": layer, "spread": round(spread, 5)})
    return rows


def draw_spreads(axis, rows):
    """Lines of `spreads` on a Matplotlib axis: dashed where the statistics are an image's own."""
    shades = plt.get_cmap("Blues")
    sizes = sorted(rows[rows["net"] == "NetA"]["images"].unique())
    for (net, size), line in rows.groupby(["net", "images"], sort=False):
        norm = NORM_OF[net]
        alone, several = f"{net}, {norm}: an image's own", f"{net}, {norm}: of {size} images"
        colour = shades(0.4 + 0.5 * sizes.index(size) / len(sizes)) if norm == "batch" else COLOURS[norm]
        style = {"color": colour, "marker": "o", "markersize": 3, "linestyle": "-" if norm == "batch" else "--"}
        axis.plot(line["layer"], line["spread"], label=several if norm == "batch" else alone, **style)
    axis.set(ylabel="spread of the means subtracted,\nin standard deviations", yscale="log")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=2)


def plot_spreads(rows, data):
    """`draw_spreads` as a figure of its own."""
    figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
    draw_spreads(axis, rows)
    axis.set_title(title("How much the subtracted means differ, from batch to batch or image to image", data))
    return figure


def plot_overlap(mistakes, data):
    """Bars of `overlap`, the largest on top."""
    counts = overlap(mistakes).sort_values()
    figure, axis = plt.subplots(figsize=(8, 3), layout="constrained")
    colours = [COLOURS[NORM_OF[name.split()[0]]] if name.endswith("only") else "#555555" for name in counts.index]
    bars = axis.barh(counts.index, counts, color=colours)
    axis.bar_label(bars, padding=3)
    axis.set(xlabel="test images", title=title("Who gets them wrong (seed 0)", data))
    axis.spines[["top", "right"]].set_visible(False)
    return figure
