"""From the settings of a run to its encoder with a fresh head, and what of it is frozen."""

from typing import Any

import torch
from torch import nn

from adalora_fast.experiments.data.tasks import Task
from adalora_fast.experiments.settings.settings import RunSettings

from .encoders import load_model, outline_model
from .families import is_of_head

TASK_TYPES = {"question_answering": "QUESTION_ANS", "translation": "SEQ_2_SEQ_LM"}
COMPUTED_IN = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def load_encoder(settings: RunSettings, task: Task) -> tuple[nn.Module, Any]:
    """The pretrained encoder with a fresh head for `task`, and its tokenizer."""
    return load_model(
        settings.model,
        dtype=settings.dtype,
        compute_dtype=COMPUTED_IN[settings.recipe.precision],
        **_form(settings, task),
    )


def outline_encoder(settings: RunSettings, task: Task) -> nn.Module:
    """The same encoder on the meta device: its modules without their numbers."""
    return outline_model(settings.model, **_form(settings, task))


def _form(settings: RunSettings, task: Task) -> dict[str, Any]:
    return {
        "kind": task.kind,
        "labels": task.labels,
        "classifier_dropout": settings.recipe.classifier_dropout,
        "dropout": settings.recipe.dropout,
        "attention": settings.attention or fastest_attention(settings),
    }


def fastest_attention(settings: RunSettings) -> str | None:
    """None leaves the choice to transformers. On a CPU in half precision the backward pass of PyTorch's fused
    attention takes longer than the rest of the step.
    """
    half = settings.recipe.precision != "fp32" or settings.dtype in ("bfloat16", "float16")
    return "eager" if half and not torch.accelerator.is_available() else None


def biases_of(model: nn.Module, head: list[str]) -> list[nn.Parameter]:
    """Every bias outside of the head, those of layer norms too; ValueError where there are none."""
    biases = [
        parameter
        for name, parameter in model.named_parameters()
        if name.endswith(".bias") and not is_of_head(name, head)
    ]
    if not biases:
        raise ValueError(
            f"a {model.config.model_type} encoder has no biases to train; use --method lora or head instead "
            "of bitfit, and no train_biases"
        )
    return biases


def freeze(model: nn.Module, head: list[str]) -> None:
    """Everything but the head."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_of_head(name, head))


def task_type(task: Task) -> Any:
    """PEFT's name for it."""
    from peft import TaskType

    return TaskType[TASK_TYPES.get(task.kind, "SEQ_CLS")]
