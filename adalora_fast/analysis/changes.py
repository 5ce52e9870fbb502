"""What a run changed in its base model: low-rank factors of ΔW, and tensors that it replaced.

For an adapted matrix of a run i, with the scale folded into the factors (LoRA: s = α / r; AdaLoRA:
s = α / (init_r + 1e-5) and diag(λ)),

    ΔW_i = B_i A_i        A_i [r_i, in], B_i [out, r_i]

and a mixture with weights w_i that sum to 1 has the matrix W + Σ_i w_i B_i A_i: never a product of mixed
factors, so ranks and methods may differ. Whatever a run trained fully (its head; biases; all of full
fine-tuning) is kept as it is, and mixes as Σ_i w_i θ_i, with the base's own tensor in place of a θ_i that a
run has not.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from adalora_fast.experiments.methods.fusion import TRAINED
from adalora_fast.experiments.models.families import family_of, is_of_head
from adalora_fast.integrations.files import (
    PREFIX,
    adapted_in,
    file_within,
    read_config,
    read_tensors,
    weights_file,
)
from adalora_fast.integrations.plain_lora import convert, scale_of

from .saved import FULL, SavedRun

# With trained biases, PEFT stores those of a head three times: as the head itself, which counts, in its copy
# of the head from before, and in the module that holds both.
COPIES = {"original_module", "modules_to_save"}


@dataclass(frozen=True, kw_only=True)
class Factors:
    """ΔW = B A of one matrix: A [r, in], B [out, r]."""

    A: Tensor
    B: Tensor

    @property
    def rank(self) -> int:
        return len(self.A)


@dataclass(frozen=True, kw_only=True)
class RunChange:
    """`factors` by module name; `tensors`, the replaced ones, by parameter name in the base model."""

    factors: dict[str, Factors]
    tensors: dict[str, Tensor]

    def to(self, device: torch.device | str) -> "RunChange":
        """The same on another device."""
        return RunChange(
            factors={
                name: Factors(A=each.A.to(device), B=each.B.to(device)) for name, each in self.factors.items()
            },
            tensors={name: tensor.to(device) for name, tensor in self.tensors.items()},
        )


def read_change(run: SavedRun, base: nn.Module) -> RunChange:
    """What `run` changed, checked against its base model's names and shapes.

    Raises:
        ValueError: damaged files, an adapter that is not a LoRA or AdaLoRA of this base, or no whole head.
    """
    if run.settings.method in ("head", "bitfit"):
        change = RunChange(factors={}, tensors=read_tensors(file_within(run.adapter, TRAINED)))
    elif run.settings.method == "full":
        buffers = {name for name, _ in base.named_buffers()}
        tensors = read_tensors(file_within(run.adapter, FULL))
        change = RunChange(
            factors={}, tensors={name: value for name, value in tensors.items() if name not in buffers}
        )
    else:
        change = _read_adapter(run.adapter)
    _check(change, run, base)
    return change


def mixture(name: str, base: Tensor, changes: Sequence[RunChange], weights: Sequence[float]) -> Tensor:
    """Σ_i w_i θ_i of the parameter `name`, in the dtype of `base`; `base` itself where no run changed it.

    Args:
        name: of a parameter of the base model.
        base: that parameter.
        changes, weights: one weight per run; the weights sum to 1.
    """
    changes, weights = used(changes, weights)
    result, rest = None, 1.0
    for change, weight in zip(changes, weights, strict=True):
        if name in change.tensors:
            part = weight * change.tensors[name].to(base.dtype)
            result, rest = part if result is None else result + part, rest - weight
    if result is not None and len([each for each in changes if name in each.tensors]) < len(changes):
        result = result + rest * base
    module = name.removesuffix(".weight")
    if module != name and (factors := concatenated(module, changes, weights)) is not None:
        result = torch.addmm(
            base if result is None else result, factors.B.to(base.dtype), factors.A.to(base.dtype)
        )
    return base if result is None else result


def concatenated(module: str, changes: Sequence[RunChange], weights: Sequence[float]) -> Factors | None:
    """The factors of Σ_i w_i B_i A_i, exactly: A = [A_1; A_2; …], B = [w_1 B_1, w_2 B_2, …]; their ranks add
    up. None where no run adapted this module.
    """
    parts = [
        (change.factors[module], weight)
        for change, weight in zip(*used(changes, weights), strict=True)
        if module in change.factors
    ]
    if not parts:
        return None
    return Factors(
        A=torch.cat([factors.A for factors, _ in parts]),
        B=torch.cat([weight * factors.B for factors, weight in parts], dim=1),
    )


def used(
    changes: Sequence[RunChange], weights: Sequence[float]
) -> tuple[Sequence[RunChange], Sequence[float]]:
    """Those whose weight is not zero.

    Raises:
        ValueError: not one weight per change, or weights that do not sum to 1.
    """
    if len(changes) != len(weights):
        raise ValueError(f"{len(weights)} weights for {len(changes)} runs; give one for each")
    if not math.isclose(sum(weights), 1.0, abs_tol=1e-9):
        raise ValueError(f"the weights {list(weights)} sum to {sum(weights)}; they must sum to 1")
    kept = [(change, weight) for change, weight in zip(changes, weights, strict=True) if weight != 0]
    return [change for change, _ in kept], [weight for _, weight in kept]


def _read_adapter(folder: Path) -> RunChange:
    """An adapter as `save_pretrained` wrote it."""
    config = read_config(folder)
    tensors = read_tensors(weights_file(folder))
    kind = config.get("peft_type")
    strange = next(
        (
            name
            for name in ("use_dora", "lora_bias", "fan_in_fan_out", "layer_replication")
            if config.get(name)
        ),
        None,
    )
    if kind not in ("LORA", "ADALORA") or strange is not None:
        raise ValueError(
            f"the adapter in {folder} has {strange or f'peft_type {kind}'}; give a LoRA or AdaLoRA without it"
        )
    if kind == "ADALORA":
        layers = adapted_in(tensors)
        # PEFT could not load biases of a layer without a triplet; here they are tensors like any other.
        plain = convert(tensors, config | {"bias": "none"}, dict.fromkeys(layers, scale_of(config)))
        tensors, scales = plain.tensors, dict.fromkeys(layers, 1.0)
    else:
        scales = _lora_scales(config, tensors, folder)
    factors, others = {}, {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        if key.endswith(".lora_A.weight"):
            module = name.removesuffix(".lora_A.weight")
            B = tensors[f"{PREFIX}{module}.lora_B.weight"]
            factors[module] = Factors(A=tensor, B=scales[module] * B)
        elif not key.endswith(".lora_B.weight") and not COPIES.intersection(name.split(".")):
            others[name.replace(".base_layer.", ".")] = tensor
    return RunChange(factors=factors, tensors=others)


def _lora_scales(config: Mapping, tensors: Mapping[str, Tensor], folder: Path) -> dict[str, float]:
    """alpha / r of every layer (alpha / √r for rsLoRA), patterns included."""
    scales = {}
    for key, A in tensors.items():
        if not key.endswith(".lora_A.weight"):
            continue
        module = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        B = tensors.get(f"{PREFIX}{module}.lora_B.weight")
        if B is None or A.ndim != 2 or B.ndim != 2 or B.shape[1] != len(A) or not len(A):
            raise ValueError(f"the factors of {module} in {folder} do not fit together; restore it")
        pattern = config.get("alpha_pattern") or {}
        alpha = pattern.get(get_pattern_key(pattern.keys(), module), config.get("lora_alpha"))
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise ValueError(f"the adapter in {folder} has lora_alpha {alpha!r}; restore its configuration")
        scales[module] = alpha / (math.sqrt(len(A)) if config.get("use_rslora") else len(A))
    return scales


def _check(change: RunChange, run: SavedRun, base: nn.Module) -> None:
    """ValueError where names or shapes are not the base model's, or a part of the head is missing."""
    parameters = dict(base.named_parameters())
    shapes = {
        **{name: tensor.shape for name, tensor in change.tensors.items()},
        **{
            f"{name}.weight": torch.Size((len(each.B), each.A.shape[1]))
            for name, each in change.factors.items()
        },
    }
    for name, shape in shapes.items():
        if name not in parameters:
            raise ValueError(
                f"{run.adapter} changes {name}, which {run.settings.model} has not; give its own base"
            )
        if shape != parameters[name].shape:
            raise ValueError(
                f"{run.adapter} changes {name} of shape {list(shape)}, and in {run.settings.model} it is "
                f"{list(parameters[name].shape)}; give its own base"
            )
    head = family_of(base).head_for(run.task.kind)
    missing = [name for name in parameters if is_of_head(name, head) and name not in change.tensors]
    if missing:
        raise ValueError(f"{run.adapter} lacks {missing[0]} of the head; train the run again")
