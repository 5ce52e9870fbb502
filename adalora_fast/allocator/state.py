"""A RankAllocator's state as a dictionary of tensors and plain values, and as one safetensors file."""

import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from adalora_fast.distributed.shards import shards_of
from adalora_fast.ops.importance import layout_of
from adalora_fast.ops.importance.reference import KINDS

from .layers import AllocatedLayers, Snapshot
from .schedule import Position

FILE_NAME = "adalora_allocator.safetensors"
FORMAT = 2
# What those formats did not say.
OLDER = {1: {"weights": "after", "triplet": "full", "hysteresis": 0.0, "remember": False}}
AllocatorState = dict[str, Any]  # {"config": plain values, "tensors": {name: tensor}}


def save_state(allocator: AllocatedLayers) -> AllocatorState:
    """See :meth:`RankAllocator.state_dict`. Statistics are stored per parameter, so that the file explains
    itself.
    """
    now, statistics = allocator.snapshot(), allocator._statistics
    config = facts_of(allocator)
    config["layers"] = {name: len(kept) for name, kept in allocator.rank_pattern().items()}
    tensors = {
        "mask": now.mask.to("cpu", copy=True),
        "updates": now.updates.to("cpu", copy=True),
    }
    if not now.position.is_final:
        for name, view in _statistic_views(allocator, statistics.whole()):
            tensors[name] = view.to("cpu", copy=True)
        if allocator.remember:
            tensors["remembered"] = now.remembered.to("cpu", copy=True)
    for name, tensor in now.user_state.items():
        tensors[f"user/{name}"] = tensor.to("cpu", copy=True)
    return {"config": config, "tensors": tensors}


def facts_of(allocator: AllocatedLayers) -> dict[str, Any]:
    """Position, budget, score and schedule as plain values."""
    here = allocator.snapshot().position
    return {
        "format": FORMAT,
        "t": here.t,
        "is_final": here.is_final,
        "is_over": here.is_over,
        "budget": allocator.budget,
        "update_count": here.updates,
        "score": allocator.score.name,
        "smoothing": allocator.smoothing,
        "beta1": allocator._statistics.rule.beta1,
        "beta2": allocator._statistics.rule.beta2,
        "score_gradient": allocator.score_gradient,
        "weights": allocator.weights,
        "triplet": allocator.triplet,
        "hysteresis": allocator.hysteresis,
        "remember": allocator.remember,
        "schedule": {
            name: getattr(allocator.schedule, name)
            for name in ("initial", "target", "tinit", "tfinal", "deltaT", "total_step")
        },
    }


def _statistic_views(allocator: AllocatedLayers, buffer: torch.Tensor):
    """(name, view into ``buffer``) of every statistic of every parameter."""
    layers = allocator.layer_names
    layout = layout_of(allocator._statistics.judged(allocator.parameters()), allocator.score.name)
    for row, statistic in enumerate(allocator._statistics.names):
        for group in layout.groups:
            stacked = group.view(buffer[row])
            for position, member in enumerate(group.members):
                yield f"{statistic}/{layers[member // 3]}.{KINDS[member % 3]}", stacked[position]


def load_state(allocator: AllocatedLayers, state: AllocatorState) -> None:
    """See :meth:`RankAllocator.load_state_dict`."""
    sizes = (factors.lora_E.shape[0] for factors in allocator.factors())
    ranks = dict(zip(allocator.layer_names, sizes, strict=True))
    mask = check_state(state, allocator, ranks)
    config, tensors = state["config"], state["tensors"]
    ours = allocator._statistics
    values = ours.new(allocator.parameters())
    for name, view in () if config["is_final"] else _statistic_views(allocator, values):
        if name not in tensors or tensors[name].shape != view.shape:
            raise ValueError(
                f"allocator state lacks {name} {tuple(view.shape)}; it is damaged or of another model"
            )
        view.copy_(tensors[name])
    user_state = {
        name.removeprefix("user/"): tensor.to(ours.device, copy=True)
        for name, tensor in tensors.items()
        if name.startswith("user/")
    }
    position = Position(
        t=config["t"],
        is_final=config["is_final"],
        is_over=config["is_over"],
        updates=config["update_count"],
    )
    remembered = ours.values.new_zeros(mask.shape if allocator.remember and not config["is_final"] else 0)
    if len(remembered):
        remembered.copy_(_of_layers(tensors["remembered"], tensors["mask"], config["layers"], ranks))
    allocator.restore(
        Snapshot(
            position=position,
            mask=mask.to(ours.device),
            values=values,
            updates=tensors["updates"].to(ours.device, copy=True),
            user_state=user_state,
            remembered=remembered,
        )
    )


