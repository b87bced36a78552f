"""Each fast part against the stock PyTorch part that it stands in for, forward and backward."""

import copy

import pytest
import torch
from torch import nn

import models
from engine import fast


def run(module, x, gradient):
    """Return output, gradient of the input and gradients of the parameters."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    module.zero_grad()
    y = module(x)
    y.backward(gradient.to(y.dtype))
    return [y.detach(), x.grad, *(p.grad.clone() for p in module.parameters())]


@pytest.mark.parametrize("size", [(16, 8), (32, 32)])  # below and from 1,024 pixels, two ways on a CPU
@pytest.mark.parametrize("mean", [1, 21])  # bfloat16 can't tell 21 from 21.06
@pytest.mark.parametrize("groups", [1, 4, 32])
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-4), (torch.bfloat16, 0.01)])
def test_group_norm_equals_nn_group_norm_in_float64(device, size, mean, groups, dtype, rounding):
    torch.manual_seed(0)
    if dtype == torch.bfloat16 and device.type == "cuda":
        dtype = torch.float16  # what GPUs train in
    norm = nn.GroupNorm(groups, 32)
    nn.init.normal_(norm.weight, 1, 0.3)
    nn.init.normal_(norm.bias)
    x, gradient = torch.randn(2, 20, 32, *size)
    x, gradient = (
        tensor.to(device, dtype).contiguous(memory_format=torch.channels_last) for tensor in (x * 2 + mean, gradient)
    )
    expected = run(copy.deepcopy(norm).to(device).double(), x.double(), gradient)
    found = run(fast.ChannelsLastGroupNorm(norm.to(device)), x, gradient)
    for right, value in zip(expected, found, strict=True):
        assert (value - right).norm() < rounding * right.norm()
    assert found[0].dtype == dtype
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    assert found[1].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("size", [(16, 8), (15, 8), (16, 9)])
def test_average_pooling_equals_nn_avg_pool(device, size):
    torch.manual_seed(0)
    x = torch.randn(4, 24, *size, device=device).contiguous(memory_format=torch.channels_last)
    gradient = torch.randn(4, 24, size[0] // 2, size[1] // 2, device=device)
    for expected, found in zip(run(nn.AvgPool2d(2), x, gradient), run(fast.AvgPool2x2(), x, gradient), strict=True):
        assert torch.allclose(found, expected, atol=1e-6)
        assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("norm", models.NORMS)
def test_low_precision_copy_equals_the_net_in_float32(device, norm):
    torch.manual_seed(0)
    net = models.Net(norm).to(device, memory_format=torch.channels_last)
    for parameter in net.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, 1, 0.3)
    copied = fast.low_precision_copy(net, torch.float32)
    assert [p.shape for p in copied.parameters()] == [p.shape for p in net.parameters()]
    images = torch.randn(8, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
    logits = torch.randn(8, 10, device=device)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        expected, found = run(net, images, logits), run(copied, images, logits)
    for right, value in zip(expected, found, strict=True):
        assert (value - right).norm() < 1e-4 * right.norm()


@pytest.mark.parametrize("norm", models.NORMS)
def test_low_precision_copy_rounds_and_no_more(norm):
    torch.manual_seed(0)
    net = models.Net(norm).to(memory_format=torch.channels_last)
    images = torch.randn(8, 3, 32, 32)
    logits = fast.low_precision_copy(net, torch.bfloat16)(images.bfloat16())
    assert logits.dtype == torch.bfloat16
    assert (logits - net(images)).norm() < 0.03 * logits.norm()


def test_norms_stay_in_float32_and_are_the_nets_own():
    for norm in ("batch", "layer", "group"):
        net = models.Net(norm)
        copied = fast.low_precision_copy(net, torch.bfloat16)
        assert copied.C2.norm.weight is net.C2.norm.weight
        assert copied.C2.norm.bias is net.C2.norm.bias
        assert (copied.C2.norm is net.C2.norm) == (norm == "batch")  # with the running averages
        assert net.C2.norm.weight.dtype == torch.float32
        assert copied.C2.conv.weight.dtype == torch.bfloat16
        assert net.C2.conv.weight.dtype == torch.float32
        assert isinstance(net.P1, nn.AvgPool2d), "the net itself was changed"
    net = models.NetB()
    net.C2.norm = nn.LayerNorm([32, 32, 32])
    assert fast.low_precision_copy(net, torch.bfloat16).C2.norm.weight.dtype == torch.bfloat16


def test_a_forward_may_ask_for_group_norms_and_what_they_have():
    class Scaled(models.NetC):
        def forward(self, x):
            for layer in self.children():
                for part in layer if isinstance(layer, nn.Sequential) else [layer]:
                    x = part(x) * (3 + part.eps + part.own if isinstance(part, nn.GroupNorm) else 1)
            return x.flatten(1)

    net, images = Scaled(), torch.randn(8, 3, 32, 32)
    for module in net.modules():
        module.own = 1
    assert torch.allclose(fast.low_precision_copy(net, torch.float32)(images), net(images), rtol=1e-3, atol=1e-3)


ACTIVATION = nn.Tanh()


def insert(net, after):
    """Insert modules after children of `net`, by their names."""
    layers = dict(net._modules)
    net._modules.clear()
    for name, layer in layers.items():
        net._modules |= {name: layer} | ({f"{name}_more": after[name]} if name in after else {})


class Gain(nn.Module):
    """Multiply by a parameter without dimensions."""

    state_in_buffers = True

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        return self.gain * x


class Doubled(nn.GroupNorm):
    """A norm of one's own, in the form of a subclass."""

    state_in_buffers = True

    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    "change",
    [
        lambda net: insert(net, {"c3": ACTIVATION, "c7": ACTIVATION}),
        lambda net: setattr(net, "C1", nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.SiLU())),
        lambda net: setattr(net.C5, "norm", Gain()),
        lambda net: setattr(net, "P1", nn.MaxPool2d(2)),
        lambda net: setattr(net, "P1", nn.AvgPool2d(2, divisor_override=1)),
        lambda net: setattr(net, "c3", nn.Sequential(net.c3, nn.SiLU())),
        lambda net: setattr(net, "c7", nn.Conv2d(24, 24, 1, stride=2)),
        lambda net: setattr(net.C5, "norm", Doubled(4, 24)),
        lambda net: setattr(net.C5, "norm", nn.GroupNorm(1, 24, affine=False)),
    ],
)
def test_a_changed_net_is_copied_as_it_is(change):
    torch.manual_seed(0)
    net = models.NetB().to(memory_format=torch.channels_last)
    change(net)
    images = torch.randn(8, 3, 32, 32)
    expected = copy.deepcopy(net)(images)
    found = fast.low_precision_copy(net, torch.float32)(images)
    assert (found - expected).norm() < 1e-4 * expected.norm()
    assert fast.low_precision_copy(net, torch.bfloat16)(images.bfloat16()).dtype == torch.bfloat16


