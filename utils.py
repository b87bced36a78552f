"""Settings, training, testing and misclassified images for `s8.ipynb`.

Accuracies are percent, losses are nats per image, seconds are wall-clock. Results are from the last epoch.
"""

import contextlib
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import models
from engine import checkpoints, fast, files, hashes, records
from engine.data import check_images, check_text, normalize
from engine.figures import COLORS, save_figure, title
from engine.probe import check_votes, describe_votes, eval_mode
from engine.statistics import contrast
from engine.trainer import DEFINED, OPTIMIZERS, Trainer, check_input, check_kind, kind, layout_kept, takes_fused_step
from models import NORM_OF, choose, show, whole_number

NETS = ("NetA", "NetB", "NetC")
AUGMENTS = ("none", "flip", "flip+crop")
MAX_EPOCHS = 20  # the limit that the comparison sets itself
CHECKPOINT_SECONDS = 1  # from one checkpoint of a run to its next, at least, but for its last


@dataclass(frozen=True)
class Settings:
    """Hyperparameters of one training run, by default the published recipe. ValueError for one that is out of range."""

    learning_rate: float = 0.03  # peak of the schedule, see engine.trainer.schedule
    weight_decay: float = 0.167  # decoupled, multiplied by the learning rate; under sgd an L2 term; see param_groups
    momentum: float = 0.95  # under adamw: beta 1
    optimizer: str = "muon"  # one of engine.trainer.OPTIMIZERS
    batch_size: int = 250  # images; an epoch leaves out what does not fill a batch
    epochs: int = 20
    augment: str = "none"  # one of AUGMENTS, see engine.trainer.Trainer.epoch
    crop: int = 2  # pixels by which random crops move an image, at most
    label_smoothing: float = 0.1  # share of the loss that all classes have alike
    warmup: float = 0.2  # share of the steps in which the learning rate rises
    seed: int = 0  # of initial weights, order of the images and augmentation

    def __post_init__(self):
        highest = {"learning_rate": 10, "weight_decay": 100, "momentum": 0.999, "label_smoothing": 1, "warmup": 0.99}
        for name, high in highest.items():
            value = getattr(self, name)
            value = value.item() if isinstance(value, np.number) else value
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= high:
                raise ValueError(f"{name} is {show(value)}; give a number from 0 to {high}")
            if value == 0 and name in ("learning_rate", "warmup", *["momentum"] * (self.optimizer in ("sgd", "sgdw"))):
                raise ValueError(f"{name} is 0; give a number above 0")
            object.__setattr__(self, name, float(value) + 0)  # -0.0 is 0.0
        for name, low in (("batch_size", 1), ("epochs", 1), ("seed", 0)):
            object.__setattr__(self, name, whole_number(name, getattr(self, name), low))
        object.__setattr__(self, "crop", whole_number("crop", self.crop, 0, 16))
        for name, choices in (("optimizer", OPTIMIZERS), ("augment", AUGMENTS)):
            object.__setattr__(self, name, choose(name, getattr(self, name), choices))


def pick_device(name=None):
    """Return the torch.device called `name`, or the best of CUDA, MPS and CPU. ValueError for one that is not here."""
    available = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    available = ["cuda"] * bool(available) + available + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    return torch.device(choose("device", str(available[0] if name is None else name), available))


def run_length(device, seeds=None, epochs=None):
    """Return the seeds, (0, 1, ...), and the epochs of the notebook's runs. ValueError for what is out of range.

    None means the default: 3 seeds of 20 epochs on a GPU, 1 seed of 5 epochs on a CPU.
    """
    seeds = (1 if device.type == "cpu" else 3) if seeds is None else whole_number("seeds", seeds, 1, 1000)
    epochs = (5 if device.type == "cpu" else MAX_EPOCHS) if epochs is None else epochs
    return tuple(range(seeds)), whole_number("epochs", epochs, 1, MAX_EPOCHS)


# ---------------------------------------------------------------------------------------------------------------------
# Training and testing
# ---------------------------------------------------------------------------------------------------------------------


def build(name, settings, **options):
    """Build NetA, NetB, NetC or Net (the control without a norm) with initial weights drawn from settings.seed.

    options are those of `models.Net`. ValueError for another name, or for options that it can't be built from.
    """
    choose("net", name, NORM_OF)
    torch.manual_seed(settings.seed)
    if name in NETS:
        return getattr(models, name)(**options)
    return models.Net(NORM_OF[name], **options)


