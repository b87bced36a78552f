"""The training step of `models.Net` as a few Triton kernels, the same for batch, layer and group norm.

Every block of the net is a 3x3 convolution, a norm and SiLU. For image n and channel c each norm is one function,

    y = silu(z)    z = scale * x + shift    scale[n, c] = weight[c] * rstd    shift[n, c] = bias[c] - mean * scale

of the convolution's output x. The norms differ only in the x over which mean and rstd are taken:

    batch   channel c of all images           layer   all channels of image n
    group   the channels of a group of n      none    nothing: mean 0, rstd 1

So a convolution also writes two sums for each image and channel over its pixels, S1 of x and S2 of x^2, and the next
kernel pools them: `pool` adds up GROUP neighboring channels (layer norm: all; group norm: a group's), `add_rows` all
images (batch norm). In training that is the whole difference. With M values in a pool,

    mean = pool(S1) / M    variance = pool(S2) / M - mean^2    rstd = 1 / sqrt(variance + eps)

The backward pass pools two other sums in the same way, T1 of dz = dy * silu'(z) and T2 of dz * x:

    dx = scale * dz + b * x + c    b = -rstd^2 * pool(weight * rstd * (T2 - mean * T1)) / M
                                   c = -rstd * pool(weight * T1) / M - b * mean
    dweight = sum over images of rstd * (T2 - mean * T1)    dbias = sum over images of T1

A program, a block of threads, takes an image through one layer, so that its values stay in one multiprocessor's caches:

    forward    x of the layer before -> y -> barrier -> convolution: x, S1, S2
    backward   dy, x -> dx -> barrier -> convolution: dy of the layer before; weights' gradient -> barrier -> T1, T2

An average pool and a 1x1 convolution commute, so the pool comes first, where y is made. Then c3 and C4, and c7 and C8,
are one 3x3 convolution each, which `compose_weights` multiplies out and `split_gradients` takes apart again.

Activations are float16 (image, row, column, channel), channels padded by zeros to 16, 32, 64...; what a convolution
reads has a border of one pixel of zeros, so that no tap needs a mask. Sums, parameters and gradients are float32.
Nothing is added in an order that changes from run to run: the same seed gives the same bits.

`python -m engine.tune` measures a step on this GPU, and `TILES` anew.
"""

import contextlib
import functools
import hashlib
import math
import multiprocessing
import os
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import nn
from tqdm import tqdm

import models
from engine import fast
from engine.muon import split_like

# ---------------------------------------------------------------------------------------------------------------------
# What the kernels share
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def sigmoid(z):
    """1 / (1 + exp(-z)) without a division, which would take several instructions."""
    root = tl.math.rsqrt(1 + tl.math.exp2(-1.4426950408889634 * z))
    return root * root


@triton.jit
def sum_both(first, second):
    """Two sums over pixels at once, (pixels, channels) each to (channels, 2): half the waiting for other warps."""
    return tl.sum(tl.join(first, second), 0)


@triton.jit
def store_both(sums, n, n_images, both, CHANNELS: tl.constexpr):
    """Write what `sum_both` gave as row n of sums (2, n_images, CHANNELS)."""
    channel, which = tl.arange(0, CHANNELS), tl.arange(0, 2)
    tl.store(sums + ((which * n_images + n) * CHANNELS)[None, :] + channel[:, None], both)


