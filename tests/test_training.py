import copy
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torchgen
import yaml
from conftest import ROOT
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import utils
from utils import Settings

SHORT = Settings(epochs=2, batch_size=100)


def trained(small, net="NetC", settings=SHORT):
    made = utils.build(net, settings)
    history = utils.train(made, small, settings)
    return made.state_dict(), history


@pytest.mark.parametrize("net", ["NetA", "NetB", "NetC", "Net"])
def test_same_seed_same_weights(small, net):
    (first, history), (second, _) = trained(small, net), trained(small, net)
    assert all(torch.equal(first[name], second[name]) for name in first)
    other, _ = trained(small, net, replace(SHORT, seed=1))
    assert not torch.equal(first["C2.conv.weight"], other["C2.conv.weight"])
    assert [epoch["epoch"] for epoch in history] == [1, 2]
    assert set(history[0]) == {
        "epoch",
        "loss",
        "train_accuracy",
        "test_accuracy",
        "learning_rate",
        "seconds",
        "elapsed",
    }


def test_history_ends_with_the_trained_net(small):
    settings = replace(SHORT, epochs=3)
    net = utils.build("NetB", settings)
    history = utils.train(net, small, settings)
    assert history[-1]["test_accuracy"] == utils.test(net, small.test_images, small.test_labels).accuracy
    assert history[-1]["loss"] < history[0]["loss"]


def test_nets_share_initial_weights_and_order(small):
    nets = [utils.build(name, SHORT) for name in ("NetA", "NetB", "NetC", "Net")]
    trainers = [utils.Trainer(net, small, SHORT) for net in nets]
    for trainer in trainers:
        next(trainer.epoch())
    for trainer in trainers[1:]:
        assert torch.equal(trainer.order, trainers[0].order)
    fresh = [utils.build(name, SHORT) for name in ("NetA", "NetB", "NetC", "Net")]
    for net in fresh[1:]:
        assert torch.equal(net.C9.conv.weight, fresh[0].C9.conv.weight)
        assert torch.equal(net.c11.bias, fresh[0].c11.bias)


def test_every_image_once_an_epoch(small):
    trainer = utils.Trainer(utils.build("NetA", SHORT), small, SHORT)
    orders = []
    for _ in range(2):
        next(trainer.epoch())
        orders.append(trainer.order.flatten().clone())
    assert orders[0].sort().values.tolist() == list(range(600))
    assert not torch.equal(*orders)


def test_learning_rate_climbs_and_falls(small):
    settings = replace(SHORT, epochs=10, learning_rate=0.5)
    trainer = utils.Trainer(utils.build("NetA", settings), small, settings)
    rates = trainer.rates.tolist()
    assert len(rates) == 60
    assert max(rates) == pytest.approx(0.5, rel=0.05)
    assert rates.index(max(rates)) == 11  # after 20 % of the steps
    assert 0 < rates[-1] < 0.02
    seen = []
    for _ in trainer.epoch():
        seen.append(trainer.rate.item())
    assert seen == pytest.approx(rates[:6])


@pytest.mark.parametrize("net", ["NetA", "NetB", "NetC", "Net"])
def test_one_batch_is_learned_by_heart(small, net):
    one = replace(small, images=small.images[:50], labels=small.labels[:50])
    settings = Settings(epochs=150, batch_size=50, weight_decay=0.0)
    made = utils.build(net, settings)
    utils.train(made, one, settings, track=False)
    assert utils.test(made, one.images, one.labels).accuracy == 100


