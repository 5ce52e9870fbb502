"""Adapters called like a part of a module's name: saved and loaded by their places in the model.

PEFT finds the tensors of an adapter by text. It leaves out every key that has another adapter's name as a
component, takes ``.<name>`` out of the keys of a rank pattern wherever it stands, and when it loads such a
pattern under a name that is part of a key, it cuts one component too many. What is here goes by places.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from peft import PeftModel
from peft.tuners.adalora.layer import AdaLoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

ADAPTABLE = (AdaLoraLayer, nn.Linear, nn.Conv2d, Conv1D)
CONTAINERS = ("base_layer", "original_module", "token_adapter", "trainable_tokens_delta")


def tensors_of(model: PeftModel, adapter: str) -> dict[str, Tensor]:
    """What PEFT saves of one adapter, under the names that files have."""
    with only(model, adapter) as others:
        return get_peft_model_state_dict(
            model,
            without(others, model, model.state_dict()),
            adapter_name=adapter,
            save_embedding_layers=False,
        )


@contextlib.contextmanager
def only(model: PeftModel, adapter: str) -> Iterator[list[str]]:
    """The model as if it had no other adapter; gives the names of the others."""
    tuner, configs, active = model.base_model, model.peft_config, model.active_adapter
    tuner.peft_config, model.active_adapter = {adapter: configs[adapter]}, adapter
    try:
        yield [name for name in configs if name != adapter]
    finally:
        tuner.peft_config, model.active_adapter = configs, active


def without(adapters: Iterable[str], model: nn.Module, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """``state_dict`` without the tensors of these adapters."""
    adapters = set(adapters)
    places = {
        f"{name}.{kind}.{adapter}"
        for name, module in model.named_modules()
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
        for kind, held in module.named_children()
        if kind != "base_layer" and hasattr(held, "keys")
        for adapter in adapters.intersection(held.keys())
    }

    def belongs(key: str) -> bool:
        while key and key not in places:
            key = key.rpartition(".")[0]
        return bool(key)

    return {key: value for key, value in state_dict.items() if not (places and belongs(key))}


def by_layer(pattern: Mapping[str, Any]) -> dict[str, Any]:
    """A rank pattern by the names of the layers; its keys may end with an adapter's name."""
    return {key.partition(".lora_E")[0]: kept for key, kept in pattern.items()}


def as_taken_out(layer: str, adapter: str) -> str:
    """What PEFT makes of the layer's key in a rank pattern when it saves the adapter."""
    return f"{layer}.lora_E".replace(f".{adapter}", "")


def is_in_a_key(adapter: str, layers: Iterable[str]) -> bool:
    """Whether PEFT, loading a rank pattern of these layers under this name, would look for other layers."""
    return any(adapter in f"{layer}.lora_E" for layer in layers)


def check_name(model: nn.Module, config, adapter: str) -> None:
    """Refuse a name with which the adapter could not be saved.

    Args:
        model: the base model, adapted or not.
        config: the adapter's.

    Raises:
        ValueError: PEFT would take the name out of the name of a tensor that is saved beside the factors, or
            make one name of those of two layers.
    """
    for key in _saved_beside(model, config):
        if adapter in key.split(".")[-2:]:
            raise ValueError(
                f"the adapter name {adapter!r} is part of {key}, which is saved with the adapter, and PEFT "
                "would take it out of there; choose another name for the adapter"
            )
    if config.trainable_token_indices is not None and adapter in CONTAINERS:
        raise ValueError(f"the adapter name {adapter!r} is PEFT's own for trained tokens; choose another")
    seen: dict[str, str] = {}
    for layer, module in model.named_modules():
        if isinstance(module, ADAPTABLE) and not layer.endswith("base_layer"):
            other = seen.setdefault(as_taken_out(layer, adapter), layer)
            if other != layer:
                raise ValueError(
                    f"PEFT takes the adapter name {adapter!r} out of {other} and {layer}, which then have "
                    "the same name; choose another name for the adapter"
                )


def _saved_beside(model: nn.Module, config) -> Iterator[str]:
    """Names of the tensors that are or may be saved with the adapter and are not its factors."""
    wholes = tuple(config.modules_to_save or ())
    for name, _ in (*model.named_parameters(), *model.named_buffers()):
        parts = name.split(".")
        plain = ".".join(part for part in parts if part not in CONTAINERS)
        plain = _without_copies(plain)
        modules = [plain[:end] for end, letter in enumerate(plain) if letter == "."]
        if any(module.endswith(wholes) for module in modules):
            yield plain
        elif config.bias != "none" and parts[-1] == "bias":
            yield name
    for find in ("get_input_embeddings", "get_output_embeddings"):  # saved if the vocabulary was resized
        with contextlib.suppress(AttributeError, NotImplementedError):
            embedding = getattr(model, find)()
            yield from (f"{name}.weight" for name, module in model.named_modules() if module is embedding)


def _without_copies(name: str) -> str:
    """``score.modules_to_save.default.weight`` → ``score.weight``."""
    before, found, after = name.partition(".modules_to_save.")
    return f"{before}.{after.partition('.')[2]}" if found else name
