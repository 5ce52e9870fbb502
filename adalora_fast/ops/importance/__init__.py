"""The importance op: statistics of every adapter parameter, and every triplet's score, of a whole model at
once.
"""

import warnings
from functools import cache

import torch
from torch import Tensor

from adalora_fast.ops.dispatch import backend, launch
from adalora_fast.ops.dispatch.library import NO_CUDA_GRAPH, define
from adalora_fast.ops.dispatch.native import cpu_refusal

from . import native, reference
from .reference import SIGNALS, layout_of
from .rule import SMOOTHINGS, ScoreRule, statistic_names

__all__ = [
    "SIGNALS",
    "SMOOTHINGS",
    "ScoreRule",
    "importance_scores",
    "importance_update_",
    "layout_of",
    "not_computed",
    "statistic_names",
]

backend.register("importance", "reference", reference)
backend.register("importance", "cpu", native, cpu_refusal)
backend.register("importance", "triton", launch.LazyModule(f"{__name__}.triton"), launch.refusal)


def _limit(functions: object, score: str, smoothing: str) -> str | None:
    """Why an implementation does not compute this score with this smoothing, or None."""
    declared = getattr(functions, "limit", None)
    return "its kernels do not declare what they compute" if declared is None else declared(score, smoothing)


@cache
def _within_limits(functions: object, score: str, smoothing: str) -> object:
    """``functions``, or the reference for a score that they do not compute, which is said once."""
    reason = _limit(functions, score, smoothing)
    if reason is None:
        return functions
    warnings.warn(f"importance runs in plain PyTorch: {reason}", UserWarning, stacklevel=2)
    return reference


def _functions(device: torch.device, score: str, smoothing: str) -> object:
    return _within_limits(backend.kernel("importance", device.type), score, smoothing)


def not_computed(device_type: str) -> list[str]:
    """Why the backend that is chosen for a device type leaves built-in scores to the reference; normally
    empty.
    """
    functions = backend.kernel("importance", device_type)
    reasons = [_limit(functions, score, smoothing) for score in SIGNALS for smoothing in SMOOTHINGS]
    return list(dict.fromkeys(reason for reason in reasons if reason is not None))


@define(
    "importance_update_(Tensor[] parameters, Tensor?[] grads, Tensor(a!) statistics, "
    "Tensor(b!) updates, str score, str smoothing, float beta1, float beta2, Tensor? active=None) -> ()",
    fake=lambda *arguments, **options: None,
    tags=NO_CUDA_GRAPH,
)
def _update(parameters, grads, statistics, updates, score, smoothing, beta1, beta2, active=None):
    functions = _functions(statistics.device, score, smoothing)
    rule = ScoreRule(score, smoothing, beta1, beta2)
    with torch.no_grad():
        functions.update_(parameters, grads, statistics, updates, rule, active)


@define(
    "importance_scores(Tensor[] parameters, Tensor statistics, str score, str smoothing) -> Tensor",
    fake=lambda parameters, statistics, score, smoothing: statistics.new_empty(
        sum(e.shape[0] for e in parameters[1::3])
    ),
    tags=NO_CUDA_GRAPH,
)
def _scores(parameters, statistics, score, smoothing):
    functions = _functions(statistics.device, score, smoothing)
    return functions.triplet_scores(parameters, statistics, ScoreRule(score, smoothing))


def _check(parameters: list[Tensor], statistics: Tensor, rule: ScoreRule) -> None:
    score, smoothing = rule.score, rule.smoothing
    if score not in SIGNALS:
        raise ValueError(f"score {score!r} is not one of {tuple(SIGNALS)}")
    if not parameters or len(parameters) % 3:
        raise ValueError(
            f"parameters must be lora_A, lora_E, lora_B of every matrix, got {len(parameters)} tensors"
        )
    shape = (len(rule.statistics), layout_of(parameters, score).size)
    if statistics.shape != shape:
        raise ValueError(f"statistics is {tuple(statistics.shape)}, {score} with {smoothing} needs {shape}")


def importance_update_(
    parameters: list[Tensor],
    grads: list[Tensor | None],
    statistics: Tensor,
    updates: Tensor,
    rule: ScoreRule = ScoreRule(),  # noqa: B008 - frozen
    active: Tensor | None = None,
) -> None:
    """Update the importance statistics with one optimizer step's gradients, in place, without a host
    synchronisation.

    With w an entry and g its gradient: I = |w g| (sensitivity), -w g (movement), g² (fisher), m̄²/(Var + ε)
    (gsnr), |w| (magnitude, Λ only); Ī ← β1 Ī + (1 - β1) I and Ū ← β2 Ū + (1 - β2) |I - Ī|  (arXiv 2303.10512,
    eq. 8-11). If any signal is not finite (an AMP overflow), nothing changes. A parameter whose gradient is
    None keeps its statistics.

    Args:
        parameters: A_0 [r, in], E_0 [r, 1], B_0 [out, r], A_1, ... of every matrix.
        grads: their gradients, in the same order, or None.
        statistics: [len(rule.statistics), layout_of(parameters, rule.score).size], float32 or float64.
        updates: [len(parameters)] int64, the number of updates each parameter has had.
        rule: score, smoothing and decays.
        active: bool scalar on the same device; False changes nothing. None is True.

    Raises:
        ValueError: an unknown score, or buffers whose shapes do not fit the parameters.
    """
    _check(parameters, statistics, rule)
    if len(grads) != len(parameters):
        raise ValueError(
            f"grads has {len(grads)} entries for {len(parameters)} parameters; None for a missing one"
        )
    if updates.shape != (len(parameters),) or updates.dtype != torch.int64:
        given = f"{updates.dtype} {tuple(updates.shape)}"
        raise ValueError(f"updates is {given}, it must be int64 ({len(parameters)},), one per parameter")
    if active is not None and (
        active.dtype != torch.bool or active.dim() or active.device != statistics.device
    ):
        given = f"{active.dtype} {tuple(active.shape)} on {active.device}"
        raise ValueError(f"active is {given}, it must be a bool scalar on {statistics.device}")
    torch.ops.adalora_fast.importance_update_(
        parameters, grads, statistics, updates, rule.score, rule.smoothing, rule.beta1, rule.beta2, active
    )


def importance_scores(
    parameters: list[Tensor],
    statistics: Tensor,
    rule: ScoreRule = ScoreRule(),  # noqa: B008 - frozen
) -> Tensor:
    """S_{k,i} = s(λ_i) + mean_j s(P_ji) + mean_j s(Q_ij) of every triplet (arXiv 2303.10512, eq. 7); λ only:
    s(λ_i).

    Args:
        parameters, statistics, rule: as in :func:`importance_update_`.

    Returns:
        [T] scores in ``statistics``'s type, matrix by matrix in the order of ``parameters``.
    """
    _check(parameters, statistics, rule)
    return torch.ops.adalora_fast.importance_scores(parameters, statistics, rule.score, rule.smoothing)
