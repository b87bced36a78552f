"""What can be measured inside a net, and of its mistakes."""

import contextlib
import copy

import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn

from engine.data import normalize
from models import NORM_OF


@contextlib.contextmanager
def eval_mode(net):
    """Put `net` in eval mode within a `with` block; afterwards each module has its own mode again."""
    modes = {module: module.training for module in net.modules()}
    try:
        yield net.eval()
    finally:
        for module, training in modes.items():
            module.training = training


def layer_table(net):
    """Tabulate the chain, a line per layer: what it is, its output (C, H, W) for a 32x32 image, its parameters."""
    lines, x = [], torch.zeros(1, 3, 32, 32)
    for name, layer in copy.deepcopy(net).cpu().eval()._modules.items():
        x = layer(x)
        conv, activation = getattr(layer, "conv", layer), getattr(layer, "activation", None)
        kind = "x".join(map(str, conv.kernel_size)) + " conv" if isinstance(conv, nn.Conv2d) else type(layer).__name__
        if isinstance(layer, nn.Sequential) and activation is not None:
            kind += f", norm, {type(activation).__name__}"
        shape = "x".join(str(n) for n in x.shape[1:])
        count = sum(p.numel() for p in layer.parameters())
        lines.append({"layer": name, "type": kind, "output": shape, "parameters": count})
    return pd.DataFrame(lines).set_index("layer")


