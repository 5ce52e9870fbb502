"""Dropout by a counter: which entries of the adapter's input survive, as a function of a seed.

Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) with the seed as its
key and (column // 8, row, 0, 0) as its counter gives 128 bits, 16 for each of eight columns: no mask is
stored, the backward makes it again, and it depends on no tiling. An entry survives where its bits reach the
threshold p · 65536, so p is rounded to a multiple of 1/65536 and the survivors' scale 1 / (1 - p) with it.
"""

import torch
from torch import Tensor

LEVELS = 65536  # values of 16 bits
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


def threshold_of(dropout_p: float) -> int:
    """The number of the 65536 values that drop an entry."""
    return round(dropout_p * LEVELS)


def survivors_scale(dropout_p: float) -> float:
    """1 / (1 - p) for the p that :func:`threshold_of` rounds to; 0 where nothing survives."""
    survivors = LEVELS - threshold_of(dropout_p)
    return LEVELS / survivors if survivors else 0.0


def draw_seed(device: torch.device) -> Tensor:
    """A fresh key [1] from the device's generator: it follows ``torch.manual_seed`` and changes at every
    replay of a CUDA graph.
    """
    return torch.randint(torch.iinfo(torch.int64).max, (1,), device=device)


def philox(seed: Tensor, counter: list[Tensor]) -> list[Tensor]:
    """Four words of 32 bits (in int64) for every counter; ``seed`` is an int64 whose halves are the key."""
    key = [seed & _WORD, (seed >> 32) & _WORD]
    c0, c1, c2, c3 = counter
    for _ in range(10):
        (high0, low0), (high2, low2) = (_wide_product(a, b) for a, b in zip((c0, c2), _MULTIPLIERS))
        c0, c1, c2, c3 = high2 ^ c1 ^ key[0], low2, high0 ^ c3 ^ key[1], low0
        key = [(word + step) & _WORD for word, step in zip(key, _KEY_STEPS)]
    return [c0, c1, c2, c3]


def _wide_product(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """(high, low) words of a · b, both below 2³², in halves of b so that nothing passes 2⁶³."""
    low, high = a * (b & 0xFFFF), a * (b >> 16)  # below 2⁴⁸
    middle = high + (low >> 16)
    return middle >> 16, ((middle << 16) | (low & 0xFFFF)) & _WORD


def survivors(seed: Tensor, rows: int, columns: int, dropout_p: float) -> Tensor:
    """[rows, columns] bool: which entries survive. What the kernels compute, in plain PyTorch."""
    groups = torch.arange(-(-columns // 8), device=seed.device).expand(rows, -1)
    row = torch.arange(rows, device=seed.device).unsqueeze(1).expand_as(groups)
    zero = torch.zeros_like(groups)
    words = torch.stack(philox(seed, [groups, row, zero, zero]), dim=-1)  # [M, C / 8, 4]
    bits = torch.stack([words & 0xFFFF, words >> 16], dim=-1)  # [M, C / 8, 4, 2]
    return bits.reshape(rows, -1)[:, :columns] >= threshold_of(dropout_p)
