"""Muon against torch.optim.Muon, its padded stack, and the SGD that it takes the other parameters with."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import models
from engine.muon import Muon, fix_filter_norm, fix_tensor_norm, newton_schulz

TALL = {"norm": "layer", "widths": (40, 8, 40, 8, 8, 40, 8, 8, 8, 64), "in_channels": 1}  # more rows than columns, too


def gradients_for(net, seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(p.shape, generator=generator) for name, p in net.named_parameters()}


def step(optimizer, net, gradients):
    for name, parameter in net.named_parameters():
        parameter.grad = gradients[name].clone()
    optimizer.step()


def is_matrix(name):
    return name.endswith(("conv.weight", "c3.weight", "c7.weight"))


@pytest.mark.parametrize("channels_last", [False, True])
def test_twenty_steps_of_torch_muon_matrix_by_matrix(monkeypatch, channels_last):
    """torch.optim.Muon averages gradients where ours sums them: one scale for both, which Newton-Schulz divides out."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)  # in which torch's would compute
    torch.manual_seed(0)
    net = models.NetC()
    if channels_last:
        net.to(memory_format=torch.channels_last)
    leaves = {name: p.detach().clone().flatten(1) for name, p in net.named_parameters() if is_matrix(name)}
    assert len(leaves) == 10
    assert all(leaf.shape[0] <= leaf.shape[1] for leaf in leaves.values())  # else torch's would step further
    reference = torch.optim.Muon(
        [nn.Parameter(leaf) for leaf in leaves.values()], lr=0.02, weight_decay=0.5, momentum=0.9, ns_steps=4
    )
    pairs = dict(zip(leaves, reference.param_groups[0]["params"], strict=True))
    optimizer = Muon(models.param_groups(net, 0.5), lr=0.02, momentum=0.9)
    for number in range(20):
        gradients = gradients_for(net, number)
        for group in (*reference.param_groups, *optimizer.param_groups):
            group["lr"] = 0.002 * (number + 1)
        for name, leaf in pairs.items():
            leaf.grad = gradients[name].flatten(1)
        reference.step()
        step(optimizer, net, gradients)
        for name, leaf in pairs.items():
            assert (net.get_parameter(name).flatten(1) - leaf).norm() < 1e-5 * leaf.norm(), (number, name)


@pytest.mark.parametrize("options", [{"norm": "layer"}, TALL])
def test_the_padded_stack_equals_one_matrix_at_a_time(options):
    torch.manual_seed(0)
    net = models.Net(**options)
    one_by_one = copy.deepcopy(net)
    together = Muon(models.param_groups(net, 0.5), lr=0.1)
    apart = [
        Muon([{"params": [p], "weight_decay": 0.5, "use_muon": is_matrix(name)}], lr=0.1)
        for name, p in one_by_one.named_parameters()
    ]
    for number in range(3):
        gradients = gradients_for(net, number)
        step(together, net, gradients)
        for parameter, (name, _) in zip(one_by_one.parameters(), net.named_parameters(), strict=True):
            parameter.grad = gradients[name].clone()
        for optimizer in apart:
            optimizer.step()
    for (name, p), q in zip(net.named_parameters(), one_by_one.parameters(), strict=True):
        assert (p - q).abs().max() < 1e-5, name


@pytest.mark.parametrize("shape", [(24, 216), (24, 24), (16, 27), (64, 8)])
def test_rows_and_columns_of_zeros_stay_zero(shape):
    rows, columns = shape
    matrix = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    padded = F.pad(matrix, (0, 288 - columns, 0, 64 - rows))
    result = newton_schulz(padded, torch.float32)
    assert (result[:, :rows, :columns] - newton_schulz(matrix, torch.float32)).abs().max() < 1e-5
    assert result[:, rows:].abs().sum() == 0
    assert result[:, :, columns:].abs().sum() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_newton_schulz_approximates_the_orthogonal_factor(dtype):
    matrices = torch.randn(3, 24, 216, generator=torch.Generator().manual_seed(0))
    result = newton_schulz(matrices, dtype)
    assert result.dtype == dtype
    values = torch.linalg.svdvals(result.float())
    assert 0.6 < values.min() < values.max() < 1.3
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    assert F.cosine_similarity(result.float().flatten(1), (left @ right).flatten(1)).min() > 0.97


def test_a_matrix_of_zeros_stays_one():
    assert newton_schulz(torch.zeros(2, 4, 9), torch.float32).abs().sum() == 0


