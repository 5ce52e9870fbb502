"""Importance statistics and triplet scores in plain PyTorch, batched over parameters of one shape.

For every entry w with gradient g, an instantaneous signal I is smoothed into an element score s
(``smoothing``)::

    sensitivity  I = |w g|        magnitude  I = |w| (λ only)      ema_uncertainty  s = Ī Ū
    movement     I = -w g         gsnr       I = m̄² / (Var + ε)    ema              s = Ī
    fisher       I = g²                                            sum              s = Σ I
                                                                   none             s = I

    Ī ← β1 Ī + (1 - β1) I        Ū ← β2 Ū + (1 - β2) |I - Ī|      (Ī already updated)

and a triplet i of matrix k scores S = s(λ_i) + mean_j s(P_ji) + mean_j s(Q_ij)  (arXiv 2303.10512, eq. 7-11).
gsnr keeps the bias-corrected mean and the exponentially weighted variance of g by Welford's recurrence: with
a = (1 - β1) / (1 - β1^c) at a parameter's c-th update and d = g - m̄::

    m̄ ← m̄ + a d        Var ← (1 - a)(Var + a d²)        ε = 1e-6 (Var + m̄²) + 1e-30

A step whose signal is not finite anywhere changes nothing; whether it is, stays on the device. Legend: L
matrices, parameters in the order A_0, E_0, B_0, A_1, ...; n parameters of one shape; T triplets in the order
(matrix, i).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from .rule import SMOOTHINGS, ScoreRule

KINDS = ("lora_A", "lora_E", "lora_B")  # a parameter's kind is its position modulo 3


def _gradient_itself(w: Tensor, g: Tensor) -> Tensor:
    return g


SIGNALS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sensitivity": lambda w, g: (w * g).abs_(),
    "movement": lambda w, g: (w * g).neg_(),
    "fisher": lambda w, g: g * g,
    "gsnr": _gradient_itself,  # its I is the ratio, which needs the moments
    "magnitude": lambda w, g: w.abs() + 0 * g,  # an infinite gradient still shows
}


@dataclass(frozen=True, kw_only=True)
class Group:
    """Parameters of one kind and shape: columns [start, stop) of the statistics buffer, stacked to [n,
    *shape].
    """

    kind: str
    shape: tuple[int, int]
    members: tuple[int, ...]
    start: int
    stop: int

    def view(self, row: Tensor) -> Tensor:
        """The group's part of a buffer row as [n, *shape]."""
        return row[self.start : self.stop].view(len(self.members), *self.shape)

    def triplet_means(self, element_scores: Tensor) -> Tensor:
        """[n, r]: what this group's entries add to their triplets' scores."""
        if self.kind == "lora_E":
            return element_scores.squeeze(2)
        return element_scores.mean(2 if self.kind == "lora_A" else 1)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where every parameter's entries lie in the statistics buffer and every matrix's triplets in the score
    vector.
    """

    groups: tuple[Group, ...]
    size: int
    ranks: tuple[int, ...]
    _index: dict[torch.device, list[Tensor]] = field(default_factory=dict, repr=False, compare=False)

    def triplet_index(self, device: torch.device) -> list[Tensor]:
        """Per group, the positions [n * r] of its triplets in the score vector [T]."""
        if device not in self._index:
            starts = [0]
            for rank in self.ranks:
                starts.append(starts[-1] + rank)
            self._index[device] = [
                torch.tensor(
                    [
                        starts[i // 3] + triplet
                        for i in group.members
                        for triplet in range(self.ranks[i // 3])
                    ],
                    dtype=torch.int64,
                    device=device,
                )
                for group in self.groups
            ]
        return self._index[device]


@lru_cache(maxsize=64)
def _layout(shapes: tuple[tuple[int, int], ...], lambda_only: bool) -> Layout:
    members: dict[tuple[str, tuple[int, int]], list[int]] = {}
    for position, shape in enumerate(shapes):
        kind = KINDS[position % 3]
        if (kind == "lora_E" or not lambda_only) and shape[0] * shape[1] > 0:
            members.setdefault((kind, shape), []).append(position)
    groups, start = [], 0
    for (kind, shape), positions in members.items():
        stop = start + len(positions) * shape[0] * shape[1]
        groups.append(Group(kind=kind, shape=shape, members=tuple(positions), start=start, stop=stop))
        start = stop
    return Layout(groups=tuple(groups), size=start, ranks=tuple(shape[0] for shape in shapes[1::3]))


def layout_of(parameters: list[Tensor], score: str) -> Layout:
    """The layout for parameters A_0, E_0, B_0, A_1, ...; ``magnitude`` keeps Λ only."""
    return _layout(tuple(tuple(parameter.shape) for parameter in parameters), score == "magnitude")


def signals(
    layout: Layout, parameters: list[Tensor], grads: list[Tensor | None], signal: Callable, dtype: torch.dtype
) -> tuple[list[Tensor], Tensor]:
    """(I or g of every group [n, *shape], whether all are finite); a missing gradient counts as zero."""
    stacked, peaks = [], []
    for group in layout.groups:
        weights = torch.stack([parameters[i] for i in group.members]).to(dtype)
        present = [parameters[i] if grads[i] is None else grads[i] for i in group.members]
        gradients = torch.stack(present).to(dtype)
        missing = [position for position, i in enumerate(group.members) if grads[i] is None]
        if missing:
            gradients[missing] = 0.0
        value = signal(weights, gradients)
        peak = torch.linalg.vector_norm(value, float("inf"))
        # Differences of signals must be finite too, and gsnr squares them: leave room for both.
        peaks.append(16 * peak * peak if signal is _gradient_itself else 4 * peak)
        stacked.append(value)
    if not peaks:
        return [], torch.ones((), dtype=torch.bool, device=parameters[0].device)
    return stacked, torch.stack(peaks).isfinite().all()


def unknown(
    kernels: str, scores: tuple[str, ...], smoothings: tuple[str, ...], score: str, smoothing: str
) -> str | None:
    """Why ``kernels`` that compute ``scores`` and ``smoothings`` do not compute this pair, or None."""
    for what, name, names in (("score", score, scores), ("smoothing", smoothing, smoothings)):
        if name not in names:
            return f"{kernels} do not compute {what} {name!r}, they have {names}"
    return None


def limit(score: str, smoothing: str) -> str | None:
    """This is the meaning of every score and smoothing: there is none that it does not compute."""
    return None


def smooth_(rows: dict[str, Tensor], value: Tensor, rule: ScoreRule, alive: Tensor) -> None:
    """Update the smoothing's rows [n, *shape] in place; ``alive`` ([n, 1, 1], 0 or 1) says which parameters
    move.
    """
    smoothing = rule.smoothing
    if smoothing == "sum":
        rows["sum"].addcmul_(value, alive)
    elif smoothing == "none":
        rows["last"].lerp_(value, alive)
    elif smoothing not in ("ema", "ema_uncertainty"):
        raise NotImplementedError(f"smooth_ has no branch for smoothing {smoothing!r}; add one to it")
    else:
        rows["ema"].lerp_(value, alive * (1 - rule.beta1))
        if smoothing == "ema_uncertainty":
            rows["uncertainty"].lerp_((value - rows["ema"]).abs_(), alive * (1 - rule.beta2))


def _update_moments_(
    rows: dict[str, Tensor], g: Tensor, count: Tensor, alive: Tensor, beta1: float
) -> Tensor:
    """Welford's recurrence; returns the ratio. ``count``: updates before this one [n, 1, 1]."""
    mean, variance = rows["mean"], rows["variance"]
    bias = 1 - beta1 ** (count + 1).double()  # in float32 the first share would not be exactly 1
    share = torch.where(alive > 0, ((1 - beta1) / bias).to(mean.dtype), 0.0)
    deviation = g - mean
    mean.addcmul_(deviation, share)
    variance.addcmul_(deviation.square_(), share).mul_(1 - share)
    return gradient_signal_to_noise(mean, variance)


