"""What ``to_lora`` returns: PEFT's LoRA model on tensors that it shares with the model it came from."""

from functools import cache
from pathlib import Path

import peft
from peft import PeftModel
from peft.tuners import lora
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from .model_card import CARD, EXPORTED, exported_section, finish_card


class LoraModel(lora.LoraModel):
    """PEFT's, which merges into weights of its own: those of the AdaLoRA model stay as they are."""

    _owns_weights = False

    def _check_merge_allowed(self) -> None:
        """PEFT's check; it is the first step of every merge."""
        super()._check_merge_allowed()
        if not self._owns_weights:
            self._owns_weights = True
            own_adapted_weights(self.model)


class WithOrigin:
    """What ``to_lora`` adds to a ``PeftModel``: its model card says where the adapter came from."""

    def create_or_update_model_card(self, output_dir: str) -> None:
        """PEFT's card, and the section about AdaLoRA."""
        super().create_or_update_model_card(output_dir)
        section = exported_section(self.adalora_facts, self.adalora_ranks)
        finish_card(Path(output_dir) / CARD, "LoRA adapter", EXPORTED, section)


@cache
def exported_class(cls: type[PeftModel]) -> type[PeftModel]:
    """One of PEFT's model classes with :class:`WithOrigin`."""
    return type(f"Exported{cls.__name__}", (WithOrigin, cls), {"__module__": __name__})


def __getattr__(name: str):
    """The classes made by ``to_lora`` by name, so that a model can be copied and pickled by its owner."""
    if name.startswith("ExportedPeftModel"):
        return exported_class(getattr(peft, name.removeprefix("Exported")))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def own_adapted_weights(model: nn.Module) -> None:
    """Give every adapted layer a weight of its own, which it may so far share with layers of other models and
    with other layers of this one (replicated layers, tied embeddings).
    """
    config = getattr(model, "config", None)
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    for layer in (module for module in model.modules() if isinstance(module, LoraLayer)):
        base = layer.get_base_layer()
        for name, parameter in base.named_parameters(recurse=False):
            if type(parameter) is nn.Parameter:
                own = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
                base.register_parameter(name, own)
        if layer is output and getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False  # else saving the merged model would tie them again


def own_trained_tensors(model: nn.Module) -> None:
    """Give the model memory of its own for everything that its training changes: biases, for one."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.clone()