def check_state(state: AllocatorState, allocator: AllocatedLayers, ranks: dict[str, int]) -> torch.Tensor:
    """The state's mask for layers of these ``ranks``, if all of the state fits the allocator and is sound.

    Raises:
        ValueError: it does not.
    """
    try:
        config, tensors = state["config"], state["tensors"]
        if config["format"] not in (FORMAT, *OLDER):
            raise ValueError(
                f"allocator state has format {config['format']}, this version reads 1 to {FORMAT}"
            )
        config = OLDER.get(config["format"], {}) | config
        for name in ("t", "update_count"):
            if not isinstance(config[name], int) or config[name] < 0:
                raise ValueError(f"allocator state has {name}={config[name]!r}; it is damaged")
        for name in ("is_final", "is_over"):
            if not isinstance(config[name], bool):
                raise ValueError(f"allocator state has {name}={config[name]!r}; it is damaged")
        _check_same(config, allocator)
        mask, updates, layers = tensors["mask"], tensors["updates"], config["layers"]
        if not isinstance(layers, dict) or not all(isinstance(rank, int) for rank in layers.values()):
            raise ValueError(
                f"allocator state has layers {layers!r}, names and ranks were expected; it is damaged"
            )
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(
            f"allocator state is incomplete ({error}); it is damaged or not an allocator's"
        ) from error
    kept = _mask_for_layers(mask, layers, ranks, config)
    expected = len(allocator._statistics.updates)
    if updates.shape != (expected,):
        raise ValueError(f"allocator state counts {updates.numel()} parameters, the model has {expected}")
    if updates.dtype != torch.int64 or (updates < 0).any():
        raise ValueError("allocator state has updates that are no counts; it is damaged")
    if config["remember"] and not config["is_final"]:
        remembered = tensors.get("remembered")
        if remembered is None or remembered.shape != mask.shape:
            raise ValueError(f"allocator state lacks the remembered λ {tuple(mask.shape)}; it is damaged")
    statistics = {name: t for name, t in tensors.items() if name not in ("mask", "updates")}
    for name, tensor in statistics.items():
        sound = name.startswith("user/") or (tensor.is_floating_point() and tensor.isfinite().all())
        if not sound:
            raise ValueError(f"allocator state has {name} that is not finite numbers; it is damaged")
    if not config["is_final"]:
        _check_statistics(allocator, layers, statistics)
    return kept


def _check_statistics(allocator: AllocatedLayers, layers: dict[str, int], tensors: dict) -> None:
    """Every statistic of every entry is there, for layers of the saved ranks."""
    lambda_only = allocator.score.name == "magnitude" or allocator.triplet == "lambda"
    for (layer, rank), factors in zip(layers.items(), allocator.factors(), strict=False):
        shapes = {"lora_A": (rank, factors.lora_A.shape[1]), "lora_E": (rank, 1)}
        shapes["lora_B"] = (factors.lora_B.shape[0], rank)
        if rank == 0:
            continue
        for statistic in allocator._statistics.names:
            for kind in ("lora_E",) if lambda_only else shapes:
                name = f"{statistic}/{layer}.{kind}"
                if name not in tensors or tensors[name].shape != shapes[kind]:
                    raise ValueError(
                        f"allocator state lacks {name} {shapes[kind]}; it is damaged or of another model"
                    )


