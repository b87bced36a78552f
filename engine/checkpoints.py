"""Checkpoints, and the fingerprint that tells whether one is of the same run.

A problem is one line that names the file: OSError when it can't be written, ValueError when its content won't do.
"""

import ast
import contextlib
import functools
import gc
import io
import itertools
import sys
import types
import zipfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

import models
from engine.files import ROOT, check_path, read_bytes, save_tensors
from engine.hashes import data_hash, digest, weights_hash
from engine.records import HISTORY, device_name

# What trains, as it was loaded. People copy models.py and utils.py to other folders.
MODELS, UTILS = (Path(getattr(sys.modules.get(name), "__file__", ROOT / f"{name}.py")) for name in ("models", "utils"))
# Files of editors begin with a dot. When this module is loaded again, the first reading stays.
TRAINS = [MODELS.resolve(), UTILS.resolve(), *sorted((ROOT / "engine").glob("[!.]*.py"))]
CODE = globals().get("CODE") or {path: path.read_bytes() for path in TRAINS if path.is_file()}
LIBRARIES = {"filelock", "matplotlib", "numpy", "pandas", "PIL", "scipy", "torch", "torchvision", "tqdm", "triton"}
OF_ALL_MODULES = set(vars(torch.nn.Module()))
PLAIN = (bool, int, float, complex, str, type(None), torch.dtype, torch.device)


def fingerprint(net, data, settings, track, precision=None):
    """Return, as numbers and texts, what must be the same for a run to be the same; `net` is not yet trained.

    precision  a text: the number type of training, and whose step

    ValueError, which says why, where a checkpoint might not hold or not tell all that the net computes from: for a
    buffer that is not saved, and what `describe`, `check_loaded` and `check_imports` raise. What a program sets in a
    class or module while it runs can't be seen.
    """
    device, weights = data.images.device, net.state_dict()
    for name in (name for name, _ in net.named_buffers() if name not in weights):
        advice = "register it with persistent=True, or train without a checkpoint"
        raise ValueError(f"the net's buffer {name} would not be in the checkpoint; {advice}")
    check_loaded()
    check_imports()
    described = {  # each of two words, which no setting can be called
        "torch version": str(torch.__version__),
        "device name": device_name(device),
        "number format": str(precision),
        "thread count": torch.get_num_threads() if device.type == "cpu" else None,
        "training code": digest([*CODE.values()]),
        "net's modules": "\n".join(describe(net)),
        "data name": f"{data.name}, {data.split}",
        "training images": data_hash(data.images),
        "training labels": data_hash(data.labels),
        "test images": data_hash(data.test_images),
        "test labels": data_hash(data.test_labels),
        "each epoch tested": bool(track),
        "initial weights": weights_hash(weights),
    }
    return _savable(asdict(settings)) | described


def describe(net):
    """Return class, parts and settings of each module of a net, and settings of its tensors, as lines of text.

    ValueError for a class that is not of models.py or PyTorch, since its code can't be told; for a setting that is no
    number, text, or tuple or list of them.
    """
    names, lines = {module: name or "net" for name, module in net.named_modules()}, []
    for module, name in names.items():
        cls = type(module)
        known = cls.__module__ == "models" or cls.__module__.startswith("torch.nn.modules.")
        if not known or getattr(sys.modules.get(cls.__module__), cls.__name__, None) is not cls:
            advice = "define it in models.py, or train without a checkpoint"
            raise ValueError(f"{name} is a {cls.__name__}, whose code a checkpoint can't tell; {advice}")
        parts = {part: names.get(one) for part, one in module._modules.items()}
        lines += [f"{name} is a {cls.__module__}.{cls.__name__}", f"{name} has {parts}"]
        lines.append(f"{name} learns {[*module._parameters]}, keeps {[*module._buffers]}")
    tensors = [(tensor, name) for name, tensor in [*net.named_parameters(), *net.named_buffers()]]
    for one, name in [*names.items(), *tensors]:
        for setting, value in sorted(vars(one).items()):
            if setting not in OF_ALL_MODULES:
                if not _is_setting(value):
                    advice = "use a number, a text, or a tuple of them, or train without a checkpoint"
                    raise ValueError(f"{name}.{setting} is a {type(value).__name__}, which can't be told; {advice}")
                lines.append(f"{name}.{setting} {value!r}")
    return lines


