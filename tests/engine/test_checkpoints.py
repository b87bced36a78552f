"""Checkpoints, fingerprints and hashes: nothing of another run is taken, nothing damaged is read."""

import errno
import functools
import importlib
import io
import itertools
import os
import pickle
import random
import shutil
import struct
import sys
import tempfile
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, Evil, copy_checkout, refused, run_together, same
from torch import nn

import models
import utils
from engine import checkpoints, fast, hashes
from engine.data import Data
from engine.trainer import OPTIMIZERS, Trainer
from experiments import variants

SETTINGS = utils.Settings(epochs=3, batch_size=20, augment="flip+crop")
GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.randint(0, 256, (80, 32, 32, 3), dtype=torch.uint8, generator=GENERATOR)
LABELS = torch.arange(80) % 10
DATA = Data(IMAGES[:60], LABELS[:60], IMAGES[60:], LABELS[60:])


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints of another run
# ---------------------------------------------------------------------------------------------------------------------


def trained(path=None, net=None, data=DATA, settings=SETTINGS, **options):
    net = net or utils.build("NetA", settings)
    history = utils.train(net, data, settings, checkpoint=path, **options)
    return net.state_dict(), history


class Interrupted:
    """Inside, training stops with KeyboardInterrupt at a step counted from 1."""

    def __init__(self, monkeypatch, step):
        self.context, self.left, self.step = monkeypatch.context(), step, Trainer.step

    def __enter__(self):
        def count(trainer):
            self.step(trainer)
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt

        self.context.__enter__().setattr(Trainer, "step", count)

    def __exit__(self, *error):
        self.context.__exit__(*error)
        assert error[0] is KeyboardInterrupt
        return True


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The checkpoint of a finished run of NetA."""
    path = tmp_path_factory.mktemp("finished") / "run.pt"
    trained(path)
    return path


def swap(tensor, *places):
    """Return a copy with two rows swapped."""
    order = list(range(len(tensor)))
    for place, other in zip(places, reversed(places), strict=True):
        order[place] = other
    return tensor[order]


def reordered(order):
    return replace(DATA, images=DATA.images[order], labels=DATA.labels[order])


def altered(name, *place, by=1):
    tensor = getattr(DATA, name).clone()
    tensor[place] += by
    return replace(DATA, **{name: tensor})


OTHER_DATA = {
    "another order": (reordered(torch.arange(60).flip(0)), "training images"),
    "two images swapped within a class": (replace(DATA, images=swap(DATA.images, 3, 13)), "training images"),
    "two images swapped with their labels": (reordered(swap(torch.arange(60), 3, 4)), "training images"),
    "one pixel": (altered("images", 59, 31, 31, 2), "training images"),
    "mirrored": (replace(DATA, images=DATA.images.flip(2)), "training images"),
    "two labels swapped": (replace(DATA, labels=swap(DATA.labels, 3, 4)), "training labels"),
    "fewer": (replace(DATA, images=DATA.images[:40], labels=DATA.labels[:40]), "training images"),
    "another test split": (replace(DATA, test_images=255 - DATA.test_images), "test images"),
    "test images in another order": (replace(DATA, test_images=swap(DATA.test_images, 0, 10)), "test images"),
    "test labels": (replace(DATA, test_labels=swap(DATA.test_labels, 0, 1)), "test labels"),
    "name": (replace(DATA, name="SYNTHETIC"), "data name"),
    "split": (replace(DATA, split="validation"), "data name"),
}


@pytest.mark.parametrize("change", OTHER_DATA)
def test_a_checkpoint_of_other_data_is_refused_and_kept(finished, change):
    data, difference = OTHER_DATA[change]
    before = finished.read_bytes()
    refused(lambda: trained(finished, data=data), ValueError, finished, f"is a checkpoint with {difference} ", "delete")
    assert finished.read_bytes() == before


def altered_net(name, alter, settings=SETTINGS):
    net = utils.build(name, settings)
    for block in net:
        if isinstance(block, nn.Sequential):
            alter(block)
    return net


def set_norm(make):
    return lambda block: block.set_submodule("norm", make(block.conv.out_channels))


def kaiming(net):
    variants.kaiming_init(net, 0)
    return net


def same_but(block):
    block.norm.eps = 1e-3


NETS = {
    "layer norm": lambda: utils.build("NetB", SETTINGS),
    "no norm": lambda: utils.build("Net", SETTINGS),
    "ReLU": lambda: altered_net("NetA", lambda block: block.set_submodule("activation", nn.ReLU())),
    "another epsilon": lambda: altered_net("NetA", same_but),
    "Kaiming weights": lambda: kaiming(utils.build("NetA", SETTINGS)),
    "another seed's weights": lambda: utils.build("NetA", replace(SETTINGS, seed=1)),
    "other widths": lambda: utils.build("NetA", SETTINGS, widths=(16,) * 10),
}


@pytest.mark.parametrize("change", NETS)
def test_a_checkpoint_of_another_net_is_refused_and_kept(finished, change):
    net, before = NETS[change](), finished.read_bytes()
    weights = {name: value.clone() for name, value in net.state_dict().items()}
    refused(lambda: trained(finished, net), ValueError, finished, "is a checkpoint with ", "delete it to start anew")
    assert finished.read_bytes() == before
    assert same(net.state_dict(), weights)


@pytest.mark.parametrize(
    ("name", "alter"),
    [
        ("NetB", set_norm(lambda n: nn.GroupNorm(4, n))),
        ("NetC", set_norm(lambda n: nn.GroupNorm(2, n))),
        ("NetA", set_norm(lambda n: nn.BatchNorm2d(n, momentum=0.2))),
        ("NetA", lambda block: block.set_submodule("activation", nn.GELU())),
    ],
)
def test_nets_of_equal_weights_are_told_apart(name, alter):
    """They have the published nets' parameters, names and initial values."""
    first, second = utils.build(name, SETTINGS), altered_net(name, alter)
    assert same(first.state_dict(), second.state_dict())
    assert checkpoints.describe(first) != checkpoints.describe(second)