@pytest.mark.parametrize("norm", ["batch", "none"])
def test_the_other_parameters_are_sgd_at_ten_times_the_rate(norm):
    torch.manual_seed(0)
    net = models.Net(norm)
    plain = copy.deepcopy(net)
    optimizer = Muon(models.param_groups(net, 0.5), lr=0.01, momentum=0.9)
    rest = {name: p for name, p in plain.named_parameters() if not is_matrix(name)}
    reference = torch.optim.SGD(rest.values(), 10 * 0.01, momentum=0.9, nesterov=True)
    assert len(rest) == 18  # eight scales and shifts, weight and bias of c11
    for number in range(5):
        gradients = gradients_for(net, number)
        step(optimizer, net, gradients)
        for name, parameter in rest.items():
            parameter.grad = gradients[name].clone()
        reference.step()
    for name, parameter in rest.items():
        assert torch.allclose(net.get_parameter(name), parameter, atol=1e-5), name


def test_what_is_not_finite_keeps_all_parameters_also_from_decay():
    net = models.NetA()
    optimizer = Muon(models.param_groups(net, 0.5), lr=torch.tensor(0.1))
    optimizer.found_inf = torch.ones(())
    before = [p.detach().clone() for p in net.parameters()]
    gradients = gradients_for(net, 0)
    gradients["C2.conv.weight"].fill_(float("nan"))
    gradients["c11.bias"].fill_(float("inf"))
    step(optimizer, net, gradients)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))


def test_found_inf_of_zero_changes_nothing():
    nets = []
    for found_inf in (None, torch.zeros(())):
        torch.manual_seed(0)
        nets.append(models.NetA())
        optimizer = Muon(models.param_groups(nets[-1], 0.5), lr=torch.tensor(0.1))
        optimizer.found_inf = found_inf
        step(optimizer, nets[-1], gradients_for(nets[-1], 0))
    assert all(torch.equal(p, q) for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True))


def test_state_dict_through_a_file(tmp_path):
    torch.manual_seed(0)
    net = models.NetB()
    optimizer = Muon(models.param_groups(net, 0.5), lr=0.1)
    step(optimizer, net, gradients_for(net, 0))
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed = models.NetB()
    resumed.load_state_dict(saved["net"])
    other = Muon(models.param_groups(resumed, 0.0), lr=0.3, momentum=0.1)
    step(other, resumed, gradients_for(net, 9))  # of which nothing may be left
    resumed.load_state_dict(saved["net"])
    other.load_state_dict(saved["optimizer"])
    for number in (1, 2):
        step(optimizer, net, gradients_for(net, number))
        step(other, resumed, gradients_for(net, number))
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), resumed.parameters(), strict=True))


def test_a_parameter_that_is_no_convolution_is_refused():
    linear = nn.Linear(3, 4)
    with pytest.raises(
        ValueError, match=r"^use_muon is set for a parameter of shape \(4, 3\); give weights \(out, in, k, k\)$"
    ):
        Muon([{"params": [linear.weight], "use_muon": True}])
    Muon(linear.parameters())  # steps with SGD


def test_the_loss_of_a_closure_is_returned():
    torch.manual_seed(0)
    net = models.NetB()
    optimizer = Muon(models.param_groups(net, 0.0), lr=0.001)

    def closure():
        optimizer.zero_grad()
        loss = net(torch.ones(2, 3, 8, 8)).square().mean()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert first.requires_grad
    assert optimizer.step(closure) < first


def test_parts_of_muons_step_have_its_norm():
    """By matrix, by row; zero padding stays zero."""
    torch.manual_seed(0)
    stack = torch.zeros(2, 5, 9)
    stack[0, :4, :6], stack[1] = torch.randn(4, 6), torch.randn(5, 9)
    orthogonal = [torch.linalg.svd(matrix, full_matrices=False) for matrix in (stack[0, :4, :6], stack[1])]
    wanted = torch.stack([(u @ v).norm() for u, _, v in orthogonal])
    by_tensor, by_filter = (fix(stack, torch.float32) for fix in (fix_tensor_norm, fix_filter_norm))
    torch.testing.assert_close(by_tensor.norm(dim=(1, 2)), wanted)
    torch.testing.assert_close(by_filter.norm(dim=(1, 2)), wanted)
    torch.testing.assert_close(by_filter[0].norm(dim=1), torch.tensor([1.0, 1, 1, 1, 0]))
    for found in (by_tensor, by_filter):
        assert (found * stack >= 0).all()
        assert not found[0, 4].any()
        assert not found[0, :, 6:].any()


def test_a_step_of_fixed_norm_does_not_depend_on_the_size_of_the_gradient():
    weights = []
    for size in (1.0, 1000.0):
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(4, 3, 3, 3))
        group = {"params": [weight], "use_muon": True}
        optimizer = Muon([group], lr=0.1, direction=fix_tensor_norm)
        weight.grad = size * torch.randn(4, 3, 3, 3)
        optimizer.step()
        weights.append(weight.detach())
    torch.testing.assert_close(*weights)
