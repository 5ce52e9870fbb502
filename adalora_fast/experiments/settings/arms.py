"""The arms of an experiment: every way to train, under the short name that recipes and tables use.

sensitivity, movement, fisher, gsnr, magnitude   AdaLoRA with this score; "+ema", "+sum", "+none" or
                                                 "+ema_uncertainty" for another smoothing, "+task" to score
                                                 the gradient without the orthogonality term
uniform, random, dealt                           the nulls: the same start and schedule, but what is kept
                                                 does not depend on the training (`nulls`)
peft                                             PEFT's own AdaLoRA
lora, full, head, ...                            the other methods (`adapters.adapt`)

An arm may end in "-<variant>" where the recipe has settings of its own for it: lora-r4, sensitivity-slow.
"""

from typing import Any

from adalora_fast.allocator.scores import get_score, resolve_smoothing, score_names
from adalora_fast.ops.importance import SMOOTHINGS

from .settings import NULLS, OTHER_METHODS


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
    scores = dict.fromkeys((*score_names(), *NULLS))
    if name not in scores:
        raise ValueError(
            f"unknown arm {arm!r}; choose one of {', '.join((*scores, *OTHER_METHODS))}, "
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