class Block(nn.Module):
    """An activation of one's own, which keeps what the fast step asks for."""

    state_in_buffers = True

    def forward(self, x):
        return 2 * x


def replaced(name, module):
    net = utils.build("NetA", SETTINGS)
    net.set_submodule(name, module)
    return net


def with_attribute(name, value):
    net = utils.build("NetA", SETTINGS)
    setattr(net.C1.activation, name, value)
    return net


DIFFERENT = {  # pairs of a setting's values
    "a number": (2.0, 3.0),
    "its type": (1, True),
    "a text": ("a", "b"),
    "a text of a number": ("1", 1),
    "a tuple": ((1, 2), (1, 3)),
    "a tuple in it": ((1, (2,)), (1, (3,))),
    "a tuple or a list": ((1, 2), [1, 2]),
    "a number type": (torch.float16, torch.float32),
    "a device": (torch.device("cpu"), torch.device("meta")),
    "none": (None, 0),
}


@pytest.mark.parametrize("difference", DIFFERENT)
@pytest.mark.parametrize("name", ["slope", "_slope"])
def test_nets_with_other_settings_are_told_apart(difference, name):
    first, second = (with_attribute(name, value) for value in DIFFERENT[difference])
    assert checkpoints.describe(first) != checkpoints.describe(second)
    assert checkpoints.describe(first) == checkpoints.describe(with_attribute(name, DIFFERENT[difference][0]))


def test_a_setting_that_differs_is_named(tmp_path):
    trained(tmp_path / "run.pt", with_attribute("slope", 1.5))
    message = "is a checkpoint with net's modules C1.activation.slope 1.5, not C1.activation.slope 2.5"
    refused(lambda: trained(tmp_path / "run.pt", with_attribute("slope", 2.5)), ValueError, message)


def test_which_tensors_are_parameters_is_told():
    """A norm's scale may be learned or kept."""
    found = []
    for learned, kept in (("C4", "C5"), ("C5", "C4")):
        net = utils.build("NetC", SETTINGS)
        net.get_submodule(learned).norm.gain = nn.Parameter(torch.ones(24))
        net.get_submodule(kept).norm.register_buffer("gain", torch.ones(24))
        found.append(checkpoints.describe(net))
    assert found[0] != found[1]


def test_settings_of_parameters_are_told():
    """An edited models.param_groups may read them."""
    found = []
    for name in ("C4", "C5"):
        net = utils.build("NetA", SETTINGS)
        net.get_submodule(name).norm.weight.decays = True
        found.append(checkpoints.describe(net))
    assert found[0] != found[1]


def test_which_place_has_which_of_two_modules_is_told():
    found = []
    for places in ((0, 1), (1, 1)):
        net, parts = utils.build("NetA", SETTINGS), [nn.SiLU(), nn.ReLU()]
        net.C1.activation = nn.Sequential(*parts, *(parts[place] for place in places))
        found.append(checkpoints.describe(net))
    assert found[0] != found[1]


def test_settings_of_the_net_and_of_a_part_called_net_are_told_apart():
    found = []
    for slope in (1, 2):
        net = utils.build("NetA", SETTINGS)
        net.net = nn.Identity()
        net.slope, net.net.slope = slope, 3
        found.append(checkpoints.describe(net))
    assert found[0] != found[1]


def cell_class():
    """A class of a notebook's cell that says that it is of models.py."""
    return type("ScaleShift", (models.ScaleShift,), {"__module__": "models", "state_in_buffers": True})


UNTOLD = {  # nets that compute from what can't be told, and why
    "a class of one's own": (lambda: replaced("C1.activation", Block()), "C1.activation is a Block, whose code"),
    "a norm of a variant": (lambda: replaced("C5.norm", variants.LayerNorm2d(24)), "C5.norm is a LayerNorm2d, whose"),
    "a class that is not that of models.py": (
        lambda: replaced("C5.norm", cell_class()(24)),
        "C5.norm is a ScaleShift, whose code",
    ),
    "a function": (lambda: with_attribute("curve", torch.tanh), "C1.activation.curve is a builtin_function_or_method"),
    "a tensor": (lambda: with_attribute("slope", torch.ones(1)), "C1.activation.slope is a Tensor"),
    "a dict": (lambda: with_attribute("slopes", {"a": 1}), "C1.activation.slopes is a dict"),
    "a set": (lambda: with_attribute("slopes", {1}), "C1.activation.slopes is a set"),
    "a function in a tuple": (lambda: with_attribute("curves", (1, [len])), "C1.activation.curves is a tuple"),
    "an object": (lambda: with_attribute("curve", SimpleNamespace(a=1)), "C1.activation.curve is a SimpleNamespace"),
    "a list of its own class": (
        lambda: with_attribute("shape", type("Own", (list,), {})()),
        "activation.shape is a Own",
    ),
    "a number of NumPy": (lambda: with_attribute("slope", np.float64(2)), "C1.activation.slope is a float64"),
    "a class": (lambda: with_attribute("layers", torch.nn.Linear), "C1.activation.layers is a type"),
}