def test_random_labels_stay_at_chance(stand_in):
    generator = torch.Generator().manual_seed(0)
    data = replace(
        stand_in,
        images=stand_in.images[:3000],
        labels=torch.randint(0, 10, (3000,), generator=generator),
        test_labels=torch.randint(0, 10, (2000,), generator=generator),
    )
    net = utils.build("NetC", SHORT)
    utils.train(net, data, SHORT, track=False)
    accuracy = utils.test(net, data.test_images, data.test_labels).accuracy
    assert abs(accuracy - 10) < 3 * 100 * math.sqrt(0.1 * 0.9 / 2000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_orthogonalise(dtype):
    generator = torch.Generator().manual_seed(0)
    matrices = torch.randn(3, 24, 216, generator=generator)
    result = utils.orthogonalise(matrices, dtype).float()
    values = torch.linalg.svdvals(result)
    assert 0.6 < values.min() < values.max() < 1.3
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    cosine = nn.functional.cosine_similarity(result.flatten(1), (left @ right).flatten(1))
    assert cosine.min() > 0.97


def test_padding_does_not_change_the_result():
    small = torch.randn(1, 24, 24, generator=torch.Generator().manual_seed(0))
    padded = torch.zeros(1, 32, 288)
    padded[:, :24, :24] = small
    result = utils.orthogonalise(padded, torch.float32).float()
    assert (result[:, :24, :24] - utils.orthogonalise(small, torch.float32).float()).abs().max() < 1e-5
    assert result[:, 24:].abs().max() == 0
    assert result[:, :, 24:].abs().max() == 0


def test_two_steps_of_muon_against_plain_arithmetic():
    torch.manual_seed(0)
    net, rate = utils.models.NetB(), torch.tensor(0.1)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer = utils.Muon(net, rate, weight_decay=0.5, momentum=0.9)
    gradients = [{name: torch.randn_like(p) for name, p in net.named_parameters()} for _ in range(2)]
    for step in gradients:
        for name, parameter in net.named_parameters():
            parameter.grad = step[name].clone()
        optimizer.step()
    for name, parameter in net.named_parameters():
        momentum, expected = torch.zeros_like(parameter), before[name]
        for step in gradients:
            momentum = 0.9 * momentum + step[name]
            update = step[name] + 0.9 * momentum
            if name.startswith(("C", "c")) and parameter.ndim == 4 and not name.startswith("c11"):
                flat = utils.orthogonalise(update.flatten(1)[None], torch.float32)[0].view_as(update)
                expected = expected * (1 - 0.1 * 0.5) - 0.1 * flat
            else:
                expected = expected - 10 * 0.1 * update
        assert (parameter - expected).abs().max() < 1e-5, name


def test_bfloat16_computes_and_float32_remembers(small, monkeypatch):
    monkeypatch.setattr(utils, "pick_precision", lambda device: torch.bfloat16)
    net = utils.build("NetA", SHORT)
    trainer = utils.Trainer(net, small, SHORT)
    assert trainer.model.C2.conv.weight.dtype == torch.bfloat16
    assert trainer.model.C2.norm is net.C2.norm  # norms stay in float32, batch norm with its running averages
    for _ in trainer.epoch():
        pass
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    for working, parameter in trainer.copied:
        assert torch.equal(working, parameter.bfloat16())
    assert net.C2.norm.num_batches_tracked == trainer.steps


@pytest.mark.parametrize("name", ["NetA", "NetB", "NetC", "Net"])
def test_working_copy_computes_what_the_net_does(name):
    torch.manual_seed(0)
    net = utils.build(name, SHORT).to(memory_format=torch.channels_last)
    copied = utils.working_copy(net, torch.float32)
    images = torch.randn(8, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    gradients = []
    for model in (net, copied):
        logits = model(images)
        model.zero_grad()
        logits.square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert (logits - net(images)).abs().max() < 1e-4
    for expected, found in zip(*gradients, strict=True):
        assert (found - expected).norm() < 1e-4 * expected.norm()
    images = images.bfloat16()
    logits = utils.working_copy(net, torch.bfloat16)(images)
    assert logits.dtype == torch.bfloat16
    assert (logits - net(images.float())).norm() < 0.03 * logits.norm()


@pytest.mark.parametrize("size", [(16, 8), (32, 32)])
@pytest.mark.parametrize("mean", [1, 21])  # bfloat16 can't tell 21 from 21.06
@pytest.mark.parametrize("groups", [1, 4, 32])
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-4), (torch.bfloat16, 0.01)])
def test_group_norm_in_channels_last(device, size, mean, groups, dtype, rounding):
    """Output and gradients against nn.GroupNorm in float64."""
    torch.manual_seed(0)
    if dtype == torch.bfloat16 and device.type == "cuda":
        dtype = torch.float16  # what GPUs train in
    norm = nn.GroupNorm(groups, 32)
    nn.init.normal_(norm.weight, 1, 0.3)
    nn.init.normal_(norm.bias)
    x, gradient = torch.randn(2, 20, 32, *size).to(dtype)
    x = x * 2 + mean
    found = []
    for module, kind in ((copy.deepcopy(norm).double(), torch.float64), (norm, dtype)):
        module = module.to(device)
        activations = x.to(device, kind, memory_format=torch.channels_last).requires_grad_()
        layer = module if kind == torch.float64 else utils.ChannelsLastGroupNorm(module)
        y = layer(activations)
        y.backward(gradient.to(device, kind, memory_format=torch.channels_last))
        found.append([y, activations.grad, module.weight.grad, module.bias.grad])
    for expected, value in zip(*found, strict=True):
        assert (value - expected).norm() < rounding * expected.norm()
    assert found[1][0].dtype == dtype
    assert found[1][0].is_contiguous(memory_format=torch.channels_last)
    assert found[1][1].is_contiguous(memory_format=torch.channels_last)


