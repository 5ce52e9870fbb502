"""What becomes of every setting of an ``AdaLoraConfig`` in a plain LoRA adapter: a table of all of them."""

from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from typing import Any

from peft import AdaLoraConfig

# LoRA has the same setting with the same meaning.
CARRIED = (
    "task_type",
    "base_model_name_or_path",
    "revision",
    "auto_mapping",
    "inference_mode",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "layer_replication",
    "modules_to_save",
    "ensure_weight_tying",
    "trainable_token_indices",
    "bias",
    "fan_in_fan_out",
    "lora_dropout",
)
# It is in the exported factors, ranks and alpha.
FOLDED = (
    "peft_type",
    "init_r",
    "target_r",
    "lora_alpha",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
)
# It acts only before or during the training of an AdaLoRA adapter, or on no layer of AdaLoRA's.
OVER = (
    "peft_version",
    "r",
    "tinit",
    "tfinal",
    "deltaT",
    "total_step",
    "beta1",
    "beta2",
    "orth_reg_weight",
    "init_lora_weights",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "megatron_core",
    "qalora_group_size",
    "runtime_config",
)
# AdaLoRA's layers ignore it and LoRA's do not: what the user meant by it cannot be known.
REFUSED = (
    "use_dora",
    "lora_bias",
    "loftq_config",
    "target_parameters",
    "megatron_config",
    "velora_config",
    "alora_invocation_tokens",
    "use_qalora",
    "monteclora_config",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
)


def carried(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a plain LoRA adapter takes over.

    Args:
        settings: of an AdaLoRA adapter, by name.

    Raises:
        ValueError: a setting of :data:`REFUSED`, or one that this table does not know, is set.
    """
    for name in REFUSED:
        if settings.get(name):
            raise ValueError(
                f"{name} is {settings[name]!r}, which AdaLoRA's layers ignore and LoRA's would not; set it "
                "to None in the adapter's config, then export"
            )
    for name in unknown(settings):
        if settings[name] and settings[name] != _default(name):
            raise ValueError(
                f"{name} is {settings[name]!r}, a setting that this version of adalora_fast cannot export; "
                "set it to its default in the adapter's config, or use a newer version"
            )
    return {name: settings[name] for name in CARRIED if settings.get(name) is not None}


def unknown(settings: Iterable[str]) -> list[str]:
    """The fields of PEFT's AdaLoRA configuration among these names that the table leaves out."""
    known = {*CARRIED, *FOLDED, *OVER, *REFUSED}
    names = [field.name for field in fields(AdaLoraConfig)]
    return [name for name in names if name in settings and name not in known]


def _default(name: str) -> Any:
    field = next(field for field in fields(AdaLoraConfig) if field.name == name)
    return field.default_factory() if field.default_factory is not MISSING else field.default
