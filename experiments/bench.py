"""Time this project's training beside the plain loop that notebooks like it use.

    python -m experiments.bench            measure, write results/bench.csv, print the table
    python -m experiments.bench --scale    measure over batch sizes, widths and numbers of training images
    python -m experiments.bench --check    compare the weights that the eager, captured and fused steps reach

Needs CIFAR-10. An epoch is every training image once, forward, backward and update, without evaluation. The paths:

    plain-0, plain-4  torchvision's dataset, ToTensor and Normalize in a DataLoader with 0 or 4 workers, batch 128,
                      float32, SGD, loss and accuracy fetched in each step
    eager             the step in PyTorch, one kernel launched after another
    captured          the same, captured as a CUDA graph: utils.train(..., fused=False) on a GPU
    fused             the step of engine.kernels, captured as a CUDA graph: what utils.train does on a newer GPU
    fused-125, fused-250    the same at batch sizes of 125 and 250, the published one; 500 elsewhere
    captured-3, fused-3    three nets at once on one GPU, as experiments.run trains them: seconds per net and epoch

On a CPU there is nothing to capture: eager is what utils.train does. The plain loop runs in the same process, so there
it profits from fast.keep_memory, too. The rows of --scale have the path "scale". What was tried is in bench_log.md.
"""

import argparse
import contextlib
import io
import itertools
import math
import statistics
import time
import warnings
from dataclasses import replace

import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn
from torchvision import transforms
from torchvision.datasets import CIFAR10

import models
import utils
from engine import fast, records
from engine.data import load_data
from engine.trainer import Trainer
from experiments import ROOT
from models import NORM_OF
from utils import NETS, Settings

BENCH = ROOT / "results" / "bench.csv"
PLAIN_BATCH = 128
SIZES = {"fused-125": 125, "fused-250": 250}  # batch sizes of some paths
STANDARD = 500  # of the others, but for the plain loop's


class PlainLoop:
    """The plain loop. `epoch` gives the seconds of an epoch, from `images` of the training images if not from all."""

    def __init__(self, name, device, workers, images, root=ROOT / "data"):
        steps = [transforms.ToTensor(), transforms.Normalize(models.MEAN.flatten(), models.STD.flatten())]
        warnings.filterwarnings(
            "ignore", "This DataLoader will create"
        )  # more workers than cores: that is the plain loop
        dataset = CIFAR10(root, transform=transforms.Compose(steps))
        self.loader = torch.utils.data.DataLoader(dataset, PLAIN_BATCH, shuffle=True, num_workers=workers)
        self.steps = math.ceil(images / PLAIN_BATCH)
        self.net = utils.build(name, Settings()).to(device).train()
        self.optimizer = torch.optim.SGD(self.net.parameters(), 0.05, momentum=0.9)
        self.device = device

    def epoch(self):
        right = seen = 0
        start = time.perf_counter()
        for images, labels in itertools.islice(self.loader, self.steps):
            images, labels = images.to(self.device), labels.to(self.device)
            self.optimizer.zero_grad()
            logits = self.net(images)
            loss = F.cross_entropy(logits, labels)
            loss.backward()
            self.optimizer.step()
            right += (logits.argmax(1) == labels).sum().item()
            seen += len(labels)
            loss.item(), right / seen  # what such loops show in their progress bar
        return (time.perf_counter() - start) * len(self.loader) / self.steps


class TrainerLoop:
    """Time an epoch of `engine.trainer.Trainer` on one net, or on `at_once` of them in turn: seconds per net.

    setup_seconds is what came before the first epoch, peak_memory_mib the most GPU memory that it needed.
    """

    def __init__(self, name, data, settings, images, fused=None, capture=True, width=1, at_once=1):
        self.device = data.images.device
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated() - data.images.nbytes - data.test_images.nbytes
        start = time.perf_counter()
        widths = tuple(width * channels for channels in models.WIDTHS)
        nets = [utils.build(name, settings, widths=widths) for _ in range(at_once)]
        self.trainers = [Trainer(net, data, settings, fused, capture, stream=number) for number, net in enumerate(nets)]
        synchronize(self.device)
        self.setup_seconds = time.perf_counter() - start
        self.steps = images // settings.batch_size
        self.epoch()
        self.peak_memory_mib = ""
        if self.device.type == "cuda":
            self.peak_memory_mib = round((torch.cuda.max_memory_allocated() - before) / 2**20)

    def epoch(self):
        start = time.perf_counter()
        for trainer in self.trainers:
            for _ in itertools.islice(trainer.epoch(), self.steps):
                pass
        for trainer in self.trainers:
            trainer.means()  # waits for the device
        return (time.perf_counter() - start) * trainer.steps_per_epoch / self.steps / len(self.trainers)


