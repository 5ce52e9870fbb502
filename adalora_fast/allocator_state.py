"""A RankAllocator's state as a dictionary of tensors and plain values, and as one safetensors file."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

if TYPE_CHECKING:
    from adalora_fast.allocator import RankAllocator

FILE_NAME = "adalora_allocator.safetensors"
FORMAT = 1
AllocatorState = dict[str, Any]  # {"config": plain values, "tensors": {name: tensor}}


def save_state(allocator: "RankAllocator") -> AllocatorState:
    """See :meth:`RankAllocator.state_dict`. Statistics are stored per parameter, so that the file explains
    itself.
    """
    config = {
        "format": FORMAT,
        "t": allocator.t,
        "is_final": allocator.is_final,
        "is_over": allocator.is_over,
        "budget": allocator.budget,
        "update_count": allocator._update_count,
        "score": allocator.score.name,
        "smoothing": allocator.smoothing,
        "beta1": allocator.beta1,
        "beta2": allocator.beta2,
        "score_gradient": allocator.score_gradient,
        "schedule": {
            name: getattr(allocator.schedule, name)
            for name in ("initial", "target", "tinit", "tfinal", "deltaT", "total_step")
        },
        "layers": {name: len(kept) for name, kept in allocator.rank_pattern().items()},
    }
    tensors = {
        "mask": allocator._mask.to("cpu", copy=True),
        "updates": allocator._updates.to("cpu", copy=True),
    }
    for name, view in _statistic_views(allocator, allocator._statistics):
        tensors[name] = view.to("cpu", copy=True)
    for name, tensor in allocator._user_state.items():
        tensors[f"user/{name}"] = tensor.to("cpu", copy=True)
    return {"config": config, "tensors": tensors}


def _statistic_views(allocator: "RankAllocator", buffer: torch.Tensor):
    """(name, view into ``buffer``) of every statistic of every parameter; none once the mask is final."""
    from adalora_fast.ops.importance import layout_of
    from adalora_fast.ops.importance.reference import KINDS

    if buffer.shape[1] == 0:
        return
    layers = list(allocator._layers)
    layout = layout_of(allocator._parameters(), allocator.score.name)
    for row, statistic in enumerate(allocator._statistic_names()):
        for group in layout.groups:
            stacked = group.view(buffer[row])
            for position, member in enumerate(group.members):
                yield f"{statistic}/{layers[member // 3]}.{KINDS[member % 3]}", stacked[position]


def load_state(allocator: "RankAllocator", state: AllocatorState) -> None:
    """See :meth:`RankAllocator.load_state_dict`."""
    try:
        config, tensors = state["config"], state["tensors"]
        if config["format"] != FORMAT:
            raise ValueError(f"allocator state has format {config['format']}, this version reads {FORMAT}")
        _check_same(config, allocator)
        mask, updates = tensors["mask"], tensors["updates"]
        layers = dict(config["layers"])
        t, is_final, is_over = int(config["t"]), bool(config["is_final"]), bool(config["is_over"])
        update_count = int(config["update_count"])
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"allocator state is incomplete ({error}); it is damaged or not an allocator's"
        ) from error
    mask = _mask_for_layers(mask, layers, allocator)
    size = 0 if is_final else allocator._statistics.shape[1]
    statistics = torch.zeros(
        len(allocator._statistic_names()), size, dtype=allocator._dtype, device=allocator._device
    )
    if not is_final:
        if updates.shape != allocator._updates.shape:
            raise ValueError(
                f"allocator state counts {updates.numel()} parameters, the model has "
                f"{len(allocator._updates)}"
            )
        for name, view in _statistic_views(allocator, statistics):
            if name not in tensors or tensors[name].shape != view.shape:
                raise ValueError(
                    f"allocator state lacks {name} {tuple(view.shape)}; it is damaged or of another model"
                )
            view.copy_(tensors[name])
    allocator._statistics, allocator._mask = statistics, mask.to(allocator._device)
    allocator._updates = updates.to(allocator._device, copy=True)
    allocator._update_count = update_count
    allocator._user_state = {
        name.removeprefix("user/"): tensor.to(allocator._device, copy=True)
        for name, tensor in tensors.items()
        if name.startswith("user/")
    }
    allocator.t, allocator.is_final, allocator.is_over = t, is_final, is_over


def _check_same(config: dict, allocator: "RankAllocator") -> None:
    ours = {
        "score": allocator.score.name,
        "smoothing": allocator.smoothing,
        "score_gradient": allocator.score_gradient,
    }
    for name, value in ours.items():
        if config[name] != value:
            raise ValueError(
                f"allocator state was saved with {name}={config[name]!r}, this allocator has {value!r}"
            )
    if config["schedule"]["target"] != allocator.schedule.target:
        raise ValueError(
            f"allocator state has a target budget of {config['schedule']['target']} triplets, "
            "this allocator has "
            f"{allocator.schedule.target}; use the same target_r"
        )


def _mask_for_layers(mask: torch.Tensor, layers: dict[str, int], allocator: "RankAllocator") -> torch.Tensor:
    """The saved mask for the layers as they are: whole, or cut down to the triplets that were kept."""
    now = {
        name: factors.lora_E.shape[0]
        for name, factors in zip(allocator._layers, allocator._factors(), strict=True)
    }
    if list(layers) != list(now):
        strange = next((name for name in (*layers, *now) if (name in layers) != (name in now)), "their order")
        raise ValueError(f"allocator state belongs to other layers (first difference: {strange})")
    if mask.dtype != torch.bool or mask.numel() != sum(layers.values()):
        raise ValueError(
            f"allocator state has a mask of {mask.numel()} {mask.dtype} for {sum(layers.values())} triplets"
        )
    parts = []
    for (name, rank), kept in zip(layers.items(), mask.split(list(layers.values())), strict=True):
        if now[name] == rank:
            parts.append(kept)
        elif now[name] == int(kept.sum()):
            parts.append(torch.ones(now[name], dtype=torch.bool))
        else:
            raise ValueError(f"allocator state gives {name} rank {rank}, the model has {now[name]}")
    return torch.cat(parts)


def write_state(allocator: "RankAllocator", folder: str | os.PathLike) -> Path:
    """Write the state to ``folder/adalora_allocator.safetensors``, whole or not at all; returns the path."""
    path = Path(folder) / FILE_NAME
    state = allocator.state_dict()
    temporary = path.with_name(f".{FILE_NAME}.{os.getpid()}")
    try:
        save_file(state["tensors"], temporary, metadata={"adalora_fast": json.dumps(state["config"])})
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def read_state(folder: str | os.PathLike) -> AllocatorState | None:
    """The state in ``folder``, or None if it has none.

    Raises:
        ValueError: the file is truncated or not an allocator's.
    """
    path = Path(folder) / FILE_NAME
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            config = json.loads((file.metadata() or {})["adalora_fast"])
            return {"config": config, "tensors": {name: file.get_tensor(name) for name in file.keys()}}  # noqa: SIM118
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise ValueError(
            f"{path} is not a readable allocator state ({error}); restore it or delete it"
        ) from error
