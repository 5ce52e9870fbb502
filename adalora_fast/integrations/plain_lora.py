"""From the tensors and settings of an AdaLoRA adapter to those of a plain LoRA adapter; no model is needed.

With λ = E, c = α / (ranknum + 1e-5) and the kept triplets i of one layer:

    A'[i, :] = λ_i A[i, :]      B'[:, i] = c B[:, i]      ΔW = B' A' = c B diag(λ) A

so that LoRA's own scale, alpha / r, is 1 in every layer: r = alpha, globally and in every pattern.
"""

import contextlib
import math
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor

from .files import FACTORS, PREFIX, adapted_in, check_numbers
from .lora_settings import carried


@dataclass(frozen=True, kw_only=True)
class PlainLora:
    """A plain LoRA adapter as PEFT stores it, and the number of kept triplets of every layer it came from."""

    config: LoraConfig
    tensors: dict[str, Tensor]
    ranks: dict[str, int]


def scale_of(settings: Mapping[str, Any]) -> float:
    """c = α / (init_r + 1e-5) of an adapter's settings (``ranknum`` stays at ``init_r`` after pruning).

    PEFT takes init_r for an α that is not positive.

    Raises:
        ValueError: one of the two is not a finite number, or init_r is not positive.
    """
    alpha, init_r = settings.get("lora_alpha"), settings.get("init_r")
    for name, value in (("lora_alpha", alpha), ("init_r", init_r)):
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or (name == "init_r" and value <= 0):
            raise ValueError(f"the adapter's {name} is {value!r}, not a positive number; restore its config")
    return (alpha if alpha > 0 else init_r) / (init_r + 1e-5)


def convert(
    tensors: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    scales: Mapping[str, float],
    *,
    masks: Mapping[str, list[bool]] | None = None,
    uniform: bool = False,
    budget: int | None = None,
) -> PlainLora:
    """The plain LoRA adapter that computes what the AdaLoRA adapter computes.

    A triplet is dropped where its λ is zero or its mask says so. Layers with no triplet left get no adapter
    (they are named in ``exclude_modules``), unless ``uniform``. Factors become float32 (float64 ones stay),
    in which the products of half-precision factors are exact.

    Args:
        tensors: as PEFT stores them: ``base_model.model.<layer>.lora_A`` [r, in], ``.lora_E`` [r, 1],
            ``.lora_B`` [out, r]; others (``modules_to_save``) pass through.
        settings: the adapter's configuration; what becomes of each is the table of ``lora_settings``.
        scales: c of every layer.
        masks: which triplets of a layer are kept, for layers whose tensors are whole.
        uniform: pad every layer with zeros to the largest rank, instead of ragged ranks.
        budget: the final budget in triplets; more of them left is warned of.

    Raises:
        ValueError: a factor is missing, of a wrong shape or not finite, or every λ is zero.
    """
    layers = adapted_in(tensors)
    _check_layers(tensors, layers)
    folded = {
        name: fold(
            *(tensors[f"{PREFIX}{name}{kind}"] for kind in FACTORS), scales[name], (masks or {}).get(name)
        )
        for name in layers
    }
    ranks = {name: len(lora_A) for name, (lora_A, _) in folded.items()}
    r = max(ranks.values(), default=0)
    if r == 0:
        raise ValueError(
            "no triplet of the adapter has a λ other than zero, so it changes nothing; train it first"
        )
    if budget is not None and sum(ranks.values()) > budget:
        warnings.warn(
            f"{sum(ranks.values())} triplets are left of a final budget of {budget} (ranks "
            f"{min(ranks.values())} to {r}): this is from before the final mask; train on, or call "
            "rankallocator.finalize() first",
            UserWarning,
            stacklevel=3,
        )
    result = {key: tensor for key, tensor in tensors.items() if not key.endswith(FACTORS)}
    for name, (lora_A, lora_B) in folded.items():
        if uniform:
            missing = r - ranks[name]
            lora_A = torch.nn.functional.pad(lora_A, (0, 0, 0, missing))
            lora_B = torch.nn.functional.pad(lora_B, (0, missing))
        elif ranks[name] == 0:
            continue
        result[f"{PREFIX}{name}.lora_A.weight"] = lora_A
        result[f"{PREFIX}{name}.lora_B.weight"] = lora_B
    check_numbers(result, "the adapter")
    return PlainLora(config=_lora_config(settings, ranks, r, uniform), tensors=result, ranks=ranks)


