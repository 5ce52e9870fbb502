"""``to_lora``: an exact plain LoRA model of a trained AdaLoRA model; ``export_folder``: the same of files."""

import copy
import os
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from peft.tuners.adalora import AdaLoraModel
from peft.tuners.adalora.layer import AdaLoraLayer, SVDConv2d
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import save_file
from torch import Tensor, nn

from adalora_fast.allocator.allocator import RankAllocator
from adalora_fast.allocator.state import facts_of, read_state
from adalora_fast.nn import AdaLoraLinear
from adalora_fast.nn.calls import keep_called

from .adapter_names import tensors_of
from .checkpoints import move_files
from .exported import LoraModel, exported_class, own_trained_tensors
from .files import (
    CONFIG,
    PREFIX,
    WEIGHTS,
    adapted_in,
    read_config,
    read_rank_pattern,
    read_tensors,
    weights_file,
)
from .fused import FusedAdaLoraModel
from .injected import forget_handle, take_handle
from .layers import adapter_layers
from .locate import the_peft_model
from .model_card import CARD, EXPORTED, RUN, exported_section, new_card, section_of, write_section
from .patched import with_own_forwards
from .plain_lora import PlainLora, convert, exact_pattern, is_suffix, scale_of
from .scales import peft_scale


def to_lora(model: nn.Module, *, uniform: bool = False, adapter_name: str | None = None) -> PeftModel:
    """An exact plain LoRA model of a trained AdaLoRA model: ΔW = B' A' with A' = E ⊙ A, B' = c B, c = α /
    (ranknum + 1e-5).

    The base model's tensors are shared, ``model`` stays as it is. Pruned triplets (masked, or λ = 0) are
    left out, ``r = lora_alpha`` is the largest kept rank and ``rank_pattern == alpha_pattern`` names the
    others, so that LoRA's scale is 1 everywhere. A layer of rank 0 gets no adapter. ``save_pretrained``
    writes what plain PEFT loads, and a model card with the ranks; :func:`adalora_fast.servable` says which
    servers take it.

    Args:
        model: a PEFT AdaLoRA model, fused or not, a model after ``add_adapter`` or
            ``inject_adapter_in_model``, a module with one such model in it (of which the result is made), or
            a model with :class:`adalora_fast.AdaLoraLinear` layers.
        uniform: the same rank everywhere, padded with zeros (all zeros at rank 0), as some servers need it.
        adapter_name: of a PEFT model; None is the adapter under training, else the active one.

    Returns:
        A ``PeftModel`` with one LoRA adapter, ``"default"``, in float32 (float64 where the factors are).

    Raises:
        TypeError: there is no AdaLoRA adapter in ``model``.
        ValueError: several adapted models, no such adapter, or it is merged into the weights, sharded, not
            finite, or all λ are zero.
    """
    adapted = model if isinstance(model, PeftModel) else the_peft_model(model, "to_lora")
    if adapted is not None:
        plain, base = _from_peft(adapted, adapter_name, uniform)
        allocator = _allocator_of(adapted.base_model, adapter_name)
    else:
        plain, base = _from_native(model, uniform)
        allocator = model.__dict__.get("rankallocator")
    mode = base.training
    # The layers of the model in memory are replicated already; of the one that loads the files they are not.
    lora = get_peft_model(base, replace(plain.config, layer_replication=None))
    _check_tensors(lora, plain.tensors)
    own_trained_tensors(lora)
    set_peft_model_state_dict(lora, plain.tensors)
    config = lora.peft_config["default"]
    config.layer_replication = plain.config.layer_replication
    if config.modules_to_save:  # PEFT appends a task's heads once more
        config.modules_to_save = list(dict.fromkeys(config.modules_to_save))
    lora.base_model.__class__ = LoraModel
    lora.__class__ = exported_class(type(lora))
    for layer in lora.modules():
        if isinstance(layer, LoraLayer):
            keep_called(layer.lora_A)  # PyTorch's fast path leaves PEFT's layers out in evaluation
    lora.adalora_ranks = plain.ranks
    lora.adalora_facts = None if allocator is None else facts_of(allocator)
    return lora.train(mode)


def _check_tensors(lora: PeftModel, tensors: dict[str, Tensor]) -> None:
    """Every tensor of the adapter has its own place in the new model, and every place its tensor.

    Raises:
        ValueError: naming the first that has not.
    """
    places = get_peft_model_state_dict(lora, save_embedding_layers=False)
    for key, tensor in tensors.items():
        if key not in places:
            raise ValueError(
                f"PEFT made no place for {key} in the LoRA model; adapt plain layers under unique names"
            )
        if places[key].shape != tensor.shape:
            raise ValueError(
                f"PEFT made {key} {tuple(places[key].shape)} in the LoRA model, not {tuple(tensor.shape)}; "
                "adapt plain layers under unique names"
            )
    for key in places:
        if key not in tensors:
            raise ValueError(
                f"PEFT made {key} in the LoRA model, which the adapter does not have; adapt plain layers "
                "under unique names"
            )