@pytest.mark.parametrize("kind", UNTOLD)
def test_a_net_that_a_checkpoint_cannot_tell_takes_none(tmp_path, kind):
    make, message = UNTOLD[kind]
    net = make()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    refused(lambda: trained(tmp_path / "run.pt", net), ValueError, message, "or train without a checkpoint")
    assert same(net.state_dict(), before)
    assert not list(tmp_path.iterdir())
    trained(None, net, settings=replace(SETTINGS, epochs=1))
    assert not same(net.state_dict(), before)


def test_a_class_that_models_py_defines_takes_a_checkpoint(tmp_path, monkeypatch):
    own = type("Block", (Block,), {"__module__": "models", "state_in_buffers": True})
    monkeypatch.setattr(models, "Block", own, raising=False)
    _, history = trained(tmp_path / "run.pt", replaced("C1.activation", own()))
    assert trained(tmp_path / "run.pt", replaced("C1.activation", own()))[1] == history


# They hold functions, weak references or dicts.
UNTOLD_OF_TORCH = {"DataParallel", "GRU", "LSTM", "ParameterDict", "RNN", "Transformer", "TransformerDecoderLayer"}
UNTOLD_OF_TORCH |= {"TransformerEncoderLayer"}


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_which_modules_of_torch_a_checkpoint_can_tell():
    """Of those that are built by one or two numbers, and are not lazy: all but UNTOLD_OF_TORCH."""
    untold = set()
    for name, cls in sorted(vars(nn).items()):
        lazy = name.startswith("Lazy") or name in ("Container", "NLLLoss2d")
        if lazy or not isinstance(cls, type) or not issubclass(cls, nn.Module):
            continue
        for arguments in ((), (4,), (4, 4), (4, 4, 3), (2, 4), (4, (2, 2))):
            try:
                module = cls(*arguments)
            except (TypeError, ValueError, AssertionError):
                continue
            try:
                assert checkpoints.describe(module)
            except ValueError:
                untold.add(name)
            break
    assert untold == UNTOLD_OF_TORCH


def test_an_optimizer_of_ones_own_takes_no_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setitem(OPTIMIZERS, "own", functools.partial(OPTIMIZERS["sgd"]))
    settings = replace(SETTINGS, epochs=1, optimizer="own")
    message = "optimizer 'own' is not that of engine/trainer.py; add it there, or train without a checkpoint"
    refused(lambda: trained(tmp_path / "run.pt", settings=settings), ValueError, message)
    assert not list(tmp_path.iterdir())
    trained(settings=settings)


def test_neither_training_nor_building_again_changes_a_fingerprint():
    net = utils.build("NetA", SETTINGS)
    before = checkpoints.fingerprint(net, DATA, SETTINGS, True)
    assert checkpoints.fingerprint(utils.build("NetA", SETTINGS).eval(), DATA, SETTINGS, True) == before
    trained(net=net)
    after = checkpoints.fingerprint(net, DATA, SETTINGS, True)
    assert {name for name in before if before[name] != after[name]} == {"initial weights"}


def test_a_net_with_code_of_its_own_takes_no_checkpoint(tmp_path):
    net = utils.build("NetA", SETTINGS)
    net.C5.activation = type("Own", (nn.SiLU,), {})()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    message = "C5.activation is a Own, which does not say state_in_buffers = True; train without a checkpoint, or see"
    refused(lambda: trained(tmp_path / "run.pt", net), ValueError, message)
    assert same(net.state_dict(), before)
    assert not list(tmp_path.iterdir())
    trained(None, net, settings=replace(SETTINGS, epochs=1))
    assert not same(net.state_dict(), before)


def test_a_buffer_that_a_checkpoint_would_not_hold_is_refused_at_the_start(tmp_path):
    net = utils.build("NetA", SETTINGS)
    net.C5.norm.register_buffer("steps", torch.zeros(()), persistent=False)
    message = "the net's buffer C5.norm.steps would not be in the checkpoint; register it with persistent=True"
    refused(lambda: trained(tmp_path / "run.pt", net), ValueError, message)
    assert not list(tmp_path.iterdir())
    trained(None, net, settings=replace(SETTINGS, epochs=1))


class Extra(nn.SiLU):
    state_in_buffers = True

    def get_extra_state(self):
        return {"version": 1}

    def set_extra_state(self, state):
        pass


@pytest.mark.parametrize(
    "value",
    [torch.eye(3).to_sparse(), torch.ones(1).expand(5), torch.ones(3, dtype=torch.cfloat).conj(), "extra state"],
    ids=["sparse", "expanded", "conjugate", "extra state"],
)
def test_what_is_no_plain_tensor_is_refused_at_the_start(tmp_path, value):
    net, name = utils.build("NetA", SETTINGS), "C5.activation._extra_state"
    if isinstance(value, torch.Tensor):
        net.C5.norm.register_buffer("other", value)
        name = "C5.norm.other"
    else:
        net.C5.activation = Extra()
    message = f"the net's {name} is no plain tensor, as a checkpoint holds; train without a checkpoint"
    refused(lambda: trained(tmp_path / "run.pt", net), ValueError, message)
    assert not list(tmp_path.iterdir())


