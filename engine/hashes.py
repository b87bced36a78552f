"""Hashes of tensors and weights, by which data sets, nets and runs are told apart."""

import functools
import hashlib

import torch


def data_hash(*tensors):
    """Return a hash of the tensors' values, types and shapes, in order, the same on every device.

    It guards against mistakes, not attackers: a sum of 32-bit words, each times 64-bit numbers of its place, modulo
    2^64. It is computed where they are, a few MB at a time: only what is not contiguous is copied.
    """
    block, found = 4096, []  # words
    for tensor in tensors:
        flat, sums = tensor.detach().contiguous().flatten(), []
        for part in flat.split((2**22 if flat.is_cuda else 2**19) // flat.element_size()):
            part = (part.cpu() if part.device.type == "mps" else part).view(torch.uint8)
            if len(part) % (4 * block) or part.storage_offset() % 4:
                part = torch.cat([part, part.new_zeros(-len(part) % (4 * block))])
            words = part.view(torch.int32).view(-1, block)
            sums.append(torch.stack([(words * row).sum(1) for row in _multipliers(block, 0, part.device)]))
        sums = torch.cat(sums, 1)
        totals = (sums * _multipliers(sums.shape[1], 1, sums.device)).sum(1)
        found.append((tensor.dtype, tuple(tensor.shape), totals.tolist()))
    return digest(found)


@functools.lru_cache(64)
def _multipliers(count, seed, device):
    numbers = torch.randint(-(2**63), 2**63 - 1, (2, count), generator=torch.Generator().manual_seed(seed))
    return (numbers | 1).to(device)


def digest(value):
    """Return a hash of a value's repr, as a text."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


def weights_hash(state_dict):
    """Return a hash of a state dict's names and values."""
    return digest((list(state_dict), data_hash(*state_dict.values())))


def test_hash(data):
    """Return a hash of the test images and labels, which tells data sets apart whatever they are called."""
    return data_hash(data.test_images, data.test_labels)