class Around(nn.Module):
    """Has a buffer and a group norm."""

    state_in_buffers = True

    def __init__(self):
        super().__init__()
        self.inner = nn.GroupNorm(4, 24)
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x):
        return self.inner(x.float()).to(x.dtype)


class WithBuffer(models.NetB):
    state_in_buffers = True


def test_what_has_buffers_is_the_nets_own_with_all_that_is_in_it():
    net = WithBuffer()
    net.C5.norm = Around()
    net.register_buffer("steps", torch.zeros(()))
    assert not fast.reason_against_copy(net)
    copied = fast.low_precision_copy(net, torch.bfloat16)
    assert copied(torch.randn(8, 3, 32, 32).bfloat16()).dtype == torch.bfloat16
    assert copied.steps is net.steps
    assert copied.C5.norm is net.C5.norm
    assert type(net.C5.norm.inner) is nn.GroupNorm


class Listed(nn.Module):
    """Runs its modules from a list of its own."""

    state_in_buffers = True

    def __init__(self, norm):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(24, 24, 3, padding=1, bias=False), norm
        self.steps = [self.conv, self.norm, torch.relu]

    def forward(self, x):
        for step in self.steps:
            x = step(x)
        return x


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(24, affine=False), nn.BatchNorm2d(24), nn.GroupNorm(4, 24)])
def test_modules_that_a_list_holds_too_are_those_of_the_copy(norm):
    net = models.NetB()
    net.C5 = Listed(norm)
    copied = fast.low_precision_copy(net, torch.bfloat16)
    assert copied.C5.steps[0] is copied.C5.conv
    assert copied.C5.steps[0] is not net.C5.conv
    assert copied.C5.steps[1] is copied.C5.norm
    assert copied.C5.norm.weight is norm.weight
    copied(torch.randn(8, 3, 32, 32).bfloat16()).float().sum().backward()
    if isinstance(norm, nn.BatchNorm2d):
        assert copied.C5.norm is norm
        assert norm.num_batches_tracked == 1