def check_arguments(data, settings):
    """Raise TypeError, in one line, unless these are, or look like, `engine.data.Data` and `Settings`."""
    if not hasattr(data, "test_images"):
        raise TypeError(f"data is {kind(data)}; give what engine.data.load_data returns")
    if not hasattr(settings, "batch_size") or isinstance(settings, type):
        raise TypeError(f"settings is {kind(settings)}; give Settings()")


def train(net, data, settings, label="", track=True, fused=None, checkpoint=None):
    """Train `net` in place on `data`; returns its history, a dict per epoch. It ends on the data's device.

    track       test after each epoch
    fused       whether to take the step of engine.kernels, see `engine.trainer.takes_fused_step`
    checkpoint  file written first, once a second at most, and at the end; where it exists, training resumes bit for bit

    The history's keys are epoch (from 1), loss (with label smoothing) and train_accuracy (both while training),
    test_accuracy (nan unless `track`), learning_rate (of the last step), seconds (of training alone) and elapsed
    (seconds from the start, without pauses). Equal settings, machine, torch, Triton and threads give equal weights.

    ValueError, see `engine.trainer.Trainer`, also when the checkpoint is damaged or of another run, or might not hold
    or tell all that the net computes from, see `engine.fast.reason_against_copy` and `engine.checkpoints.fingerprint`,
    or the optimizer is not of `engine.trainer`; TypeError for another kind of net, data or settings; MemoryError when a
    batch takes more than the GPU has; FloatingPointError when a gradient is not finite. A call with `checkpoint` that
    is interrupted leaves `net` as it was before.
    """
    started = time.perf_counter()
    check_kind(net)
    check_arguments(data, settings)
    device = data.images.device
    if device.type == "cpu":
        fast.keep_memory()
    if checkpoint is not None and (reason := fast.reason_against_copy(net)):
        raise ValueError(f"{reason}; train without a checkpoint, or see CONTRIBUTING.md, A norm of your own")
    if checkpoint is not None and OPTIMIZERS[settings.optimizer] is not DEFINED.get(settings.optimizer):
        advice = "add it there, or train without a checkpoint"
        raise ValueError(f"optimizer {settings.optimizer!r} is not that of engine/trainer.py; {advice}")
    if checkpoint is not None:
        files.check_path(checkpoint)
        checkpoint = Path(checkpoint).expanduser()
    net.to(device)
    history = []
    restored = contextlib.nullcontext() if checkpoint is None else checkpoints.restored_on_error(net)
    with layout_kept(net), restored:
        try:
            trainer = Trainer(net, data, settings, fused)
        except torch.OutOfMemoryError:
            message = f"batch_size is {settings.batch_size}: that takes more than the memory of {device}"
            raise MemoryError(f"{message}; try {max(1, settings.batch_size // 2)}") from None
        if checkpoint is not None:
            step = f"fused step of Triton {trainer.fused.triton_version}" if trainer.fused else "PyTorch's step"
            run = checkpoints.fingerprint(net, data, settings, track, f"{trainer.dtype}, {step}")
            saved = checkpoints.read_checkpoint(checkpoint, run, trainer.steps_per_epoch, trainer.state_dict())
            if saved:
                run, history = saved["fingerprint"], saved["history"]
                trainer.load_state_dict(saved["state"])
                started -= history[-1]["elapsed"] if history else 0
            else:  # so that a run that ends in its first epoch is not resumed from half-trained weights
                checkpoints.write_checkpoint(checkpoint, run, history, trainer.state_dict())
        written = time.perf_counter()
        form = "{desc} {percentage:3.0f}% |{bar:20}| {elapsed}<{remaining}{postfix}"
        wait = 1 if sys.stdout.isatty() else 10  # seconds: a notebook saves each
        total, done = trainer.steps_per_epoch * settings.epochs, trainer.steps_per_epoch * len(history)
        with tqdm(total=total, initial=done, desc=label, file=sys.stdout, bar_format=form, mininterval=wait) as bar:
            for epoch in range(len(history) + 1, settings.epochs + 1):
                epoch_started = time.perf_counter()
                for _ in trainer.epoch():
                    bar.update()
                loss, accuracy = trainer.means()
                trainer.check_finite()
                seconds = time.perf_counter() - epoch_started
                tested = test(net, data.test_images, data.test_labels).accuracy if track else math.nan
                rate = trainer.learning_rates[epoch * trainer.steps_per_epoch - 1].item()
                values = (epoch, loss, accuracy, tested, rate, seconds, time.perf_counter() - started)
                history.append(dict(zip(records.HISTORY, values, strict=True)))
                due = epoch == settings.epochs or time.perf_counter() - written >= CHECKPOINT_SECONDS
                if checkpoint is not None and due:
                    checkpoints.write_checkpoint(checkpoint, run, history, trainer.state_dict())
                    written = time.perf_counter()
                message = f"epoch {epoch}, loss {loss:.3f}, train {accuracy:.1f}%"
                bar.set_postfix_str(message + (f", {data.split} {tested:.1f}%" if track else ""), refresh=False)
    return history


