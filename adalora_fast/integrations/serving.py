"""What keeps a LoRA adapter from being served: the rules of those who load PEFT's files (docs/export.md)."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.utils import get_peft_model_state_dict

from .files import PREFIX, read_config, read_tensors, weights_file

SERVERS = ("vllm", "sglang", "tgi")
# They scale every layer by lora_alpha / (the rank of its tensors), whatever the patterns say.
OWN_RANK = ("llama.cpp", "diffusers<0.42")
READERS = (*SERVERS, *OWN_RANK)
KEY_ENDS = (".lora_A.weight", ".lora_B.weight")
# They copy or stack the factors of all layers at the rank r of the configuration.
ONE_RANK = ("sglang", "tgi")


def servable(
    adapter: PeftModel | str | os.PathLike, *, max_lora_rank: int = 16, adapter_name: str = "default"
) -> dict[str, list[str]]:
    """Why each server would refuse a plain LoRA adapter, or serve something else; an empty list: neither.

    Judged by the files alone: whether the server knows the base model's architecture is not asked.

    Args:
        adapter: what :func:`adalora_fast.to_lora` returned, any PEFT LoRA model, or a saved adapter's folder.
        max_lora_rank: the bound the server is started with (16 is vLLM's default); the last two have none.
        adapter_name: which adapter of a model.

    Returns:
        ``{"vllm": [...], "sglang": [...], "tgi": [...], "llama.cpp": [...], "diffusers<0.42": [...]}``, one
        line for each reason. ``"llama.cpp"`` is its ``convert_lora_to_gguf.py`` and what the result computes,
        ``"diffusers<0.42"`` the pipelines' ``load_lora_weights``.

    Raises:
        ValueError: the folder is damaged or unsafe.
    """
    if isinstance(adapter, PeftModel):
        config = adapter.peft_config[adapter_name].to_dict()
        tensors = get_peft_model_state_dict(adapter, adapter_name=adapter_name, save_embedding_layers=False)
    else:
        folder = Path(adapter)
        config, tensors = read_config(folder), read_tensors(weights_file(folder))
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    common = _common(config, shapes)
    bounded = _too_large(config, shapes, max_lora_rank)
    reasons = {reader: [*common, *(bounded if reader in SERVERS else [])] for reader in READERS}
    for server in ONE_RANK:
        reasons[server] += _ragged(config, shapes)
    for reader in OWN_RANK:
        reasons[reader] += _scaled_otherwise(config, shapes)
    return reasons


def _common(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    reasons = []
    kind = str(getattr(config.get("peft_type"), "value", config.get("peft_type")))
    if kind != "LORA":
        reasons.append(f"peft_type is {kind}; export it with to_lora")
    foreign = [key for key in shapes if not (key.startswith(PREFIX) and key.endswith(KEY_ENDS))]
    modules = config.get("modules_to_save") or config.get("trainable_token_indices")
    if modules:
        reasons.append("it has whole trained modules (modules_to_save), which servers do not load")
    elif foreign:
        reasons.append(
            f"{len(foreign)} tensors are neither lora_A.weight nor lora_B.weight (the first is {foreign[0]})"
        )
    if config.get("bias", "none") != "none":
        reasons.append(f"bias is {config['bias']!r}, servers take only 'none'")
    odd = [name for name in ("use_dora", "use_rslora") if config.get(name)]
    reasons += [f"{name} is set" for name in odd]
    convolution = next((key for key, shape in shapes.items() if len(shape) != 2 and key not in foreign), None)
    if convolution is not None:
        reasons.append(f"{convolution} belongs to a convolution")
    ranks, alphas = (config.get(name) or {} for name in ("rank_pattern", "alpha_pattern"))
    r, alpha = config.get("r"), config.get("lora_alpha")
    for name in {**ranks, **alphas}:
        if r and alphas.get(name, alpha) * r != alpha * ranks.get(name, r):
            reasons.append(f"{name} has a scale of its own, servers know one (lora_alpha / r)")
            break
    return reasons


def _ranks(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    return {key: shape[0] for key, shape in shapes.items() if key.endswith(".lora_A.weight")}


def _too_large(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], bound: int) -> list[str]:
    largest = max([config.get("r") or 0, *_ranks(shapes).values()])
    return [f"rank {largest} is above max_lora_rank {bound}"] if largest > bound else []


def _scaled_otherwise(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """The layer that lora_alpha / (its own rank) scales most wrongly; the right scale is lora_alpha / r."""
    ranks, r = _ranks(shapes), config.get("r") or 0
    key = max(ranks, key=lambda key: abs(r - ranks[key]), default=None)
    if key is None or ranks[key] == r:
        return []
    return [
        f"{key} of rank {ranks[key]} would be scaled by lora_alpha / {ranks[key]} instead of lora_alpha / "
        f"{r}; export with uniform=True"
    ]


def _ragged(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    other = next((key for key, rank in _ranks(shapes).items() if rank != config.get("r")), None)
    if other is not None:
        return [
            f"{other} has rank {_ranks(shapes)[other]}, not r = {config.get('r')}; export with uniform=True"
        ]
    if config.get("exclude_modules"):
        return ["layers without an adapter are left out (exclude_modules); export with uniform=True"]
    return []
