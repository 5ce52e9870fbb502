"""Checkpoints of a fused model: read and judged as a whole before anything changes, written whole or not
at all.
"""

import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from peft import AdaLoraConfig, PeftConfig

from adalora_fast.allocator.state import (
    FILE_NAME,
    AllocatorState,
    check_state,
    facts_of,
    is_sharded,
    read_state,
    write_state,
)

from .adapter_names import by_layer, only, tensors_of, without
from .files import (
    CONFIG,
    FACTORS,
    PREFIX,
    WEIGHTS,
    file_within,
    read_config,
    read_rank_pattern,
    read_tensors,
    weights_file,
)
from .model_card import CARD, TRAINED, finish_card, trained_section
from .policies import WithPolicies


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What a folder holds: tensor shapes by key, the rank pattern of a finished run, the allocator's
    state.
    """

    folder: Path
    shapes: dict[str, tuple[int, ...]]
    rank_pattern: dict[str, list[bool]] | None
    state: AllocatorState | None

    def rank(self, layer: str) -> int | None:
        """The rank of a layer in this checkpoint."""
        shape = self.shapes.get(f"{PREFIX}{layer}.lora_E")
        return None if shape is None else shape[0]


def read_checkpoint(folder: Path, renamed: Callable[[str], str] = str) -> Checkpoint:
    """Read and judge everything that can be judged without the model.

    Args:
        folder: the adapter's.
        renamed: what a key of the file is called in the model, both with PEFT's prefix.

    Raises:
        ValueError: a file is missing, damaged, a link that leaves the folder, or only a pickle is there.
    """
    config = read_config(folder)
    tensors = read_tensors(weights_file(folder))
    file_within(folder, FILE_NAME)
    pattern = read_rank_pattern(config, tensors, folder)
    return Checkpoint(
        folder=folder,
        shapes={renamed(key): tuple(tensor.shape) for key, tensor in tensors.items()},
        rank_pattern=None if pattern is None else renamed_pattern(pattern, renamed),
        state=renamed_state(read_state(folder), renamed),
    )


def mapped_key(mapping: Mapping[str, str], key: str) -> str:
    """A file's key after ``load_adapter(key_mapping=…)``: the first expression that is found in the key,
    without PEFT's prefix, is replaced.
    """
    if not key.startswith(PREFIX):
        return key
    key = key.removeprefix(PREFIX)
    replaced = (re.subn(pattern, replacement, key) for pattern, replacement in mapping.items())
    return PREFIX + next((new for new, count in replaced if count), key)


def renamed_pattern(pattern: Mapping[str, Any], renamed: Callable[[str], str]) -> dict[str, Any]:
    """A rank pattern for the layers' names in the model, under keys without an adapter's name."""
    return {
        renamed(f"{PREFIX}{layer}.lora_E").removeprefix(PREFIX): kept
        for layer, kept in by_layer(pattern).items()
    }


def renamed_state(state: AllocatorState | None, renamed: Callable[[str], str]) -> AllocatorState | None:
    """An allocator's state for the layers' names in the model."""
    config = {} if state is None else state["config"]
    if not isinstance(config, dict) or not isinstance(config.get("layers"), dict):
        return state  # none, or a damaged one, which is judged later
    names = {
        layer: renamed(f"{PREFIX}{layer}.lora_E").removeprefix(PREFIX).removesuffix(".lora_E")
        for layer in config["layers"]
    }
    tensors = {}
    for key, tensor in state["tensors"].items():
        statistic, slash, place = key.partition("/")
        layer, dot, kind = place.rpartition(".")
        if statistic != "user" and layer in names:
            key = f"{statistic}{slash}{names[layer]}{dot}{kind}"
        tensors[key] = tensor
    layers = {names[layer]: rank for layer, rank in config["layers"].items()}
    return {"config": {**config, "layers": layers}, "tensors": tensors}


def check_checkpoint(checkpoint: Checkpoint, model, adapter: str) -> None:
    """Refuse a checkpoint that does not fit the model; ranks may differ, everything else may not.

    Raises:
        ValueError: naming the first tensor that is missing or of another shape.
    """
    ranks = {}
    for key, tensor in tensors_of(model, adapter).items():
        saved, here = checkpoint.shapes.get(key), tuple(tensor.shape)
        if saved is None:
            raise ValueError(f"{checkpoint.folder / WEIGHTS} lacks {key} {here}; it belongs to another model")
        if not key.endswith(FACTORS):
            fits = saved == here
        else:
            side = 1 if key.endswith(".lora_B") else 0  # where the rank stands
            layer = key.rpartition(".")[0]
            rank = ranks.setdefault(layer, saved[side] if len(saved) == 2 else None)
            fits = len(saved) == 2 and saved[1 - side] == here[1 - side] and saved[side] == rank
        if not fits:
            raise ValueError(
                f"{checkpoint.folder / WEIGHTS} has {key} {saved}, the model {here}; it belongs "
                "to another model"
            )


class WithAllocator(WithPolicies):
    """What ``fuse`` adds to a ``PeftModel``: saving, loading, adding and deleting of adapters that know the
    allocator, whatever the adapters are called.
    """

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        *args,
        state_dict: dict[str, Any] | None = None,
        **kwargs,
    ) -> None:
        """PEFT's, plus the allocator's state; written beside the target and moved into place at the end."""
        adapters = list(self.peft_config) if selected_adapters is None else selected_adapters
        unknown = next((name for name in adapters if name not in self.peft_config), None)
        if unknown is not None:
            raise ValueError(
                f"there is no adapter {unknown!r} to save; choose from {', '.join(self.peft_config)}"
            )
        options = (save_embedding_layers, is_main_process, *args)

        def write(place: str | os.PathLike) -> None:
            for name in adapters:
                with self.base_model.saving(name), only(self, name) as others:
                    tensors = state_dict
                    if others:
                        tensors = without(others, self, self.state_dict() if tensors is None else tensors)
                    super(WithAllocator, self).save_pretrained(
                        place, safe_serialization, [name], *options, state_dict=tensors, **kwargs
                    )

        if not is_main_process:
            return write(save_directory)
        tuner = self.base_model
        allocator = tuner.rankallocator
        if allocator is not None and allocator.t == 0 and tuner.was_trained() and not allocator.is_over:
            warnings.warn("saving an adapter that was trained without one allocator step", stacklevel=2)
        target = Path(save_directory)
        if target.is_file():
            raise ValueError(f"{target} is a file; give save_pretrained a folder")
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target, prefix=".saving-") as place:
            if (target / CARD).is_file():
                shutil.copy2(target / CARD, place)  # PEFT updates a model card that is there
            write(place)
            # Not if the adapter is not among those that are saved; of a sharded one AdaLoraCallback does it.
            if allocator is not None and not is_sharded(allocator):
                adapter = tuner.trainable_adapter_name
                folder = Path(place) if adapter == "default" else Path(place) / adapter
                if (folder / CONFIG).is_file():
                    write_state(allocator, folder, tuner.whole_pattern(adapter))
            move_files(Path(place), target)

    def create_or_update_model_card(self, output_dir: str) -> None:
        """PEFT's card, and what the allocator has chosen."""
        super().create_or_update_model_card(output_dir)
        allocator = self.base_model.rankallocator
        if allocator is not None and not is_sharded(allocator):
            section = trained_section(facts_of(allocator), allocator.ranks())
            finish_card(Path(output_dir) / CARD, "AdaLoRA adapter", TRAINED, section)

    def add_adapter(self, adapter_name: str, peft_config, *args, **kwargs) -> None:
        """PEFT's; an adapter that is not for inference becomes the one under training."""
        is_alone = not self.peft_config
        super().add_adapter(adapter_name, peft_config, *args, **kwargs)
        if is_alone:
            self.active_adapter = adapter_name
        if not self.peft_config[adapter_name].inference_mode:  # a frozen copy has a config of its own
            self.base_model.train_adapter(adapter_name)

    def load_adapter(self, model_id, adapter_name: str, is_trainable: bool = False, **kwargs):
        """PEFT's, and the allocator's state if the checkpoint has one; whole and cut-down checkpoints both
        load.

        Raises:
            ValueError: a file is missing, damaged or of another model; nothing was changed then.
        """
        tuner, folder = self.base_model, Path(str(model_id)) / (kwargs.get("subfolder") or "")
        mapping = kwargs.get("key_mapping")
        renamed = partial(mapped_key, mapping) if mapping else str
        checkpoint = read_checkpoint(folder, renamed) if folder.is_dir() else None
        new = adapter_name not in self.peft_config
        ours = tuner.rankallocator is not None and adapter_name == tuner.trainable_adapter_name
        if checkpoint is None or not (ours or (new and is_trainable and tuner.rankallocator is None)):
            with tuner.loading(renamed):
                result = super().load_adapter(model_id, adapter_name, is_trainable=is_trainable, **kwargs)
            if new and adapter_name == getattr(tuner, "trainable_adapter_name", None):  # from the hub
                tuner.rankallocator.rebind(finished=tuner.peft_config[adapter_name].rank_pattern is not None)
                tuner.remember_versions()
            return result
        if new:
            self._add_for_training(adapter_name, folder, kwargs)
        try:
            check_checkpoint(checkpoint, self, adapter_name)
            allocator, finished = tuner.rankallocator, checkpoint.rank_pattern is not None
            state = None if finished else checkpoint.state
            if state is not None:
                ranks = {name: checkpoint.rank(name) for name in allocator.layer_names}
                check_state(state, allocator, ranks)
        except ValueError:
            if new:
                self.delete_adapter(adapter_name)
            raise
        tuner.match_ranks(checkpoint)
        config = tuner.peft_config[adapter_name]
        config.rank_pattern = None  # the layers have their ranks, PEFT must not cut them again
        allocator.rebind(finished=finished)  # before the weights: PEFT ends with eval(), which masks
        result = super().load_adapter(str(model_id), adapter_name, is_trainable=is_trainable, **kwargs)
        config.rank_pattern = checkpoint.rank_pattern
        if state is not None:
            allocator.load_state_dict(state)
            if not allocator.is_final and not is_trainable:
                _warn_unfinished(state["config"])
        elif not finished:
            warnings.warn(
                f"{folder} has no {FILE_NAME}: the allocator starts with empty statistics", stacklevel=2
            )
        tuner.remember_versions()
        return result

    def _add_for_training(self, adapter: str, folder: Path, options: dict[str, Any]) -> None:
        """A fresh trainable adapter with the configuration in ``folder``."""
        config = PeftConfig.from_pretrained(str(folder))
        config.inference_mode = False
        if isinstance(config, AdaLoraConfig):
            config.rank_pattern = None
        self.add_adapter(adapter, config, autocast_adapter_dtype=options.get("autocast_adapter_dtype", True))
        self.set_requires_grad(adapter)


def _warn_unfinished(saved: dict[str, Any]) -> None:
    warnings.warn(
        f"this checkpoint was saved before the final mask, at step {saved['t']} with {saved['budget']} "
        f"triplets (final budget {saved['schedule']['target']}); train on, or call rankallocator.finalize()",
        stacklevel=3,
    )


def move_files(source: Path, target: Path) -> None:
    """Rename every file below ``source`` to its place below ``target`` (same file system)."""
    for path in sorted(source.rglob("*")):
        place = target / path.relative_to(source)
        if path.is_dir():
            place.mkdir(exist_ok=True)
        else:
            os.replace(path, place)