def test_bfloat16_and_float32_agree(small, monkeypatch):
    """Two epochs in both precisions end at about the same loss: rounding is noise, not a different training."""
    losses = []
    for dtype in (torch.bfloat16, torch.float32):
        monkeypatch.setattr(utils, "pick_precision", lambda device, dtype=dtype: dtype)
        losses.append(trained(small, "NetB")[1][-1]["loss"])
    assert abs(losses[0] - losses[1]) < 0.05


def test_batch_larger_than_the_data(small):
    with pytest.raises(ValueError, match="batch_size is 601; there are 600 training images"):
        utils.Trainer(utils.build("NetA", SHORT), small, replace(SHORT, batch_size=601))


def test_training_leaves_the_data_alone(small):
    before = copy.deepcopy(small)
    trained(small, settings=replace(SHORT, augment="flip+crop"))
    assert torch.equal(before.images, small.images)
    assert torch.equal(before.labels, small.labels)


def test_progress(small, capfd):
    trained(small)
    captured = capfd.readouterr()
    last = captured.out.split("\r")[-1]
    assert "100%" in last
    assert "epoch 2, loss" in last
    assert captured.err == ""


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"learning_rate": 0}, "learning_rate is 0; give a number above 0"),
        ({"learning_rate": -0.1}, "learning_rate is -0.1; give"),
        ({"learning_rate": math.nan}, "learning_rate is nan; give"),
        ({"learning_rate": "fast"}, "learning_rate is 'fast'; give"),
        ({"weight_decay": -1}, "weight_decay is -1; give"),
        ({"momentum": 1.5}, "momentum is 1.5; give"),
        ({"epochs": 0}, "epochs is 0; give a whole number from 1"),
        ({"epochs": 2.5}, "epochs is 2.5; give"),
        ({"batch_size": 0}, "batch_size is 0; give"),
        ({"batch_size": True}, "batch_size is True; give"),
        ({"learning_rate": True}, "learning_rate is True; give"),
        ({"seed": -1}, "seed is -1; give a whole number from 0 to 4294967295"),
        ({"seed": 2**70}, "seed is 1180591620717411303424; give"),
        ({"augment": "cutout"}, "augment is 'cutout'; choose one of none, flip, flip+crop"),
    ],
)
def test_wrong_settings(change, said):
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        Settings(**change)
    assert said in str(error.value)