@torch.no_grad()
def mean_spread(net, name, images, size=1):
    """Measure how much the means that the norms subtract differ, in units of the standard deviations they divide by.

    name    of the net, for the rows
    images  (N, 32, 32, 3) uint8
    size    images that share a mean: those of a batch for batch norm, 1 for layer and group norm

    Returns a row per layer: net, images (the size), layer, spread. ValueError unless `size` divides N into two
    or more, for norms that are neither an nn.BatchNorm2d nor an nn.GroupNorm, and for layers that share a norm.
    """
    if size < 1 or len(images) % size or len(images) < 2 * size:
        raise ValueError(f"size is {size}; give a divisor of the {len(images)} images that is at most half of them")
    found = {}

    def look(layer, norm, x):
        groups = norm.num_groups if isinstance(norm, nn.GroupNorm) else x.shape[1]
        values = x.unflatten(1, (groups, -1)).unflatten(0, (-1, size))
        found.setdefault(layer, []).append(torch.var_mean(values, (1, 3, 4, 5), correction=0))  # (N / size, groups)

    blocks = [(layer, block) for layer, block in net.named_children() if isinstance(block, nn.Sequential)]
    for layer, block in blocks:
        if not isinstance(block.norm, nn.BatchNorm2d | nn.GroupNorm):
            raise ValueError(f"{layer}.norm is a {type(block.norm).__name__}; give batch, layer or group norm")
    hooks = [
        block.norm.register_forward_pre_hook(lambda norm, inputs, layer=layer: look(layer, norm, inputs[0]))
        for layer, block in blocks
    ]
    try:
        with eval_mode(net):
            for part in images.split(max(1, 500 // size) * size):  # some at a time, to spare memory
                net(normalize(part))
    finally:
        for hook in hooks:
            hook.remove()
    rows = []
    for layer, parts in found.items():
        variance, mean = (torch.cat(values) for values in zip(*parts, strict=True))
        if len(mean) * size != len(images):
            raise ValueError(f"{layer}, or its norm, is applied more than once; give each layer its own")
        spread = (mean.var(0).mean() / variance.mean()).sqrt().item()
        rows.append({"net": name, "images": size, "layer": layer, "spread": round(spread, 5)})
    return rows


@torch.no_grad()
def class_activation_maps(net, images):
    """Compute each position's share in each logit, (N, classes, H / 4, W / 4), of images (N, H, W, 3) uint8.

    Zhou et al. 2016, https://arxiv.org/abs/1512.04150. c11 is linear, so it may come before GAP as well: the mean of a
    map over its positions is the net's logit. ValueError for a net of which that is not true.
    """
    images = normalize(images)
    with eval_mode(net), torch.autocast(images.device.type, enabled=False):
        logits, maps = net(images), images
        for name, layer in net._modules.items():
            if name != "GAP":
                maps = layer(maps)
    same = maps.dim() == 4 and maps.shape[:2] == logits.shape
    if not same or ((maps.mean((2, 3)) - logits).abs() > 0.01 * logits.abs().amax(1, keepdim=True)).any():
        raise ValueError("the maps' means are not the net's logits; give a net that computes as models.Net does")
    return maps


def confusion(predictions, labels, classes=10):
    """Count (classes, classes) pairs: row the true class, column the predicted one."""
    return torch.bincount(classes * labels.long() + predictions, minlength=classes**2).view(classes, classes)


def overlap(mistakes):
    """Count the test images that exactly these norms get wrong: a Series "batch only", "batch and layer", ..."""
    norms = mistakes.groupby("index")["net"].agg(lambda nets: tuple(NORM_OF[net] for net in sorted(nets)))
    names = {
        one: " and ".join([", ".join(one[:-1]), one[-1]]) if len(one) > 1 else f"{one[0]} only" for one in set(norms)
    }
    return norms.map(names).value_counts().rename("images")


def check_votes(votes, data):
    """Raise ValueError unless `votes` can be people's answers on the test images of `data`.

    Each image has some, and for 80% of them or more the label is the commonest.
    """
    right = data.split == "test" and votes.shape == (len(data.test_labels), len(data.classes))
    right = right and votes.sum(1).min() > 0
    if not right or (votes.argmax(1) == data.test_labels.cpu()).float().mean() < 0.8:
        raise ValueError(f"votes are for other images than those of {data.name}, {data.split} split; leave them out")


def people_table(runs, data, votes):
    """Compare the mistakes of {norm: Run} with people's answers: percentages of each norm's mistakes.

    votes     (N, classes) counts from `engine.data.human_votes`
    disputed  fewer than 90% of people give the label; on the last line, of all test images
    most      more than half of them
    """
    check_votes(votes, data)
    labels = data.test_labels.cpu()
    agreeing = votes[torch.arange(len(labels)), labels] / votes.sum(1)
    disputed = agreeing < 0.9
    lines = []
    for norm, run in runs.items():
        predictions = run.scores.predictions
        wrong = (predictions != labels).nonzero().flatten()
        shares = {
            "disputed, %": disputed[wrong],
            "someone agrees with the net, %": votes[wrong, predictions[wrong]] > 0,
            "most people agree with the net, %": votes[wrong, predictions[wrong]] > votes[wrong].sum(1) / 2,
        }
        lines.append({"norm": norm, "mistakes": len(wrong)} | {name: percent(share) for name, share in shares.items()})
    lines.append({"norm": "all test images", "mistakes": len(labels)} | dict.fromkeys(shares, "-"))
    lines[-1]["disputed, %"] = percent(disputed)
    return pd.DataFrame(lines).set_index("norm")


def vote_table(runs, data, votes):
    """Let all seeds of {norm: list of Run} vote where most people give another label: percentages of those images.

    votes    (N, classes) counts from `engine.data.human_votes`
    neither  the commonest answer of the seeds is a third one, or two are equally common
    """
    check_votes(votes, data)
    labels, commonest = data.test_labels.cpu(), votes.argmax(1)
    against = (votes[torch.arange(len(labels)), commonest] > votes.sum(1) / 2) & (commonest != labels)
    lines = []
    for norm, own in runs.items():
        answers = F.one_hot(torch.stack([run.scores.predictions for run in own])[:, against], votes.shape[1]).sum(0)
        (most, next_most), vote = answers.topk(2).values.T, answers.argmax(1)
        people, label = ((most > next_most) & (vote == other[against]) for other in (commonest, labels))
        shares = {"with people, %": people, "with the label, %": label, "with neither, %": ~people & ~label}
        shares = {name: percent(share) for name, share in shares.items()}
        lines.append({"norm": norm, "seeds": len(own), "images": int(against.sum())} | shares)
    return pd.DataFrame(lines).set_index("norm")


def percent(flags):
    """Return the share of True in a tensor of bool in percent, rounded to tenths; a dash when it is empty."""
    return round(100 * flags.float().mean().item(), 1) if len(flags) else "-"


def describe_votes(votes, classes, most=2):
    """Return what people answered for an image, the commonest first: "25 frog, 24 cat"."""
    commonest = votes.argsort(descending=True, stable=True)[:most]
    return ", ".join(f"{votes[i]} {classes[i]}" for i in commonest if votes[i])
