"""Tiny transformers with random weights, adapted by PEFT's AdaLoRA; no file is read, none downloaded."""

from collections.abc import Callable

import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

VOCABULARY = 61
LABELS = 3
LENGTH = 12
ENCODER_LINEARS = ["query", "key", "value", "dense"]
LLAMA_LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def bert(seed: int = 0, dropout: float = 0.0, width: int = 16, layers: int = 2) -> nn.Module:
    """BERT for classification."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=2 * width,
        max_position_embeddings=32,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        num_labels=LABELS,
        initializer_range=0.2,  # much more than usual, so that every part shows in the output
    )
    return BertForSequenceClassification(config)


def deberta(seed: int = 0, width: int = 16) -> nn.Module:
    """DeBERTa-v2 whose relative positions go through the same query and key layers as the tokens."""
    torch.manual_seed(seed)
    config = DebertaV2Config(
        vocab_size=VOCABULARY,
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=2 * width,
        max_position_embeddings=32,
        relative_attention=True,
        position_buckets=8,
        pos_att_type=["p2c", "c2p"],
        share_att_key=True,
        norm_rel_ebd="layer_norm",
        position_biased_input=False,
        type_vocab_size=0,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pooler_dropout=0.0,
        num_labels=LABELS,
        initializer_range=0.2,  # much more than usual, so that every part shows in the output
    )
    return DebertaV2ForSequenceClassification(config)


def llama(seed: int = 0, width: int = 16) -> nn.Module:
    """A Llama with grouped-query attention, for classification."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=2 * width,
        max_position_embeddings=32,
        pad_token_id=0,
        num_labels=LABELS,
        initializer_range=0.2,  # much more than usual, so that every part shows in the output
    )
    return LlamaForSequenceClassification(config)


def gpt2(seed: int = 0, width: int = 16) -> nn.Module:
    """GPT-2 for classification; its linear layers are Conv1D."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=width,
        n_layer=2,
        n_head=2,
        n_positions=32,
        pad_token_id=0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        num_labels=LABELS,
        initializer_range=0.2,  # much more than usual, so that every part shows in the output
    )
    return GPT2ForSequenceClassification(config)


TARGETS: dict[str, list[str]] = {
    "bert": ENCODER_LINEARS,
    "deberta": ["query_proj", "key_proj", "value_proj", "attention.output.dense", "intermediate.dense"],
    "llama": LLAMA_LINEARS,
    "gpt2": ["c_attn", "c_fc"],
}
BASES: dict[str, Callable[..., nn.Module]] = {"bert": bert, "deberta": deberta, "llama": llama, "gpt2": gpt2}


def adapt(base: nn.Module, targets: list[str] | str, seed: int = 1, **overrides) -> PeftModel:
    """``base`` with PEFT's AdaLoRA: rank 4 to mean 2 over 60 steps unless ``overrides`` says otherwise."""
    settings = {
        "task_type": "SEQ_CLS",
        "init_r": 4,
        "target_r": 2,
        "tinit": 10,
        "tfinal": 15,
        "deltaT": 1,
        "total_step": 60,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "orth_reg_weight": 0.5,
        "target_modules": targets,
    }
    torch.manual_seed(seed)
    return get_peft_model(base, AdaLoraConfig(**{**settings, **overrides}))


def adapted(family: str = "bert", **overrides) -> PeftModel:
    """A new tiny model of ``family``, adapted; the same arguments give the same weights."""
    return adapt(BASES[family](), TARGETS[family], **overrides)


def batch(seed: int, size: int = 4, length: int = LENGTH) -> dict[str, Tensor]:
    """Random tokens (none of them padding) and labels."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "input_ids": torch.randint(1, VOCABULARY, (size, length), generator=generator),
        "attention_mask": torch.ones(size, length, dtype=torch.int64),
        "labels": torch.randint(0, LABELS, (size,), generator=generator),
    }


def examples(count: int = 32, length: int = LENGTH, seed: int = 5) -> list[dict[str, Tensor]]:
    """A data set for the Trainer."""
    whole = batch(seed, count, length)
    return [{name: column[i] for name, column in whole.items()} for i in range(count)]


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """What an optimizer should get."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of everything that is trained, by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def awake(model: PeftModel, adapter: str = "default", seed: int = 3) -> PeftModel:
    """Give λ (zero in a new adapter) and the other factors large random values, so that the adapter shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f"lora_E.{adapter}" in name or f"lora_A.{adapter}" in name or f"lora_B.{adapter}" in name:
                parameter.copy_(
                    torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.4
                )
    return model