@pytest.fixture
def environment(monkeypatch, tmp_path):
    for name in list(os.environ):
        if name.startswith("S8_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return lambda **settings: [monkeypatch.setenv(f"S8_{name}", value) for name, value in settings.items()]


def test_defaults(environment, cpu):
    plan = utils.read_environment(cpu)
    assert (plan.seeds, plan.epochs, plan.data, plan.publish, str(plan.out)) == ((0,), 5, "auto", False, "out")
    plan = utils.read_environment(torch.device("cuda"))
    assert (plan.seeds, plan.epochs) == ((0, 1, 2), 20)


def test_environment(environment, cpu, tmp_path):
    environment(SEEDS="2", EPOCHS="7", DATA="cifar10", OUT=str(tmp_path / "a b"))
    plan = utils.read_environment(cpu)
    assert (plan.seeds, plan.epochs, plan.data, plan.out) == ((0, 1), 7, "cifar10", tmp_path / "a b")
    assert not (tmp_path / "out").exists()
    shown = {picture.name: picture.read_bytes() for picture in (tmp_path / "a b" / "img").iterdir()}
    assert shown["chain.png"] == (ROOT / "img" / "chain.png").read_bytes()
    assert not {"batch.png", "layer.png", "group.png"} & set(shown)  # each run draws its own


def test_publishing(environment, cpu):
    environment(PUBLISH="1")
    plan = utils.read_environment(cpu)
    assert (plan.seeds, plan.epochs, plan.data, str(plan.out)) == (tuple(range(10)), 20, "cifar10", ".")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"SEEDS": "0"}, "S8_SEEDS is '0'; give a whole number from 1 to 1000"),
        ({"SEEDS": "three"}, "S8_SEEDS is 'three'; give"),
        ({"EPOCHS": "-1"}, "S8_EPOCHS is '-1'; give"),
        ({"EPOCHS": "21"}, "S8_EPOCHS is '21'; give a whole number from 1 to 20"),
        ({"DATA": "imagenet"}, "S8_DATA is 'imagenet'; choose one of auto, cifar10, synthetic"),
        ({"PUBLISH": "yes"}, "S8_PUBLISH is 'yes'; choose one of 0, 1"),
        ({"PUBLISH": "1", "SEEDS": "9"}, "S8_SEEDS is 9; S8_PUBLISH=1 needs 10 or more"),
        ({"PUBLISH": "1", "EPOCHS": "19"}, "S8_EPOCHS is 19; S8_PUBLISH=1 needs 20"),
        ({"PUBLISH": "1", "DATA": "synthetic"}, "S8_DATA is 'synthetic'; S8_PUBLISH=1 publishes CIFAR-10 alone"),
        ({"PUBLISH": "1", "OUT": "elsewhere"}, "S8_OUT is 'elsewhere'; S8_PUBLISH=1 writes beside the notebook"),
        ({"SEED": "3"}, "S8_SEED is not a setting; those are S8_SEEDS, S8_EPOCHS"),
        ({"SEEDS": "99999999999"}, "S8_SEEDS is '99999999999'; give a whole number from 1 to 1000"),
        ({"OUT": "/dev/null/out"}, "/dev/null/out/results can't be written (Not a directory); S8_OUT names the folder"),
        ({"OUT": str(ROOT)}, "the checkout itself; choose another folder"),
    ],
)
def test_wrong_environment(environment, cpu, tmp_path, settings, said):
    environment(**settings)
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        utils.read_environment(cpu)
    assert said in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_there_but_cannot_be_written(environment, cpu, monkeypatch):
    def refuse(dir):
        raise PermissionError(13, "Permission denied")

    environment(OUT="mine")
    monkeypatch.setattr(utils.tempfile, "TemporaryFile", refuse)
    with pytest.raises(
        ValueError, match=r"mine/results can't be written \(Permission denied\); S8_OUT names the folder"
    ):
        utils.read_environment(cpu)


@pytest.mark.parametrize("limit", [2**40, 2**25, 0])
def test_memory_is_kept_as_far_as_the_library_allows(monkeypatch, limit):
    calls = []

    class Library:
        def mallopt(self, option, value):
            calls.append((option, value))
            return int(option != -3 or value <= limit)

    monkeypatch.setattr(utils.ctypes, "CDLL", lambda name: Library())
    utils.keep_memory()
    accepted = [value for option, value in calls if option == -3 and value <= limit]
    trimmed = [value for option, value in calls if option == -1]
    assert len(accepted) == len(trimmed) == int(limit > 0)  # the second option without the first would slow all down
    monkeypatch.setattr(utils.ctypes, "CDLL", lambda name: (_ for _ in ()).throw(OSError("another library")))
    utils.keep_memory()


