"""``fuse``: a PEFT AdaLoRA model made fast and correct in place; same state dict, checkpoints, methods."""

import peft
from peft import PeftMixedModel, PeftModel
from torch import nn

from adalora_fast.allocator.scores import Score

from .fused import FuseSettings, fuse_peft_model, fused_model_class
from .injected import fuse_inside


def __getattr__(name: str):
    """The classes made by ``fuse`` by name, so that a fused model can be copied and pickled by its owner."""
    if name.startswith("FusedPeftModel"):
        return fused_model_class(getattr(peft, name.removeprefix("Fused")))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def fuse(
    model: nn.Module,
    score: str | Score = "sensitivity",
    *,
    smoothing: str | None = None,
    score_gradient: str = "total",
    weights: str = "after",
    triplet: str = "full",
    hysteresis: float = 0.0,
    remember: bool = False,
    orth_penalty: str = "fro",
    precision: str = "default",
) -> nn.Module:
    """Make a PEFT AdaLoRA model fast and its allocation correct, in place.

    Layers, tuner and model change their class, nothing is copied: parameters, state dict, optimizers made
    before, and PEFT's methods stay valid. Layers without a fused form (convolutions, bases that subclass
    nn.Linear) keep PEFT's forward; ``model.base_model.unfused`` names them with the reason.

    Args:
        model: what ``get_peft_model(base, AdaLoraConfig(...))`` or ``PeftModel.from_pretrained`` returned, a
            model after ``add_adapter`` or ``inject_adapter_in_model``, or any module with such models in it,
            all of which are fused (:mod:`adalora_fast.integrations.injected`).
        score: ``sensitivity`` (PEFT's), ``movement``, ``fisher``, ``gsnr``, ``magnitude``, a registered name
            or a :class:`adalora_fast.allocator.scores.Score`.
        smoothing, score_gradient, weights, triplet, hysteresis, remember: see
            :class:`adalora_fast.RankAllocator`.
        orth_penalty: ``"fro"`` (PEFT's) or ``"squared"`` (the paper's).
        precision: ``"default"`` or ``"highest"``, see :func:`adalora_fast.ops.adalora_linear`.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: there is no AdaLoRA in ``model``.
        ValueError: fused already, a config whose numbers do not fit, an unknown score, smoothing or penalty.
    """
    settings = FuseSettings(
        score=score,
        smoothing=smoothing,
        score_gradient=score_gradient,
        weights=weights,
        triplet=triplet,
        hysteresis=hysteresis,
        remember=remember,
        orth_penalty=orth_penalty,
        precision=precision,
    )
    is_peft = isinstance(model, (PeftModel, PeftMixedModel))
    return fuse_peft_model(model, settings) if is_peft else fuse_inside(model, settings)
