"""What makes a training step quick and changes nothing else: each part stands in for a stock PyTorch one."""

import contextlib
import copy
import ctypes
import functools
import itertools
import pickle

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import models

SETTINGS = bool | int | float | str | tuple | list | np.generic | None  # types of attributes that `held` compares
CODE_PARTS = ("co_code", "co_consts", "co_names", "co_varnames", "co_freevars", "co_argcount", "co_flags")
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")  # of a module


def pick_precision(device):
    """Return the 16-bit type that `device` computes with natively (float16 on GPUs, bfloat16 on CPUs), or float32."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 0):
        return torch.float16  # as fast as bfloat16, more exact, on more GPUs, and cuDNN has a batch norm for it
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"):
            return torch.bfloat16
    return torch.float32


def training_precision(net, device):
    """Return the type of number that `net` is trained with on `device`. Float32 convolutions may use TF32 on a GPU."""
    return torch.float32 if reason_against_copy(net) else pick_precision(device)


def reason_against_copy(net):
    """Return why a copy can't train for `net`, in a few words, or "" where it can.

    A copy, a CUDA graph and a checkpoint hold parameters and buffers; what else a net changes would be lost. These
    change nothing else: the classes of models.py, PyTorch's modules without buffers, and BatchNorm2d. Any other class
    must say ``state_in_buffers = True`` itself, since a subclass does not inherit it; CONTRIBUTING.md has what it
    promises. Hooks, methods set on one module, tensors that modules share, and modules that are in a list or dict but
    not in `net.modules` are reasons against, too.
    """
    registered = set(net.modules())
    ours = models.Net, models.NetA, models.NetB, models.NetC, models.ScaleShift
    for name, module in net.named_modules():
        cls, name = type(module), name or "net"
        known = cls in ours or cls.__module__.startswith("torch.nn.modules.")
        if [*module.buffers(recurse=False)]:
            known = cls is nn.BatchNorm2d and module.momentum is not None  # else its average needs the host
        if not known and not vars(cls).get("state_in_buffers"):
            return f"{name} is a {cls.__name__}, which does not say state_in_buffers = True"
        if has_own_code(module):
            return f"{name} has a hook, is compiled, or has a method of its own"
        for attribute, value in vars(module).items():
            if not registered.issuperset(modules_in(value)):
                return f"{name}.{attribute} holds a module that is not registered"
    first = {}
    for name, tensor in [*net.named_parameters(remove_duplicate=False), *net.named_buffers(remove_duplicate=False)]:
        if first.setdefault(tensor, name) != name:
            return f"{first[tensor]} is {name}, too"
        if tensor._backward_hooks or tensor._post_accumulate_grad_hooks:
            return f"{name} has a hook"
    return ""


def modules_in(value):
    """Return the modules that a value is, or that lists, tuples, sets and dicts in it hold."""
    if isinstance(value, nn.Module):
        return {value}
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple | set) else ()
    return set().union(*map(modules_in, items))


def low_precision_copy(net, dtype, reorder=True):
    """Copy a `models.Net` for training in `dtype`, which shares the float32 norms of `net`.

    It also shares modules with buffers, such as running averages; other norms are copied in `dtype`. The order of
    parameters is that of `net`. Only for nets without a `reason_against_copy`. ValueError where an attribute can't be
    copied.

    reorder  c3 and c7, where they are plain, come after their pools: the same function for a quarter of the work. Not
             for who looks into the copy, where c3 is then a pool
    """
    instead = {buffer: buffer for buffer in net.buffers(recurse=False)}  # what stands in the copy, wherever it is held
    for module in list(net.modules())[1:]:
        if module in instead:
            continue
        if type(module) is nn.BatchNorm2d or [*module.buffers(recurse=False)]:
            instead |= {one: one for one in (*module.modules(), *module.parameters(), *module.buffers())}
        elif type(module) is nn.GroupNorm and module.weight is not None and module.bias is not None:
            instead |= {module: ChannelsLastGroupNorm(module), **{one: one for one in module.parameters()}}
    kept = set(instead.values())  # in float32
    try:
        copied = copy.deepcopy(net, {id(one): other for one, other in instead.items()})
    except (RuntimeError, TypeError, pickle.PickleError) as error:
        raise ValueError(f"net can't be copied: {str(error).splitlines()[0]}; remove what can't") from None
    for module in set(copied.modules()) - kept:
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.to(dtype)
    if not reorder or not runs_in_order(net):
        return copied
    for (name, conv), (next_name, pool) in itertools.pairwise(list(copied._modules.items())):
        with torch.device("meta"):  # draws no random numbers
            plain = (
                type(conv) is nn.Conv2d
                and conv.weight.shape[2:] == (1, 1)
                and equals(conv, nn.Conv2d(conv.in_channels, conv.out_channels, 1))
            )
        if plain and equals(pool, nn.AvgPool2d(2)):
            copied.set_submodule(name, AvgPool2x2())  # what is called c3 is a pool from here on
            copied.set_submodule(next_name, conv)
    return copied


def held(net):
    """Return what a copy, a CUDA graph or the fused step of a net holds, beside the values of its tensors."""

    def settings(module):
        return {name: value for name, value in vars(module).items() if isinstance(value, SETTINGS) or callable(value)}

    tensors = [
        (id(one), one.data_ptr(), one.requires_grad, bool(one._backward_hooks or one._post_accumulate_grad_hooks))
        for one in [*net.parameters(), *net.buffers()]
    ]
    modules = [
        (name, id(one), type(one), settings(one), *(len(getattr(one, hooks)) for hooks in HOOKS))
        for name, one in net.named_modules(remove_duplicate=False)
    ]
    return tensors, modules


def runs_in_order(net):
    """Return whether the layers of `net` follow each other and nothing else is computed; not if models.py says more."""
    forward, then = type(net).forward, super(models.Net, net).forward
    stock = forward is models.Net.forward and then.__func__ is nn.Sequential.forward
    stock = stock and type(net).__call__ is nn.Module.__call__ and type(net).__iter__ is nn.Sequential.__iter__
    stock = stock and not nn.modules.module._has_any_global_hook()
    return stock and computes(forward, "super().forward(x).flatten(1)")


def computes(forward, result):
    """Return whether a method ``forward(self, x)`` returns `result`, source of one line, and does nothing else.

    By its byte code, since it may be another than its file has by now: IPython's autoreload changes it in place.
    """
    code = getattr(forward, "__code__", None)
    return all(getattr(code, part, None) == getattr(stock_code(result), part) for part in CODE_PARTS)


@functools.cache
def stock_code(result):
    scope = {}
    exec(f"class Stock:\n    def forward(self, x):\n        return {result}", scope)
    return scope["Stock"].forward.__code__


def has_own_code(module):
    """Return whether a module has hooks, is compiled, or has a method that was set on it alone."""
    hides = any(callable(getattr(type(module), name, None)) for name in vars(module))  # a method of the class
    return hides or module._compiled_call_impl is not None or any(getattr(module, name) for name in HOOKS)


def equals(module, stock):
    """Return whether a module is one of PyTorch's like `stock`: of the same class and settings."""

    def settings(module):
        return {name: value for name, value in vars(module).items() if name[0] != "_" and name != "training"}

    return type(module) is type(stock) and settings(module) == settings(stock)


