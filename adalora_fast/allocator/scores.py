"""The importance scores as data: their names, how each is smoothed by default, and where it comes from."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from adalora_fast.ops.importance import SIGNALS, SMOOTHINGS, ScoreRule, reference, statistic_names

__all__ = [
    "Score",
    "get_score",
    "register_score",
    "resolve_smoothing",
    "score_names",
    "statistic_names",
    "update_user_statistics_",
]


@dataclass(frozen=True, kw_only=True)
class Score:
    """An importance score.

    Args:
        name: how users ask for it.
        smoothing: the default, one of ``ema_uncertainty``, ``ema``, ``sum``, ``none``.
        source: paper and equation.
        function: a user's own I(w, g, state); None for the built-in ones, whose formula is the importance
            op's.
        min_updates: masks wait for so many updates of the statistics.
    """

    name: str
    smoothing: str
    source: str
    function: Callable[[Tensor, Tensor, dict[str, Tensor]], Tensor] | None = None
    min_updates: int = 1


_BUILT_IN = (
    Score(name="sensitivity", smoothing="ema_uncertainty", source="AdaLoRA, arXiv 2303.10512, eq. 8-11"),
    Score(name="movement", smoothing="ema", source="movement pruning, arXiv 2005.07683, eq. 3, smoothed"),
    Score(name="fisher", smoothing="ema", source="diagonal empirical Fisher information, E[g²]"),
    Score(name="gsnr", smoothing="none", source="gradient signal-to-noise ratio, m̄²/Var", min_updates=2),
    Score(name="magnitude", smoothing="none", source="AdaLoRA's ablation |λ|, arXiv 2303.10512, section 4.4"),
)
_scores = {score.name: score for score in _BUILT_IN}
assert set(_scores) == set(SIGNALS)


def score_names() -> tuple[str, ...]:
    """Every score that can be asked for now."""
    return tuple(_scores)


def get_score(name: str | Score) -> Score:
    """The score called ``name``; a :class:`Score` that was made by hand is one already.

    Raises:
        ValueError: there is none.
    """
    if isinstance(name, Score):
        return name
    if name not in _scores:
        raise ValueError(f"score {name!r} is not one of {score_names()}; register_score() adds your own")
    return _scores[name]


def resolve_smoothing(score: Score, smoothing: str | None) -> str:
    """``smoothing``, or the score's default for None.

    Raises:
        ValueError: it is not a known smoothing.
    """
    if smoothing is None:
        return score.smoothing
    if smoothing not in SMOOTHINGS:
        raise ValueError(f"smoothing {smoothing!r} is not one of {tuple(SMOOTHINGS)}")
    return smoothing


def register_score(
    name: str,
    function: Callable[[Tensor, Tensor, dict[str, Tensor]], Tensor],
    *,
    smoothing: str = "none",
    source: str = "user",
    min_updates: int = 1,
) -> Score:
    """Add a score of your own, to be asked for as ``score=name``.

    Args:
        name: a new name.
        function: ``function(w, g, state)`` returns I in the shape of w. w and g are [n, rows, columns]: the
            parameters of one shape and kind (λ: columns 1), after the optimizer's step, and their gradients.
            ``state`` is a dictionary of tensors that belongs to this group of parameters and is kept between
            steps and in checkpoints. It runs in plain PyTorch, once per shape, and only on steps whose
            gradients are finite (checking that synchronises). A parameter without a gradient has g = 0, and
            keeps its rows of those state tensors that are [n, ...].
        smoothing: the default smoothing of I.
        source: where it comes from, for reports.
        min_updates: masks wait for so many updates.

    Raises:
        ValueError: the name is taken, or the smoothing unknown.
    """
    if name in _scores:
        raise ValueError(f"a score called {name!r} exists already; choose another name")
    if not callable(function):
        raise TypeError(
            f"the function of score {name!r} must be callable as function(w, g, state), got {function!r}"
        )
    if smoothing not in SMOOTHINGS:
        raise ValueError(f"smoothing {smoothing!r} is not one of {tuple(SMOOTHINGS)}")
    _scores[name] = Score(
        name=name, smoothing=smoothing, source=source, function=function, min_updates=min_updates
    )
    return _scores[name]


def update_user_statistics_(
    score: Score,
    rule: ScoreRule,
    parameters: list[Tensor],
    grads: list[Tensor | None],
    statistics: Tensor,
    updates: Tensor,
    state: dict[str, Tensor],
) -> dict[str, Tensor]:
    """What ``importance_update_`` does, for a registered score: plain PyTorch, one call per shape, and a look
    at the finite flag; returns the functions' new state.
    """
    layout = reference.layout_of(parameters, score.name)
    taken = _user_signals(score, layout, parameters, grads, state, statistics.dtype)
    if taken is None:
        return state
    values, state = taken
    alive = torch.tensor([grad is not None for grad in grads], device=statistics.device)
    for group, value in zip(layout.groups, values, strict=True):
        rows = {name: group.view(statistics[row]) for row, name in enumerate(rule.statistics)}
        moving = alive[list(group.members)].to(statistics.dtype).view(-1, 1, 1)
        reference.smooth_(rows, value, rule, moving)
    updates.add_(alive)
    return state


def _user_signals(
    score: Score,
    layout: reference.Layout,
    parameters: list[Tensor],
    grads: list[Tensor | None],
    state: dict[str, Tensor],
    dtype: torch.dtype,
) -> tuple[list[Tensor], dict[str, Tensor]] | None:
    """(I of every group, the functions' new state), or None where a gradient or an I is not finite.

    The functions work on copies of ``state``, so that a step which is dropped leaves no trace in it.

    Raises:
        ValueError: the function returned something else than a tensor of w's shape.
    """
    gradients, finite = reference.signals(layout, parameters, grads, lambda w, g: g, dtype)
    if not finite:
        return None
    values, states = [], {}
    for number, (group, gradient) in enumerate(zip(layout.groups, gradients, strict=True)):
        prefix = f"{number}."
        own = {key.removeprefix(prefix): t.clone() for key, t in state.items() if key.startswith(prefix)}
        weights = torch.stack([parameters[i] for i in group.members]).to(dtype)
        value = score.function(weights, gradient, own)
        if not isinstance(value, Tensor) or value.shape != weights.shape:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"score {score.name!r} must return a tensor {tuple(weights.shape)}, got {got}")
        if not (4 * value).isfinite().all():  # the room that the built-in scores leave, too
            return None
        values.append(value.to(dtype))
        alive = torch.tensor([grads[i] is not None for i in group.members], device=weights.device)
        states.update(
            {prefix + key: _keep_rows(tensor, state.get(prefix + key), alive) for key, tensor in own.items()}
        )
    return values, states


def _keep_rows(new: Tensor, old: Tensor | None, alive: Tensor) -> Tensor:
    """``new``, with the rows of ``old`` for the parameters that had no gradient."""
    if old is None or old.shape != new.shape or new.dim() == 0 or len(new) != len(alive):
        return new
    return torch.where(alive.view(-1, *[1] * (new.dim() - 1)).to(new.device), new, old)
