"""The fused step at its full size on a GPU: agreement with float32, the same bits each time, 20 steps of training."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import draw_batch, make_net, poison

import models

pytest.importorskip("triton", reason="Triton is not installed")

from engine import kernels
from engine.data import crop_and_flip, normalize
from engine.muon import Muon

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0), reason="needs capability 8.0"
    ),
]


@pytest.fixture(scope="module")
def data():
    """20,000 images in which neighboring pixels are alike, and labels that their colors tell, on the GPU."""
    torch.manual_seed(0)
    small = torch.rand(20_000, 3, 4, 4, device="cuda")
    labels = (small.mean((2, 3)) @ torch.tensor([[7.0], [13.0], [29.0]], device="cuda")).flatten().long() % 10
    images = 255 * F.interpolate(small, size=32, mode="bilinear").permute(0, 2, 3, 1)
    return images.to(torch.uint8).contiguous(), labels


@pytest.fixture(autouse=True)
def exact_float32(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def plain_step(net, images, labels, batch, augment):
    """Loss and gradients in float32 by PyTorch."""
    chosen, shift, flip = batch
    pictures = crop_and_flip(images[chosen], shift, flip) if augment != "none" else images[chosen]
    loss = F.cross_entropy(net(normalize(pictures)), labels[chosen], label_smoothing=0.1)
    net.zero_grad()
    loss.backward()
    return loss


def results_of(fused):
    """Copy a step's loss, accuracy and gradients into one row."""
    return torch.cat([fused.metrics, *(p.grad.flatten() for p in fused.net.parameters())])


@pytest.mark.parametrize("augment", ["none", "flip", "flip+crop"])
@pytest.mark.parametrize("norm", models.NORMS)
@pytest.mark.parametrize("count", [500, 125, 7, 1])
def test_gradients_agree_with_float32_and_have_the_same_bits_again(data, norm, count, augment):
    if norm == "batch" and count == 1:
        pytest.skip("one image has no statistics worth the comparison")
    net = make_net(norm, "cuda")
    plain = copy.deepcopy(net)
    batch = draw_batch(count, 20_000, 3, "cuda")
    fused = kernels.FusedNet(net, *data, count, augment)
    poison(fused)
    loss, _ = fused(*batch)
    assert loss.item() == pytest.approx(plain_step(plain, *data, batch, augment).item(), rel=1e-3)
    for (name, parameter), other in zip(net.named_parameters(), plain.named_parameters(), strict=True):
        assert (parameter.grad - other[1].grad).norm() <= 5e-3 * other[1].grad.norm(), name
    first = results_of(fused)
    poison(fused)
    fused(*batch)
    assert torch.equal(first, results_of(fused))


@pytest.mark.parametrize(
    "options",
    [
        {"widths": (8, 16, 8, 8, 8, 8, 8, 16, 16, 16)},
        {"widths": (12, 28, 20, 20, 20, 20, 20, 28, 28, 28)},
        {"classes": 100},
    ],
)
def test_other_nets_agree_with_float32(data, options):
    net = make_net("group", "cuda", **options)
    plain = copy.deepcopy(net)
    batch = draw_batch(200, 20_000, 4, "cuda")
    kernels.FusedNet(net, *data, 200)(*batch)
    plain_step(plain, *data, batch, "none")
    for (name, parameter), other in zip(net.named_parameters(), plain.parameters(), strict=True):
        assert (parameter.grad - other.grad).norm() <= 5e-3 * other.grad.norm(), name


@pytest.mark.parametrize("norm", models.NORMS)
def test_twenty_steps_stay_with_a_plain_float32_loop(data, norm):
    """With SGD: the singular values that Muon sets to 1 are in part rounding errors, in which two runs differ."""
    net = make_net(norm, "cuda")
    plain = copy.deepcopy(net)
    fused = kernels.FusedNet(net, *data, 250, "flip+crop")
    optimizers = [torch.optim.SGD(each.parameters(), 0.02, 0.9, nesterov=True) for each in (net, plain)]
    losses = []
    for number in range(20):
        batch = draw_batch(250, 20_000, number, "cuda")
        loss, _ = fused(*batch)
        losses.append((loss.item(), plain_step(plain, *data, batch, "flip+crop").item()))
        for optimizer in optimizers:
            optimizer.step()
    for own, wanted in losses:
        assert own == pytest.approx(wanted, abs=0.02)
    for (name, buffer), other in zip(net.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(buffer, other, rtol=0.05, atol=0.05, msg=name)


@pytest.mark.parametrize("norm", models.NORMS)
def test_muon_in_one_kernel_steps_as_the_optimizer_does(data, norm):
    net = make_net(norm, "cuda")
    fused = kernels.FusedNet(net, *data, 125)
    muon = Muon(models.param_groups(net, 0.5), torch.tensor(0.03, device="cuda"), 0.95, dtype=torch.float16)
    step = kernels.MuonStep(fused, muon)
    fused(*draw_batch(125, 20_000, 6, "cuda"))
    plain = copy.deepcopy(net)
    other = Muon(models.param_groups(plain, 0.5), torch.tensor(0.03, device="cuda"), 0.95, dtype=torch.float16)
    before = [parameter.detach().clone() for parameter in net.parameters()]
    for parameter, copied in zip(net.parameters(), plain.parameters(), strict=True):
        copied.grad = parameter.grad.clone()
    for _ in range(2):
        step()
        other.step()
    for own, wanted, first in zip(net.parameters(), plain.parameters(), before, strict=True):
        assert (own - wanted).norm() <= 5e-3 * (wanted - first).norm()


def test_a_captured_step_equals_an_eager_one(data):
    results = []
    for captured in (False, True):
        net = make_net("batch", "cuda")
        fused = kernels.FusedNet(net, *data, 125, "flip+crop")
        batch = draw_batch(125, 20_000, 5, "cuda")
        fused(*batch)
        if captured:
            graph = torch.cuda.CUDAGraph()
            torch.cuda.synchronize()
            with torch.cuda.graph(graph):
                fused(*batch)
            fused.totals.fill_(math.nan)
            graph.replay()
        results.append(results_of(fused))
    assert torch.equal(*results)
