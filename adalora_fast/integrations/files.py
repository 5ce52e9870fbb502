"""Reading adapter folders that somebody else wrote: safetensors and JSON only, nothing outside the folder."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
FACTORS = (".lora_A", ".lora_E", ".lora_B")
PREFIX = "base_model.model."  # of every key in PEFT's files


def adapted_in(keys: Iterable[str]) -> list[str]:
    """Names of the AdaLoRA layers among the keys of a file."""
    return [key.removesuffix(".lora_E").removeprefix(PREFIX) for key in keys if key.endswith(".lora_E")]


def file_within(folder: Path, name: str) -> Path:
    """``folder / name``, which may be a link only to a file of the same folder.

    In the hub's cache (``snapshots/<revision>/`` beside ``blobs/``) the whole repository counts.

    Raises:
        ValueError: the link leads elsewhere.
    """
    path, root = folder / name, folder.resolve()
    if root.parent.name == "snapshots":
        root = root.parent.parent
    if path.is_symlink() and not path.resolve().is_relative_to(root):
        raise ValueError(
            f"{path} is a link that leaves its folder (to {path.resolve()}); copy the file there"
        )
    return path


def read_config(folder: Path) -> dict[str, Any]:
    """The adapter's configuration.

    Raises:
        ValueError: it is missing, no JSON object, or a link that leaves the folder.
    """
    path = file_within(folder, CONFIG)
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not readable ({error}); restore it from a copy") from None
    if not isinstance(config, dict):
        raise ValueError(
            f"{path} holds {type(config).__name__}, not settings by name; restore it from a copy"
        )
    return config


def weights_file(folder: Path) -> Path:
    """The adapter's safetensors file.

    Raises:
        ValueError: there is none (a pickle is not read), or it is a link that leaves the folder.
    """
    path = file_within(folder, WEIGHTS)
    if not path.is_file():
        others = ", ".join(sorted(found.name for found in folder.glob("adapter_model.*"))) or "none"
        raise ValueError(f"{path} is missing (adapter files there: {others}); only safetensors are loaded")
    return path


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file, on the CPU.

    Raises:
        ValueError: the file is damaged, a number in it is NaN or infinite, or a factor is no float tensor.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable checkpoint ({error}); restore it from a copy") from error
    check_numbers(tensors, path)
    return tensors


def check_numbers(tensors: dict[str, Tensor], origin: object) -> None:
    """Refuse NaN and infinity anywhere, and factors that are no floating-point numbers.

    Raises:
        ValueError: naming the first such tensor.
    """
    for key, tensor in tensors.items():
        if key.endswith(FACTORS) and not tensor.is_floating_point():
            raise ValueError(
                f"{origin} has {key} in {tensor.dtype}, not floating point; restore it from a copy"
            )
        if tensor.is_floating_point() and not tensor.double().isfinite().all():
            raise ValueError(f"{origin} has {key} with NaN or infinite numbers; take an earlier checkpoint")


def read_rank_pattern(config: dict[str, Any], tensors: dict[str, Tensor], folder: Path) -> dict | None:
    """The rank pattern of a finished run (layer and ``.lora_E`` to one bool per initial triplet), or None.

    Raises:
        ValueError: it is malformed, or counts other triplets than the tensors have.
    """
    pattern = config.get("rank_pattern") or None
    if pattern is None:
        return None
    where = f"{folder / CONFIG} has a rank_pattern"
    if not isinstance(pattern, dict):
        raise ValueError(f"{where} that is a {type(pattern).__name__}, not lists by layer; restore it")
    for name, kept in pattern.items():
        if not isinstance(kept, list) or set(map(type, kept)) - {bool}:
            raise ValueError(f"{where} of {name} that is no list of true and false; restore it")
        tensor = tensors.get(f"{PREFIX}{name.partition('.lora_E')[0]}.lora_E")
        if tensor is None:
            raise ValueError(
                f"{where} of {name}, which {WEIGHTS} lacks; they belong to different checkpoints"
            )
        if sum(kept) != len(tensor):
            raise ValueError(
                f"{where} of {name} with {sum(kept)} triplets where {WEIGHTS} has {len(tensor)}; "
                "they belong to different checkpoints"
            )
    return pattern