@triton.jit
def tap_offsets(block, k, TAPS: tl.constexpr, SIDE: tl.constexpr, CHANNELS: tl.constexpr):
    """Where values k of a block of TAPS taps lie, from the first tap on, in an image (SIDE, SIDE, CHANNELS).

    There are nine taps; where the last block has more, they repeat the ninth and meet weights of zero.
    """
    tap = tl.minimum(block * TAPS + k // CHANNELS, 8)
    return (tap // 3 * SIDE + tap % 3) * CHANNELS + k % CHANNELS


@triton.jit
def pool(sums, GROUP: tl.constexpr, CHANNELS: tl.constexpr):
    """Add up sums (CHANNELS,) over each GROUP of neighboring channels; (CHANNELS,), equal within a group."""
    if GROUP > 1:
        group = tl.arange(0, CHANNELS) // GROUP
        sums = tl.sum(tl.where(group[:, None] == group[None, :], sums[None, :], 0.0), axis=1)
    return sums


@triton.jit
def mean_and_rstd(sums, n, rows, count, eps, GROUP: tl.constexpr, CHANNELS: tl.constexpr):
    """Mean and 1 / deviation of each channel of image n, (CHANNELS,), from S1 and S2, sums (2, rows, CHANNELS).

    rows   images, or 1 where batch norm has added them up
    count  values in a pool; GROUP 0 stands for a norm without statistics
    """
    channel = tl.arange(0, CHANNELS)
    mean = tl.zeros([CHANNELS], tl.float32)
    rstd = mean + 1
    if GROUP > 0:
        row = tl.where(rows == 1, 0, n)
        mean = pool(tl.load(sums + row * CHANNELS + channel), GROUP, CHANNELS) / count
        square = pool(tl.load(sums + (rows + row) * CHANNELS + channel), GROUP, CHANNELS) / count
        rstd = tl.math.rsqrt(tl.maximum(square - mean * mean, 0.0) + eps)
    return mean, rstd


@triton.jit
def scale_and_shift(mean, rstd, values, weight, bias, REAL: tl.constexpr, CHANNELS: tl.constexpr):
    """The norm as z = scale * x + shift, each (CHANNELS,); weight and bias are places in `values`."""
    channel = tl.arange(0, CHANNELS)
    scale = tl.load(values + weight + channel, channel < REAL, 0.0) * rstd
    return scale, tl.load(values + bias + channel, channel < REAL, 0.0) - mean * scale


@triton.jit
def load_mean_rstd(mean_rstd, n, n_images, CHANNELS: tl.constexpr):
    """Mean and rstd of image n, (CHANNELS,) each, from mean_rstd (2, n_images, CHANNELS)."""
    channel = tl.arange(0, CHANNELS)
    mean = tl.load(mean_rstd + n * CHANNELS + channel)
    return mean, tl.load(mean_rstd + (n_images + n) * CHANNELS + channel)


@triton.jit
def store_mean_rstd(mean_rstd, n, n_images, mean, rstd, CHANNELS: tl.constexpr):
    channel = tl.arange(0, CHANNELS)
    tl.store(mean_rstd + n * CHANNELS + channel, mean)
    tl.store(mean_rstd + (n_images + n) * CHANNELS + channel, rstd)


# ---------------------------------------------------------------------------------------------------------------------
# Forward
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def reflect(position):
    return 31 - tl.abs(31 - tl.abs(position))


@triton.jit(do_not_specialize=["n_images"])
def forward_first(
    images, chosen, shift, flip, colors, y, weights, x, sums, pooled, arrived, n_images,
    AUGMENT: tl.constexpr, CO: tl.constexpr, TAPS: tl.constexpr, TILE: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Batch's image n -> augmented, normalized y (N, 34, 34, 4) -> convolution x (N, 32, 32, CO), sums (2, N, CO).

    images  (all, 32, 32, 3) uint8; chosen (N,), shift (N, 2), flip (N,) as `crop_and_flip` takes them
    colors  (2, 4) float32: mean and deviation of the colors, 0..255
    """
    n = tl.program_id(0)
    start = n.to(tl.int64)
    image = images + tl.load(chosen + n) * 3072
    color = tl.arange(0, 4)
    mean, deviation = tl.load(colors + color), tl.load(colors + 4 + color)
    y += start * (34 * 34 * 4)
    for first in range(0, 1024, 256):
        pixel = first + tl.arange(0, 256)
        row, column = pixel // 32, pixel % 32
        from_row, from_column = row, column
        if AUGMENT:
            mirrored = tl.load(flip + n)
            from_row = reflect(row + tl.load(shift + 2 * n).to(tl.int32))
            from_column = tl.where(mirrored, 31 - column, column) + tl.load(shift + 2 * n + 1).to(tl.int32)
            from_column = reflect(from_column)
        value = tl.load(image + ((from_row * 32 + from_column) * 3)[:, None] + color, (color < 3)[None, :], 0)
        value = tl.where((color < 3)[None, :], (value.to(tl.float32) - mean) / deviation, 0.0)
        offsets = ((row + 1) * 34 + column + 1) * 4
        tl.store(y + offsets[:, None] + color, value.to(tl.float16))
    tl.debug_barrier()
    convolve(y, weights, x + start * (1024 * CO), sums, pooled, arrived, n, n_images, 32, 4, CO, TAPS, TILE, ADD)


@triton.jit(do_not_specialize=["n_images", "rows", "count", "eps", "weight", "bias"])
def forward_layer(
    x_before, sums_before, rows, count, eps, values, weight, bias, mean_rstd, y, weights, x, sums, pooled, arrived,
    n_images, H: tl.constexpr, GROUP: tl.constexpr, REAL: tl.constexpr, CI: tl.constexpr, CO: tl.constexpr,
    POOL: tl.constexpr, TAPS: tl.constexpr, FILL: tl.constexpr, TILE: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """x_before (N, H * POOL, H * POOL, CI) of image n -> y (N, H + 2, H + 2, CI) -> x (N, H, H, CO), sums (2, N, CO).

    sums_before (2, rows, CI) -> mean_rstd (2, N, CI), mean and rstd of x_before, for the backward pass
    """
    n = tl.program_id(0)
    start = n.to(tl.int64)
    mean, rstd = mean_and_rstd(sums_before, n, rows, count, eps, GROUP, CI)
    store_mean_rstd(mean_rstd, n, n_images, mean, rstd, CI)
    scale, shift = scale_and_shift(mean, rstd, values, weight, bias, REAL, CI)
    channel = tl.arange(0, CI)
    x_before += start * (H * H * POOL * POOL * CI)
    y += start * ((H + 2) * (H + 2) * CI)
    for first in range(0, H * H, FILL):
        pixel = first + tl.arange(0, FILL)
        i, j = pixel // H, pixel % H
        total = tl.zeros([FILL, CI], tl.float32)
        for part in tl.static_range(POOL * POOL):
            offsets = ((i * POOL + part // POOL) * (H * POOL) + j * POOL + part % POOL) * CI
            z = scale * tl.load(x_before + offsets[:, None] + channel) + shift
            total += z * sigmoid(z)
        offsets = ((i + 1) * (H + 2) + j + 1) * CI
        tl.store(y + offsets[:, None] + channel, (total * (1 / (POOL * POOL))).to(tl.float16))
    tl.debug_barrier()
    convolve(y, weights, x + start * (H * H * CO), sums, pooled, arrived, n, n_images, H, CI, CO, TAPS, TILE, ADD)


@triton.jit
def convolve(
    y, weights, x, sums, pooled, arrived, n, n_images,
    H: tl.constexpr, CI: tl.constexpr, CO: tl.constexpr, TAPS: tl.constexpr, TILE: tl.constexpr,
    ADD: tl.constexpr,
):  # fmt: skip
    """One image's y (H + 2, H + 2, CI) and weights (taps, CI, CO) -> x (H, H, CO) and row n of the sums.

    ADD  `add_images_if_last`
    """
    BLOCKS: tl.constexpr = (8 + TAPS) // TAPS
    k, channel = tl.arange(0, TAPS * CI), tl.arange(0, CO)
    both = tl.zeros([CO, 2], tl.float32)
    for first in range(0, H * H, TILE):
        pixel = first + tl.arange(0, TILE)
        pointers = y + ((pixel // H * (H + 2) + pixel % H) * CI)[:, None]
        total = tl.zeros([TILE, CO], tl.float32)
        for block in tl.static_range(BLOCKS):
            taps = tl.load(pointers + tap_offsets(block, k, TAPS, H + 2, CI))
            w = tl.load(weights + (block * TAPS * CI + k)[:, None] * CO + channel)
            total = tl.dot(taps, w, total)
        tl.store(x + (pixel * CO)[:, None] + channel, total.to(tl.float16))
        both += sum_both(total, total * total)
    store_both(sums, n, n_images, both, CO)
    if ADD:
        add_images_if_last(sums, pooled, arrived, n_images, CO)


@triton.jit
def add_rows(sums, pooled, n_images, first, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """Batch norm's pool: sums (2, N, CHANNELS) over all images -> pooled (2, 1, CHANNELS), for BLOCK channels."""
    channel = first + tl.arange(0, BLOCK)
    s1, s2 = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, n_images, CHUNK):
        image = start + tl.arange(0, CHUNK)
        pointers, mask = sums + (image * CHANNELS)[:, None] + channel, (image < n_images)[:, None]
        values = tl.load(pointers, mask, 0.0, cache_modifier=".cg")
        squares = tl.load(pointers + n_images * CHANNELS, mask, 0.0, cache_modifier=".cg")
        s1 += tl.sum(values, 0)
        s2 += tl.sum(squares, 0)
    tl.store(pooled + channel, s1)
    tl.store(pooled + CHANNELS + channel, s2)


@triton.jit(do_not_specialize=["n_images"])
def add_images(sums, pooled, n_images, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """`add_rows` by a kernel of its own, BLOCK channels to a program."""
    add_rows(sums, pooled, n_images, tl.program_id(0) * BLOCK, CHANNELS, BLOCK, CHUNK)


@triton.jit
def add_images_if_last(sums, pooled, arrived, n_images, CHANNELS: tl.constexpr):
    """`add_rows` by the last program of the kernel that made the sums: with few images, sooner than by another kernel.

    Which program is last changes, what it adds and in which order does not. arrived (1,) counts them, from 0 to 0.
    """
    tl.debug_barrier()
    if tl.atomic_add(arrived, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        add_rows(sums, pooled, n_images, 0, CHANNELS, CHANNELS, 128)
        tl.store(arrived, 0)


@triton.jit
def track_statistics(
    pooled, sources, squares, counts, momenta, running_mean, running_var, batches, layers,
    CHANNELS: tl.constexpr, LAYERS: tl.constexpr,
):  # fmt: skip
    """Update the running statistics of all layers from their pooled sums, as nn.BatchNorm2d does.

    sources, squares  (CHANNELS,) places of S1 and S2 in pooled, for each channel of each layer; none where negative
    counts, momenta   of each channel: N * H * H, and by how much running_mean and running_var (CHANNELS,) move
    batches           (layers,) int64, one more for each
    """
    channel, layer = tl.arange(0, CHANNELS), tl.arange(0, LAYERS)
    source, count, momentum = tl.load(sources + channel), tl.load(counts + channel), tl.load(momenta + channel)
    mask = source >= 0
    mean = tl.load(pooled + source, mask, 0.0) / count
    square = tl.load(pooled + tl.load(squares + channel), mask, 0.0) / count
    variance = tl.maximum(square - mean * mean, 0.0) * count / tl.maximum(count - 1, 1.0)
    old = tl.load(running_mean + channel, mask, 0.0)
    tl.store(running_mean + channel, old + momentum * (mean - old), mask)
    old = tl.load(running_var + channel, mask, 0.0)
    tl.store(running_var + channel, old + momentum * (variance - old), mask)
    tl.store(batches + layer, tl.load(batches + layer, layer < layers, 0) + 1, layer < layers)


@triton.jit(do_not_specialize=["n_images", "rows", "count", "eps", "weight", "bias", "w11", "b11", "columns"])
def head(
    x, sums, rows, count, eps, values, weight, bias, mean_rstd, w11, b11, labels, chosen,
    dy, t_sums, pooled, arrived, partials, columns, n_images, loss_scale, smoothing,
    PIXELS: tl.constexpr, GROUP: tl.constexpr, REAL: tl.constexpr, CHANNELS: tl.constexpr, CLASSES: tl.constexpr,
    PADDED: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """x (N, 8, 8, CHANNELS) of C10 -> y, GAP, c11, loss, and back: dy (N, CHANNELS), T1 and T2 of C10.

    mean_rstd as in `forward_layer`.
    Row p of partials (programs, columns): sums over the images of program p of c11's gradients (PADDED, CHANNELS) and
    (PADDED,), of the loss and of the correct answers, both divided by N. All of it is multiplied by loss_scale.
    """
    p = tl.program_id(0)
    pixel, channel, label = tl.arange(0, PIXELS), tl.arange(0, CHANNELS), tl.arange(0, PADDED)
    mask = (label < CLASSES)[:, None] & (channel < REAL)[None, :]
    w = tl.load(values + w11 + (label * REAL)[:, None] + channel, mask, 0.0)
    b = tl.load(values + b11 + label, label < CLASSES, float("-inf"))
    grad_w, grad_b = tl.zeros([PADDED, CHANNELS], tl.float32), tl.zeros([PADDED], tl.float32)
    loss, correct = 0.0, 0.0
    for n in range(p, n_images, tl.num_programs(0)):
        mean, rstd = mean_and_rstd(sums, n, rows, count, eps, GROUP, CHANNELS)
        store_mean_rstd(mean_rstd, n, n_images, mean, rstd, CHANNELS)
        scale, shift = scale_and_shift(mean, rstd, values, weight, bias, REAL, CHANNELS)
        offsets = (tl.full([], 1, tl.int64) * n * PIXELS + pixel)[:, None] * CHANNELS + channel
        value = tl.load(x + offsets).to(tl.float32)
        z = scale * value + shift
        s = sigmoid(z)
        average = tl.sum(z * s, 0) / PIXELS
        logits = tl.sum(w * average[None, :], 1) + b
        truth = tl.load(labels + tl.load(chosen + n))
        highest = tl.max(logits, 0)
        log_sum = tl.log(tl.sum(tl.exp(logits - highest), 0)) + highest
        wanted = tl.where(label == truth, 1 - smoothing, 0.0) + smoothing / CLASSES
        wanted = tl.where(label < CLASSES, wanted, 0.0)
        loss += tl.sum(tl.where(label < CLASSES, wanted * (log_sum - logits), 0.0), 0)
        guess = tl.min(tl.where(logits == highest, label, CLASSES), 0)  # of equal logits the first, as argmax takes
        correct += tl.where(guess == truth, 1.0, 0.0)
        grad_logits = (tl.exp(logits - log_sum) - wanted) * (loss_scale / n_images)
        grad_w += grad_logits[:, None] * average[None, :]
        grad_b += grad_logits
        grad_y = tl.sum(w * grad_logits[:, None], 0) / PIXELS
        tl.store(dy + n * CHANNELS + channel, grad_y.to(tl.float16))
        dz = grad_y * (s * (1 + z * (1 - s)))
        store_both(t_sums, n, n_images, sum_both(dz, dz * value), CHANNELS)
    out = partials + p * columns
    tl.store(out + (label * CHANNELS)[:, None] + channel, grad_w)
    tl.store(out + PADDED * CHANNELS + label, grad_b)
    tl.store(out + PADDED * CHANNELS + PADDED, loss / n_images * loss_scale)
    tl.store(out + PADDED * CHANNELS + PADDED + 1, correct / n_images * loss_scale)
    if ADD:
        add_images_if_last(t_sums, pooled, arrived, n_images, CHANNELS)


# ---------------------------------------------------------------------------------------------------------------------
# Backward
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def norm_backward(
    mean_rstd, t_sums, n, rows, count, values, weight, bias, n_images,
    GROUP: tl.constexpr, REAL: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """scale, shift, b, c (see above) of image n, and its share of dweight and dbias, each (CHANNELS,)."""
    channel = tl.arange(0, CHANNELS)
    mean, rstd = load_mean_rstd(mean_rstd, n, n_images, CHANNELS)
    scale, shift = scale_and_shift(mean, rstd, values, weight, bias, REAL, CHANNELS)
    row = tl.where(rows == 1, 0, n)
    t1 = tl.load(t_sums + row * CHANNELS + channel)
    t2 = tl.load(t_sums + (rows + row) * CHANNELS + channel) - mean * t1
    b, c = tl.zeros([CHANNELS], tl.float32), tl.zeros([CHANNELS], tl.float32)
    if GROUP > 0:
        b = -rstd * rstd * pool(scale * t2, GROUP, CHANNELS) / count
        c = -pool(scale * t1, GROUP, CHANNELS) / count - b * mean
        b, c = tl.where(channel < REAL, b, 0.0), tl.where(channel < REAL, c, 0.0)
    once = tl.where((rows > 1) | (n == 0), 1.0, 0.0)  # the one row of batch norm counts once
    return scale, shift, b, c, once * rstd * t2, once * t1


@triton.jit
def input_gradient(x, dy, pixel, scale, shift, b, c, H: tl.constexpr, CHANNELS: tl.constexpr, POOL: tl.constexpr):
    """dx (pixels, CHANNELS), float32, of one image: x (H, H, CHANNELS), dy (H / POOL, H / POOL, CHANNELS)."""
    channel = tl.arange(0, CHANNELS)
    value = tl.load(x + (pixel * CHANNELS)[:, None] + channel).to(tl.float32)
    pooled = pixel // H // POOL * (H // POOL) + pixel % H // POOL
    gradient = tl.load(dy + (pooled * CHANNELS)[:, None] + channel).to(tl.float32)
    z = scale * value + shift
    s = sigmoid(z)
    return gradient * scale * (s * (1 + z * (1 - s))) + b * value + c


@triton.jit(do_not_specialize=[
    "rows", "count", "weight", "bias", "weight_before", "bias_before", "columns", "n_images"
])  # fmt: skip
def backward_layer(
    values, dy, x, mean_rstd, t_sums, rows, count, weight, bias, x_before, mean_rstd_before, weight_before, bias_before,
    y, weights, dx, dy_before, t_before, pooled, arrived, partials, columns, n_images,
    H: tl.constexpr, GROUP: tl.constexpr, REAL: tl.constexpr, CO: tl.constexpr, POOL: tl.constexpr,
    REAL_BEFORE: tl.constexpr, CI: tl.constexpr, POOL_BEFORE: tl.constexpr,
    TAPS: tl.constexpr, FILL: tl.constexpr, TILE: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """dy, x and mean_rstd of this layer -> dx, gradients of weights, and dy_before, T1 and T2 of the layer before.

    dy (N, H / POOL, H / POOL, CO), one for the pixels of a pool, x (N, H, H, CO), dx (programs, H + 2, H + 2, CO) for
    one image at a time, weights (taps, CO, CI) turned by 180 degrees, dy_before (N, H, H, CI). The
    convolution's input y is read (N, H + 2, H + 2, CI) after a pool and computed from x_before otherwise.
    Row p of partials (programs, columns): sums over the images of program p of the gradients of the weights
    (taps, CO, CI), again turned, and of the norm's weight and bias, (CO,) each.
    """
    BLOCKS: tl.constexpr = (8 + TAPS) // TAPS
    p = tl.program_id(0)
    channel, before, k = tl.arange(0, CO), tl.arange(0, CI), tl.arange(0, TAPS * CO)
    grad_norm_weight, grad_norm_bias = tl.zeros([CO], tl.float32), tl.zeros([CO], tl.float32)
    grad_weights = ()
    for _ in tl.static_range(BLOCKS):
        grad_weights = grad_weights + (tl.zeros([TAPS * CO, CI], tl.float32),)  # noqa: RUF005 - as Triton reads it
    dx += p.to(tl.int64) * ((H + 2) * (H + 2) * CO)
    for n in range(p, n_images, tl.num_programs(0)):
        start = tl.full([], 1, tl.int64) * n
        # Zero, which the compiler can't know: it would keep the addresses of all loads in registers, and run out.
        zero = tl.minimum(n, 0)
        mean, rstd = load_mean_rstd(mean_rstd_before, n, n_images, CI)
        scale_before, shift_before = scale_and_shift(mean, rstd, values, weight_before, bias_before, REAL_BEFORE, CI)
        scale, shift, b, c, t2, t1 = norm_backward(
            mean_rstd, t_sums, n, rows, count, values, weight, bias, n_images, GROUP, REAL, CO
        )
        grad_norm_weight += t2
        grad_norm_bias += t1
        x_n, dy_n = x + start * (H * H * CO), dy + start * (H // POOL * (H // POOL) * CO)
        for first in range(0, H * H, FILL):
            pixel = zero + first + tl.arange(0, FILL)
            gradient = input_gradient(x_n, dy_n, pixel, scale, shift, b, c, H, CO, POOL)
            offsets = ((pixel // H + 1) * (H + 2) + pixel % H + 1) * CO
            tl.store(dx + offsets[:, None] + channel, gradient.to(tl.float16))
        tl.debug_barrier()
        x_n, dy_n = x_before + start * (H * H * POOL_BEFORE * POOL_BEFORE * CI), dy_before + start * (H * H * CI)
        y_n = y + start * ((H + 2) * (H + 2) * CI)
        for first in range(0, H * H, TILE):
            pixel = zero + first + tl.arange(0, TILE)
            i, j = pixel // H, pixel % H
            if POOL_BEFORE == 1:
                z = scale_before * tl.load(x_n + (pixel * CI)[:, None] + before) + shift_before
                inputs = (z * sigmoid(z)).to(tl.float16)
            else:
                inputs = tl.load(y_n + (((i + 1) * (H + 2) + j + 1) * CI)[:, None] + before)
            pointers = dx + ((i * (H + 2) + j) * CO)[:, None]
            total = tl.zeros([TILE, CI], tl.float32)
            updated = ()
            taps = tl.load(pointers + tap_offsets(0, k, TAPS, H + 2, CO))
            w = tl.load(weights + k[:, None] * CI + before)
            for block in tl.static_range(BLOCKS):
                next_taps, next_w = taps, w
                if block + 1 < BLOCKS:
                    next_taps = tl.load(pointers + tap_offsets(block + 1, k, TAPS, H + 2, CO))
                    next_w = tl.load(weights + ((block + 1) * TAPS * CO + k)[:, None] * CI + before)
                total = tl.dot(taps, w, total)
                updated = updated + (tl.dot(tl.trans(taps), inputs, grad_weights[block]),)  # noqa: RUF005
                taps, w = next_taps, next_w
            grad_weights = updated
            total = total * (1 / (POOL_BEFORE * POOL_BEFORE))
            tl.store(dy_n + (pixel * CI)[:, None] + before, total.to(tl.float16))
        tl.debug_barrier()
        t1, t2 = tl.zeros([FILL, CI], tl.float32), tl.zeros([FILL, CI], tl.float32)
        for first in range(0, H * H, FILL):
            pixel = zero + first + tl.arange(0, FILL)
            gradient = tl.load(dy_n + (pixel * CI)[:, None] + before).to(tl.float32)
            for part in tl.static_range(POOL_BEFORE * POOL_BEFORE):
                i = pixel // H * POOL_BEFORE + part // POOL_BEFORE
                j = pixel % H * POOL_BEFORE + part % POOL_BEFORE
                value = tl.load(x_n + ((i * (H * POOL_BEFORE) + j) * CI)[:, None] + before).to(tl.float32)
                z = scale_before * value + shift_before
                s = sigmoid(z)
                dz = gradient * (s * (1 + z * (1 - s)))
                t1 += dz
                t2 += dz * value
        store_both(t_before, n, n_images, sum_both(t1, t2), CI)
    out = partials + p * columns
    for block in tl.static_range(BLOCKS):
        mask = (block * TAPS + k // CO < 9) & (k % CO < REAL)
        pointers = out + ((block * TAPS * CO + k) * CI)[:, None] + before
        tl.store(pointers, grad_weights[block], mask[:, None] & (before < REAL_BEFORE))
    tl.store(out + BLOCKS * TAPS * CO * CI + channel, grad_norm_weight)
    tl.store(out + BLOCKS * TAPS * CO * CI + CO + channel, grad_norm_bias)
    if ADD:
        add_images_if_last(t_before, pooled, arrived, n_images, CI)


@triton.jit(do_not_specialize=["rows", "count", "weight", "bias", "columns", "n_images"])
def backward_first(
    values, dy, x, mean_rstd, t_sums, rows, count, weight, bias, y, partials, columns, n_images,
    GROUP: tl.constexpr, REAL: tl.constexpr, CO: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """dy, x (N, 32, 32, CO) and mean_rstd of C1, its input y (N, 34, 34, 4) -> gradients; nothing lies before.

    Row p of partials (programs, columns): the weights' (16 taps, 4, CO), of which 9 taps and 3 colors count, and the
    norm's weight and bias, (CO,) each.
    """
    p = tl.program_id(0)
    channel, k = tl.arange(0, CO), tl.arange(0, 64)
    grad_norm_weight, grad_norm_bias = tl.zeros([CO], tl.float32), tl.zeros([CO], tl.float32)
    grad_weights = tl.zeros([64, CO], tl.float32)
    for n in range(p, n_images, tl.num_programs(0)):
        start = tl.full([], 1, tl.int64) * n
        scale, shift, b, c, t2, t1 = norm_backward(
            mean_rstd, t_sums, n, rows, count, values, weight, bias, n_images, GROUP, REAL, CO
        )
        grad_norm_weight += t2
        grad_norm_bias += t1
        x_n, dy_n, y_n = x + start * (1024 * CO), dy + start * (1024 * CO), y + start * (34 * 34 * 4)
        for first in range(0, 1024, TILE):
            pixel = first + tl.arange(0, TILE)
            gradient = input_gradient(x_n, dy_n, pixel, scale, shift, b, c, 32, CO, 1)
            offsets = (pixel // 32 * 34 + pixel % 32) * 4
            taps = tl.load(y_n + offsets[:, None] + tap_offsets(0, k, 16, 34, 4))
            grad_weights = tl.dot(tl.trans(taps), gradient.to(tl.float16), grad_weights)
    out = partials + p * columns
    tl.store(out + (k * CO)[:, None] + channel, grad_weights)
    tl.store(out + 64 * CO + channel, grad_norm_weight)
    tl.store(out + 65 * CO + channel, grad_norm_bias)


# ---------------------------------------------------------------------------------------------------------------------
# Weights in, gradients out, Muon
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def compose_weights(values, sources, others, terms, strides, weights, BLOCK: tl.constexpr):
    """Float32 values -> float16 weights, BLOCK to a program, in the order in which the convolutions read them.

    A weight is the value at `sources` (none where negative), or where the program's `terms` is not 0 the sum of that
    many products of values at `sources` + term and `others` + term * stride: a 3x3 convolution after a 1x1.
    """
    p = tl.program_id(0)
    element = p * BLOCK + tl.arange(0, BLOCK)
    source = tl.load(sources + element)
    count = tl.load(terms + p)
    mask = source >= 0
    if count == 0:
        weight = tl.load(values + source, mask, 0.0)
    else:
        other, stride = tl.load(others + element), tl.load(strides + p)
        weight = tl.zeros([BLOCK], tl.float32)
        for term in range(0, count):
            first = tl.load(values + source + term, mask, 0.0)
            weight += first * tl.load(values + other + term * stride, mask, 0.0)
    tl.store(weights + element, weight.to(tl.float16))


@triton.jit(do_not_specialize=["factor"])
def add_partials(
    partials, starts, targets, rows, columns, factor, totals, diverged, BLOCK: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """Sums over rows of `partials`, BLOCK columns to a program, times factor, to their places in `totals`.

    starts, rows, columns  of each program: its place in the first row, how many rows there are and how long they are
    targets                places in totals, none where negative
    diverged               set to 1 where a sum is not finite
    """
    p = tl.program_id(0)
    target = tl.load(targets + p * BLOCK + tl.arange(0, BLOCK))
    start, count, stride = tl.load(starts + p), tl.load(rows + p), tl.multiple_of(tl.load(columns + p), 16)
    column = tl.multiple_of(start, 16) + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, count, CHUNK):
        row = first + tl.arange(0, CHUNK)
        values = tl.load(partials + (row * stride)[:, None] + column[None, :], (row < count)[:, None], 0.0)
        total += tl.sum(values, 0)
    total = tl.where(target >= 0, total * factor, 0.0)
    tl.store(totals + target, total, target >= 0)
    tl.store(diverged, 1.0, tl.sum(tl.where(tl.abs(total) < float("inf"), 0, 1), 0) > 0)


@triton.jit
def split_gradients(
    values, totals, pairs, MIDDLE: tl.constexpr, INPUTS: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr
):
    """The gradient of each product of a 1x1 and a 3x3 convolution -> the gradients of the two, all in `totals`.

    With product[o, i] = sum over m of outer[o, m] * inner[m, i], o an output channel and a tap:
    douter = dproduct inner^T, dinner = outer^T dproduct. Program (pair, block): a block of ROWS rows o of douter, and
    then one of ROWS rows m of dinner.
    pairs  (pairs, 7): place of dproduct in totals, places of outer and of inner, number of o, m, i, blocks of o
    """
    block = tl.program_id(1)
    pair = pairs + tl.program_id(0) * 7
    product, outer, inner = tl.load(pair), tl.load(pair + 1), tl.load(pair + 2)
    outputs, middle, inputs, blocks = tl.load(pair + 3), tl.load(pair + 4), tl.load(pair + 5), tl.load(pair + 6)
    m, i = tl.arange(0, MIDDLE), tl.arange(0, INPUTS)
    if block < blocks:
        o = block * ROWS + tl.arange(0, ROWS)
        grad_product = tl.load(totals + product + (o * inputs)[:, None] + i, (o < outputs)[:, None] & (i < inputs), 0.0)
        w = tl.load(values + inner + i[:, None] + m * inputs, (i < inputs)[:, None] & (m < middle), 0.0)
        grad_outer = tl.dot(grad_product, w, input_precision="ieee")
        tl.store(totals + outer + (o * middle)[:, None] + m, grad_outer, (o < outputs)[:, None] & (m < middle))
    else:
        rows = (block - blocks) * ROWS + tl.arange(0, ROWS)
        grad_inner = tl.zeros([ROWS, INPUTS], tl.float32)
        for first in range(0, outputs, CHUNK):
            many = first + tl.arange(0, CHUNK)
            outers = tl.load(
                values + outer + rows[:, None] + many * middle, (rows < middle)[:, None] & (many < outputs), 0.0
            )
            products = tl.load(
                totals + product + (many * inputs)[:, None] + i, (many < outputs)[:, None] & (i < inputs), 0.0
            )
            grad_inner = tl.dot(outers, products, grad_inner, input_precision="ieee")
        tl.store(totals + inner + (rows * inputs)[:, None] + i, grad_inner, (rows < middle)[:, None] & (i < inputs))


@triton.jit
def orthogonalized(matrix, STEPS: tl.constexpr):
    """The iteration of `muon.newton_schulz` on one matrix (float32), rounded to float16 where that rounds."""
    norm = tl.sqrt(tl.sum(tl.sum(matrix * matrix, 1), 0))
    x = (matrix / (norm + 1e-7)).to(tl.float16)
    for _ in tl.static_range(STEPS):
        square = tl.dot(x, tl.trans(x)).to(tl.float16)
        mixed = 2.0315 * tl.dot(square, square) - 4.7750 * square.to(tl.float32)
        x = (3.4445 * x.to(tl.float32) + tl.dot(mixed.to(tl.float16), x)).to(tl.float16)
    return x


@triton.jit(do_not_specialize=["weight_decay", "momentum", "rest_lr", "matrices", "rest_count"])
def muon_step(
    values, gradients, momenta, rest_momenta, offsets, momenta_offsets, rows, columns, rest, lr, diverged,
    weight_decay, momentum, rest_lr, matrices, rest_count,
    STEPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One step of Muon for all parameters: momenta, and values where nothing has diverged.

    Program k < matrices: the convolution whose values lie from offsets[k] on, as a matrix (rows[k], columns[k]).
    The others: BLOCK each of the places in `rest`, by Nesterov momentum at rest_lr times the learning rate, undecayed.
    """
    k = tl.program_id(0)
    stop = tl.load(diverged) > 0
    rate = tl.load(lr)
    if k < matrices:
        m, n = tl.load(rows + k), tl.load(columns + k)
        row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
        inside = (row * n)[:, None] + column
        mask = (row < m)[:, None] & (column < n)[None, :]
        first, moving_first = tl.load(offsets + k), tl.load(momenta_offsets + k)
        gradient = tl.load(gradients + first + inside, mask, 0.0)
        moving = momentum * tl.load(momenta + moving_first + inside, mask, 0.0) + gradient
        tl.store(momenta + moving_first + inside, moving, mask)
        update = orthogonalized(gradient + momentum * moving, STEPS).to(tl.float32) * rate
        value = tl.load(values + first + inside, mask, 0.0)
        value = tl.where(stop, value, value * (1 - rate * weight_decay) - update)
        tl.store(values + first + inside, value, mask)
    else:
        element = (k - matrices) * BLOCK + tl.arange(0, BLOCK)
        rest_mask = element < rest_count
        rest_offsets = tl.load(rest + element, rest_mask, 0)
        slope = tl.load(gradients + rest_offsets, rest_mask, 0.0)
        speed = momentum * tl.load(rest_momenta + element, rest_mask, 0.0) + slope
        tl.store(rest_momenta + element, speed, rest_mask)
        parameter = tl.load(values + rest_offsets, rest_mask, 0.0)
        updated = parameter - (slope + momentum * speed) * rest_lr * rate
        tl.store(values + rest_offsets, tl.where(stop, parameter, updated), rest_mask)


@triton.jit(do_not_specialize=["count"])
def begin_step(
    order, shift, flip, learning_rates, counts, chosen, own_shift, own_flip, lr, count,
    AUGMENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Copy what belongs to step counts[0] of the epoch, row of order (steps, count), and counts[1] of the run: lr."""
    p = tl.program_id(0)
    image = p * BLOCK + tl.arange(0, BLOCK)
    mask = image < count
    index = tl.load(order + tl.load(counts) * count + image, mask, 0)
    tl.store(chosen + image, index, mask)
    if AUGMENT:
        tl.store(own_shift + 2 * image, tl.load(shift + 2 * index, mask, 0), mask)
        tl.store(own_shift + 2 * image + 1, tl.load(shift + 2 * index + 1, mask, 0), mask)
        tl.store(own_flip + image, tl.load(flip + index, mask, 0), mask)
    if p == 0:
        tl.store(lr, tl.load(learning_rates + tl.load(counts + 1)))


@triton.jit
def end_step(metrics, metric_sums, counts, diverged):
    """Add loss and accuracy, 0 to 1, to their sums; count the step, unless the run has diverged."""
    two = tl.arange(0, 2)
    tl.store(metric_sums + two, tl.load(metric_sums + two) + tl.load(metrics + two))
    tl.store(counts + two, tl.load(counts + two) + tl.where(tl.load(diverged) > 0, 0, 1))


# ---------------------------------------------------------------------------------------------------------------------
# The net as a list of launches
# ---------------------------------------------------------------------------------------------------------------------


class Tile(NamedTuple):
    """How a kernel cuts its work."""

    pixels: int  # of a product
    fill: int  # pixels of the elementwise part
    taps: int  # to a block of the product
    warps: int
    programs: int = 1  # for each multiprocessor; backward alone


# For each layer and direction, for batches of an image or more for each multiprocessor and for smaller ones.
# Measured on an H100 80GB HBM3 with torch 2.11 and Triton 3.6 by `python -m engine.tune --tiles`.
TILES = {
    "C1 forward": (Tile(256, 128, 4, 4), Tile(256, 256, 4, 4)),
    "C2 forward": (Tile(256, 128, 1, 4), Tile(256, 256, 2, 4)),
    "C4 forward": (Tile(128, 128, 1, 4), Tile(256, 256, 2, 8)),
    "C5 forward": (Tile(128, 128, 1, 4), Tile(256, 128, 2, 4)),
    "C8 forward": (Tile(64, 64, 1, 4), Tile(64, 64, 1, 4)),
    "C9 forward": (Tile(64, 64, 1, 4), Tile(64, 64, 1, 4)),
    "C1 backward": (Tile(64, 64, 16, 4, 4), Tile(256, 256, 16, 4)),
    "C2 backward": (Tile(128, 128, 2, 4, 2), Tile(256, 128, 4, 8)),
    "C4 backward": (Tile(64, 64, 2, 4, 2), Tile(256, 256, 4, 8)),
    "C5 backward": (Tile(64, 64, 2, 4, 2), Tile(128, 128, 2, 8)),
    "C8 backward": (Tile(64, 64, 2, 4, 2), Tile(64, 64, 2, 4, 2)),
    "C9 backward": (Tile(64, 64, 2, 4, 2), Tile(64, 64, 2, 4, 2)),
}
SAME_TILES = {"C6": "C5", "C10": "C9"}  # layers whose tiles are those of another of the same sizes
SIDES = {"C1": 32, "C2": 32, "C4": 16, "C5": 16, "C6": 16, "C8": 8, "C9": 8, "C10": 8}
LAYERS = ["C1", "C2", "c3", "P1", "C4", "C5", "C6", "c7", "P2", "C8", "C9", "C10", "GAP", "c11"]
SCALE_SHIFT = "x * self.weight.view(-1, 1, 1) + self.bias.view(-1, 1, 1)"
SIDE_STREAM = ("add most partials", "split gradients", "track statistics")  # launches that run beside others
POINTWISE_BEFORE = {"C4": "c3", "C8": "c7"}  # the 1x1 convolution before each, after a 2x2 pool
COMPOSE_BLOCK, REDUCE_BLOCK = 256, 64  # elements of a program of compose_weights and of add_partials


def reason_against(net):
    """Return why `FusedNet` can't stand for `net`, in a few words, or "" where it can."""
    if reason := fast.reason_against_copy(net):
        return reason
    if not has_known_layers(net):
        return "its layers are not those of models.Net with SiLU, for three colors"
    if any(module.training != net.training for module in net.modules()):
        return "some of its modules are in eval mode"
    for name in SIDES:
        norm = net.get_submodule(name).norm
        if type(norm) not in (nn.BatchNorm2d, nn.GroupNorm, models.ScaleShift):
            return f"there is no kernel for {type(norm).__name__}"
        if type(norm) is models.ScaleShift and not fast.computes(models.ScaleShift.forward, SCALE_SHIFT):
            return "ScaleShift was edited"
        if None in norm._buffers.values():
            return "its norms keep no averages"
        shapes = {own: tuple(parameter.shape) for own, parameter in norm.named_parameters()}
        if shapes != dict.fromkeys(("weight", "bias"), (net.get_submodule(name).conv.out_channels,)):
            return "its norms have no scale and shift for each channel"
        if getattr(norm, "eps", 1) <= 0:  # padded channels, of variance 0, would become nan
            return "the eps of its norms is not above 0"
    if not all(parameter.requires_grad for parameter in net.parameters()):
        return "some of its parameters are frozen"
    if max(net.widths) > 32 or net.c11.out_channels > 128:
        return "it has layers of more than 32 channels, or more than 128 classes"
    return ""


def has_known_layers(net):
    """Return whether the modules of `net`, but for its norms, are those that the kernels compute; no more, no other."""
    if list(net._modules) != LAYERS or not fast.runs_in_order(net):
        return False
    blocks = [net._modules[name] for name in SIDES]
    if any(type(one) is not nn.Sequential or [*one._modules] != ["conv", "norm", "activation"] for one in blocks):
        return False
    with torch.device("meta"):  # draws no random numbers
        stock = {"P1": nn.AvgPool2d(2), "P2": nn.AvgPool2d(2), "GAP": nn.AdaptiveAvgPool2d(1)}
        channels = 3
        for name, width in zip((one for one in LAYERS if one not in (*stock, "c11")), net.widths, strict=True):
            if name in SIDES:
                stock[f"{name}.conv"] = nn.Conv2d(channels, width, 3, padding=1, bias=False)
                stock[f"{name}.activation"] = nn.SiLU()
            else:
                stock[name] = nn.Conv2d(channels, width, 1, bias=False)
            channels = width
        stock["c11"] = nn.Conv2d(channels, net.c11.out_channels, 1)
    shapes = {f"{name}.{own}": one.shape for name, module in stock.items() for own, one in module.named_parameters()}
    found = {name: parameter.shape for name, parameter in net.named_parameters() if ".norm." not in name}
    return found == shapes and all(fast.equals(net.get_submodule(name), stock[name]) for name in stock)


@functools.cache
def reason_against_device(device):
    """Return why the kernels can't run on `device`, in a few words, or "" where they can."""
    if device.type != "cuda":
        return ""  # Triton's interpreter
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "the GPU's compute capability is below 8.0"
    try:
        with torch.cuda.device(device):
            double[(1,)](torch.zeros(1, device=device))
    except Exception as error:  # of many kinds: no C compiler, a driver that is too old
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    return ""


@triton.jit
def double(x):
    """The smallest kernel, to see whether there is a compiler."""
    tl.store(x, 2 * tl.load(x))


def padded(channels):
    """Channels as the kernels store them: a power of two of 16 or more."""
    return max(16, triton.next_power_of_2(channels))


class Layer:
    """One 3x3 convolution with its norm: sizes, places in the flat buffers, and the tensors of its activations."""

    def __init__(self, net, name, before, batch_size, sm_count, small_batch, device):
        self.name, self.before, self.side = name, before, SIDES[name]
        block = net.get_submodule(name)
        norm = self.norm = block.norm
        self.channels = block.conv.out_channels
        self.padded_channels = padded(self.channels)
        self.channels_in = before.channels if before else 3
        self.padded_channels_in = before.padded_channels if before else 4
        self.pool = {"C2": 2, "C6": 2, "C10": 8}.get(name, 1)  # of its output
        self.pooled_by_image = not isinstance(norm, nn.BatchNorm2d)
        self.group, self.eps, pixels = 0, 0.0, self.side**2
        self.count = 1.0  # values in a pool
        if isinstance(norm, nn.BatchNorm2d):
            self.group, self.eps, self.count = 1, norm.eps, float(batch_size * pixels)
        elif isinstance(norm, nn.GroupNorm):
            self.group, self.eps = self.channels // norm.num_groups, norm.eps
            self.count = float(self.group * pixels)
        tiled = SAME_TILES.get(name, name)
        self.forward_tile = TILES[f"{tiled} forward"][small_batch]
        self.backward_tile = TILES[f"{tiled} backward"][small_batch]
        self.programs = min(batch_size, self.backward_tile.programs * sm_count)

        def empty(*shape, dtype=torch.float16):
            return torch.empty(shape, dtype=dtype, device=device)

        self.x = empty(batch_size, self.side, self.side, self.padded_channels)
        self.dy = empty(batch_size, self.side // self.pool, self.side // self.pool, self.padded_channels)
        row = self.padded_channels
        self.sums, self.t_sums, self.mean_rstd = (empty(2, batch_size, row, dtype=torch.float32) for _ in "123")
        self.rows = batch_size if self.pooled_by_image else 1
        if self.pooled_by_image:
            self.pooled_sums, self.pooled_t_sums = self.sums, self.t_sums
        else:
            self.pooled_sums, self.pooled_t_sums = (empty(2, 1, row, dtype=torch.float32) for _ in "12")
        self.arrived = torch.zeros(8, dtype=torch.int32, device=device)  # forward from 0 on, backward from 4 on

    def forward_places(self):
        """Output channel, row, column and input channel of each forward weight (taps, CI, CO), nine taps or more."""
        taps = self.forward_tile.taps
        k = torch.arange((8 + taps) // taps * taps * self.padded_channels_in)[:, None]
        tap = k // self.padded_channels_in
        return torch.arange(self.padded_channels)[None], tap // 3, tap % 3, k % self.padded_channels_in

    def backward_places(self):
        """The same for the turned weights (taps, CO, CI) and their gradient, and for the gradient of C1's."""
        if not self.before:
            k = torch.arange(64)[:, None]
            return torch.arange(self.padded_channels)[None], k // 4 // 3, k // 4 % 3, k % 4
        taps = self.backward_tile.taps
        k = torch.arange((8 + taps) // taps * taps * self.padded_channels)[:, None]
        tap = 8 - k // self.padded_channels
        return k % self.padded_channels, tap // 3, tap % 3, torch.arange(self.padded_channels_in)[None]

    def places(self, indices, inputs):
        """Places in a weight (out, 3, 3, inputs) that lies flat, -1 for what pads: int64 of the indices' shape."""
        out, row, column, channel = torch.broadcast_tensors(*indices)
        inside = (out < self.channels) & (row >= 0) & (row < 3) & (channel < self.channels_in)
        return torch.where(inside, ((out * 3 + row) * 3 + column) * inputs + channel, -1)


class FusedNet:
    """Loss and gradients of `models.Net` for a batch of uint8 images, by the kernels above; see `reason_against`.

    net              its parameters become views of one flat float32 buffer, `values`, and their .grad views of another;
                     a BatchNorm2d's running statistics become views, too, and are updated
    images, labels   (all, 32, 32, 3) uint8 and (all,) int64, on the GPU
    augment          "none", "flip" or "flip+crop": whether shift and flip are looked at
    diverged         float32 scalar tensor, a new one by default

    The loss is multiplied within by `loss_scale`, a power of two, about 1024 to an image, so that float16 holds its
    gradients.

    A call takes chosen (B,) int64, and shift (B, 2) int64 and flip (B,) bool as `crop_and_flip` does, and returns the
    mean loss and the accuracy, 0 to 1, float32 tensors that the next call overwrites. It fills .grad in place,
    already divided by loss_scale, and sets `diverged` to 1 where a gradient is not finite. All of it can be captured
    in a CUDA graph. Any optimizer may follow.

    `weights[name]` is what the kernels read for the parameter of that name and `gradients[name]` what they write, so
    that a weight can be computed from another one: `detach(name)`.
    """

    def __init__(self, net, images, labels, batch_size, augment="none", diverged=None, label_smoothing=0.1):
        reason = reason_against(net)
        if reason:
            raise ValueError(f"no fused step for this net: {reason}")
        if not net.training:
            raise ValueError("there is no fused step in eval mode; give a net in train mode, or fused=False")
        device = images.device
        self.net, self.images, self.labels = net, images, labels
        self.triton_version = triton.__version__
        self.batch_size, self.augment = batch_size, augment != "none"
        self.loss_scale = 2.0 ** int(math.log2(1024 * batch_size))
        self.label_smoothing = label_smoothing
        sm_count, large_shared_memory = 2, True
        if device.type == "cuda":
            properties = torch.cuda.get_device_properties(device)
            sm_count = properties.multi_processor_count
            # The tiles for small batches need 170,000 bytes.
            large_shared_memory = properties.shared_memory_per_block_optin >= 200_000
        self.colors = torch.zeros(2, 4, device=device)
        self.colors[1] = 1
        self.colors[:, :3] = 255 * torch.stack([models.MEAN.flatten(), models.STD.flatten()]).to(device)
        self.layers, before = [], None
        self.small_batch = batch_size < sm_count
        for name in SIDES:
            before = Layer(net, name, before, batch_size, sm_count, self.small_batch and large_shared_memory, device)
            self.layers.append(before)
        self.flatten_parameters(device)
        self.make_activations(device)
        self.plan_weights(device)
        self.plan_gradients(min(batch_size, 4 * sm_count), device)
        self.diverged = torch.zeros((), device=device) if diverged is None else diverged
        self.plan_statistics(device)
        self.side = None
        if device.type == "cuda" and not self.small_batch:  # else, the time to part and to join is longer
            self.side = fast.cuda_stream(device, "side")

    def other_norms(self):
        """Yield the launches of a step for each of the three published norms, for `compile_all`."""
        for norm in ("batch", "layer", "group"):
            groups = 1 if any(layer.channels % 4 for layer in self.layers) else 4
            with torch.random.fork_rng(devices=[]):
                net = models.Net(norm, groups, self.net.widths, self.classes).to(self.images.device)
            augment = "flip" if self.augment else "none"
            other = FusedNet(net, self.images, self.labels, self.batch_size, augment)
            yield from other.launches(self.labels, self.labels, self.labels.bool())

    def flatten_parameters(self, device):
        """Move the parameters into `values`, convolutions as (out, row, tap, in), their gradients into `totals`."""
        named = dict(self.net.named_parameters())
        self.offsets, self.size = {}, 0
        for name, parameter in named.items():
            self.offsets[name] = self.size
            self.size += parameter.numel()
        composed = [layer for layer in self.layers if layer.name in POINTWISE_BEFORE]
        products = sum(layer.channels * 9 * layer.channels_in for layer in composed)
        self.values = torch.zeros(self.size, device=device)
        size = -(-(self.size + products) // 4) * 4  # 16 bytes, at which Triton reads faster
        self.totals = torch.zeros(size + 2, device=device)
        self.weights, self.gradients = (
            dict(zip(named, split_like(buffer[: self.size], named.values()), strict=True))
            for buffer in (self.values, self.totals)
        )
        self.attached = named
        for name, parameter in named.items():
            self.weights[name].copy_(parameter.detach())
            parameter.data = self.weights[name]
            parameter.grad = self.gradients[name]
        self.metrics = self.totals[-2:]
        self.loss, self.accuracy = self.metrics

    def detach(self, name):
        """Give parameter `name` memory and a gradient of its own again; who calls this fills weights[name] from it."""
        parameter = self.attached.pop(name)
        parameter.data, parameter.grad = parameter.data.clone(), None
        return parameter

    def make_activations(self, device):
        """The inputs of convolutions and the gradients of their outputs, with their borders, which stay zero.

        Where nothing has to last, layers of the same size share memory: what is overwritten soon stays in the L2 cache.
        """

        def bordered(key, images, side, channels):
            if key not in shared:
                size = images * (side + 2) ** 2 * channels
                shared[key] = torch.zeros(size, dtype=torch.float16, device=device)
            return shared[key]

        shared = {}
        for layer in self.layers:
            side, images = layer.side, self.batch_size
            lasts = not layer.before or layer.before.pool > 1  # read in the backward pass, too
            key = layer.name if lasts else (side, layer.padded_channels_in)
            layer.y = bordered(key, images, side, layer.padded_channels_in)
            if layer.before:
                images = max(other.programs for other in self.layers if other.side == side)
                key = "dx", side, layer.padded_channels
                layer.dx = bordered(key, images, side, layer.padded_channels)

    def plan_weights(self, device):
        """Tables for `compose_weights`: where each float16 weight comes from."""
        sources, others, terms, strides, self.places, size = [], [], [], [], {}, 0
        for layer in self.layers:
            outer = self.offsets[f"{layer.name}.conv.weight"]
            plans = {"forward": layer.forward_places()}
            if layer.before:
                plans["backward"] = layer.backward_places()
            for direction, indices in plans.items():
                inner = POINTWISE_BEFORE.get(layer.name)
                if inner:
                    middle = self.net.get_submodule(inner).out_channels
                    product = layer.places(indices, layer.channels_in).flatten()
                    source = torch.where(product < 0, -1, outer + product // layer.channels_in * middle)
                    other = self.offsets[f"{inner}.weight"] + product % layer.channels_in
                else:
                    middle = 0
                    source = layer.places(indices, layer.channels_in).flatten()
                    source, other = torch.where(source < 0, -1, outer + source), torch.zeros_like(source)
                fill = -len(source) % COMPOSE_BLOCK
                self.places[layer.name, direction] = size, len(source)
                size += len(source) + fill
                sources.append(nn.functional.pad(source, (0, fill), value=-1))
                others.append(nn.functional.pad(other, (0, fill)))
                blocks = (len(source) + fill) // COMPOSE_BLOCK
                terms += [middle] * blocks
                strides += [layer.channels_in] * blocks
        self.weight_tables = [torch.cat(part).int().to(device) for part in (sources, others)]
        self.weight_tables += [torch.tensor(part, dtype=torch.int32, device=device) for part in (terms, strides)]
        self.float16_weights = torch.zeros(size, dtype=torch.float16, device=device)

    def plan_gradients(self, head_programs, device):
        """Tables for `add_partials` and `split_gradients`: where each column of partial sums goes to."""
        targets, programs_of, pairs = ([], []), ([], []), []
        self.parts, size, product = {}, 0, self.size  # of partials: where a kernel's rows begin, and how long they are
        self.head_programs = head_programs

        def add(name, target, programs):
            target = nn.functional.pad(target, (0, -len(target) % REDUCE_BLOCK), value=-1)
            self.parts[name] = size, len(target)
            for number, part in enumerate(target.split(REDUCE_BLOCK)):
                if (part >= 0).any():
                    last = int(name in ("C1", "C2"))
                    targets[last].append(part)
                    programs_of[last].append((size + number * REDUCE_BLOCK, programs, len(target)))
            return size + programs * len(target)

        for layer in self.layers:
            places = layer.places(layer.backward_places(), layer.channels_in).flatten()
            target = self.offsets[f"{layer.name}.conv.weight"]
            inner = POINTWISE_BEFORE.get(layer.name)
            if inner:
                middle = self.net.get_submodule(inner).out_channels
                outputs = layer.channels * 9
                pairs.append([product, target, self.offsets[f"{inner}.weight"], outputs, middle, layer.channels_in])
                target, product = product, product + outputs * layer.channels_in
            channel = torch.arange(layer.padded_channels)
            norm = [torch.where(channel < layer.channels, offset + channel, -1) for offset in self.norm_offsets(layer)]
            size = add(layer.name, torch.cat([torch.where(places < 0, -1, target + places), *norm]), layer.programs)
        last, classes = self.layers[-1], self.net.c11.out_channels
        self.classes, self.padded_classes = classes, padded(classes)
        label, channel = torch.arange(self.padded_classes)[:, None], torch.arange(last.padded_channels)
        weight = self.offsets["c11.weight"] + label * last.channels + channel
        weight = torch.where((label < classes) & (channel < last.channels), weight, -1)
        bias = torch.where(label < classes, self.offsets["c11.bias"] + label, -1)
        metrics = len(self.totals) - 2 + torch.arange(2)
        size = add("head", torch.cat([weight.flatten(), bias.flatten(), metrics]), head_programs)
        self.partials = torch.zeros(size, device=device)
        self.gradient_tables = []  # of the two launches of add_partials
        for target, programs in zip(targets, programs_of, strict=True):
            starts, rows, columns = (torch.tensor(part, dtype=torch.int32) for part in zip(*programs, strict=True))
            self.gradient_tables.append([part.to(device) for part in (starts, torch.cat(target).int(), rows, columns)])
        self.middle = padded(max(pair[4] for pair in pairs))
        self.inputs = padded(max(pair[5] for pair in pairs))
        blocks = [-(-pair[3] // 16) for pair in pairs]
        self.split_blocks = max(count + -(-pair[4] // 16) for count, pair in zip(blocks, pairs, strict=True))
        pairs = [[*pair, count] for pair, count in zip(pairs, blocks, strict=True)]
        self.pairs = torch.tensor(pairs, dtype=torch.int32, device=device)

    def plan_statistics(self, device):
        """Arguments of `track_statistics`; the running statistics of batch norm become views of one buffer."""
        layers = [layer for layer in self.layers if not layer.pooled_by_image and layer.norm.track_running_stats]
        self.tracked = None
        if not layers:
            return
        size = triton.next_power_of_2(sum(layer.channels for layer in layers))
        self.pooled = torch.zeros(sum(2 * layer.padded_channels for layer in layers), device=device)
        running, batches = (
            torch.zeros(2, size, device=device),
            torch.zeros(len(layers), dtype=torch.int64, device=device),
        )
        sources, squares, counts, momenta, start = [], [], [], [], 0
        for number, layer in enumerate(layers):
            layer.pooled_sums = self.pooled[start : start + 2 * layer.padded_channels].view(2, 1, -1)
            own = slice(len(sources), len(sources) + layer.channels)
            for part, name in zip(running, ("running_mean", "running_var"), strict=True):
                part[own] = getattr(layer.norm, name)
                setattr(layer.norm, name, part[own])
            batches[number] = layer.norm.num_batches_tracked
            layer.norm.num_batches_tracked = batches[number]
            sources += range(start, start + layer.channels)
            squares += range(start + layer.padded_channels, start + layer.padded_channels + layer.channels)
            counts += [layer.count] * layer.channels
            momenta += [layer.norm.momentum] * layer.channels
            start += 2 * layer.padded_channels
        fill = size - len(sources)
        tables = [torch.tensor(part + [-1] * fill, dtype=torch.int32, device=device) for part in (sources, squares)]
        tables += [torch.tensor(part + [1.0] * fill, device=device) for part in (counts, momenta)]
        options = {"CHANNELS": size, "LAYERS": triton.next_power_of_2(len(layers)), "num_warps": 4}
        self.tracked = (self.pooled, *tables, *running, batches, len(layers)), options

    def norm_offsets(self, layer):
        """Where the weight and the bias of the layer's norm are in `values`."""
        return [self.offsets[f"{layer.name}.norm.{name}"] for name in ("weight", "bias")]

    def part(self, name):
        """The part of `partials` of a kernel, and the length of its rows."""
        start, columns = self.parts[name]
        return self.partials[start:], columns

    def resources(self, tile):
        """A kernel's resources, as Triton takes them."""
        return {"num_warps": tile.warps, "num_stages": 1}

    def weights_for(self, layer, direction):
        start, length = self.places[layer.name, direction]
        return self.float16_weights[start : start + length]

    def launches(self, chosen, shift, flip):
        """Yield each launch of a step: its name, kernel, grid, arguments, options."""
        n, first, last = self.batch_size, self.layers[0], self.layers[-1]
        yield (
            "compose weights", compose_weights, (len(self.weight_tables[2]),),
            (self.values, *self.weight_tables, self.float16_weights), {"BLOCK": COMPOSE_BLOCK, "num_warps": 2},
        )  # fmt: skip
        for layer in self.layers:
            weights = self.weights_for(layer, "forward")
            tile = layer.forward_tile
            options = {"CO": layer.padded_channels, "TAPS": tile.taps, "TILE": tile.pixels} | self.resources(tile)
            options["ADD"] = self.small_batch and not layer.pooled_by_image
            results = layer.sums, layer.pooled_sums, layer.arrived
            if layer is first:
                arguments = (self.images, chosen, shift, flip, self.colors, layer.y, weights, layer.x, *results, n)
                yield "C1 forward", forward_first, (n,), arguments, options | {"AUGMENT": self.augment}
            else:
                before = layer.before
                options |= {"H": layer.side, "GROUP": before.group, "REAL": before.channels}
                options |= {"CI": before.padded_channels, "POOL": before.pool, "FILL": tile.fill}
                arguments = (
                    before.x, before.pooled_sums, before.rows, before.count, before.eps, self.values,
                    *self.norm_offsets(before), before.mean_rstd, layer.y, weights, layer.x, *results, n,
                )  # fmt: skip
                yield f"{layer.name} forward", forward_layer, (n,), arguments, options
            if not self.small_batch and not layer.pooled_by_image:
                yield self.add_images(layer, layer.sums, layer.pooled_sums)
        yield (
            "head", head, (self.head_programs,),
            (last.x, last.pooled_sums, last.rows, last.count, last.eps, self.values, *self.norm_offsets(last),
             last.mean_rstd, self.offsets["c11.weight"], self.offsets["c11.bias"], self.labels, chosen, last.dy,
             *self.t_results(last), *self.part("head"), n, self.loss_scale, self.label_smoothing),
            {"PIXELS": last.side**2, "GROUP": last.group, "REAL": last.channels, "CHANNELS": last.padded_channels,
             "CLASSES": self.classes, "PADDED": self.padded_classes,
             "ADD": self.small_batch and not last.pooled_by_image, "num_warps": 4},
        )  # fmt: skip
        for layer in reversed(self.layers):
            if not self.small_batch and not layer.pooled_by_image:
                yield self.add_images(layer, *self.t_results(layer)[:2])
            arguments = [self.values, layer.dy, layer.x, layer.mean_rstd, layer.pooled_t_sums, layer.rows, layer.count]
            arguments += self.norm_offsets(layer)
            tile = layer.backward_tile
            options = {"GROUP": layer.group, "REAL": layer.channels, "CO": layer.padded_channels, "TILE": tile.pixels}
            options |= self.resources(tile)
            if layer is first:
                arguments += [layer.y, *self.part(layer.name), n]
                yield "C1 backward", backward_first, (layer.programs,), arguments, options
                break
            before = layer.before
            arguments += [before.x, before.mean_rstd, *self.norm_offsets(before), layer.y]
            arguments += [self.weights_for(layer, "backward"), layer.dx, before.dy, *self.t_results(before)]
            arguments += [*self.part(layer.name), n]
            options |= {"H": layer.side, "POOL": layer.pool, "REAL_BEFORE": before.channels}
            options |= {"CI": before.padded_channels, "POOL_BEFORE": before.pool, "TAPS": tile.taps, "FILL": tile.fill}
            options["ADD"] = self.small_batch and not before.pooled_by_image
            yield f"{layer.name} backward", backward_layer, (layer.programs,), arguments, options
            if layer.name == "C4":
                yield self.add_partials("add most partials", self.gradient_tables[0])
                yield (
                    "split gradients", split_gradients, (len(self.pairs), self.split_blocks),
                    (self.values, self.totals, self.pairs),
                    {"MIDDLE": self.middle, "INPUTS": self.inputs, "ROWS": 16, "CHUNK": 32, "num_warps": 4},
                )  # fmt: skip
                if self.tracked:
                    yield "track statistics", track_statistics, (1,), *self.tracked
        yield self.add_partials("add last partials", self.gradient_tables[1])

    def add_images(self, layer, sums, pooled):
        options = {"CHANNELS": layer.padded_channels, "BLOCK": 8, "CHUNK": 512, "num_warps": 8}
        arguments = sums, pooled, self.batch_size
        return f"{layer.name} add images", add_images, (layer.padded_channels // 8,), arguments, options

    def t_results(self, layer):
        return layer.t_sums, layer.pooled_t_sums, layer.arrived[4:]

    def add_partials(self, name, tables):
        arguments = (self.partials, *tables, 1 / self.loss_scale, self.totals, self.diverged)
        return name, add_partials, (len(tables[0]),), arguments, {"BLOCK": REDUCE_BLOCK, "CHUNK": 128, "num_warps": 4}

    def __call__(self, chosen, shift, flip):
        for name, parameter in self.attached.items():  # net.zero_grad() takes them away
            parameter.grad = self.gradients[name]
        for name, kernel, grid, arguments, options in self.launches(chosen, shift, flip):
            if not self.side:
                kernel[grid](*arguments, **options)
                continue
            current = torch.cuda.current_stream()
            if name == "add most partials":  # beside the backward pass of C2 and C1
                self.side.wait_stream(current)
            if name == "add last partials":
                current.wait_stream(self.side)
            with torch.cuda.stream(self.side if name in SIDE_STREAM else current):
                kernel[grid](*arguments, **options)
        return self.loss, self.accuracy


class StepState:
    """What of a run's state changes from step to step, by one kernel before each step and one after it.

    order            (steps, B) int64: the images of each step of an epoch; shift (N, 2) int64 and flip (N,) bool of all
    learning_rates   (steps of the run,), of which `begin` writes the current one to lr
    counts           (2,) int64: step of the epoch, step of the run
    metric_sums      (2,): sums of loss and accuracy, 0 to 1
    """

    def __init__(self, fused, order, shift, flip, learning_rates, counts, metric_sums, lr):
        self.fused, self.counts, self.metric_sums = fused, counts, metric_sums
        size = order.shape[1]
        self.batch = order.new_zeros(size), order.new_zeros(size, 2), torch.zeros_like(flip[:size])
        chosen, own_shift, own_flip = self.batch
        flips = flip.view(torch.uint8), own_flip.view(torch.uint8)
        self.arguments = order, shift, flips[0], learning_rates, counts, chosen, own_shift, flips[1], lr, size

    def launches(self):
        """As `FusedNet.launches`."""
        count, block = self.arguments[-1], 256
        options = {"AUGMENT": self.fused.augment, "BLOCK": block, "num_warps": 4}
        yield "begin step", begin_step, (-(-count // block),), self.arguments, options
        metrics = self.fused.metrics
        yield (
            "end step",
            end_step,
            (1,),
            (metrics, self.metric_sums, self.counts, self.fused.diverged),
            {"num_warps": 1},
        )

    def begin(self):
        """Return chosen, shift and flip of the current step, as FusedNet takes them."""
        _, kernel, grid, arguments, options = next(self.launches())
        kernel[grid](*arguments, **options)
        return self.batch

    def end(self):
        *_, (_, kernel, grid, arguments, options) = self.launches()
        kernel[grid](*arguments, **options)


class MuonStep:
    """`muon.Muon.step` for the parameters of a `FusedNet`, in one kernel, with that optimizer's own momenta.

    optimizer  a Muon of models.param_groups(net), whose learning rate is a tensor on the GPU
    """

    def __init__(self, fused, optimizer):
        self.fused, self.optimizer = fused, optimizer
        device = fused.values.device
        offsets = {p: fused.offsets[name] for name, p in fused.net.named_parameters()}
        matrices, rest = optimizer.param_groups[0]["params"], optimizer.param_groups[1]["params"]

        def integers(values):
            return torch.tensor(values, dtype=torch.int32, device=device)

        sizes = [(len(p), p[0].numel()) for p in matrices]
        starts = [0]
        for m, n in sizes:
            starts.append(starts[-1] + m * n)
        self.tables = [integers([offsets[p] for p in matrices]), integers(starts[:-1])]
        self.tables += [integers(part) for part in zip(*sizes, strict=True)]
        self.rest = torch.cat([offsets[p] + torch.arange(p.numel(), dtype=torch.int32) for p in rest]).to(device)
        self.rows, self.columns = (padded(max(part)) for part in zip(*sizes, strict=True))

    def launch(self):
        """As one of FusedNet.launches."""
        group = self.optimizer.param_groups[0]
        (momenta, _), (rest_momenta, _) = self.optimizer.flat
        fused, count, block = self.fused, len(self.tables[0]), 256
        arguments = (
            fused.values,
            fused.totals,
            momenta,
            rest_momenta,
            *self.tables,
            self.rest,
            group["lr"],
            fused.diverged,
        )
        arguments += (group["weight_decay"], group["momentum"], self.optimizer.rest_lr, count, len(self.rest))
        options = {"STEPS": 4, "ROWS": self.rows, "COLUMNS": self.columns, "BLOCK": block, "num_warps": 8}
        return "Muon", muon_step, (count + -(-len(self.rest) // block),), arguments, options

    def __call__(self):
        _, kernel, grid, arguments, options = self.launch()
        kernel[grid](*arguments, **options)


# ---------------------------------------------------------------------------------------------------------------------
# Compiling
# ---------------------------------------------------------------------------------------------------------------------


class OfflineDriver:
    """Stands for Triton's driver in a process that compiles for a GPU and must not touch it."""

    def __init__(self, target):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def compile_launch(job):
    """Compile one kernel into Triton's cache on disk; for a process of its own."""
    kernel, arguments, options, target = job
    triton.runtime.driver.set_active(OfflineDriver(target))
    compiled = globals()[kernel].warmup(*arguments, grid=(1,), **options)
    with contextlib.suppress(ImportError, AttributeError):  # up to Triton 3.7, a C program launches each kind of kernel
        from triton.backends.nvidia.driver import CudaLauncher

        CudaLauncher(compiled.src, compiled.metadata)


def jobs_of(launches, target):
    """What `compile_launch` needs for each launch, by the file in Triton's cache that says that it is done."""
    jobs = {}
    for _, kernel, _, arguments, options in launches:
        types = [a.dtype if isinstance(a, torch.Tensor) else a for a in arguments]
        job = kernel.fn.__name__, types, options, target
        # Kernels are compiled for any float, and for any value of an argument that is not specialized.
        any_value = [
            isinstance(a, float) or parameter.do_not_specialize
            for a, parameter in zip(types, kernel.params, strict=False)
        ]
        key = [type(a).__name__ if any_value else a for a, any_value in zip(types, any_value, strict=True)]
        text = f"{kernel.cache_key} {triton.__version__} {kernel.fn.__name__} {key} {options} {target}"
        jobs[Path(triton.knobs.cache.dir) / f"fused-{hashlib.sha256(text.encode()).hexdigest()}"] = job
    return {done: job for done, job in jobs.items() if not done.exists()}


def compile_all(launches, more=list, progress=True):
    """Compile the kernels of `launches`, as FusedNet.launches yields them, by all CPU cores at the same time.

    more  returns further launches, to be compiled along with these where any of these is not compiled yet

    Fills Triton's cache on disk with what is not there yet; one line counts the kernels.
    """
    target = triton.runtime.driver.active.get_current_target()
    jobs = jobs_of(launches, target)
    if not jobs:
        return
    jobs |= jobs_of(more(), target)
    with multiprocessing.get_context("fork").Pool(min(len(jobs), len(os.sched_getaffinity(0)))) as workers:
        compiled = workers.imap_unordered(compile_launch, jobs.values())
        bar_format = "{desc}: {n_fmt} of {total_fmt}, {elapsed}"
        options = {"file": sys.stdout, "disable": not progress, "mininterval": 5, "bar_format": bar_format}
        for _ in tqdm(compiled, "compiling kernels", len(jobs), **options):
            pass
    for done in jobs:
        done.parent.mkdir(parents=True, exist_ok=True)
        done.touch()
