"""Supervised fine-tuning of a decoder with TRL."""

from datasets import Dataset
from peft import AdaLoraConfig, get_peft_model
from tiny import LLAMA_LINEARS, decoder, show, texts, tokenizer
from trl import SFTConfig, SFTTrainer

from adalora_fast import AdaLoraCallback, fuse

config = AdaLoraConfig(
    task_type="CAUSAL_LM", target_modules=LLAMA_LINEARS, init_r=8, target_r=4, lora_alpha=16,
    total_step=10_000,
)  # fmt: skip
model = fuse(get_peft_model(decoder(), config), score="fisher")  # decoder(): from_pretrained("...")
trainer = SFTTrainer(
    model,
    SFTConfig(
        "runs/sft",
        max_steps=60,
        learning_rate=5e-3,
        per_device_train_batch_size=8,
        logging_steps=10,
        max_length=16,
        use_cpu=True,
        bf16=False,
        report_to=[],
        disable_tqdm=True,
    ),
    train_dataset=Dataset.from_dict({"text": texts()}),
    processing_class=tokenizer(),
    callbacks=[AdaLoraCallback()],
)
trainer.train()

ranks = model.base_model.rankallocator.ranks()
show(ranks)
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")
assert losses[-1] < losses[0]
assert sum(ranks.values()) == 4 * len(ranks)