class AvgPool2x2(nn.Module):
    """Average 2x2 pixels, as nn.AvgPool2d(2) does, whose backward pass is slow on CUDA in channels last."""

    def forward(self, x):
        if not x.is_cuda or x.shape[2] % 2 or x.shape[3] % 2:
            return F.avg_pool2d(x, 2)
        blocks = x.permute(0, 2, 3, 1).unflatten(2, (-1, 2)).unflatten(1, (-1, 2))
        return blocks.mean((2, 4)).permute(0, 3, 1, 2)


class ChannelsLastGroupNorm(nn.GroupNorm):
    """An nn.GroupNorm with all that another one has, for activations (N, C, H, W) in channels last.

    PyTorch's own copies to channels first and back on CUDA; on CPUs its backward pass is slow.
    """

    def __init__(self, norm):
        nn.Module.__init__(self)
        vars(self).update(vars(norm))  # the float32 parameters, too

    def forward(self, x):
        if x.dim() != 4:
            return super().forward(x.float()).to(x.dtype)
        weight, bias, groups, eps = self.weight, self.bias, self.num_groups, self.eps
        if groups > 1:
            return GroupNormFunction.apply(x, weight, bias, groups, eps)
        # With one group an image's values lie in one row, for which PyTorch's layer norm is fast.
        rows = x.permute(0, 2, 3, 1)
        scale, shift = (values.repeat(rows[0, :, :, 0].numel()) for values in (weight, bias))
        if x.is_cuda:  # where it takes one type alone
            scale, shift = scale.to(x.dtype), shift.to(x.dtype)
        return F.layer_norm(rows.flatten(1), scale.shape, scale, shift, eps).view_as(rows).permute(0, 3, 1, 2)


