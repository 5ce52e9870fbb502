"""Virtual tokens and scales for a frozen encoder, through PEFT.

n  virtual tokens      E  width of the embeddings      D  width of the encoder      L  its layers

prompt    n vectors [n, E] before the embeddings of the text (Lester et al. 2021, section 2), which start as
          those of n tokens drawn from the vocabulary
p_tuning  the same, but computed by a network from n trained vectors (Liu et al. 2021, section 3; an
          LSTM and two layers there, three linear layers with ReLU between them in PEFT)
prefix    n keys and values [n, 2 L D] before those of the text in every layer (Li and Liang 2021, section
          4.2), trained themselves, without a network before them, from N(0, 1)
ia3       softmax(q (l_k ⊙ k)ᵀ / √d) (l_v ⊙ v) and W_2 (l_ff ⊙ f(W_1 x)) in every layer, with vectors l_k and
          l_v [D] and l_ff [inner width] that start at 1 (Liu et al. 2022, section 3.3)
"""

import inspect
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from adalora_fast.experiments.data.tasks import Task
from adalora_fast.experiments.models.families import FAMILIES, adapted_modules, position_limit
from adalora_fast.experiments.models.loading import task_type
from adalora_fast.experiments.settings.recipes import Recipe
from adalora_fast.experiments.settings.settings import RunSettings
from adalora_fast.integrations.files import file_within, read_tensors

from .fusion import TRAINED


def add_prompt(model: nn.Module, settings: RunSettings, task: Task, head: list[str]) -> nn.Module:
    """PEFT's prompt tuning, prefix tuning, P-tuning or (IA)³ on `model`, with its head trained fully.

    A classification head reads the first position, which is a virtual token under prompt and p_tuning. Under
    question answering it is given the text alone, so that starts and ends count from its first token.

    Raises:
        ValueError: this kind of encoder cannot be given what the method adds, or has too few positions.
    """
    from peft import get_peft_model

    recipe, method = settings.recipe, settings.method
    if task.kind == "translation":
        raise ValueError(
            f"the method {method} is for encoders, not for {model.config.model_type} models that translate; "
            "use lora or adalora"
        )
    if method == "ia3":
        config = _scales_config(model, task, head)
    else:
        _check_length(model, recipe, method)
        config = _prompt_config(model, method, recipe.virtual_tokens, task, head)
    adapted = get_peft_model(model, config)
    if method in ("prompt", "p_tuning") and task.kind == "question_answering":
        encoder = getattr(model, model.base_model_prefix)
        encoder.register_forward_hook(partial(_text_alone, recipe.virtual_tokens))
    if method == "p_tuning" or recipe.train_biases:
        adapted.__class__ = _with_the_rest(type(adapted))
    return adapted


def _prompt_config(model: nn.Module, method: str, virtual_tokens: int, task: Task, head: list[str]) -> Any:
    from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig

    encoder, config = getattr(model, model.base_model_prefix), model.config
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"the method {method} is not known to work with a {config.model_type} encoder; use lora or "
            "adalora"
        )
    if method == "prefix" and "past_key_values" not in inspect.signature(encoder.forward).parameters:
        raise ValueError(
            f"a {config.model_type} encoder takes no keys and values from outside, which the method prefix "
            "gives; use prompt or p_tuning"
        )
    common = {
        "task_type": task_type(task),
        "modules_to_save": list(head),  # PEFT adds to it
        "num_virtual_tokens": virtual_tokens,
        "num_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
    }
    if method == "prefix":
        return PrefixTuningConfig(token_dim=config.hidden_size, **common)
    width = encoder.get_input_embeddings().embedding_dim  # ELECTRA's is not that of its layers
    if method == "p_tuning":
        return PromptEncoderConfig(token_dim=width, encoder_hidden_size=width, **common)
    return PromptTuningConfig(token_dim=width, prompt_tuning_init="SAMPLE_VOCAB", **common)


def _scales_config(model: nn.Module, task: Task, head: list[str]) -> Any:
    from peft import IA3Config

    try:
        scaled = adapted_modules(model, ("key", "value", "output"))
    except ValueError as error:
        raise ValueError(
            "the method ia3 scales keys, values and inner activations, and which matrices of a "
            f"{model.config.model_type} encoder give those alone is not known; use lora or bitfit"
        ) from error
    return IA3Config(
        task_type=task_type(task),
        modules_to_save=list(head),
        target_modules=scaled,
        feedforward_modules=adapted_modules(model, ("output",)),  # scaled before the matrix
    )


def _check_length(model: nn.Module, recipe: Recipe, method: str) -> None:
    limit = position_limit(model)
    if limit is not None and recipe.max_length + recipe.virtual_tokens > limit:
        raise ValueError(
            f"{method}: max_length {recipe.max_length} and {recipe.virtual_tokens} virtual tokens are more "
            f"than the {limit} positions of this {model.config.model_type} encoder; lower either with --set"
        )


def _text_alone(virtual_tokens: int, encoder: nn.Module, inputs: tuple, output: Any) -> Any:
    """The encoder's output without the positions of the virtual tokens."""
    output.last_hidden_state = output.last_hidden_state[:, virtual_tokens:]
    return output


class WithTheRest:
    """What `PeftModel` of a prompt or of (IA)³ does not save though it was trained: the network of p_tuning,
    of which PEFT keeps the prompts it computes, and biases of the base. Both are in trained.safetensors, and
    `load_adapter` takes them from there, so that a run can go on from its checkpoint.
    """

    def _rest(self) -> dict[str, nn.Parameter]:
        saved = ("modules_to_save", "ia3_l")
        return {
            name: parameter
            for name, parameter in self.named_parameters()
            if parameter.requires_grad and saved[0] not in name.split(".") and saved[1] not in name.split(".")
        }

    def save_pretrained(
        self, save_directory: Any, *arguments: Any, is_main_process: bool = True, **options: Any
    ) -> None:
        """PEFT's, after trained.safetensors."""
        if is_main_process:
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            rest = {name: tensor.detach().cpu().contiguous() for name, tensor in self._rest().items()}
            save_file(rest, Path(save_directory) / TRAINED)
        super().save_pretrained(save_directory, *arguments, is_main_process=is_main_process, **options)

    def load_adapter(self, model_id: Any, adapter_name: str, *arguments: Any, **options: Any) -> Any:
        """PEFT's, and trained.safetensors.

        Raises:
            ValueError: that file is missing, damaged, or of another model.
        """
        file = file_within(Path(model_id), TRAINED)
        tensors, rest = read_tensors(file), self._rest()
        shapes = ({name: tuple(each.shape) for name, each in group.items()} for group in (tensors, rest))
        if len(differences := set.symmetric_difference(*(set(group.items()) for group in shapes))):
            name = min(differences)[0]
            raise ValueError(f"{file} and this model differ in {name}; load it into the model of its run")
        result = super().load_adapter(model_id, adapter_name, *arguments, **options)
        with torch.no_grad():
            for name, parameter in rest.items():
                parameter.copy_(_as(tensors[name], parameter))
        return result


def _as(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor.to(like.device, like.dtype)


@cache
def _with_the_rest(cls: type) -> type:
    return type(f"Whole{cls.__name__}", (WithTheRest, cls), {"__module__": __name__})