def gradient_signal_to_noise(mean: Tensor, variance: Tensor) -> Tensor:
    """m̄² / (Var + ε), ε = 1e-6 (Var + m̄²) + 1e-30, where Var + m̄² is the weighted mean of g²."""
    square = mean.square()
    return square / (variance + 1e-6 * (variance + square) + 1e-30)


def update_(
    parameters: list[Tensor],
    grads: list[Tensor | None],
    statistics: Tensor,
    updates: Tensor,
    rule: ScoreRule,
    active: Tensor | None = None,
) -> None:
    """One optimizer step's update of ``statistics`` [rows, size] and of each parameter's count ``updates``
    [3L]; none where ``active`` is False.
    """
    layout = layout_of(parameters, rule.score)
    values, finite = signals(layout, parameters, grads, SIGNALS[rule.score], statistics.dtype)
    if active is not None:
        finite = finite & active
    if any(grad is None for grad in grads):
        present = torch.tensor([grad is not None for grad in grads], device=statistics.device)
        alive = present.logical_and_(finite)
    else:
        alive = finite.expand(len(grads))
    for group, value in zip(layout.groups, values, strict=True):
        members = list(group.members)
        moving = alive[members].to(statistics.dtype).view(-1, 1, 1)
        rows = {name: group.view(statistics[row]) for row, name in enumerate(rule.statistics)}
        value = torch.where(finite, value, 0.0)
        if rule.score == "gsnr":
            count = updates[members].view(-1, 1, 1)
            value = _update_moments_(rows, value, count, moving, rule.beta1)
        if rule.score != "gsnr" or rule.smoothing != "none":
            smooth_(rows, value, rule, moving)
    updates.add_(alive)