@dataclass(frozen=True)
class Scores:
    """What `test` measures. predictions, confidences: (N,), on the CPU."""

    loss: float
    accuracy: float
    predictions: torch.Tensor
    confidences: torch.Tensor  # softmax probability of the prediction, 0 to 1


@torch.no_grad()
def test(net, images, labels):
    """Score `net` on uint8 images (N, 32, 32, 3) with labels (N,): float32 without TF32, no test-time augmentation.

    `net` keeps its mode, training or eval, module by module.
    """
    check_images(images, labels, classes=getattr(getattr(net, "c11", None), "out_channels", 2**63))
    check_input(net)
    size = 100 if images.device.type == "cpu" else 2500  # images at once: on a CPU, what its cache holds
    flags = torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
    with eval_mode(net), flags, torch.autocast(images.device.type, enabled=False):
        logits = torch.cat([net(normalize(part)) for part in images.split(size)])
    confidences, predictions = logits.softmax(1).max(1)
    loss, accuracy = F.cross_entropy(logits, labels).item(), 100 * (predictions == labels).float().mean().item()
    return Scores(loss, accuracy, predictions.cpu(), confidences.cpu())


# ---------------------------------------------------------------------------------------------------------------------
# Runs and their rows
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A finished run: its net, history, scores on the test or validation split, and row for results/runs.csv."""

    net: nn.Module
    history: list
    scores: Scores
    row: dict
    images: str = ""  # engine.hashes.test_hash of what it was scored on

    @property
    def name(self):
        """Net, norm and seed, for titles."""
        return f"{self.row['norm']} norm ({self.row['net']}), seed {self.row['seed']}"


def run(name, data, settings, study="main", track=True, checkpoints=None):
    """Build, train and score the net called `name`; see `build`, `train` and `test`.

    study        a name for the run's row, after "synthetic" on synthetic data. The row does not tell apart runs on
                 other training images or labels, such as noisy ones: give each a study of its own
    checkpoints  folder for the run's checkpoint, in that of `save_runs`: what that would refuse is refused at once
    """
    check_text("study", study)
    check_arguments(data, settings)
    records.code_commit()  # of the code that runs, whatever is edited while it does
    net = build(name, settings, classes=len(data.classes))
    if checkpoints:
        files.check_path(checkpoints)
        checkpoints = Path(checkpoints).expanduser()
        records.check_folder(checkpoints.parent, settings_columns(name, net, data, settings, study), data)
    label = f"{name} {net.norm} norm, seed {settings.seed}" + (f" [{data.name}]" if data.synthetic else "")
    checkpoint = checkpoints and checkpoints / f"{name}-{settings.seed}.pt"
    history = train(net, data, settings, label, track, checkpoint=checkpoint)
    return finish(name, net, data, settings, history, study, history[-1]["elapsed"])


def settings_columns(name, net, data, settings, study):
    """Return the columns of a run's row that tell it apart, which are known before it."""
    if data.synthetic:
        study = "synthetic" if study == "main" else f"synthetic {study}"
    elif study == "main" and settings.epochs < MAX_EPOCHS:
        study = "short"
    return {
        "study": study,
        "dataset": data.name,
        "net": name,
        **records.net_columns(net, settings.batch_size),
        **{setting: value for setting, value in asdict(settings).items() if setting in Settings.__dataclass_fields__},
        "train_images": len(data.images),
        "split": data.split,
    }