class Scales(models.Net):
    """Uses the tensors of its norms again, from a list."""

    state_in_buffers = True

    def __init__(self, norm):
        super().__init__(norm)
        self.scales = [self.C1.norm.weight, self.C10.norm.weight, *self.C5.norm.buffers()]

    def forward(self, x):
        return super().forward(x) * sum(scale.float().mean() for scale in self.scales)


@pytest.mark.parametrize("norm", ["batch", "layer", "group", "none"])
def test_tensors_of_a_norm_that_a_list_holds_too_are_those_of_the_norm(norm):
    torch.manual_seed(0)
    net = Scales(norm)
    copied = fast.low_precision_copy(net, torch.float32)
    assert copied.scales[0] is copied.C1.norm.weight
    assert [*map(id, copied.scales[2:])] == [*map(id, net.C5.norm.buffers())]
    images = torch.randn(8, 3, 32, 32)
    plain = copy.deepcopy(net)
    [expected] = torch.autograd.grad(plain(images).square().sum(), [plain.C10.norm.weight])
    [found] = torch.autograd.grad(copied(images).square().sum(), [copied.C10.norm.weight])
    assert (found - expected).norm() < 1e-3 * expected.norm()


def test_an_edited_forward_is_copied_as_it_is(monkeypatch):
    """As if models.py said so."""

    def forward(net, x):
        for name, layer in net.named_children():
            x = layer(x).relu() if name == "c3" else layer(x)
        return x.flatten(1)

    monkeypatch.setattr(models.Net, "forward", forward)
    net, images = models.NetB(), torch.randn(8, 3, 32, 32)
    assert torch.allclose(fast.low_precision_copy(net, torch.float32)(images), net(images), rtol=1e-3, atol=1e-3)


class Edited(torch.nn.Sequential):
    def another_number(self, x):
        return super().forward(x).flatten(2)

    def another_name(self, x):
        return super().forward(x).squeeze(1)

    def more(self, x):
        return super().forward(x).flatten(1) / 4


@pytest.mark.parametrize("edit", ["another_number", "another_name", "more"])
def test_a_forward_that_is_changed_in_place_is_seen(monkeypatch, edit):
    """As IPython's autoreload changes it, whatever its file says."""
    net = models.NetB()
    assert fast.runs_in_order(net)
    monkeypatch.setattr(models.Net.forward, "__code__", getattr(Edited, edit).__code__)
    assert not fast.runs_in_order(net)