def test_a_fingerprint_is_the_same_in_each_process():
    """Whatever the order of sets and the addresses of objects."""
    code = "import utils; from test_checkpoints import *; "
    code += "print(checkpoints.fingerprint(utils.build('NetC', SETTINGS), DATA, SETTINGS, True))"
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tests" / "engine")))
    command = [sys.executable, "-c", code]
    printed = run_together(*((command, {"PYTHONHASHSEED": seed, "PYTHONPATH": path}) for seed in ("1", "2")))
    assert printed[0] == printed[1]


@pytest.mark.parametrize("length", [10, 100, 1000])
def test_the_message_shows_where_two_long_texts_differ(tmp_path, monkeypatch, length):
    path, texts = tmp_path / "run.pt", [f"{'x' * length} {word} {'y' * length}" for word in ("first", "second")]
    monkeypatch.setattr(checkpoints, "device_name", lambda device: texts[0])
    trained(path)
    monkeypatch.setattr(checkpoints, "device_name", lambda device: texts[1])
    refused(lambda: trained(path), ValueError, "x first y", "x second y", ";")


@pytest.mark.parametrize("path", [True, 1, 2.5, b"run.pt"])
def test_a_checkpoint_that_is_no_path_is_refused(path):
    net = utils.build("NetA", SETTINGS)
    refused(lambda: trained(path, net), TypeError, f"path is {path!r}; give a str or a Path")


@pytest.mark.parametrize(
    "changes",
    [
        {"learning_rate": 0.01},
        {"weight_decay": 0.1},
        {"momentum": 0.9},
        {"optimizer": "sgd"},
        {"batch_size": 10},
        {"epochs": 4},
        {"epochs": 2},
        {"augment": "flip"},
        {"seed": 1},
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(finished, changes):
    ((name, value),) = changes.items()
    net = utils.build("NetA", SETTINGS)
    settings = replace(SETTINGS, **changes)
    call = functools.partial(trained, finished, net, settings=settings)
    refused(call, ValueError, f"{finished} is a checkpoint with {name} {getattr(SETTINGS, name)}, not {value};")


def test_a_checkpoint_with_tests_and_one_without_are_told_apart(finished, tmp_path):
    refused(lambda: trained(finished, track=False), ValueError, "each epoch tested True, not False")
    trained(tmp_path / "run.pt", track=False)
    refused(lambda: trained(tmp_path / "run.pt"), ValueError, "each epoch tested False, not True")


def test_a_checkpoint_of_another_number_of_threads_is_refused(finished):
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        refused(lambda: trained(finished), ValueError, f"thread count {threads}, not {threads + 1}")
    finally:
        torch.set_num_threads(threads)


HUBCONF = {ROOT / "hubconf.py": (ROOT / "hubconf.py").read_bytes()}


@pytest.mark.parametrize(
    ("owner", "name", "value", "difference"),
    [
        (
            checkpoints,
            "CODE",
            checkpoints.CODE | {ROOT / "hubconf.py": (ROOT / "hubconf.py").read_bytes()},
            "training code",
        ),
        (torch, "__version__", "9.9", "torch version"),
        (checkpoints, "device_name", lambda device: "another machine", "device name"),
        (fast, "pick_precision", lambda device: torch.float64, "number format"),
    ],
)
def test_a_checkpoint_of_other_code_or_another_machine_is_refused(
    finished, monkeypatch, owner, name, value, difference
):
    monkeypatch.setattr(owner, name, value)
    refused(lambda: trained(finished), ValueError, f"is a checkpoint with {difference} ")


EDITED = "{} was edited since it was loaded; restart Python, or train without a checkpoint"


def test_code_that_was_edited_since_it_was_loaded_takes_no_checkpoint(tmp_path, monkeypatch):
    """It may have been loaded again."""
    path = tmp_path / "muon.py"
    path.write_text("SLOPE = 1")
    monkeypatch.setitem(checkpoints.CODE, path, path.read_bytes())
    trained(tmp_path / "run.pt")
    before = (tmp_path / "run.pt").read_bytes()
    for edit in (lambda: path.write_text("SLOPE = 2"), path.unlink):
        edit()
        refused(lambda: trained(tmp_path / "run.pt"), ValueError, EDITED.format("muon.py"))
    assert (tmp_path / "run.pt").read_bytes() == before
    path.write_text("SLOPE = 1")
    trained(tmp_path / "run.pt")


def test_code_that_is_not_that_of_its_file_takes_no_checkpoint(tmp_path, monkeypatch):
    """As when models.py is edited between its import and that of utils, or changed in place by IPython's autoreload."""
    for function in (models.show, models.ScaleShift.forward):
        with monkeypatch.context() as patch:
            patch.setattr(function, "__code__", kaiming.__code__.replace(co_filename=models.__file__))
            refused(checkpoints.check_loaded, ValueError, EDITED.format("models.py"))
    checkpoints.check_loaded()


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("import own", "own"),
        ("import torch, own as torch", "own"),
        ("import own.deeper", "own"),
        ("from own.deeper import SLOPE", "own"),
        ("def later():\n    from own import (\n        SLOPE)", "own"),
        ("import math; import own", "own"),
        ("from experiments.variants import Experiment", "experiments"),
    ],
)
def test_code_that_imports_other_files_takes_no_checkpoint(tmp_path, monkeypatch, line, name):
    path = tmp_path / "models.py"
    path.write_text(f"import torch\n{line}")
    monkeypatch.setitem(checkpoints.CODE, path, path.read_bytes())
    message = f"models.py imports {name}, whose code a checkpoint can't tell; move what it needs into the file,"
    refused(lambda: trained(tmp_path / "run.pt"), ValueError, message)
    assert not (tmp_path / "run.pt").exists()