def export_folder(
    folder: str | os.PathLike, out: str | os.PathLike, *, uniform: bool = False, base: str | None = None
) -> PlainLora:
    """``to_lora(model).save_pretrained(out)`` from a saved adapter's files; the base model is not loaded.

    Args:
        folder: what ``save_pretrained`` of a PEFT AdaLoRA model wrote, fused or not. Adapted convolutions
            need the base's kernel shape: use :func:`to_lora` there.
        out: a new or empty folder; it is written whole or not at all.
        uniform: see :func:`to_lora`.
        base: name or path of the base model for the new adapter's configuration; None keeps the old one.

    Raises:
        ValueError: the checkpoint is damaged, unsafe or no AdaLoRA's, or ``out`` holds something already.
        OSError: ``out`` cannot be written.
    """
    folder, out = Path(folder), Path(out)
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}; give the folder that save_pretrained wrote")
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ValueError(f"{out} is not an empty folder; choose another")
    settings = read_config(folder)
    if settings.get("peft_type") != "ADALORA":
        raise ValueError(
            f"{folder / CONFIG} has peft_type {settings.get('peft_type')!r}; only ADALORA is exported"
        )
    scale = scale_of(settings)
    tensors = read_tensors(weights_file(folder))
    read_rank_pattern(settings, tensors, folder)
    layers = adapted_in(tensors)
    target = settings.get("target_r")
    budget = target * len(layers) if isinstance(target, int) else None
    plain = convert(tensors, settings, dict.fromkeys(layers, scale), uniform=uniform, budget=budget)
    if base is not None:
        plain = replace(plain, config=replace(plain.config, base_model_name_or_path=base))
    try:
        _write(plain, out, folder)
    except OSError as error:
        raise OSError(f"cannot write to {out} ({error.strerror or error}); choose another folder") from error
    return plain


def _write(plain: PlainLora, out: Path, folder: Path) -> None:
    """All files, or none of them."""
    state, run = read_state(folder), section_of(folder / CARD, RUN)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".saving-") as name:
        place = Path(name)
        save_file(plain.tensors, place / WEIGHTS, metadata={"format": "pt"})
        replace(plain.config, inference_mode=True).save_pretrained(place)
        new_card(place / CARD, plain.config.base_model_name_or_path)
        section = exported_section(None if state is None else state["config"], plain.ranks)
        write_section(place / CARD, EXPORTED, section)
        if run is not None:
            write_section(place / CARD, RUN, run)
        move_files(place, out)


def _allocator_of(tuner: AdaLoraModel, adapter: str | None) -> RankAllocator | None:
    """The allocator of this adapter, if the model is fused and has one."""
    if not isinstance(tuner, FusedAdaLoraModel):
        return None
    return tuner.rankallocator if adapter in (None, tuner.__dict__.get("trainable_adapter_name")) else None


def _from_peft(model: PeftModel, adapter: str | None, uniform: bool) -> tuple[PlainLora, nn.Module]:
    tuner = model.base_model
    layers = adapter_layers(tuner.model)
    if not layers:
        raise TypeError(
            f"this PeftModel has {type(tuner).__name__}, not AdaLoRA; save_pretrained it as it is"
        )
    if adapter is None:
        adapter = getattr(tuner, "trainable_adapter_name", None) or tuner.active_adapters[0]
    if adapter not in model.peft_config:
        raise ValueError(f"there is no adapter {adapter!r}; choose one of {', '.join(model.peft_config)}")
    layers = {name: layer for name, layer in layers.items() if adapter in layer.lora_A}
    merged = next((name for name, layer in layers.items() if layer.merged), None)
    if merged is not None:
        raise ValueError(f"an adapter is merged into {merged}; call unmerge_adapter() first")
    sharded = next((n for n, layer in layers.items() if type(layer.lora_E[adapter].data) is not Tensor), None)
    if sharded is not None:
        raise ValueError(f"the factors of {sharded} are sharded; save the model, then export the folder")
    config = model.peft_config[adapter]
    before, config.rank_pattern = config.rank_pattern, None  # whole tensors: PEFT cuts its own keys otherwise
    try:
        tensors = tensors_of(model, adapter)
    finally:
        config.rank_pattern = before
    tensors = {key: tensor.detach() for key, tensor in tensors.items()}
    plain = convert(
        tensors,
        {**vars(config), "inference_mode": False},
        {name: peft_scale(layer, adapter) for name, layer in layers.items()},
        masks=_masks(tuner, adapter, before, layers),
        uniform=uniform,
        budget=config.target_r * len(layers),
    )
    for name, layer in layers.items():
        if isinstance(layer, SVDConv2d):
            _give_kernel_shape(plain.tensors, name, layer.get_base_layer().weight)
    return plain, _without_adapters(tuner.model)


