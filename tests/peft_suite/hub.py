"""Tiny random models under the names that PEFT's tests ask the model hub for, in the layout of its cache."""

from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel

REVISION = "0" * 40
VOCABULARY = 1200
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
ENCODER = {**SIZES, "intermediate_size": 37, "max_position_embeddings": 512}
DECODER = {**ENCODER, "num_key_value_heads": 2, "pad_token_id": 0}
GPT = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 512,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
OPT = {  # deep and random enough that every adapter changes the text it generates
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "ffn_dim": 37,
    "word_embed_proj_dim": 16,
    "max_position_embeddings": 512,
    "init_std": 0.05,
}
T5 = {"vocab_size": VOCABULARY, "d_model": 32, "d_ff": 37, "d_kv": 8, "num_layers": 2, "num_heads": 4}
BART = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "max_position_embeddings": 512,
    **{
        f"{side}_{key}": value
        for side in ("encoder", "decoder")
        for key, value in {"layers": 2, "ffn_dim": 37, "attention_heads": 4}.items()
    },
}
GEMMA = {**DECODER, "head_dim": 8}


def _maker(architecture: str, sizes: dict) -> Callable[[], PreTrainedModel]:
    def make() -> PreTrainedModel:
        torch.manual_seed(0)
        cls = getattr(transformers, architecture)
        return cls(cls.config_class(**sizes)).eval()

    return make


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    name: _maker(architecture, sizes)
    for name, architecture, sizes in (
        ("peft-internal-testing/tiny-random-OPTForCausalLM", "OPTForCausalLM", OPT),
        ("peft-internal-testing/tiny-random-GPT2LMHeadModel", "GPT2LMHeadModel", GPT),
        ("hf-internal-testing/tiny-random-gpt2", "GPT2LMHeadModel", GPT),
        ("peft-internal-testing/tiny-random-GPTJForCausalLM", "GPTJForCausalLM", {**GPT, "rotary_dim": 4}),
        ("trl-internal-testing/tiny-random-LlamaForCausalLM", "LlamaForCausalLM", DECODER),
        ("hf-internal-testing/tiny-random-MistralForCausalLM", "MistralForCausalLM", DECODER),
        ("peft-internal-testing/tiny-dummy-qwen2", "Qwen2ForCausalLM", DECODER),
        ("hf-internal-testing/tiny-random-Gemma3ForCausalLM", "Gemma3ForCausalLM", GEMMA),
        (
            "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated",
            "T5ForConditionalGeneration",
            {**T5, "decoder_start_token_id": 0},
        ),
        (
            "peft-internal-testing/tiny-random-BartForConditionalGeneration",
            "BartForConditionalGeneration",
            BART,
        ),
        ("peft-internal-testing/tiny-random-BertModel", "BertModel", ENCODER),
        ("peft-internal-testing/tiny-random-RobertaModel", "RobertaModel", ENCODER),
        ("peft-internal-testing/tiny-random-DebertaModel", "DebertaModel", ENCODER),
        ("peft-internal-testing/tiny-random-DebertaV2Model", "DebertaV2Model", ENCODER),
        (
            "peft-internal-testing/tiny-random-BertForSequenceClassification",
            "BertForSequenceClassification",
            ENCODER,
        ),
        (
            "peft-internal-testing/tiny-random-RobertaForSequenceClassification",
            "RobertaForSequenceClassification",
            ENCODER,
        ),
        (
            "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2",
            "LlamaForSequenceClassification",
            DECODER,
        ),
    )
}


def make_cache(cache: Path) -> None:
    """Write every model that is not there yet below ``cache``, where an offline hub client looks for it."""
    transformers.utils.logging.disable_progress_bar()
    for name, make in MODELS.items():
        folder = cache / f"models--{name.replace('/', '--')}"
        if (folder / "refs" / "main").is_file():
            continue
        make().save_pretrained(folder / "snapshots" / REVISION)
        (folder / "refs").mkdir(parents=True, exist_ok=True)
        (folder / "refs" / "main").write_text(REVISION)  # last: it says that the model is complete
