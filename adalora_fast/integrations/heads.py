"""The trap of ``pooler.dense``: an adapter on a frozen layer that no pretraining has ever seen."""

import warnings

from peft.tuners.adalora import AdaLoraModel
from transformers import PreTrainedModel

from .layers import adapter_layers


def untrained_heads(tuner: AdaLoraModel, adapter: str) -> list[str]:
    """Adapted layers outside the pretrained part of a transformers model.

    The pretrained part is what ``base_model_prefix`` names; a task's head and, in DeBERTa, the pooler stand
    beside it, and are drawn at random unless the checkpoint was one of this very task. An output embedding
    is pretrained with its model. (PEFT adapts nothing that is in modules_to_save.)
    """
    model = tuner.model
    if not isinstance(model, PreTrainedModel) or not hasattr(model, model.base_model_prefix):
        return []
    known = f"{model.base_model_prefix}."
    embedding = model.get_output_embeddings()
    return [
        name
        for name, layer in adapter_layers(model).items()
        if adapter in layer.lora_A and layer is not embedding and not name.startswith(known)
    ]


def warn_of_untrained_heads(tuner: AdaLoraModel, adapter: str) -> None:
    """One warning that names the layers and the two remedies."""
    names = untrained_heads(tuner, adapter)
    if names:
        base = type(tuner.model).__name__
        warnings.warn(
            f"{', '.join(names)} of {base} is adapted, frozen and outside of the pretrained "
            f"{tuner.model.base_model_prefix!r}: unless the checkpoint was trained for this very task, the "
            f"weights there are random; put {names[0].partition('.')[0]!r} into modules_to_save, or name "
            "target_modules without it",
            UserWarning,
            stacklevel=4,
        )
