"""From settings to the model that is trained: the encoder with a new head, and what of it may change."""

from pathlib import Path
from typing import Any

from torch import nn

from .models import family_of, resolve_model, target_modules
from .runs import RunSettings
from .tasks import Task

PLACEHOLDER_STEPS = (
    1_000_000  # PEFT's config insists on a number; the callback knows the real one when training starts
)


def load_encoder(settings: RunSettings, task: Task) -> tuple[nn.Module, Any]:
    """The pretrained encoder with a fresh head for `task`, and its tokenizer. A local model is read
    without a network.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    name = resolve_model(settings.model)
    local = {"local_files_only": Path(name).is_dir()}
    head: dict[str, Any] = {"num_labels": task.num_labels}
    if task.is_regression:
        head["problem_type"] = "regression"
    else:
        head["problem_type"] = "single_label_classification"
        head["id2label"] = dict(enumerate(task.labels))
        head["label2id"] = {label: code for code, label in enumerate(task.labels)}
    try:
        config = AutoConfig.from_pretrained(name, **local, **head)
    except OSError as error:
        raise FileNotFoundError(
            f"the model {settings.model!r} is not reachable; give --model minilm or the path of a "
            "local folder"
        ) from error
    family_of(config.model_type)
    if settings.recipe.classifier_dropout is not None:
        dropout = {"deberta-v2": "cls_dropout", "distilbert": "seq_classif_dropout"}
        setattr(
            config, dropout.get(config.model_type, "classifier_dropout"), settings.recipe.classifier_dropout
        )
    tokenizer = AutoTokenizer.from_pretrained(name, **local)
    return AutoModelForSequenceClassification.from_pretrained(name, config=config, **local), tokenizer


def adapt(model: nn.Module, settings: RunSettings) -> nn.Module:
    """Freeze what `settings.method` freezes and add its adapters; pooler and classifier are always
    trained fully.
    """
    model_type = model.config.model_type
    head = list(family_of(model_type).head)
    if settings.method == "full":
        return model
    if settings.method == "head":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(bool(set(head).intersection(name.split("."))))
        return model

    from peft import AdaLoraConfig, LoraConfig, TaskType, get_peft_model

    recipe = settings.recipe
    common: dict[str, Any] = {
        "task_type": TaskType.SEQ_CLS,
        "target_modules": target_modules(model_type),
        "modules_to_save": head,
    }
    if settings.method == "lora":
        return get_peft_model(
            model, LoraConfig(r=recipe.target_r, lora_alpha=recipe.scale * recipe.target_r, **common)
        )

    from adalora_fast import fuse

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
    options = {"score": settings.score, "score_gradient": settings.score_gradient}
    if settings.smoothing is not None:
        options["smoothing"] = settings.smoothing
    fuse(adapted, **options)
    return adapted


def ranks_of(model: nn.Module, settings: RunSettings) -> dict[str, int]:
    """Rank of every adapted matrix by its module name; empty where nothing is adapted."""
    if settings.method == "adalora":
        return {name: int(rank) for name, rank in model.base_model.rankallocator.ranks().items()}
    if settings.method == "lora":
        modules = model.base_model.model.named_modules()
        return {name: layer.r["default"] for name, layer in modules if hasattr(layer, "lora_A")}
    return {}


def check_budget(ranks: dict[str, int], settings: RunSettings) -> int:
    """The total rank; RuntimeError where it is not exactly target_r per adapted matrix."""
    total, budget = sum(ranks.values()), settings.recipe.target_r * len(ranks)
    if total != budget:
        raise RuntimeError(
            f"{settings.label}: the total rank is {total}, the budget is {budget}; the allocation is wrong"
        )
    return total


def save_adapter(model: nn.Module, settings: RunSettings, folder: Path) -> None:
    """`save_pretrained` of an adapter or a full model; only the trained tensors of a head."""
    if settings.method != "head":
        model.save_pretrained(folder)
        return
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    trained = {
        name: tensor.detach().cpu() for name, tensor in model.named_parameters() if tensor.requires_grad
    }
    save_file(trained, folder / "head.safetensors")