class GroupNormFunction(torch.autograd.Function):
    """Forward and backward pass of `ChannelsLastGroupNorm`; float32 statistics (N, groups, 1 or C / groups).

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
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        x, weight, mean, rstd = ctx.saved_tensors
        groups = mean.shape[1]
        total = channel_sums(gradient, groups)
        product = torch.addcmul(channel_products(gradient, x, groups), mean, total, value=-1) * rstd
        both = torch.stack([total, product])  # sums of the gradient, and of the gradient times the normalized x
        c, b = (weight * both).sum(3, keepdim=True) * (rstd / (-x[0].numel() // groups))
        b = b * rstd
        c = torch.addcmul(c, mean, b, value=-1)
        result = torch.addcmul(per_channel(c, x), x, per_channel(b, x))
        result.addcmul_(gradient, per_channel(weight * rstd, x))
        bias_gradient, weight_gradient = both.sum(1).flatten(1)
        return result, weight_gradient, bias_gradient, None, None


def channel_sums(x, groups):
    """Sum (N, C, H, W) over H and W in float32, to (N, groups, C / groups)."""
    # On a CPU, asking for float32 would copy x first; it adds up in float32 all the same and rounds the sums.
    total = x.sum((2, 3), dtype=torch.float32) if x.is_cuda else x.sum((2, 3)).float()
    return total.view(len(x), groups, -1)


def channel_products(x, y, groups):
    """Return `channel_sums` of x * y."""
    if not x.is_cuda:
        return channel_sums(x * y, groups)
    # All channels with all, of which the diagonal is wanted: still faster than to write x * y and to read it again.
    x, y = (values.permute(0, 2, 3, 1).flatten(1, 2) for values in (x, y))
    products = torch.bmm(x.mT, y, out_dtype=torch.float32) if x.dtype != torch.float32 else torch.bmm(x.mT, y)
    return products.diagonal(dim1=1, dim2=2).unflatten(1, (groups, -1))


def per_channel(values, x):
    """Shape (N, groups, C / groups) or (N, groups, 1) to (N, C, 1, 1), in the type of x (N, C, H, W)."""
    n, channels = x.shape[:2]
    return values.to(x.dtype).expand(n, -1, channels // values.shape[1]).reshape(n, channels, 1, 1)


def keep_memory():
    """Let this process keep up to 2 GiB of freed memory from now on, where the C library is glibc.

    By default it gives large tensors back to the system, and each training step on a CPU waits for new pages.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD, bytes. Older versions refuse more than 32 MiB for the first; the second
        # alone would make it smaller than it is by default.
        if libc.mallopt(-3, 2**30) or libc.mallopt(-3, 2**25):
            libc.mallopt(-1, 2**31 - 1)


@functools.cache
def cuda_stream(device, number):
    """Return the CUDA stream of that number, always the same: cuBLAS keeps memory for each, 64 MiB on an H100."""
    return torch.cuda.Stream(device)