def test_a_second_derivative_through_group_norm_is_refused():
    """Its backward pass takes what it has saved for constants."""
    net = fast.low_precision_copy(models.NetC(), torch.float32)
    images = torch.randn(4, 3, 32, 32, requires_grad=True)
    [gradient] = torch.autograd.grad(net(images).logsumexp(1).sum(), images, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("name", ["c3", "c7"])
def test_a_pool_is_not_moved_before_a_convolution_whose_weight_was_replaced(name):
    net, images = models.NetB(), torch.randn(8, 3, 32, 32)
    convolution = net.get_submodule(name)
    convolution.weight = nn.Parameter(torch.randn(*convolution.weight.shape[:2], 3, 3) / 10)
    assert torch.allclose(fast.low_precision_copy(net, torch.float32)(images), net(images), rtol=1e-3, atol=1e-3)


class Clamped(torch.nn.Sequential):
    def forward(self, x):
        return super().forward(x).clamp(-1, 1)


class ClampedNet(models.Net, Clamped):
    state_in_buffers = True


def test_a_forward_above_that_of_net_is_seen(monkeypatch):
    """As of a class between Net and nn.Sequential; a call of one's own, and hooks on all modules, too."""
    assert not fast.runs_in_order(ClampedNet("batch"))
    net = models.NetA()
    hook = torch.nn.modules.module.register_module_forward_hook(lambda module, inputs, output: 2 * output)
    assert not fast.runs_in_order(net)
    hook.remove()
    assert fast.runs_in_order(net)
    for method, own in (("__call__", lambda net, x: net.forward(x) / 4), ("__iter__", lambda net: reversed([*net]))):
        with monkeypatch.context() as patch:
            patch.setattr(models.Net, method, own)
            assert not fast.runs_in_order(net)


def test_precision_is_what_the_device_computes_with(monkeypatch):
    cuda = torch.device("cuda")
    for capability, dtype in (((6, 1), torch.float32), ((7, 0), torch.float16), ((9, 0), torch.float16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        assert fast.pick_precision(cuda) == dtype
    for feature, dtype in (("avx512_bf16", torch.bfloat16), ("amx_bf16", torch.bfloat16), ("avx2", torch.float32)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda feature=feature: {feature: True})
        assert fast.pick_precision(torch.device("cpu")) == dtype
    assert fast.pick_precision(torch.device("mps")) == torch.float32


@pytest.mark.parametrize("limit", [2**40, 2**25, 0])
def test_memory_is_kept_as_far_as_the_library_allows(monkeypatch, limit):
    calls = []

    class Library:
        def mallopt(self, option, value):
            calls.append((option, value))
            return int(option != -3 or value <= limit)

    monkeypatch.setattr(fast.ctypes, "CDLL", lambda name: Library())
    fast.keep_memory()
    accepted = [value for option, value in calls if option == -3 and value <= limit]
    trimmed = [value for option, value in calls if option == -1]
    assert len(accepted) == len(trimmed) == int(limit > 0)  # the second option without the first would slow all down


def test_another_c_library_is_left_alone(monkeypatch):
    def absent(name):
        raise OSError("another library")

    monkeypatch.setattr(fast.ctypes, "CDLL", absent)
    fast.keep_memory()
    monkeypatch.setattr(fast.ctypes, "CDLL", lambda name: object())  # without mallopt
    fast.keep_memory()


@pytest.mark.gpu
def test_each_number_has_one_stream():
    device = torch.device("cuda")
    streams = [fast.cuda_stream(device, number) for number in (0, 1, 0)]
    assert streams[0] is streams[2]
    assert streams[0] is not streams[1]


@pytest.mark.parametrize("groups", [1, 4])
def test_group_norm_of_vectors_and_without_shifts_is_pytorchs(groups):
    norm, x = nn.GroupNorm(groups, 8), torch.randn(3, 8)
    torch.testing.assert_close(fast.ChannelsLastGroupNorm(norm)(x), norm(x))
    net = models.NetC(groups=groups)
    net.C1.norm = nn.GroupNorm(groups, 16, bias=False)
    assert type(fast.low_precision_copy(net, torch.float32).C1.norm) is nn.GroupNorm
