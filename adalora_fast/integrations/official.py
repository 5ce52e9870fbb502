"""``import_official``: checkpoints of AdaLoRA's own code (its ``loralib``) into a PEFT or native model.

There an adapted layer keeps ``lora_A`` [r, in], ``lora_E`` [r, 1], ``lora_B`` [out, r] and ``ranknum`` [1] in
the state dict of the whole model, and computes x Wᵀ + α / (ranknum + 1e-5) · x (A ⊙ E)ᵀ Bᵀ, as PEFT does.
"""

import os
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import PeftModel
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from adalora_fast.allocator.allocator import RankAllocator
from adalora_fast.nn import AdaLoraLinear, Factors

from .files import FACTORS, check_numbers, read_tensors
from .layers import adapter_layers, factors_of
from .locate import the_peft_model


@torch.no_grad()
def import_official(source: Mapping[str, Tensor] | str | os.PathLike, model: nn.Module) -> list[str]:
    """Load the adapters and trained heads of an official AdaLoRA checkpoint, all of it or nothing.

    Taken over are lora_A, lora_E and lora_B of every adapted layer, and the modules that ``model`` trains
    whole (PEFT's ``modules_to_save``). The base weights stay the model's own (the official code may have
    saved them with ΔW merged in). The model's allocator, if it has one, starts again at step 0;
    without further training its ``finalize()`` keeps the triplets of the largest λ. ``lora_alpha`` is not in
    such checkpoints: give the model that of the run.

    Args:
        source: a state dict, or the path of a ``.safetensors`` file. Names are those of the base model, with
            or without ``module.`` in front.
        model: a PEFT AdaLoRA model, fused or not, a module with one in it, or one with
            :class:`adalora_fast.AdaLoraLinear` layers, adapted at the same layers with the same initial rank.

    Returns:
        Names of tensors outside the adapted layers that differ from the model's and were not loaded; a
        warning names the first. If they were trained, add their modules to ``modules_to_save``.

    Raises:
        TypeError: ``model`` has no AdaLoRA layers.
        ValueError: a pickle, a damaged file, other layers, other shapes, another initial rank, or NaN and
            infinite numbers. Nothing was changed then.
    """
    tensors = {name.removeprefix("module."): tensor for name, tensor in _read(source).items()}
    inside = the_peft_model(model, "import_official")
    model = model if inside is None else inside
    layers, base, heads = _layers_of(model)
    _check_names(tensors, layers)
    pairs = []
    for name, (factors, ranknum, scale_factor) in layers.items():
        pairs += _pairs(tensors, name, factors, ranknum, scale_factor)
    for name, head in heads.items():
        for key, value in head.state_dict(keep_vars=True).items():
            pairs.append((f"{name}.{key}", _fitting(tensors, f"{name}.{key}", value), value))
    check_numbers({name: tensor for name, tensor, _ in pairs}, "the checkpoint")
    for _, tensor, place in pairs:
        place.copy_(tensor)
    allocator = getattr(model.base_model if isinstance(model, PeftModel) else model, "rankallocator", None)
    if isinstance(allocator, RankAllocator):  # its statistics and its mask are of other weights
        allocator.rebind(finished=allocator.total_rank() <= allocator.schedule.target)
        if isinstance(model, PeftModel):
            model.base_model.remember_versions()
    loaded = {name for name, _, _ in pairs}
    different = [
        name
        for name, value in base.items()
        if name in tensors and name not in loaded and not _equal(tensors[name], value)
    ]
    if different:
        warnings.warn(
            f"{len(different)} tensors of the checkpoint differ from the model's and were not loaded, the "
            f"first is {different[0]}; where they were trained, add their modules to modules_to_save",
            UserWarning,
            stacklevel=2,
        )
    return different


def _read(source: Mapping[str, Tensor] | str | os.PathLike) -> Mapping[str, Tensor]:
    if isinstance(source, Mapping):
        wrong = next((name for name, value in source.items() if not isinstance(value, Tensor)), None)
        if wrong is not None:
            raise ValueError(f"{wrong!r} of the state dict is a {type(source[wrong]).__name__}, not a tensor")
        return source
    path = Path(source)
    if path.suffix != ".safetensors":
        raise ValueError(
            f"{path} is not read: only .safetensors are, nothing is unpickled; convert it where you trust it "
            "(torch.load(path, weights_only=True), safetensors.torch.save_file)"
        )
    if not path.is_file():
        raise ValueError(f"there is no file {path}; give the checkpoint's .safetensors file")
    return read_tensors(path)