def test_what_code_says_of_imports_is_no_import():
    assert checkpoints.imported(b'"""\nimport order matters\nfrom here import it\n"""\nfrom . import near\n') == set()


FRESH = """
import contextlib, dataclasses, functools
@dataclasses.dataclass(frozen=True)
class Config: groups: int = 4
@torch.no_grad()
def initialized(net): return net
@contextlib.contextmanager
def quiet(): yield
@functools.singledispatch
def act(x): return x
class Own:
    class Inner: pass
    near = property(lambda self: 1)
    far = staticmethod(lambda: 2)
"""
EDITS = ["lambda self: 1", "lambda: 2", "return x", "return net"]


def test_an_edited_models_py_takes_checkpoints_once_it_is_loaded_anew(tmp_path):
    """Whatever stands in it: decorators and dataclasses make functions, too. Not if it was edited before utils came."""
    copied = tmp_path / "models.py"
    copied.write_text((ROOT / "models.py").read_text(encoding="utf-8") + FRESH, encoding="utf-8")
    code = """
import pathlib, sys
folder, edit, name = sys.argv[1:]
sys.path[0] = folder
import models
path = pathlib.Path(models.__file__)
assert path.parent == pathlib.Path(folder)
text = path.read_text(encoding="utf-8")
if edit:
    assert edit in text
    path.write_text(text.replace(edit, edit + " + 5"), encoding="utf-8")
import utils
from test_checkpoints import *
try:
    trained(settings=replace(SETTINGS, epochs=1), path=path.parent / name)
    print("trained")
except ValueError as error:
    print(error)
path.write_text(text, encoding="utf-8")
"""
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tests" / "engine")))
    for number, edit in enumerate(["", *EDITS]):
        command = [sys.executable, "-c", code, tmp_path, edit, f"{number}.pt"]
        [printed] = run_together((command, {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}))
        assert printed.splitlines()[-1] == (EDITED.format("models.py") if edit else "trained")


def test_code_that_was_loaded_stays_when_checkpoints_are_loaded_again(monkeypatch):
    loaded = dict(checkpoints.CODE)
    monkeypatch.setattr(Path, "read_bytes", lambda path: b"edited")
    importlib.reload(checkpoints)
    assert loaded == checkpoints.CODE


def test_copies_of_models_and_utils_count_and_files_of_editors_do_not(tmp_path):
    copy_checkout(tmp_path)
    (tmp_path / "engine" / "._data.py").write_bytes(b"\0")
    mine = tmp_path / "mine"
    mine.mkdir()
    for name in ("models.py", "utils.py"):
        shutil.copy(ROOT / name, mine)
    code = f"import sys; sys.path[:1] = {[str(mine), str(tmp_path)]}; import utils; from engine import checkpoints; "
    [printed] = run_together(([sys.executable, "-c", code + "print(*checkpoints.CODE)"], {}))
    trains = {mine / "models.py", mine / "utils.py", *(tmp_path / "engine").glob("[a-z_]*.py")}
    assert {Path(path) for path in printed.split()} == trains


def test_all_code_that_trains_counts():
    trains = {ROOT / "models.py", ROOT / "utils.py", *(ROOT / "engine").glob("*.py")}
    assert {path: path.read_bytes() for path in trains} == checkpoints.CODE


def test_a_hash_tells_values_places_types_and_shapes_apart():
    big = torch.arange(3 * 2**19, dtype=torch.int32).view(3, -1)
    tensors = [DATA.images, DATA.images.flip(0), DATA.images.float(), DATA.images.view(60, -1), DATA.images[:59]]
    tensors += [DATA.images.permute(0, 3, 1, 2), DATA.images.permute(0, 3, 2, 1), big, big[[1, 0, 2]], big.flip(1)]
    tensors += [torch.tensor(value) for value in (0.0, -0.0, 0, 1.0, 1, True, False)]
    tensors += [torch.zeros(size, dtype=torch.uint8) for size in (1, 2, 3, 4, 16384, 16385)]
    found = [hashes.data_hash(tensor) for tensor in tensors]
    found += [hashes.data_hash(*pair) for pair in itertools.permutations(tensors[-4:], 2)]
    assert len(set(found)) == len(found)


def test_a_hash_does_not_depend_on_how_a_tensor_lies_in_memory():
    whole = torch.arange(2**14).to(torch.uint8)  # one block of words, which needs no padding
    for tensor in (DATA.images, DATA.labels, DATA.images.float(), DATA.images[1:, 0, 1], whole):
        padded = torch.cat([tensor.flatten()[:1], tensor.flatten()])[1:].view_as(tensor)  # another offset
        strided = tensor.transpose(0, -1).contiguous().transpose(0, -1)
        assert len({hashes.data_hash(other) for other in (tensor, tensor.clone(), padded, strided)}) == 1


def test_every_swap_of_two_images_is_seen():
    found = {hashes.data_hash(swap(DATA.images, *pair)) for pair in itertools.combinations(range(20), 2)}
    assert len(found | {hashes.data_hash(DATA.images)}) == 191


def test_a_hash_takes_no_copy_of_the_data():
    images = torch.zeros(10_000, 32, 32, 3, dtype=torch.uint8)
    with torch.profiler.profile(profile_memory=True) as profile:
        hashes.data_hash(images)
    assert 0 < max(event.self_cpu_memory_usage for event in profile.events()) < images.numel() / 10


