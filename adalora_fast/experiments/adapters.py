"""From settings to the model that is trained: the encoder with a new head, and what of it may change."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from adalora_fast.schedule import BudgetSchedule

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
    """Freeze what `settings.method` freezes and add its adapters; the head (pooler included) is always
    trained fully.
    """
    model_type = model.config.model_type
    head = list(head_modules(model_type, task.kind))
    if settings.method == "full":
        return model
    if settings.method == "head":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(bool(set(head).intersection(name.split("."))))
        return model

    from peft import AdaLoraConfig, LoraConfig, TaskType, get_peft_model

    recipe = settings.recipe
    common: dict[str, Any] = {
        "task_type": TaskType[TASK_TYPES.get(task.kind, "SEQ_CLS")],
        "target_modules": target_modules(model_type),
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


def training_callbacks(settings: RunSettings) -> list[TrainerCallback]:
    """What moves the rank budget while the Trainer trains; empty where there is none."""
    recipe = settings.recipe
    schedule = {"tinit": recipe.tinit, "tfinal": recipe.tfinal, "deltaT": recipe.deltaT}
    if settings.method == "adalora":
        from adalora_fast import AdaLoraCallback

        return [AdaLoraCallback(**schedule)]
    return [PeftAllocation(**schedule)] if settings.method == "peft" else []


class PeftAllocation(TrainerCallback):
    """The control: PEFT's own allocator, called where it has to be, with the schedule fitted to the run."""

    def __init__(self, *, tinit: int | float, tfinal: int | float, deltaT: int) -> None:
        self.tinit, self.tfinal, self.deltaT = tinit, tfinal, deltaT

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        tuner = model.base_model
        config = tuner.peft_config[tuner.trainable_adapter_name]
        if args.fp16:
            raise ValueError(
                "PEFT's own AdaLoRA keeps an fp16 overflow in its statistics for good; use precision=bf16"
            )
        config.tinit, config.tfinal = (
            int(steps * state.max_steps) if isinstance(steps, float) else steps
            for steps in (self.tinit, self.tfinal)
        )
        config.deltaT, config.total_step = self.deltaT, state.max_steps
        BudgetSchedule(  # refuses a schedule that does not fit, in one line, as for the other arms
            initial=config.init_r,
            target=config.target_r,
            tinit=config.tinit,
            tfinal=config.tfinal,
            deltaT=self.deltaT,
            total_step=state.max_steps,
        )
        tuner.rankallocator.set_total_step(state.max_steps)

    def on_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        model.base_model.update_and_allocate(state.global_step)


def ranks_of(model: nn.Module, settings: RunSettings) -> dict[str, int]:
    """Rank of every adapted matrix by its module name; empty where nothing is adapted."""
    if settings.method == "adalora":
        return {name: int(rank) for name, rank in model.base_model.rankallocator.ranks().items()}
    if settings.method == "peft":
        tuner = model.base_model
        pattern = tuner.peft_config[tuner.trainable_adapter_name].rank_pattern
        if pattern is None:
            raise RuntimeError(
                f"{settings.label}: PEFT's allocator never made its final mask; train for longer"
            )
        return {name.partition(".lora_E")[0]: sum(kept) for name, kept in pattern.items()}
    if settings.method == "lora":
        modules = model.base_model.model.named_modules()
        return {name: layer.r["default"] for name, layer in modules if hasattr(layer, "lora_A")}
    return {}


def check_budget(ranks: dict[str, int], settings: RunSettings) -> int:
    """The total rank; RuntimeError where it is not exactly target_r per adapted matrix. (PEFT's own allocator
    may prune more: every triplet whose score equals the last one's.)
    """
    total, budget = sum(ranks.values()), settings.recipe.target_r * len(ranks)
    if total > budget or (total < budget and settings.method != "peft"):
        raise RuntimeError(
            f"{settings.label}: the total rank is {total}, the budget is {budget}; the allocation is wrong"
        )
    return total


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