def _layers_of(
    model: nn.Module,
) -> tuple[dict[str, tuple[Factors, float, float]], dict[str, Tensor], dict[str, nn.Module]]:
    """Adapted layers (factors, ranknum, what their λ is divided by), the base's tensors, and the modules that
    are trained whole.
    """
    if isinstance(model, PeftModel):
        root, tuner = model.base_model.model, model.base_model
        adapter = getattr(tuner, "trainable_adapter_name", None) or tuner.active_adapters[0]
        adapted = {name: layer for name, layer in adapter_layers(root).items() if adapter in layer.lora_A}
        layers = {
            name: (
                factors_of(layer, adapter),
                layer.ranknum[adapter].item(),
                getattr(layer, "scale_factors", {}).get(adapter, 1.0),
            )
            for name, layer in adapted.items()
        }
        heads = {
            name: module.modules_to_save[adapter]
            for name, module in root.named_modules()
            if isinstance(module, ModulesToSaveWrapper) and adapter in module.modules_to_save
        }
    else:
        root, heads = model, {}
        adapted = {name: layer for name, layer in model.named_modules() if isinstance(layer, AdaLoraLinear)}
        layers = {name: (layer.factors(), float(layer.ranknum), 1.0) for name, layer in adapted.items()}
    if not layers:
        raise TypeError(
            f"{type(model).__name__} has no AdaLoRA layers; adapt it first, with get_peft_model for one"
        )
    inside = tuple(f"{name}." for name in (*adapted, *heads))
    base = {name: value for name, value in root.state_dict().items() if not name.startswith(inside)}
    return layers, base, heads


def _check_names(tensors: Mapping[str, Tensor], layers: Mapping[str, object]) -> None:
    theirs = dict.fromkeys(name.rpartition(".")[0] for name in tensors if name.endswith(FACTORS))
    for name in theirs:
        if name not in layers:
            raise ValueError(
                f"the checkpoint adapts {name}, the model does not; adapt the same layers (target_modules)"
            )


def _pairs(
    tensors: Mapping[str, Tensor], name: str, factors: Factors, ranknum: float, scale_factor: float
) -> list[tuple[str, Tensor, Tensor]]:
    key = f"{name}.ranknum"
    lora_A = tensors.get(f"{name}.lora_A")
    if lora_A is not None and lora_A.dim() == 2 and len(lora_A) != len(factors.lora_A):
        raise ValueError(
            f"the checkpoint has rank {len(lora_A)} in {name}, the model {len(factors.lora_A)}; make it with "
            f"init_r={len(lora_A)}"
        )
    if key in tensors and (tensors[key].numel() != 1 or abs(tensors[key].item() - ranknum) > 1e-3):
        raise ValueError(
            f"the checkpoint has {key} {tensors[key].flatten().tolist()}, the model {ranknum}: its scale "
            "would be another; make the model with that initial rank"
        )
    fitting = {
        f"{name}.{kind}": _fitting(tensors, f"{name}.{kind}", factor)
        for kind, factor in factors._asdict().items()
    }
    fitting[f"{name}.lora_E"] = fitting[f"{name}.lora_E"] / scale_factor
    return [(key, tensor, place) for (key, tensor), place in zip(fitting.items(), factors, strict=True)]


def _fitting(tensors: Mapping[str, Tensor], name: str, place: Tensor) -> Tensor:
    tensor = tensors.get(name)
    if tensor is None:
        raise ValueError(f"the checkpoint lacks {name} {tuple(place.shape)}; it belongs to another model")
    if tensor.shape != place.shape:
        raise ValueError(
            f"the checkpoint has {name} {tuple(tensor.shape)}, the model {tuple(place.shape)}; it belongs to "
            "another model"
        )
    return tensor


def _equal(tensor: Tensor, other: Tensor) -> bool:
    return tensor.shape == other.shape and torch.equal(tensor.to(other.device, other.dtype), other)