# ---------------------------------------------------------------------------------------------------------------------
# Interrupted and resumed
# ---------------------------------------------------------------------------------------------------------------------


@functools.cache
def undisturbed(name):
    return trained(net=utils.build(name, SETTINGS))


@pytest.mark.parametrize(
    ("name", "step", "again"),  # of 3 steps in an epoch
    [
        ("NetA", 1, "the same net"),
        ("NetA", 2, "a new net"),
        ("NetA", 9, "the same net"),
        ("NetB", 2, "the same net"),
        ("NetB", 4, "a new net"),
        ("NetC", 4, "the same net"),
    ],
)
def test_interrupted_and_called_again_ends_with_the_same_weights(tmp_path, monkeypatch, name, step, again):
    expected, history = undisturbed(name)
    net = utils.build(name, SETTINGS)
    initial = {key: value.clone() for key, value in net.state_dict().items()}
    with Interrupted(monkeypatch, step):
        trained(tmp_path / "run.pt", net)
    assert same(net.state_dict(), initial)
    found, resumed = trained(tmp_path / "run.pt", net if again == "the same net" else utils.build(name, SETTINGS))
    assert same(found, expected)
    assert [epoch["loss"] for epoch in resumed] == [epoch["loss"] for epoch in history]


def test_interrupted_in_the_first_epoch_the_initial_weights_are_in_the_checkpoint(tmp_path, monkeypatch):
    """So another net is refused, even when nothing was learned yet."""
    with Interrupted(monkeypatch, 1):
        trained(tmp_path / "run.pt")
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    assert saved["history"] == []
    assert same(saved["state"]["net"], utils.build("NetA", SETTINGS).state_dict())
    refused(lambda: trained(tmp_path / "run.pt", kaiming(utils.build("NetA", SETTINGS))), ValueError, "initial weights")


@pytest.mark.parametrize("step", [1, 4])
def test_a_net_that_is_half_trained_is_not_taken_for_a_new_one(tmp_path, monkeypatch, step):
    """Interrupted without a checkpoint, then called with the checkpoint of the same settings."""
    net = utils.build("NetA", SETTINGS)
    with Interrupted(monkeypatch, step):
        trained(tmp_path / "run.pt")
    with Interrupted(monkeypatch, step):
        trained(None, net)
    refused(lambda: trained(tmp_path / "run.pt", net), ValueError, "initial weights")


def test_a_finished_run_is_not_trained_again(finished, monkeypatch):
    expected, history = trained(finished)
    monkeypatch.setattr(Trainer, "step", lambda trainer: pytest.fail("it was trained again"))
    net = utils.build("NetA", SETTINGS)
    for _ in range(2):  # the net that the first call leaves behind is taken, too
        found, again = trained(finished, net)
        assert same(found, expected)
        assert again == history


def test_a_checkpoint_is_removed_by_its_own_history_alone(tmp_path):
    path, other = tmp_path / "run.pt", [{"epoch": 1, "test_accuracy": np.float64("nan"), "elapsed": 0.1 + 0.2}]
    for history in ([], [other[0] | {"elapsed": 0.3}]):
        checkpoints.write_checkpoint(path, {}, history, {})
        for of_another in (other, []):
            checkpoints.remove_checkpoint(path, of_another)
        assert path.exists()
    for content in (b"", b"damaged"):
        path.write_bytes(content)
        checkpoints.remove_checkpoint(path, other)
        assert path.read_bytes() == content
    checkpoints.write_checkpoint(path, {}, other, {})
    for _ in range(2):  # what is absent is no error
        checkpoints.remove_checkpoint(path, other)
    assert not path.exists()


def test_a_failed_call_leaves_net_and_message(tmp_path, monkeypatch):
    """A full disk at a checkpoint."""
    net, write_bytes, left = utils.build("NetA", SETTINGS), Path.write_bytes, [2]
    initial = {key: value.clone() for key, value in net.state_dict().items()}

    def fill(path, content):
        left[0] -= 1
        if left[0] == 0:
            write_bytes(path, content[:1000])
            raise OSError(errno.ENOSPC, "No space left on device")
        write_bytes(path, content)

    path = tmp_path / "run.pt"
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", fill)
        refused(lambda: trained(path, net), OSError, f"{path} can't be written: the disk at /", " is full")
    assert same(net.state_dict(), initial)
    assert [file.name for file in tmp_path.iterdir() if "lock" not in file.name] == ["run.pt"]
    assert same(trained(path, net)[0], undisturbed("NetA")[0])


def test_restored_on_error():
    net = utils.build("NetA", SETTINGS)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    for error in (ValueError, KeyboardInterrupt, SystemExit, GeneratorExit):
        with pytest.raises(error), checkpoints.restored_on_error(net):  # noqa: PT012
            kaiming(net)
            raise error
        assert same(net.state_dict(), before)
    with checkpoints.restored_on_error(net):
        kaiming(net)
    assert not same(net.state_dict(), before)


def test_a_failed_call_leaves_modes_and_gradients():
    net = altered_net("NetA", lambda block: block.set_submodule("activation", Block())).eval()
    net.C2.train()
    gradient = net.c11.bias.grad = torch.ones(10)
    modes = [module.training for module in net.modules()]
    with pytest.raises(KeyboardInterrupt), checkpoints.restored_on_error(net):  # noqa: PT012
        net.train()(torch.zeros(2, 3, 32, 32)).sum().backward()
        net.c11.bias.grad = None
        raise KeyboardInterrupt
    assert [module.training for module in net.modules()] == modes
    assert net.c11.bias.grad is gradient
    assert net.C1.conv.weight.grad is None