def step_bytes(net, batch_size, bytes_each=2):
    """Bytes that one step moves through memory when each operation reads its inputs and writes its outputs once.

    Counts activations and their gradients, layer by layer; weights are far smaller. Forward, a convolution reads and
    writes, a norm reads twice (statistics, then values) and writes, an activation and a pool read and write. Backward,
    a convolution reads the gradient twice and its input once and writes a gradient; a norm reads gradient and input
    twice and writes; an activation reads gradient and input and writes; a pool reads and writes.
    """
    sizes, total = {}, 0
    hooks = [
        m.register_forward_hook(lambda m, x, y: sizes.update({m: (x[0].numel(), y.numel())})) for m in net.modules()
    ]
    with torch.no_grad():
        net.eval()(torch.zeros(1, 3, 32, 32, device=next(net.parameters()).device))
    for hook in hooks:
        hook.remove()
    for module, (read, written) in sizes.items():
        if isinstance(module, nn.Conv2d):
            total += read + written + 2 * written + 2 * read
        elif isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
            total += 3 * read + 5 * read
        elif isinstance(module, nn.SiLU):
            total += 2 * read + 3 * read
        elif isinstance(module, nn.AvgPool2d | nn.AdaptiveAvgPool2d):
            total += 2 * (read + written)
    return total * batch_size * bytes_each


def fused_bytes(fused):
    """Bytes that a fused step moves through memory when all that its kernels hand on is written and read once each.

    The output of a convolution has three readers: the next layer, its own backward pass and the next layer's. What a
    layer reads after a pool, and the first one, is kept for the backward pass.
    """
    total = 0
    for layer in fused.layers:
        total += 4 * layer.x.nbytes + 2 * layer.dy.nbytes
        if not layer.before or layer.before.pool > 1:
            total += 2 * layer.y.nbytes
    return total - fused.layers[-1].x.nbytes  # there is no next layer


