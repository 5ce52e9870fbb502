"""The forward of an adapted model after training: adapters in place, compacted, or merged into the weights.

Half of the triplets are pruned, those with the smallest |λ| over all layers. In place, the pruned ones are
still there, with λ = 0; compacted, they are removed; merged, no adapter is left.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import cast_adapter_dtype
from torch import Tensor, nn
from transformers.models.deberta_v2.modeling_deberta_v2 import DebertaV2Encoder

from adalora_fast import fuse
from benchmarks.suites import Case, Contestant, Work
from benchmarks.suites import models as whole

ADAPTER = "default"


def cases(scale: str, device: torch.device) -> list[Case]:
    chosen = whole.settings(scale, device)
    if scale == "full":
        chosen.append(replace(chosen[0], batch=1))  # one text, where the number of launches decides
    return [
        Case(
            suite="inference",
            name=setting.name,
            what={**setting.what(), "kept": setting.target_rank},
            baseline="frozen",
            build=partial(_build, setting),
            contestants=tuple(MODELS),
            dtype=setting.dtype,
        )
        for setting in chosen
    ]


def pruned(setting: whole.Setting) -> PeftModel:
    """PEFT's model at the end of a run: λ of all triplets but the best is 0."""
    model = whole.adapted(setting)
    with torch.no_grad():
        lambdas = [parameter for name, parameter in model.named_parameters() if ".lora_E." in name]
        sizes = torch.cat([parameter.abs().flatten() for parameter in lambdas])
        least = sizes.topk(setting.target_rank * len(lambdas)).values[-1]
        for parameter in lambdas:
            parameter.masked_fill_(parameter.abs() < least, 0.0)
    return model


def compacted(setting: whole.Setting) -> PeftModel:
    """Ours without the pruned triplets."""
    model = fuse(pruned(setting))
    tuner = model.base_model
    pattern = {
        name: (parameter != 0).flatten().tolist()
        for name, parameter in tuner.model.named_parameters()
        if ".lora_E." in name
    }
    tuner.resize_modules_by_rank_pattern(pattern, ADAPTER)
    cast_adapter_dtype(tuner.model, ADAPTER)  # factors stay float32, as PEFT does where it loads a model
    return model


MODELS: dict[str, Callable[[whole.Setting], nn.Module]] = {
    "frozen": whole.base_model,
    "peft": pruned,
    "adalora_fast": lambda setting: fuse(pruned(setting)),
    "adalora_fast compacted": compacted,
    "peft merged": lambda setting: pruned(setting).merge_and_unload(),
    "adalora_fast merged": lambda setting: fuse(pruned(setting)).merge_and_unload(),
}


def keep_positions(model: nn.Module) -> nn.Module:
    """Let DeBERTa compute its relative positions, which depend on the length alone, once.

    It does so with numbers copied from the host, which a CUDA graph cannot contain.
    """
    for module in model.modules():
        if isinstance(module, DebertaV2Encoder):
            module.get_rel_pos = _once(module.get_rel_pos)
    return model


def _once(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    found: list[Tensor] = []

    def first(*arguments, **options) -> Tensor:
        if not found:
            found.append(function(*arguments, **options))
        return found[0]

    return first


def forward(name: str, setting: whole.Setting) -> Callable[[], Tensor]:
    """The contestant's forward: the logits of the setting's tokens."""
    model, tokens = keep_positions(MODELS[name](setting).eval()), whole.make_batch(setting)["input_ids"]

    @torch.no_grad()
    def run() -> Tensor:
        return model(input_ids=tokens).logits

    return run


def _build(setting: whole.Setting) -> Work:
    made: dict[str, Callable[[], Tensor]] = {}

    def make(name: str) -> Contestant:
        made[name] = forward(name, setting)
        return Contestant([made[name]])

    def gate(name: str) -> None:
        if name != "frozen":
            check_logits(name, setting.tiny())
        logits = made[name]()
        assert logits.isfinite().all(), f"{name}: logits are not finite"

    return Work({name: partial(make, name) for name in MODELS}, gate)


def check_logits(name: str, setting: whole.Setting) -> None:
    """Fail unless the logits are those of PEFT's unmerged model.

    Raises:
        AssertionError: they are further away than float32 explains.
    """
    found, truth = forward(name, setting)(), forward("peft", setting)()
    error = ((found - truth).abs().max() / truth.abs().max()).item()
    assert error <= whole.TOLERANCE, f"{name}: logits differ from PEFT's by {error:.2g} of the largest"
