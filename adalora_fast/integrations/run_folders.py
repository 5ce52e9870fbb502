"""What a Trainer's checkpoint needs where its model is not a ``PeftModel``.

Of a ``PeftModel`` the Trainer saves the adapter, and the allocator's state with it. Of anything else it saves
a state dict without allocator; of a transformers model after ``add_adapter`` it saves the adapter in a form
that it cannot resume from. ``AdaLoraCallback`` adds what is missing:

    checkpoint-N/adalora_allocator.safetensors                  of an adapted model that is the Trainer's own
    checkpoint-N/adalora/<module>/adalora_allocator.safetensors of one inside another module
    checkpoint-N/model.safetensors                              after add_adapter: all that is trained
"""

from pathlib import Path

from peft import PeftModel
from safetensors.torch import save_file
from torch import nn
from transformers import TrainerState, TrainingArguments
from transformers.utils import SAFE_WEIGHTS_NAME

from adalora_fast.allocator.state import AllocatorState, is_sharded, read_state, write_state

from .locate import peft_models, unwrapped


def checkpoint_folder(args: TrainingArguments, state: TrainerState) -> Path:
    """Where the Trainer keeps the checkpoint of the current step (a search puts it into a trial's folder)."""
    output, name = Path(args.output_dir), f"checkpoint-{state.global_step}"
    folder = output / (getattr(state, "trial_name", None) or "") / name
    if folder.is_dir():
        return folder
    trials = sorted(output.glob(f"run-*/{name}"), key=lambda found: found.stat().st_mtime)
    return trials[-1] if trials else folder


def read_allocator(model: nn.Module, tuner: nn.Module, folder: str | Path) -> AllocatorState | None:
    """The state in a checkpoint of the allocator that ``tuner`` has in ``model``, or None."""
    return read_state(_place(folder, _name_of(tuner, model)))


def complete(model: nn.Module, folder: Path, should_save: bool) -> None:
    """Add to the Trainer's checkpoint what it lacks. With sharded factors all processes must call this."""
    top = unwrapped(model)
    for name, found in peft_models(model).items():
        allocator = found.base_model.rankallocator
        if allocator is None:
            continue
        sharded = is_sharded(allocator)
        if sharded or (should_save and not isinstance(top, PeftModel)):
            place = _place(folder, name)
            place.mkdir(parents=True, exist_ok=True)
            write_state(allocator, place)
        if should_save and not sharded and not name and getattr(top, "_hf_peft_config_loaded", False):
            _write_trained(top, folder)


def _place(folder: str | Path, name: str) -> Path:
    return Path(folder) / "adalora" / name if name else Path(folder)


def _name_of(tuner: nn.Module, model: nn.Module) -> str:
    return next(name for name, found in peft_models(model).items() if found.base_model is tuner)


def _write_trained(model: nn.Module, folder: Path) -> None:
    """The part of the state dict that training changes, which is what the Trainer loads of a model."""
    state = model.state_dict()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    tensors = {name: state[name].detach().cpu().clone().contiguous() for name in trained if name in state}
    save_file(tensors, folder / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})