def finish(name, net, data, settings, history, study, seconds, diverged=False, fused=None):
    """Score a trained net and make its `Run`; `seconds` is what its training took, `fused` as in `train`.

    The row of a run that diverged has no accuracies.
    """
    scores = test(net, data.test_images, data.test_labels)
    accuracy = {f"{split}_accuracy": "" for split in ("train", "test", "validation")} | {"test_loss": ""}
    if not diverged:
        accuracy["train_accuracy"] = round(test(net, data.images, data.labels).accuracy, 3)
        accuracy[f"{data.split}_accuracy"] = round(scores.accuracy, 3)
        accuracy["test_loss"] = round(scores.loss, 5) if data.split == "test" else ""
    row = settings_columns(name, net, data, settings, study) | {
        "precision": str(fast.training_precision(net, data.images.device)).removeprefix("torch."),
        "step": "fused" if takes_fused_step(net, data.images.device, fused) else "PyTorch",
        "parameters": sum(p.numel() for p in net.parameters()),
        **accuracy,
        "seconds": round(seconds, 2),
        "device": records.device_name(data.images.device),
        "torch": torch.__version__,
        "commit": records.code_commit(),
        "status": "diverged" if diverged else "done",
    }
    return Run(net, history, scores, row, hashes.test_hash(data))


def save_runs(runs, data, folder):
    """Write one net's runs under `folder`: rows, histories, predictions, and the first seed's weights and mistakes.

    They replace what is there of this net; only rows of other settings or seeds stay. Removes the runs' checkpoints, in
    folder/checkpoints. ValueError, before anything is written, for a folder with runs of other data and for those that
    `engine.files.output_folder` refuses, such as a checkout with its published results.
    """
    folder, runs = Path(folder).expanduser(), sorted(runs, key=lambda one: one.row["seed"])
    results = folder / "results"
    records.check_runs(runs, data)
    records.check_folder(folder, runs[0].row, data)
    first, name, seeds = runs[0], runs[0].row["net"], [one.row["seed"] for one in runs]
    mistakes = mistakes_table(first, data)
    predictions = torch.stack([one.scores.predictions for one in runs]).numpy()
    labels, images = data.test_labels.cpu().numpy(), hashes.test_hash(data)
    records.save_predictions(results / "predictions.npz", name, seeds, predictions, labels, images)
    records.upsert(results / "runs.csv", [one.row for one in runs])
    records.upsert(results / "history.csv", records.history_table(runs), key={"net": name})
    records.upsert(results / "mistakes.csv", mistakes, key={"net": name})
    weights = {key: value.cpu().contiguous() for key, value in first.net.state_dict().items()}
    files.save_tensors(folder / "weights" / f"{name}.pt", weights)
    for one in runs:
        checkpoints.remove_checkpoint(folder / "checkpoints" / f"{name}-{one.row['seed']}.pt", one.history)


def summarize(rows):
    """Tabulate rows of results/runs.csv, a line per net and setting: accuracies in percent, n seeds.

    Settings in which the rows of a net differ have a column each. Seconds are the median of a run. ValueError for no
    rows, an accuracy that is no number, and a seed that is there twice.
    """
    rows = records.table_of(rows)
    for name in ("train_accuracy", "test_accuracy", "seconds"):
        rows[name] = records.numbers(rows, name)
    keys = dict.fromkeys(["net", "norm", "study", "epochs", "augment", "parameters", *records.mixed_settings(rows)])
    if rows.assign(seed=rows["seed"].astype(str)).duplicated([*keys, "seed"]).any():
        raise ValueError("the rows hold a seed twice; give each run once")
    rows["n"] = rows["seed"].where(rows[["train_accuracy", "test_accuracy"]].notna().any(axis=1))
    columns = {
        "test accuracy, %": ("test_accuracy", "mean"),
        "std": ("test_accuracy", "std"),
        "n": ("n", "nunique"),
        "training accuracy, %": ("train_accuracy", "mean"),
        "seconds per run": ("seconds", "median"),
    }
    table = rows.groupby(list(keys), sort=False, dropna=False).agg(**columns).round(2).reset_index().set_index("net")
    return table.drop(columns=[key for key in ("study", "augment") if set(table[key]) <= {"main", "short", "none"}])


