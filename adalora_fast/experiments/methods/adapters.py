"""From settings to the model that is trained: the encoder with a new head, and what of it may change."""

from pathlib import Path
from typing import Any

from torch import nn

from adalora_fast.experiments.data.tasks import Task
from adalora_fast.experiments.models.families import adapted_modules, family_of
from adalora_fast.experiments.models.loading import biases_of, freeze, task_type
from adalora_fast.experiments.settings.quiet import without_model_bars
from adalora_fast.experiments.settings.settings import LOW_RANK, VIRTUAL, RunSettings

from .bottleneck import add_bottlenecks, check_bottlenecks
from .fusion import TRAINED, add_fusion
from .nulls import score_of

# PEFT's config insists on a number; the callbacks know the real one when training starts.
PLACEHOLDER_STEPS = 1_000_000


def adapt(
    model: nn.Module, settings: RunSettings, task: Task, found: dict[str, int] | None = None
) -> nn.Module:
    """Freeze what `settings.method` freezes and add what it trains; the head (pooler included) is always
    trained fully.

    adalora, peft            low-rank triplets whose budget moves: this package's AdaLoRA, or PEFT's own
    lora                     low-rank matrices of rank `target_r`
    full, head               every weight; the head alone
    bitfit                   every bias (Ben Zaken et al. 2022)
    houlsby, fusion          bottleneck adapters; attention over the finished ones of other runs
    prompt, prefix, p_tuning virtual tokens before the input or in every layer; prompts from an encoder
    ia3                      scales of keys, values and the inner feed-forward activations

    `train_biases` adds every bias of the encoder to what any of them trains. `found` are the ranks of another
    run, where the null `dealt` deals them (`nulls.read_ranks`).
    """
    check_bottlenecks(settings)
    head = family_of(model).head_for(task.kind)
    if settings.method == "head" and not head:
        raise ValueError(
            f"method head trains the head alone, and {task.kind} has none; choose another --method, for "
            "instance lora"
        )
    if settings.method == "full":
        return model
    trains_biases = settings.method == "bitfit" or settings.recipe.train_biases
    biases = biases_of(model, head) if trains_biases else []
    adapted = _adapted(model, settings, task, head, found)
    for bias in biases:
        bias.requires_grad_(True)
    return adapted


def _adapted(
    model: nn.Module, settings: RunSettings, task: Task, head: list[str], found: dict[str, int] | None
) -> nn.Module:
    if settings.method in LOW_RANK:
        return add_low_rank(model, settings, task, head, found)
    if settings.method in VIRTUAL:
        from .prompts import add_prompt

        return add_prompt(model, settings, task, head)
    freeze(model, head)
    if settings.method == "houlsby":
        add_bottlenecks(model, settings.recipe.bottleneck)
    if settings.method == "fusion":
        add_fusion(model, settings)
    return model


def add_low_rank(
    model: nn.Module,
    settings: RunSettings,
    task: Task,
    head: list[str],
    found: dict[str, int] | None = None,
) -> nn.Module:
    """PEFT's LoRA or AdaLoRA on `model`; the latter runs here unless the method is PEFT's own."""
    from peft import AdaLoraConfig, LoraConfig, get_peft_model

    recipe = settings.recipe
    common: dict[str, Any] = {
        "task_type": task_type(task),
        "target_modules": adapted_modules(model, recipe.matrices),
        "modules_to_save": head or None,
        "lora_dropout": recipe.adapter_dropout,
        "bias": "all" if recipe.train_biases else "none",
    }
    if settings.method == "lora":
        config = LoraConfig(r=recipe.target_r, lora_alpha=recipe.scale * recipe.target_r, **common)
    else:
        config = AdaLoraConfig(
            init_r=recipe.init_r,
            target_r=recipe.target_r,
            lora_alpha=recipe.scale * recipe.init_r,
            total_step=PLACEHOLDER_STEPS,
            deltaT=recipe.deltaT,
            beta1=recipe.beta1,
            beta2=recipe.beta2,
            orth_reg_weight=recipe.orth_reg_weight,
            **common,
        )
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if ".ranknum." in name:  # a number, and yet a parameter: casting a half-precision base unfreezes it
            parameter.requires_grad_(False)
    if settings.method == "adalora":
        from adalora_fast.integrations.peft import fuse

        fuse(
            adapted,
            score_of(settings, adapted, found),
            smoothing=settings.smoothing,
            score_gradient=settings.score_gradient,
            orth_penalty=recipe.orth_penalty,
            weights=recipe.weights,
            triplet=recipe.triplet,
            hysteresis=recipe.hysteresis,
            remember=recipe.remember,
        )
    return adapted


def save_adapter(model: nn.Module, settings: RunSettings, folder: Path) -> None:
    """`save_pretrained` of a model of PEFT's or a full one; of the others, trained.safetensors with what they
    have trained, and with the bottlenecks of the runs that a fusion started from.
    """
    from peft import PeftModel

    if isinstance(model, PeftModel) or settings.method == "full":
        with without_model_bars():
            model.save_pretrained(folder)
        return
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    trained = {
        name: tensor.detach().cpu()
        for name, tensor in model.named_parameters()
        if tensor.requires_grad or "adapter" in name.split(".")
    }
    save_file(trained, folder / TRAINED)
