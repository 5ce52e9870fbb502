"""From settings to the model that is trained: the encoder with a new head, and what of it may change."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from .arms import register_nulls
from .encoders import load_model
from .models import head_modules, target_modules
from .runs import RunSettings
from .tasks import Task

# PEFT's config insists on a number; the callbacks know the real one when training starts.
PLACEHOLDER_STEPS = 1_000_000
TASK_TYPES = {"question_answering": "QUESTION_ANS"}


def load_encoder(settings: RunSettings, task: Task) -> tuple[nn.Module, Any]:
    """The pretrained encoder with a fresh head for `task`, and its tokenizer."""
    return load_model(
        settings.model,
        kind=task.kind,
        labels=task.labels,
        classifier_dropout=settings.recipe.classifier_dropout,
        dropout=settings.recipe.dropout,
        dtype=settings.dtype,
        attention=settings.attention or fastest_attention(settings),
    )


def fastest_attention(settings: RunSettings) -> str | None:
    """None leaves the choice to transformers. On a CPU in half precision the backward pass of PyTorch's fused
    attention takes longer than the rest of the step.
    """
    half = settings.recipe.precision != "fp32" or settings.dtype != "float32"
    return "eager" if half and not torch.accelerator.is_available() else None


def adapt(model: nn.Module, settings: RunSettings, task: Task) -> nn.Module:
    """Freeze what `settings.method` freezes and add what it trains; the head (pooler included) is always
    trained fully.

    adalora, peft            low-rank triplets whose budget moves: this package's AdaLoRA, or PEFT's own
    lora                     low-rank matrices of rank `target_r`
    full, head               every weight; the head alone
    bitfit                   every bias (Ben Zaken et al. 2022)
    houlsby, fusion          bottleneck adapters; attention over the finished ones of other runs
    prompt, prefix, p_tuning virtual tokens before the input or in every layer; prompts from an encoder
    ia3                      scales of keys, values and the inner feed-forward activations
    """
    head = head_modules(model.config.model_type, task.kind)
    if settings.method == "full":
        return model
    if settings.method in ("adalora", "peft", "lora"):
        return add_low_rank(model, settings, task, head)
    freeze(model, head)
    return model


def freeze(model: nn.Module, head: list[str]) -> None:
    """Everything but the head."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not set(head).isdisjoint(name.split(".")))


def add_low_rank(model: nn.Module, settings: RunSettings, task: Task, head: list[str]) -> nn.Module:
    """PEFT's LoRA or AdaLoRA on `model`; the latter runs here unless the method is PEFT's own."""
    from peft import AdaLoraConfig, LoraConfig, TaskType, get_peft_model

    recipe = settings.recipe
    common: dict[str, Any] = {
        "task_type": TaskType[TASK_TYPES.get(task.kind, "SEQ_CLS")],
        "target_modules": target_modules(model.config.model_type),
        "modules_to_save": head,
    }
    if settings.method == "lora":
        return get_peft_model(
            model, LoraConfig(r=recipe.target_r, lora_alpha=recipe.scale * recipe.target_r, **common)
        )
    adapted = get_peft_model(
        model,
        AdaLoraConfig(
            init_r=recipe.init_r,
            target_r=recipe.target_r,
            lora_alpha=recipe.scale * recipe.init_r,
            total_step=PLACEHOLDER_STEPS,
            deltaT=recipe.deltaT,
            beta1=recipe.beta1,
            beta2=recipe.beta2,
            orth_reg_weight=recipe.orth_reg_weight,
            **common,
        ),
    )
    for name, parameter in adapted.named_parameters():
        if (
            ".ranknum." in name
        ):  # a number that PEFT keeps as a parameter; casting a half-precision base unfreezes it
            parameter.requires_grad_(False)
    if settings.method == "adalora":
        from adalora_fast import fuse

        register_nulls()
        options = {"score": settings.score, "score_gradient": settings.score_gradient}
        if settings.smoothing is not None:
            options["smoothing"] = settings.smoothing
        fuse(adapted, **options)
    return adapted


def save_adapter(model: nn.Module, settings: RunSettings, folder: Path) -> None:
    """`save_pretrained` of an adapter or a full model; only the trained tensors of a head."""
    if settings.method != "head":
        from transformers.utils import logging

        logging.disable_progress_bar()
        model.save_pretrained(folder)
        return
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    trained = {
        name: tensor.detach().cpu() for name, tensor in model.named_parameters() if tensor.requires_grad
    }
    save_file(trained, folder / "head.safetensors")
