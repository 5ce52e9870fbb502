"""TRL's SFTTrainer makes the PEFT model itself, from ``peft_config``; AdaLoraCallback finds and fuses it."""

import pytest
import torch
from peft import AdaLoraConfig
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from adalora_fast import AdaLoraCallback
from adalora_fast.integrations.peft import is_fused
from tests.models import LLAMA_LINEARS, VOCABULARY

trl = pytest.importorskip("trl", reason="trl is not installed")

STEPS, LAYERS = 12, 14


def tokenizer() -> PreTrainedTokenizerFast:
    """Words w0, w1, ...; made here, so that nothing is downloaded."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1", unk_token="w0")


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=2, pad_token_id=0, **sizes)
    return LlamaForCausalLM(config)


def test_the_callback_fuses_the_model_that_trl_makes(tmp_path):
    from datasets import Dataset

    texts = [" ".join(f"w{2 + (7 * i + j) % 50}" for j in range(10)) for i in range(32)]
    settings = {"total_step": 10_000, "init_r": 4, "target_r": 2, "target_modules": LLAMA_LINEARS}
    run = trl.SFTTrainer(
        model=llama(),
        args=trl.SFTConfig(
            output_dir=str(tmp_path),
            max_steps=STEPS,
            per_device_train_batch_size=4,
            learning_rate=2e-2,
            max_length=16,
            save_steps=6,
            use_cpu=True,
            bf16=False,
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"text": texts}),
        processing_class=tokenizer(),
        peft_config=AdaLoraConfig(task_type="CAUSAL_LM", **settings),
        callbacks=[AdaLoraCallback(score="fisher")],
    )
    assert is_fused(run.model)
    run.train()
    allocator = run.model.base_model.rankallocator
    assert allocator.score.name == "fisher" and allocator.t == STEPS and allocator.is_over
    assert sum(allocator.ranks().values()) == 2 * LAYERS
    assert (tmp_path / "checkpoint-6" / "adalora_allocator.safetensors").is_file()