def compare(rows, pairs=(("batch", "layer"), ("batch", "group"), ("group", "layer"))):
    """Tabulate differences in test accuracy between norms, in percentage points, with Welch's 95% interval.

    ValueError for a norm without rows, rows of several settings or without a test accuracy, and a seed that is twice.
    Norms may differ in learning rate and weight decay, since these are tuned for each.
    """
    rows = records.table_of(rows)
    accuracy = {}
    for norm in dict.fromkeys(norm for pair in pairs for norm in pair):
        own = rows[rows["norm"] == norm]
        if own.empty:
            raise ValueError(f"no row has the norm {norm!r}; there are {', '.join(sorted(set(rows['norm'])))}")
        if mixed := records.mixed_settings(own.assign(net="")):  # of several nets, too
            raise ValueError(f"the rows of {norm} norm differ in {', '.join(mixed)}; compare rows of one setting")
        if own["seed"].astype(str).duplicated().any():
            raise ValueError(f"the rows of {norm} norm hold a seed twice; give each run once")
        accuracy[norm] = records.numbers(own, "test_accuracy")
        if accuracy[norm].isna().any():
            raise ValueError(f"a row of {norm} norm has no test accuracy; leave out what diverged or was validated")
    rows = rows[rows["norm"].isin(accuracy)]
    of_norms = {"seed", "net", "norm", "learning_rate", "weight_decay", *records.statistics_columns("", 0, 0)}
    for name in rows.columns.difference(records.NON_KEY_COLUMNS | of_norms, sort=False):
        if rows[name].nunique(dropna=False) > 1:
            raise ValueError(f"rows to compare differ in {name}: {', '.join(map(str, rows[name].unique()))}")
    lines = []
    for first, second in pairs:
        found = contrast(accuracy[first], accuracy[second])._asdict()
        n = min(len(accuracy[first]), len(accuracy[second]))
        lines.append({"pair": f"{first} minus {second}", **found, "n": n})
    return pd.DataFrame(lines).set_index("pair").drop(columns="p").round(2)


# ---------------------------------------------------------------------------------------------------------------------
# Misclassified images
# ---------------------------------------------------------------------------------------------------------------------


def most_confident_mistakes(predictions, confidences, labels, count=10):
    """Return the indices of at most `count` wrong predictions, the most confident first, ties by index.

    predictions, labels: (N,) int64; confidences: (N,), 0 to 1; all on the CPU.
    """
    wrong = (predictions != labels).nonzero().flatten()
    return wrong[confidences[wrong].argsort(descending=True, stable=True)][:count]


def mistakes_table(run, data):
    """Tabulate the test images that a run gets wrong: net, index, true and predicted class, confidence (0 to 1)."""
    records.check_tested(run, data)
    scores, labels = run.scores, data.test_labels.cpu()
    wrong = (scores.predictions != labels).nonzero().flatten()
    whole_number("a predicted class", scores.predictions.max().item(), 0, len(data.classes) - 1)
    return pd.DataFrame(
        {
            "net": run.row["net"],
            "index": wrong.numpy(),
            "true": [data.classes[i] for i in labels[wrong]],
            "predicted": [data.classes[i] for i in scores.predictions[wrong]],
            "confidence": [round(value, 4) for value in scores.confidences[wrong].tolist()],
        }
    )


def plot_mistakes(run, data, path=None, votes=None):
    """Draw a run's ten most confident mistakes as 5 rows by 2 columns, or as many as there are; save it as `path`.

    votes  (N, classes) counts of what people answered for each test image, from `engine.data.human_votes`
    """
    records.check_tested(run, data)
    labels, scores = data.test_labels.cpu(), run.scores
    if votes is not None:
        check_votes(votes, data)
    chosen = most_confident_mistakes(scores.predictions, scores.confidences, labels).tolist()
    figure, axes = plt.subplots(5, 4, figsize=(8, 7.9), width_ratios=(1, 2.15) * 2)
    figure.subplots_adjust(0.01, 0.01, 0.99, 0.89 if data.synthetic else 0.92, wspace=0.05, hspace=0.12)
    heading = f"The {len(chosen)} most confident mistakes\n{run.name}" if chosen else f"No mistakes\n{run.name}"
    figure.suptitle(title(heading, data), fontsize=14, y=0.99)
    for axis in axes.flat:
        axis.axis("off")
    for (image, text), index in zip(axes.reshape(10, 2), chosen, strict=False):
        image.imshow(data.test_images[index].cpu().numpy(), interpolation="nearest")
        guess, truth = data.classes[scores.predictions[index]], data.classes[labels[index]]
        confidence = f"net: {guess}, {100 * scores.confidences[index]:.0f}%"
        text.text(0, 0.78, confidence, fontsize=13, weight="bold", color=COLORS[run.row["norm"]])
        text.text(0, 0.54, f"label: {truth}", fontsize=13)
        if votes is not None:
            text.text(0, 0.32, f"people: {describe_votes(votes[index], data.classes)}", fontsize=10.5)
        text.text(0, 0.08, f"{data.split} image {index}", fontsize=10, color="#555555")
    if path:
        save_figure(path, figure)
    return figure