def _masks(
    tuner, adapter: str, pattern: dict | None, layers: dict[str, AdaLoraLayer]
) -> dict[str, list[bool]]:
    """The final mask of every layer that still has the triplets it prunes."""
    if isinstance(tuner, FusedAdaLoraModel) and adapter == getattr(tuner, "trainable_adapter_name", None):
        pattern = tuner.rankallocator.rank_pattern() if tuner.rankallocator.is_final else None
    masks = {name.partition(".lora_E")[0]: kept for name, kept in (pattern or {}).items()}
    return {
        name: torch.as_tensor(kept).flatten().tolist()
        for name, kept in masks.items()
        if name in layers and len(kept) == len(layers[name].lora_E[adapter])
    }


def _give_kernel_shape(tensors: dict[str, Tensor], name: str, weight: Tensor) -> None:
    """LoRA's convolutions: A' [r, in, kh, kw] and B' [out, r, 1, 1]."""
    key_A, key_B = (f"{PREFIX}{name}.{kind}.weight" for kind in ("lora_A", "lora_B"))
    if key_A in tensors:
        tensors[key_A] = tensors[key_A].reshape(-1, *weight.shape[1:])
        tensors[key_B] = tensors[key_B][:, :, None, None]


def _from_native(model: nn.Module, uniform: bool) -> tuple[PlainLora, nn.Module]:
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, AdaLoraLinear)}
    if not layers or "" in layers:
        raise TypeError(
            f"to_lora needs a PEFT AdaLoRA model or a model that contains AdaLoraLinear layers, got "
            f"{type(model).__name__}"
        )
    merged = next((name for name, layer in layers.items() if layer.merged), None)
    if merged is not None:
        raise ValueError(f"the adapter is merged into {merged}; call its unmerge() first")
    layers = {name: layer for name, layer in layers.items() if layer.r > 0}
    tensors = {
        f"{PREFIX}{name}.{kind}": factor.detach()
        for name, layer in layers.items()
        for kind, factor in layer.factors()._asdict().items()
    }
    allocator = model.__dict__.get("rankallocator")
    known = allocator is not None and set(layers) <= set(allocator.layer_names)
    colliding = any(is_suffix(name, layers) for name in layers)
    dropouts = {layer.dropout for layer in layers.values()}
    plain = convert(
        tensors,
        {
            "target_modules": exact_pattern(layers) if colliding else list(layers),
            "lora_dropout": dropouts.pop() if len(dropouts) == 1 else 0.0,
        },
        {name: layer.scaling for name, layer in layers.items()},
        masks=allocator.rank_pattern() if known and allocator.is_final else None,
        uniform=uniform,
        budget=allocator.schedule.target if known else None,
    )
    return plain, _without_adapters(model)


def _without_adapters(model: nn.Module) -> nn.Module:
    """A copy of the module tree on the same tensors, with plain layers in place of adapted ones."""
    memo = {id(buffer): buffer for buffer in model.buffers()}
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):  # training changes its running statistics
            memo |= {id(buffer): buffer.clone() for buffer in module.buffers(recurse=False)}
    for parameter in model.parameters():
        plain = type(parameter) is nn.Parameter
        memo[id(parameter)] = (
            nn.Parameter(parameter.detach(), parameter.requires_grad) if plain else parameter
        )
    allocator = model.__dict__.get("rankallocator")
    if allocator is not None:
        memo[id(allocator)] = None
    forget_handle(model, memo)
    base = copy.deepcopy(model, memo)
    take_handle(base)
    for name in ("rankallocator", "peft_config", "_hf_peft_config_loaded"):
        base.__dict__.pop(name, None)
    for name, module in list(base.named_modules()):
        if isinstance(module, AdaLoraLayer):
            original = module.get_base_layer()
        elif isinstance(module, AuxiliaryTrainingWrapper):
            original = module.original_module
        elif isinstance(module, AdaLoraLinear):
            original = module.to_linear()
        else:
            continue
        base.set_submodule(name, original)
    return with_own_forwards(base, model)
