"""Checkpoints of a fused model: read and judged as a whole before anything changes, written whole or not
at all.
"""

import os
import shutil
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft.utils import get_peft_model_state_dict

from adalora_fast.allocator_state import (
    FILE_NAME,
    AllocatorState,
    check_state,
    is_sharded,
    read_state,
    write_state,
)
from adalora_fast.integrations.files import (
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


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read and judge everything that can be judged without the model.

    Raises:
        ValueError: a file is missing, damaged, a link that leaves the folder, or only a pickle is there.
    """
    config = read_config(folder)
    tensors = read_tensors(weights_file(folder))
    file_within(folder, FILE_NAME)
    return Checkpoint(
        folder=folder,
        shapes={key: tuple(tensor.shape) for key, tensor in tensors.items()},
        rank_pattern=read_rank_pattern(config, tensors, folder),
        state=read_state(folder),
    )


def check_checkpoint(checkpoint: Checkpoint, model, adapter: str) -> None:
    """Refuse a checkpoint that does not fit the model; ranks may differ, everything else may not.

    Raises:
        ValueError: naming the first tensor that is missing or of another shape.
    """
    ranks = {}
    for key, tensor in get_peft_model_state_dict(
        model, adapter_name=adapter, save_embedding_layers=False
    ).items():
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


class WithAllocator:
    """What ``fuse`` adds to a ``PeftModel``: ``save_pretrained`` and ``load_adapter`` that know the
    allocator.
    """

    def save_pretrained(self, save_directory, *args, is_main_process: bool = True, **kwargs) -> None:
        """PEFT's, plus the allocator's state; written beside the target and moved into place at the end."""
        tuner = self.base_model
        allocator = tuner.rankallocator
        if allocator is None or not is_main_process:
            return super().save_pretrained(save_directory, *args, is_main_process=is_main_process, **kwargs)
        if allocator.t == 0 and tuner.was_trained() and not allocator.is_over:
            warnings.warn("saving an adapter that was trained without one allocator step", stacklevel=2)
        target = Path(save_directory)
        if target.is_file():
            raise ValueError(f"{target} is a file; give save_pretrained a folder")
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target, prefix=".saving-") as place:
            if (target / "README.md").is_file():
                shutil.copy2(target / "README.md", place)  # PEFT updates a model card that is there
            with tuner.saving():
                super().save_pretrained(place, *args, **kwargs)
            adapter = tuner.trainable_adapter_name
            folder = Path(place) if adapter == "default" else Path(place) / adapter
            # Not if the adapter is not among those that are saved; of a sharded one AdaLoraCallback does it.
            if (folder / CONFIG).is_file() and not is_sharded(allocator):
                write_state(allocator, folder)
            move_files(Path(place), target)

    def load_adapter(self, model_id, adapter_name: str, is_trainable: bool = False, **kwargs):
        """PEFT's, and the allocator's state if the checkpoint has one; whole and cut-down checkpoints both
        load.

        Raises:
            ValueError: a file is missing, damaged or of another model; nothing was changed then.
        """
        tuner, folder = self.base_model, Path(str(model_id)) / (kwargs.get("subfolder") or "")
        ours = tuner.rankallocator is not None and adapter_name == tuner.trainable_adapter_name
        checkpoint = read_checkpoint(folder) if folder.is_dir() else None
        if not ours or checkpoint is None:
            return super().load_adapter(model_id, adapter_name, is_trainable=is_trainable, **kwargs)
        check_checkpoint(checkpoint, self, adapter_name)
        allocator, finished = tuner.rankallocator, checkpoint.rank_pattern is not None
        state = None if finished else checkpoint.state
        if state is not None:
            check_state(state, allocator, {name: checkpoint.rank(name) for name in allocator.layer_names})
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