def test_what_the_nets_own_gpu_still_computes_is_waited_for(monkeypatch):
    """Not the current GPU's: a net on another one is restored under steps that still write."""
    calls, device = [], torch.device("cuda:1")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: calls.append(device))
    value = torch.zeros(1).as_subclass(type("OnGpu", (torch.Tensor,), {"device": device, "is_cuda": True}))
    net = SimpleNamespace(state_dict=lambda: {"w": value}, load_state_dict=lambda before: calls.append("restored"))
    net.parameters = net.modules = list
    with pytest.raises(KeyboardInterrupt), checkpoints.restored_on_error(net):
        raise KeyboardInterrupt
    assert calls == [device, "restored"]


# ---------------------------------------------------------------------------------------------------------------------
# Damaged, inconsistent and hostile checkpoints
# ---------------------------------------------------------------------------------------------------------------------


def check_refused(path, call=None):
    """Check that training refuses the checkpoint in one line, and leaves it and the net as they are."""
    content, net = path.read_bytes(), utils.build("NetA", SETTINGS)
    weights = {key: value.clone() for key, value in net.state_dict().items()}
    refused(lambda: trained(path, net), ValueError, f"{path} ", "; delete it to start anew, or name another file")
    assert path.read_bytes() == content
    assert same(net.state_dict(), weights)


