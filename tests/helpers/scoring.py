"""The scores entry by entry, in float64, from the whole history of weights and gradients, no recurrences."""

import torch
from torch import Tensor

from adalora_fast.ops.importance import layout_of, statistic_names

SCORES = ("sensitivity", "movement", "fisher", "gsnr", "magnitude")
SMOOTHINGS = ("ema_uncertainty", "ema", "sum", "none")
INSTANTANEOUS = {
    "sensitivity": lambda w, g: (w * g).abs(),
    "movement": lambda w, g: -w * g,
    "fisher": lambda w, g: g * g,
    "magnitude": lambda w, g: w.abs(),
}


def moment_ratio(gradients: list[Tensor], beta: float) -> Tensor:
    """m̄² / (Var + ε) with the explicit weights β^(t-s) over the gradients seen so far."""
    stack = torch.stack(gradients)
    weights = torch.tensor(
        [beta ** (len(gradients) - 1 - s) for s in range(len(gradients))], dtype=torch.float64
    )
    weights = (weights / weights.sum()).view(-1, 1, 1)
    mean = (weights * stack).sum(0)
    variance = (weights * (stack - mean) ** 2).sum(0)
    square = (weights * stack**2).sum(0)
    return mean**2 / (variance + 1e-6 * square + 1e-30)


def element_score(
    history: list[tuple[Tensor, Tensor]], score: str, smoothing: str, beta1: float, beta2: float
):
    """s of one parameter after the (w, g) of its updates."""
    history = [(w.double(), g.double()) for w, g in history]
    if score == "gsnr":
        seen = [g for _, g in history]
        signals = [moment_ratio(seen[: t + 1], beta1) for t in range(len(seen))]
    else:
        signals = [INSTANTANEOUS[score](w, g) for w, g in history]
    if smoothing == "none":
        return signals[-1]
    if smoothing == "sum":
        return sum(signals)
    averages = [
        sum((1 - beta1) * beta1 ** (t - s) * signals[s] for s in range(t + 1)) for t in range(len(signals))
    ]
    if smoothing == "ema":
        return averages[-1]
    last = len(signals) - 1
    distance = [(signal - average).abs() for signal, average in zip(signals, averages, strict=True)]
    return averages[-1] * sum((1 - beta2) * beta2 ** (last - s) * distance[s] for s in range(last + 1))


def triplet_scores(histories: list[list], score: str, smoothing: str, beta1: float, beta2: float) -> Tensor:
    """S of every triplet from the histories of A_0, E_0, B_0, A_1, ...: lists of (w, g or None)."""
    parts = []
    for k in range(0, len(histories), 3):
        A, E, B = histories[k : k + 3]
        rank = E[0][0].shape[0]

        def of(history):
            present = [(w, g) for w, g in history if g is not None]
            if not present:
                return torch.zeros_like(history[0][0], dtype=torch.float64)
            return element_score(present, score, smoothing, beta1, beta2)

        for i in range(rank):
            total = of(E)[i, 0]
            if score != "magnitude":
                total = total + of(A)[i].mean() + of(B)[:, i].mean()
            parts.append(total)
    return torch.stack(parts) if parts else torch.zeros(0, dtype=torch.float64)


SHAPES = ((5, 3, 7), (5, 3, 7), (4, 2, 7), (6, 0, 3), (9, 1, 1), (5, 2, 7))  # (in, r, out)


def make_parameters(shapes=SHAPES, dtype=torch.float64, seed: int = 0) -> list[Tensor]:
    """A_0, E_0, B_0, A_1, ..."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)

    return [factor for k, r, n in shapes for factor in (draw(r, k), draw(r, 1), draw(n, r))]


def make_buffers(
    parameters: list[Tensor], score: str, smoothing: str, dtype=torch.float64
) -> tuple[Tensor, Tensor]:
    """Fresh (statistics, updates)."""
    rows, size = len(statistic_names(score, smoothing)), layout_of(parameters, score).size
    return torch.zeros(rows, size, dtype=dtype), torch.zeros(len(parameters), dtype=torch.int64)