def test_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert utils.pick_device().type == "cpu"
    with pytest.raises(ValueError, match="device is 'cuda'; choose one of cpu"):
        utils.pick_device("cuda")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert utils.pick_device().type == "mps"
    assert utils.pick_device("cpu").type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert utils.pick_device().type == "cuda"
    with pytest.raises(ValueError, match="device is 'meta'; choose one of cuda, mps, cpu"):
        utils.pick_device("meta")


def test_no_cuda_call_on_the_cpu_path(small, monkeypatch):
    """torch.cuda.stream(None) fails where MPS is, so training on a CPU must not touch torch.cuda."""
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: pytest.fail("torch.cuda.stream was called"))
    trained(small)


class Operators(TorchDispatchMode):
    """Notes the operators of PyTorch that run in it, in `seen`; fails where one of them makes float64 numbers."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            assert getattr(value, "dtype", None) != torch.float64, f"{function} makes float64, which MPS lacks"
        self.seen.add(str(function).removeprefix("aten.").removesuffix(".default"))
        return result


@pytest.mark.parametrize("name", list(utils.NORM_OF))
def test_training_uses_no_operator_that_mps_lacks(small, name, monkeypatch):
    """No Mac is at hand, so this asks PyTorch's own table which operators have a kernel there."""
    table = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
    entries = {entry["func"].split("(")[0]: entry for entry in yaml.safe_load(table.read_text())}
    monkeypatch.setattr(utils, "pick_precision", lambda device: torch.float32)  # as on MPS
    with Operators() as operators:
        trained(small, name, replace(SHORT, augment="flip+crop"))
    assert len(operators.seen) > 50
    for operator in operators.seen:
        entry = entries[entries[operator].get("structured_delegate", operator)]
        keys = ", ".join(entry.get("dispatch", ["Composite"])).split(", ")
        assert "MPS" in keys or any(key.startswith("Composite") for key in keys), f"{operator} has kernels for {keys}"


def test_unknown_net():
    with pytest.raises(ValueError, match="net is 'NetD'; choose one of NetA, NetB, NetC, Net"):
        utils.build("NetD", SHORT)


def test_precision(monkeypatch):
    cuda = torch.device("cuda")
    for capability, dtype in (((6, 1), torch.float32), ((7, 0), torch.float16), ((9, 0), torch.float16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        assert utils.pick_precision(cuda) == dtype
    for feature, dtype in (("avx512_bf16", torch.bfloat16), ("amx_bf16", torch.bfloat16), ("avx2", torch.float32)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda feature=feature: {feature: True})
        assert utils.pick_precision(torch.device("cpu")) == dtype
    assert utils.pick_precision(torch.device("mps")) == torch.float32


def test_without_a_compiler_training_goes_on(small, monkeypatch, capsys):
    def no_compiler(model, **options):
        def fail(images):
            raise RuntimeError("no C compiler\nand much more")

        return fail

    expected, _ = trained(small, "NetA")
    monkeypatch.setattr(torch, "compile", no_compiler)
    net = utils.build("NetA", SHORT)
    utils.train(net, small, SHORT, compile=True)
    said = "torch.compile does not work here, going on without it: no C compiler\n"
    assert said in capsys.readouterr().out
    assert all(torch.equal(expected[name], value) for name, value in net.state_dict().items())


@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")
def test_compiled_and_eager_agree(small):
    expected, history = trained(small, "NetB", replace(SHORT, epochs=1))
    net = utils.build("NetB", SHORT)
    compiled = utils.train(net, small, replace(SHORT, epochs=1), compile=True)
    assert compiled[0]["loss"] == pytest.approx(history[0]["loss"], abs=0.01)
    for name, value in net.state_dict().items():
        assert (value - expected[name]).norm() < 0.05 * expected[name].norm() + 1e-3


def test_out_of_memory(small, monkeypatch):
    def fail(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(utils.Trainer, "__init__", fail)
    with pytest.raises(MemoryError, match="batch_size is 100: that takes more than the memory of cpu; try 50"):
        trained(small)