def element_scores(rows: dict[str, Tensor], rule: ScoreRule) -> Tensor:
    """s of every entry of a group: eq. 11 where an uncertainty is kept, else the smoothing's own row."""
    smoothing = rule.smoothing
    if smoothing == "none" and rule.score == "gsnr":
        return gradient_signal_to_noise(rows["mean"], rows["variance"])
    kept = SMOOTHINGS[smoothing]
    if kept == ("ema", "uncertainty"):
        return rows["ema"] * rows["uncertainty"]
    if len(kept) > 1:
        raise NotImplementedError(
            f"smoothing {smoothing!r} keeps {kept}: say in element_scores what score they make"
        )
    return rows[kept[0]]


def triplet_scores(parameters: list[Tensor], statistics: Tensor, rule: ScoreRule) -> Tensor:
    """S of every triplet [T]."""
    layout = layout_of(parameters, rule.score)
    scores = torch.zeros(sum(layout.ranks), dtype=statistics.dtype, device=statistics.device)
    for _, index, means in _triplet_means(layout, statistics, rule):
        scores.index_add_(0, index, means)
    return scores


def triplet_terms(parameters: list[Tensor], statistics: Tensor, rule: ScoreRule) -> Tensor:
    """What lora_A, lora_E and lora_B (``KINDS``) add to S of every triplet [3, T]."""
    layout = layout_of(parameters, rule.score)
    terms = torch.zeros(len(KINDS), sum(layout.ranks), dtype=statistics.dtype, device=statistics.device)
    for kind, index, means in _triplet_means(layout, statistics, rule):
        terms[KINDS.index(kind)].index_add_(0, index, means)
    return terms


def _triplet_means(layout: Layout, statistics: Tensor, rule: ScoreRule):
    """(kind, positions in the score vector, means of the element scores) of every group."""
    for group, index in zip(layout.groups, layout.triplet_index(statistics.device), strict=True):
        rows = {name: group.view(statistics[row]) for row, name in enumerate(rule.statistics)}
        yield group.kind, index, group.triplet_means(element_scores(rows, rule)).flatten()