def copy_bandwidth(device):
    """Bytes per second of a large copy on the device, read and written: the fastest that memory is seen to go."""
    source = torch.randn(2**28 if device.type == "cuda" else 2**26, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(10):
        synchronize(device)
        start = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * source.numel() * source.element_size() / statistics.median(seconds)


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def launches(trainer):
    """Kernels, copies and fills that one step starts on the GPU, counted by the profiler; "" on a CPU."""
    if trainer.stream is None:
        return ""
    trainer.counts.zero_()
    trainer.means()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        with trainer.on_stream():
            trainer.replay()
        trainer.stream.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def row_of(data, path, net, seconds, settings, width=1, **more):
    """A row for results/bench.csv."""
    device = data.images.device
    return {
        "device": records.device_name(device),
        "torch": torch.__version__,
        "path": path,
        "net": net,
        "batch_size": PLAIN_BATCH if path.startswith("plain") else settings.batch_size,
        "width": width,
        "train_images": len(data.images),
        "seconds_per_epoch": round(statistics.median(seconds), 4),
        "seconds_min": round(min(seconds), 4),
        "seconds_max": round(max(seconds), 4),
        "warmup_seconds": "",
        "run_seconds": "",
        "run_tested_seconds": "",
        "peak_memory_mib": "",
        "ratio_plain_0": "",
        "ratio_plain_4": "",
        "dram_model_seconds": "",
        "launches_per_step": "",
        "precision": "float32" if path.startswith("plain") else str(fast.pick_precision(device)).split(".")[1],
        "commit": records.code_commit(),
    } | more


ALL_PATHS = ("plain-0", "plain-4", "eager", "captured", "captured-3", "fused", "fused-125", "fused-250", "fused-3")
KEY = ["device", "path", "net", "batch_size", "width", "train_images"]


def run_seconds(net, data, settings, fused, track):
    """Seconds of a 20-epoch run that is not the first of its net, from the call of `train` to its last test."""
    settings = replace(settings, seed=1)
    made = utils.build(net, settings)
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        utils.train(made, data, settings, track=track, fused=fused)
    if not track:
        utils.test(made, data.test_images, data.test_labels)
    return time.perf_counter() - start


def bench(data, epochs):
    """Measure every path of every net on the data's device, plain and fast epochs in turn; a list of rows.

    On a CPU each measurement is of a fifth of an epoch, scaled up. On a GPU the plain loop is measured with NetA alone.
    """
    device = data.images.device
    bandwidth = copy_bandwidth(device)
    images = len(data.images) if device.type == "cuda" else len(data.images) // 5
    fast_paths = {"eager": {"fused": False, "capture": False}}
    if device.type == "cuda":
        fast_paths |= {"captured": {"fused": False}, "captured-3": {"fused": False, "at_once": 3}}
        fast_paths |= {path: {"fused": True} for path in ("fused", *SIZES)} | {"fused-3": {"fused": True, "at_once": 3}}
    rows, medians = [], {}
    for net in NETS:
        settings = {path: Settings(batch_size=SIZES.get(path, STANDARD)) for path in ALL_PATHS}
        loops = {
            path: TrainerLoop(net, data, settings[path], images, **options) for path, options in fast_paths.items()
        }
        if net == "NetA" or device.type == "cpu":  # on a GPU all nets wait for the same loader: one tells it all
            loops |= {"plain-4": PlainLoop(net, device, 4, images), "plain-0": PlainLoop(net, device, 0, images)}
        seconds = {path: [] for path in loops}
        for _ in range(epochs):
            for path, loop in loops.items():
                seconds[path].append(loop.epoch())
        medians |= {path: statistics.median(values) for path, values in seconds.items()}
        for path, loop in loops.items():
            measured = {}
            if isinstance(loop, TrainerLoop):
                trainer, size = loop.trainers[0], settings[path].batch_size
                fused = trainer.fused is not None
                bytes_moved = fused_bytes(trainer.fused) if fused else step_bytes(utils.build(net, Settings()), size)
                bytes_moved *= trainer.steps_per_epoch
                measured = {
                    "warmup_seconds": round(loop.setup_seconds, 2),
                    "peak_memory_mib": loop.peak_memory_mib,
                    "dram_model_seconds": round(bytes_moved / bandwidth, 4),
                    "launches_per_step": launches(trainer),
                    "ratio_plain_0": round(medians["plain-0"] / medians[path], 1),
                    "ratio_plain_4": round(medians["plain-4"] / medians[path], 1),
                }
                if path in ("captured", "fused", "fused-250"):
                    own = settings[path]
                    measured["run_seconds"] = round(run_seconds(net, data, own, fused, track=False), 2)
                    measured["run_tested_seconds"] = round(run_seconds(net, data, own, fused, track=True), 2)
            rows.append(row_of(data, path, net, seconds[path], settings[path], **measured))
            print(f"{path:10} {net} {medians[path]:8.3f} s an epoch", flush=True)
        records.upsert(BENCH, rows, KEY)  # a net's rows are kept whatever happens to the next one
    return rows


def scale(data, epochs):
    """Rows of the step that `train` takes by itself, over batch sizes, widths and training images, one at a time."""
    device = data.images.device
    bandwidth = copy_bandwidth(device)
    cases = [(size, 1, 50_000) for size in (64, 128, 256, STANDARD, 1024, 2048, 4096)]
    cases += [(STANDARD, width, 50_000) for width in (2, 4)]
    cases += [(STANDARD, 1, images) for images in (5_000, 10_000, 20_000)]
    rows = []
    for net, (size, width, images) in itertools.product(("NetA", "NetC"), cases):
        some = replace(data, images=data.images[:images], labels=data.labels[:images])
        settings = Settings(batch_size=size)
        loop = TrainerLoop(net, some, settings, images if device.type == "cuda" else max(size, 4000), width=width)
        seconds = [loop.epoch() for _ in range(epochs)]
        trainer = loop.trainers[0]
        bytes_moved = fused_bytes(trainer.fused) if trainer.fused else step_bytes(trainer.net, size)
        bytes_moved *= trainer.steps_per_epoch
        measured = {
            "peak_memory_mib": loop.peak_memory_mib,
            "dram_model_seconds": round(bytes_moved / bandwidth, 4),
            "launches_per_step": launches(trainer),
        }
        rows.append(row_of(some, "scale", net, seconds, settings, width, **measured))
        print(f"{net} batch {size} width {width} images {images}: {statistics.median(seconds):.3f} s", flush=True)
        records.upsert(BENCH, rows, KEY)
    return rows


def check(data):
    """How far each path's weights are from the eager one's after two epochs, per net; SystemExit if it is too far."""
    few = replace(data, images=data.images[:10_000], labels=data.labels[:10_000])
    for net in NORM_OF:
        weights = {}
        paths = {"eager": {"fused": False, "capture": False}, "captured": {"fused": False}, "fused": {}}
        for path, options in paths.items():
            settings = Settings(epochs=2, augment="flip+crop")
            made = utils.build(net, settings)
            trainer = Trainer(made, few, settings, **options)
            for _ in range(2):
                for _ in trainer.epoch():
                    pass
            loss, _ = trainer.means()
            weights[path] = torch.cat([p.detach().flatten() for p in made.parameters()]), loss
        eager, loss = weights["eager"]
        for path, (other, other_loss) in weights.items():
            apart = ((other - eager).norm() / eager.norm()).item()
            print(f"{net} {path:8}: loss {other_loss:.4f}, weights {apart:.1e} from eager's (relative norm)")
            if (path == "captured" and apart > 0) or abs(other_loss - loss) > 0.05:
                raise SystemExit(f"{net}: the {path} step does not compute what the eager one does")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", action="store_true", help="measure over batch sizes, widths and images instead")
    parser.add_argument("--check", action="store_true", help="compare the paths' weights instead")
    parser.add_argument("--epochs", type=int, default=5, help="epochs of each path, of which the median counts")
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    try:
        models.whole_number("epochs", options.epochs)
        data = load_data(utils.pick_device(), "cifar10", ROOT / "data")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    synchronize(data.images.device)
    if data.images.device.type == "cpu":
        fast.keep_memory()
    print(
        f"{records.device_name(data.images.device)}: CIFAR-10 from disk to device {time.perf_counter() - start:.2f} s"
    )
    if options.check:
        check(data)
        return
    rows = scale(data, options.epochs) if options.scale else bench(data, options.epochs)
    print(pd.DataFrame(rows).drop(columns=["device", "torch", "commit"]).to_string(index=False))


if __name__ == "__main__":
    main()