def _is_setting(value):
    return all(map(_is_setting, value)) if type(value) in (tuple, list, torch.Size) else type(value) in PLAIN


def check_loaded():
    """Raise ValueError where a file that trains is not as it was loaded, or a function of models.py not as in its file.

    By then the file may have been loaded again, by hand or by IPython's autoreload.
    """
    edited = [path.name for path, content in CODE.items() if read_bytes(path) != content]
    written = [compile(CODE.get(MODELS.resolve(), ""), MODELS, "exec", dont_inherit=True)]
    for one in written:
        written += [part for part in one.co_consts if isinstance(part, types.CodeType)]
    for function in (one for one in gc.get_objects() if type(one) is types.FunctionType):
        if function.__code__.co_filename == models.__file__ and function.__code__ not in written:
            edited.append(MODELS.name)
    if edited:
        raise ValueError(f"{edited[0]} was edited since it was loaded; restart Python, or train without a checkpoint")


def check_imports():
    """Raise ValueError where a file that trains imports another than this project's and its libraries."""
    known = {*sys.stdlib_module_names, *LIBRARIES, "models", "utils", "engine"}
    for path, content in CODE.items():
        for name in sorted(imported(content) - known):
            advice = "move what it needs into the file, or train without a checkpoint"
            raise ValueError(f"{path.name} imports {name}, whose code a checkpoint can't tell; {advice}")


@functools.cache
def imported(content):
    """Return the names of the packages that Python source imports, at the top or within a function."""
    names = set()
    for node in ast.walk(ast.parse(content)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module.partition(".")[0])
    return names


def _savable(value):
    """Return a value in the types that a checkpoint can hold."""
    if isinstance(value, dict):
        return {name: _savable(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_savable(item) for item in value]
    value = value.item() if isinstance(value, np.generic) else value
    return value if value is None or isinstance(value, bool | int | float | str) else repr(value)


def write_checkpoint(path, fingerprint, history, state):
    """Save what a run resumes from: its fingerprint, its history and its state, a nested dict of tensors."""
    save_tensors(path, {"fingerprint": fingerprint, "history": _savable(history), "state": state})


def read_checkpoint(path, fingerprint, steps_per_epoch, like):
    """Return what `write_checkpoint` saved, a dict of fingerprint, history and state; None when absent.

    like  a state of the same run at any step: the saved one must have its keys, shapes and types

    The net may hold the initial weights or the saved ones; the fingerprint that is returned is of the initial ones.
    ValueError, which leaves the file, when it is another run's or damaged; what `check_path` raises for `path`.
    """
    check_path(path)
    advice = "delete it to start anew, or name another file"
    try:
        if (content := read_bytes(path)) is None:
            return None
        saved = load_tensors(content)
        found, history, state = map(saved.get, ("fingerprint", "history", "state"))
        differing = [name for name in {**fingerprint, **found} if found.get(name) != fingerprint.get(name)]
        if differing == ["initial weights"] and weights_hash(state["net"]) == fingerprint["initial weights"]:
            differing = []  # the net that the run left behind
        if not differing:
            _check_progress(found, history, state, steps_per_epoch)
            _check_form(state, like, "state")
            torch.Generator(like["global_step"].device).set_state(state["generator"])  # a dry run
    except Exception as error:  # of many kinds: cut off, altered, not a checkpoint at all
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"{path} can't be read as a checkpoint ({reason[0]}); {advice}") from None
    for name in differing:
        pair = [str(run.get(name)) for run in (found, fingerprint)]
        lines = itertools.zip_longest(*(text.splitlines() for text in pair), fillvalue="")
        pair = next((line for line in lines if line[0] != line[1]), pair)  # the first lines that differ
        common = "".join(a for a, _ in itertools.takewhile(lambda two: two[0] == two[1], zip(*pair, strict=False)))
        start = max(len(common) - len(common.lstrip()), len(common) - 60)
        old, new = ("..." * (len(common) > 60) + text[start:][:90] for text in pair)
        raise ValueError(f"{path} is a checkpoint with {name} {old}, not {new}; {advice}")
    return saved