def _check_same(config: dict, allocator: AllocatedLayers) -> None:
    ours = {
        "score": allocator.score.name,
        "smoothing": allocator.smoothing,
        "score_gradient": allocator.score_gradient,
        "weights": allocator.weights,
        "triplet": allocator.triplet,
        "hysteresis": allocator.hysteresis,
        "remember": allocator.remember,
    }
    for name, value in ours.items():
        if config[name] != value:
            raise ValueError(
                f"allocator state was saved with {name}={config[name]!r}, this allocator has {value!r}"
            )
    target, wanted = config["schedule"]["target"], allocator._wanted
    if target != wanted:
        raise ValueError(
            f"allocator state has a target budget of {target} triplets, this allocator has {wanted}; use the "
            "same target_r"
        )


def _mask_for_layers(
    mask: torch.Tensor, layers: dict[str, int], ranks: dict[str, int], config: dict
) -> torch.Tensor:
    """The saved mask for layers of these ranks: whole, or cut down to the triplets that were kept."""
    if list(layers) != list(ranks):
        differing = (name for name in (*layers, *ranks) if (name in layers) != (name in ranks))
        strange = next(differing, "their order")
        raise ValueError(f"allocator state belongs to other layers (first difference: {strange})")
    total = sum(layers.values())
    if mask.dtype != torch.bool or mask.shape != (total,):
        raise ValueError(
            f"allocator state has a mask of {mask.numel()} {mask.dtype} for {total} triplets; it is damaged"
        )
    if config["is_final"] and int(mask.sum()) != config["schedule"]["target"]:
        raise ValueError(
            f"allocator state has a final mask of {int(mask.sum())} triplets for a budget of "
            f"{config['schedule']['target']}; it is damaged"
        )
    parts = []
    for (name, rank), kept in zip(layers.items(), mask.split(list(layers.values())), strict=True):
        if ranks[name] == rank:
            parts.append(kept)
        elif ranks[name] == int(kept.sum()):
            parts.append(torch.ones(ranks[name], dtype=torch.bool))
        else:
            raise ValueError(f"allocator state gives {name} rank {rank}, the model has {ranks[name]}")
    return torch.cat(parts)


def _of_layers(
    values: torch.Tensor, mask: torch.Tensor, layers: dict[str, int], ranks: dict[str, int]
) -> torch.Tensor:
    """Of ``values`` [T] those of the triplets that layers of these ``ranks`` have, as :func:`check_state`
    cuts the mask.
    """
    sizes = list(layers.values())
    parts = zip(layers.items(), values.split(sizes), mask.split(sizes), strict=True)
    return torch.cat([own if ranks[name] == rank else own[kept] for (name, rank), own, kept in parts])


def is_sharded(allocator: AllocatedLayers) -> bool:
    """Whether no process holds all of the factors."""
    return shards_of(allocator.parameters()) is not None


def write_state(
    allocator: AllocatedLayers, folder: str | os.PathLike, whole: dict[str, list[bool]] | None = None
) -> Path:
    """Write the state to ``folder/adalora_allocator.safetensors``, whole or not at all; returns the path.

    Of sharded factors all processes must ask for it, and the first one writes.

    Args:
        allocator: whose.
        folder: an existing one.
        whole: by layer, the triplets that were kept, where the factors beside the state have all of them
            and the allocator's layers were cut down.
    """
    path = Path(folder) / FILE_NAME
    state = allocator.state_dict()
    if whole is not None:
        masks = {name: torch.as_tensor(whole[name]).flatten() for name in allocator.layer_names}
        state["config"]["layers"] = {name: len(kept) for name, kept in masks.items()}
        state["tensors"]["mask"] = torch.cat(list(masks.values()))
    if is_sharded(allocator) and dist.get_rank() > 0:
        return path
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