def _lora_config(settings: Mapping[str, Any], ranks: dict[str, int], r: int, uniform: bool) -> LoraConfig:
    """Ranks and scales of LoRA's, the rest as it was.

    Raises:
        ValueError: a setting that LoRA cannot take, or trained biases of layers that would get no adapter.
    """
    pattern = {} if uniform else _rank_pattern(ranks, r)
    empty = [] if uniform else [name for name, rank in ranks.items() if rank == 0]
    taken = carried(settings)
    if empty and taken.get("bias", "none") != "none":
        raise ValueError(
            f"bias is {taken['bias']!r}, and {empty[0]} has no triplet left: without an adapter PEFT would "
            "lose its trained bias; export with uniform=True"
        )
    try:
        if taken.get("modules_to_save"):
            taken["modules_to_save"] = list(dict.fromkeys(taken["modules_to_save"]))
        if empty:
            taken["exclude_modules"] = _excluding(taken.get("exclude_modules"), empty)
        return LoraConfig(r=r, lora_alpha=r, rank_pattern=pattern, alpha_pattern=dict(pattern), **taken)
    except (TypeError, ValueError) as error:
        raise ValueError(f"LoRA cannot take the adapter's settings ({error}); restore its config") from error


def fold(
    lora_A: Tensor, lora_E: Tensor, lora_B: Tensor, scale: float, mask: list[bool] | None = None
) -> tuple[Tensor, Tensor]:
    """A' = (E ⊙ A)[kept] [k, in] and B' = (c B)[:, kept] [out, k], computed in float64.

    Args:
        lora_A, lora_E, lora_B: [r, in], [r, 1], [out, r].
        scale: c.
        mask: triplets that may be kept; one with λ = 0 never is.
    """
    kept = lora_E.flatten() != 0
    if mask is not None:
        kept &= torch.tensor(mask, dtype=torch.bool, device=kept.device)
    dtype = torch.promote_types(lora_A.dtype, torch.float32)
    rows = lora_A[kept].double() * lora_E[kept].double()
    return rows.to(dtype), (lora_B[:, kept].double() * scale).to(dtype).contiguous()


def exact_pattern(names: Iterable[str]) -> str:
    """A regular expression that fully matches these module names and nothing else."""
    return "|".join(re.escape(name) for name in names)


def is_suffix(name: str, names: Iterable[str]) -> bool:
    """Whether PEFT, which also matches by the end of a name, would take ``name`` for another of ``names``."""
    return any(other.endswith(f".{name}") for other in names)


def _rank_pattern(ranks: dict[str, int], r: int) -> dict[str, int]:
    """The layers whose rank is not ``r``. Names are plain, as servers and old versions of PEFT read them."""
    return {_pattern_key(name, ranks): rank for name, rank in ranks.items() if rank not in (0, r)}


def _pattern_key(name: str, names: Iterable[str]) -> str:
    """An expression that PEFT, which also matches the end of a name, finds in ``name`` and in no other."""
    with contextlib.suppress(re.error):
        expression = re.compile(rf"(.*\.)?({name})$")
        if all((other == name) == bool(expression.match(other)) for other in names):
            return name
    return f"^{re.escape(name)}"


def _excluding(before: str | Iterable[str] | None, names: list[str]) -> str:
    """``before`` and these modules, as one expression for PEFT's ``exclude_modules``."""
    if before is None:
        return exact_pattern(names)
    if not isinstance(before, str):
        before = rf"(.*\.)?({exact_pattern(sorted(before))})"
    return f"{before}|{exact_pattern(names)}"


def _check_layers(tensors: Mapping[str, Tensor], layers: list[str]) -> None:
    if not layers:
        raise ValueError("there is no lora_E among the adapter's tensors; it is no AdaLoRA adapter")
    named = {key.rpartition(".")[0].removeprefix(PREFIX) for key in tensors if key.endswith(FACTORS)}
    for name in dict.fromkeys([*layers, *sorted(named)]):
        shapes = []
        for kind in FACTORS:
            if f"{PREFIX}{name}{kind}" not in tensors:
                raise ValueError(f"the adapter lacks {PREFIX}{name}{kind}; restore it from a copy")
            shapes.append(tuple(tensors[f"{PREFIX}{name}{kind}"].shape))
        a, e, b = shapes
        if not (len(a) == len(b) == 2 and e == (a[0], 1) and b[1] == a[0]):
            raise ValueError(
                f"the factors of {name} have shapes {a}, {e} and {b}, not [r, in], [r, 1] and [out, r]; "
                "restore the adapter from a copy"
            )