def load_tensors(content):
    """Load the bytes of a file of `torch.save` onto the CPU; running no code. Raises whatever its damage causes."""
    if zipfile.ZipFile(io.BytesIO(content)).testzip():  # torch.load does not look at the check sums
        raise ValueError("its check sum is wrong")
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def remove_checkpoint(path, history):
    """Remove the checkpoint of the finished run with this history; leave another run's, whose seconds differ."""
    try:
        saved = load_tensors(read_bytes(path))["history"]
    except Exception:  # of many kinds: absent, or as in `read_checkpoint`
        return
    if history and str(saved) == str(_savable(history)):  # as texts, since nan is not nan
        Path(path).unlink(missing_ok=True)


def _check_progress(fingerprint, history, state, steps_per_epoch):
    epochs, step = len(history), int(state["global_step"])
    limit = fingerprint.get("epochs", epochs)
    for number, epoch in enumerate(history, 1):
        numeric = epoch.keys() == set(HISTORY) and all(type(value) in (int, float) for value in epoch.values())
        if not numeric or epoch["epoch"] != number or number > limit:
            raise ValueError(f"epoch {number} of its history is not one of {limit}, with {', '.join(HISTORY)}")
    if not isinstance(history, list) or step != epochs * steps_per_epoch:
        raise ValueError(f"its history has {epochs} epochs, its state is after {step} steps")
    if epochs == 0 and weights_hash(state["net"]) != fingerprint["initial weights"]:
        raise ValueError("its history is empty, its weights are not the initial ones")


def _check_form(value, like, name):
    if isinstance(value, torch.Tensor) and isinstance(like, torch.Tensor):
        form, wanted = ((tuple(x.shape), x.dtype, x.layout, x.is_meta, x.requires_grad) for x in (value, like))
    elif isinstance(value, dict) and isinstance(like, dict):
        form, wanted = list(value), list(like)
    else:
        form, wanted = type(value), type(like)
    if form != wanted:
        raise ValueError(f"its {name} is {form}, not {wanted}")
    for key in like if isinstance(like, dict) else ():
        _check_form(value[key], like[key], f"{name}[{key!r}]")


@contextlib.contextmanager
def restored_on_error(net):
    """Put the net's weights, gradients and modes back when anything is raised inside, KeyboardInterrupt too.

    ValueError for what `state_dict` has beside plain tensors, since it could be neither put back nor saved.
    """
    for name, value in net.state_dict().items():
        plain = isinstance(value, torch.Tensor) and value.layout == torch.strided
        plain = plain and not (value.is_conj() or value.is_neg())
        # A stride of 0 is that of an expanded tensor.
        if not plain or any(size > 1 and step == 0 for size, step in zip(value.shape, value.stride(), strict=True)):
            raise ValueError(f"the net's {name} is no plain tensor, as a checkpoint holds; train without a checkpoint")
    before = {name: value.clone() for name, value in net.state_dict().items()}
    gradients = [(parameter, parameter.grad) for parameter in net.parameters()]
    modes = [(module, module.training) for module in net.modules()]
    try:
        yield
    except BaseException:
        for device in {value.device for value in net.state_dict().values() if value.is_cuda}:
            torch.cuda.synchronize(device)  # enqueued steps would write after us
        for module, mode in modes:
            module.training = mode
        net.load_state_dict(before)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        raise