def test_every_cut_is_refused(finished, tmp_path):
    content = finished.read_bytes()
    for size in [*range(0, len(content), len(content) // 12), len(content) - 1, len(content) - 22]:
        (tmp_path / "run.pt").write_bytes(content[:size])
        check_refused(tmp_path / "run.pt")


def test_a_changed_byte_in_any_tensor_is_refused(finished, tmp_path):
    """By the check sums, which torch.load does not look at."""
    content, random_places = finished.read_bytes(), random.Random(0)
    with zipfile.ZipFile(finished) as archive:
        names = [info for info in archive.infolist() if "/data/" in info.filename and info.file_size]
    for info in random_places.sample(names, 8):
        lengths = struct.unpack_from("<2H", content, info.header_offset + 26)  # of what lies before the tensor
        place = info.header_offset + 30 + sum(lengths) + random_places.randrange(info.file_size)
        damaged = bytearray(content)
        damaged[place] ^= 1 << random_places.randrange(8)
        (tmp_path / "run.pt").write_bytes(damaged)
        check_refused(tmp_path / "run.pt")


@pytest.mark.parametrize(
    "content", [b"", b"no checkpoint", b"\0" * 10_000, pickle.dumps({"state": 1}), b"PK\5\6" + b"\0" * 18]
)
def test_what_is_no_checkpoint_is_refused(tmp_path, content):
    (tmp_path / "run.pt").write_bytes(content)
    check_refused(tmp_path / "run.pt")


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_what_is_no_file_is_refused_without_waiting(tmp_path, make):
    path = tmp_path / "run.pt"
    make(path)
    before = path.lstat()
    refused(lambda: trained(path), ValueError, path, "delete it")
    assert os.path.samestat(path.lstat(), before)


def remove(name):
    return lambda saved: saved.pop(name)


def put(value, *names):
    """Put a value in a nested dict."""

    def alter(saved):
        for name in names[:-1]:
            saved = saved[name]
        saved[names[-1]] = value

    return alter


def convert(change, *names):
    def alter(saved):
        for name in names[:-1]:
            saved = saved[name]
        saved[names[-1]] = change(saved[names[-1]])

    return alter


def lengthen(saved):
    saved["history"].append(saved["history"][-1] | {"epoch": 4})
    saved["state"]["global_step"] += 3


C1 = ("state", "net", "C1.conv.weight")
INCONSISTENT = {
    "no fingerprint": remove("fingerprint"),
    "no history": remove("history"),
    "no state": remove("state"),
    "fingerprint: None": put(None, "fingerprint"),
    "fingerprint of nothing": put({}, "fingerprint"),
    "history: None": put(None, "history"),
    "state: None": put(None, "state"),
    "a later state with an empty history": put([], "history"),
    "a first state with a full history": put(torch.tensor([0]), "state", "global_step"),
    "a history too short": convert(lambda history: history[:2], "history"),
    "a history too long": lengthen,
    "a history twice": convert(lambda history: history * 2, "history"),
    "a history backwards": convert(lambda history: history[::-1], "history"),
    "a history without loss": lambda saved: saved["history"][1].pop("loss"),
    "a history of texts": put("70%", "history", 0, "test_accuracy"),
    "a history of tensors": put(torch.zeros(()), "history", 0, "loss"),
    "a history of None": put(None, "history", 0, "seconds"),
    "a history as a dict": convert(lambda history: dict(enumerate(history)), "history"),
    "a history as a tuple": convert(tuple, "history"),
    "a step too many": convert(lambda step: step + 1, "state", "global_step"),
    "a negative step": convert(lambda step: -step, "state", "global_step"),
    "a step as a number": put(9, "state", "global_step"),
    "a wrong shape": convert(lambda weight: weight[:, :2], *C1),
    "a shape that broadcasts": convert(lambda weight: weight[:1], *C1),
    "a transposed shape": convert(lambda weight: weight.transpose(0, 1), *C1),
    "another type": convert(lambda weight: weight.double(), *C1),
    "whole numbers": convert(lambda weight: weight.int(), *C1),
    "sparse": convert(lambda weight: weight.to_sparse(), *C1),
    "without content": convert(lambda weight: weight.to("meta"), *C1),
    "no tensor": put([1.0], *C1),
    "a missing weight": lambda saved: saved["state"]["net"].pop("C1.conv.weight"),
    "a weight more": put(torch.zeros(1), "state", "net", "C12.conv.weight"),
    "a wrong flip": convert(lambda flip: flip[:-1], "state", "flip"),
    "a wrong generator": convert(lambda state: state[:-1], "state", "generator"),
    "a generator of zeros": convert(torch.zeros_like, "state", "generator"),
    "no momentum": put({}, "state", "optimizer"),
    "a missing momentum": lambda saved: saved["state"]["optimizer"].pop(0),
    "a momentum of another shape": convert(lambda value: value[:1], "state", "optimizer", 0, "momentum_buffer"),
    "momenta in another order": convert(lambda momenta: dict(reversed(momenta.items())), "state", "optimizer"),
    "a weight with a gradient": convert(lambda weight: weight.requires_grad_(), *C1),
    "a momentum of another name": lambda saved: saved["state"]["optimizer"][0].update(
        other=saved["state"]["optimizer"][0].pop("momentum_buffer")
    ),
}


@pytest.mark.parametrize("damage", INCONSISTENT)
def test_an_inconsistent_checkpoint_is_refused(finished, tmp_path, damage):
    saved = torch.load(finished, weights_only=True)
    INCONSISTENT[damage](saved)
    torch.save(saved, tmp_path / "run.pt")
    check_refused(tmp_path / "run.pt")


@functools.cache
def checkpoint_of(settings):
    with tempfile.TemporaryDirectory() as folder:
        trained(Path(folder) / "run.pt", settings=settings)
        return (Path(folder) / "run.pt").read_bytes()


@pytest.mark.parametrize(("optimizer", "rate"), [("sgd", 0.1), ("adamw", 0.003)])
@pytest.mark.parametrize("damage", ["shape", "type", "none", "missing", "name", "text"])
def test_an_inconsistent_state_of_the_other_optimizers_is_refused(tmp_path, optimizer, rate, damage):
    path, settings = tmp_path / "run.pt", replace(SETTINGS, optimizer=optimizer, learning_rate=rate, epochs=1)
    saved = torch.load(io.BytesIO(checkpoint_of(settings)), weights_only=True)
    states = saved["state"]["optimizer"]
    name = next(name for name, value in states[0].items() if value.ndim)
    change = {
        "shape": lambda: states[0].update({name: states[0][name][:1]}),
        "type": lambda: states[0].update({name: states[0][name].int()}),
        "none": states.clear,  # as before the first step
        "missing": lambda: states.pop(3),
        "name": lambda: states[0].update({"other": states[0].pop(name)}),
        "text": lambda: states[0].update({name: "text"}),
    }[damage]
    change()
    torch.save(saved, path)
    content = path.read_bytes()
    refused(lambda: trained(path, settings=settings), ValueError, f"{path} ", "delete it")
    assert path.read_bytes() == content


def test_an_empty_history_with_other_weights_is_refused(tmp_path, monkeypatch):
    with Interrupted(monkeypatch, 1):
        trained(tmp_path / "run.pt")
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    saved["state"]["net"]["C1.conv.weight"] += 1
    torch.save(saved, tmp_path / "run.pt")
    check_refused(tmp_path / "run.pt")


EVIL_PLACES = [("fingerprint",), ("history",), ("state",), ("state", "generator"), ("fingerprint", "seed"), ("more",)]


@pytest.mark.parametrize("place", EVIL_PLACES)
def test_the_code_in_a_checkpoint_does_not_run(finished, tmp_path, place):
    saved = torch.load(finished, weights_only=True)
    put(Evil(tmp_path / "evil"), *place)(saved)
    torch.save(saved, tmp_path / "run.pt")
    check_refused(tmp_path / "run.pt")
    assert not (tmp_path / "evil").exists()
    torch.load(tmp_path / "run.pt", weights_only=False)  # which it does elsewhere
    assert (tmp_path / "evil").exists()


@pytest.mark.parametrize("legacy", [False, True])
def test_the_code_in_a_plain_pickle_does_not_run(tmp_path, legacy):
    if legacy:
        torch.save(Evil(tmp_path / "evil"), tmp_path / "run.pt", _use_new_zipfile_serialization=False)
    else:
        (tmp_path / "run.pt").write_bytes(pickle.dumps(Evil(tmp_path / "evil")))
    check_refused(tmp_path / "run.pt")
    assert not (tmp_path / "evil").exists()


def test_a_checkpoint_is_read_once(finished, tmp_path, monkeypatch):
    """Swapped after it was checked, it does not come into play."""
    expected, _ = trained(finished)
    path, read_bytes, count = tmp_path / "run.pt", checkpoints.read_bytes, []
    path.write_bytes(finished.read_bytes())

    def read_and_swap(name):
        content = read_bytes(name)
        if name == path:
            count.append(name)
            torch.save(Evil(tmp_path / "evil"), path)
        return content

    monkeypatch.setattr(checkpoints, "read_bytes", read_and_swap)
    assert same(trained(path)[0], expected)
    assert count == [path]
    assert not (tmp_path / "evil").exists()
