"""The arms of an experiment: every way to train, under the short name that recipes and tables use.

sensitivity, movement, fisher, gsnr, magnitude   AdaLoRA with this score; "+ema", "+sum", "+none" or
                                                 "+ema_uncertainty" for another smoothing, "+task" to score
                                                 the gradient without the orthogonality term
uniform, random                                  the nulls: the same start and schedule, but the triplets to
                                                 keep are settled beforehand, equally many per matrix or by
                                                 lot
peft                                             PEFT's own AdaLoRA
lora, full, head, ...                            the other methods (`adapters.adapt`)

An arm may end in "-<variant>" where the recipe has settings of its own for it: lora-r4, sensitivity-slow.
"""

from typing import Any

import torch
from torch import Tensor

from adalora_fast.ops.importance import SMOOTHINGS
from adalora_fast.scores import get_score, register_score, resolve_smoothing, score_names

from .runs import NULLS, OTHER_METHODS


def parse_arm(arm: str) -> dict[str, Any]:
    """Method, score, smoothing, score_gradient and variant of RunSettings for the arm of this name.

    Raises:
        ValueError: there is none.
    """
    way, _, variant = arm.partition("-")
    if variant:
        return {**parse_arm(way), "variant": variant}
    name, *extras = arm.split("+")
    if name in OTHER_METHODS and not extras:
        return {"method": name}
    register_nulls()
    if name not in score_names():
        raise ValueError(
            f"unknown arm {arm!r}; choose one of {', '.join((*score_names(), *OTHER_METHODS))}, "
            "a score also with +<smoothing> or +task"
        )
    if name in NULLS and extras:
        raise ValueError(
            f"unknown arm {arm!r}; {name} looks at nothing, so it has no smoothing and no gradient"
        )
    asked: dict[str, Any] = {"method": "adalora", "score": name}
    for extra in extras:
        if extra == "task" and "score_gradient" not in asked:
            asked["score_gradient"] = "task"
        elif extra in SMOOTHINGS and "smoothing" not in asked:
            asked["smoothing"] = resolve_smoothing(get_score(name), extra)
        else:
            raise ValueError(
                f"unknown part {extra!r} of the arm {arm!r}; choose {', '.join(SMOOTHINGS)} or task"
            )
    return asked


def register_nulls() -> None:
    """Make `uniform` and `random` known as scores."""
    known = score_names()
    if "uniform" not in known:
        register_score("uniform", uniform, source="the same rank in every matrix, in SVD form")
    if "random" not in known:
        register_score("random", by_lot, source="triplets kept by lot")


def uniform(w: Tensor, g: Tensor, state: dict[str, Tensor]) -> Tensor:
    """I = −i for λ_i, 0 for P and Q: whatever the budget, ranks differ by one at most, and the masks only
    grow.

    w is [matrices, r, 1] for λ.
    """
    if w.shape[-1] != 1:
        return torch.zeros_like(w)
    return -torch.arange(w.shape[1], dtype=w.dtype, device=w.device).view(1, -1, 1).expand(w.shape)


def by_lot(w: Tensor, g: Tensor, state: dict[str, Tensor]) -> Tensor:
    """I = a number in [0, 1) for λ_i, drawn once from the run's seed, 0 for P and Q."""
    if w.shape[-1] != 1:
        return torch.zeros_like(w)
    if "lot" not in state:
        generator = torch.Generator().manual_seed(torch.initial_seed())
        state["lot"] = torch.rand(w.shape, generator=generator).to(w.device)
    return state["lot"].to(w.dtype)
