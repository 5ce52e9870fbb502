"""AdaLoRA under transformers' Trainer: fuse the model, give the Trainer the callback."""

from peft import AdaLoraConfig, get_peft_model
from tiny import encoder, sentences, show
from transformers import Trainer, TrainingArguments

from adalora_fast import AdaLoraCallback, fuse

model = get_peft_model(
    encoder(),  # AutoModelForSequenceClassification.from_pretrained("...", num_labels=2)
    AdaLoraConfig(
        task_type="SEQ_CLS",
        target_modules=["query", "key", "value", "dense"],
        init_r=8,
        target_r=4,
        lora_alpha=16,
        total_step=10_000,  # the callback puts the real number of steps here
    ),
)
fuse(model, score="sensitivity")

trainer = Trainer(
    model,
    TrainingArguments(
        "runs/trainer",
        num_train_epochs=6,
        learning_rate=5e-3,
        per_device_train_batch_size=16,
        logging_steps=16,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    ),
    train_dataset=sentences(),
    callbacks=[AdaLoraCallback()],  # steps the allocator, saves and resumes it, makes sure of the budget
)
trainer.train()
trainer.save_model("runs/trainer/adapter")

allocator = model.base_model.rankallocator
show(allocator.ranks())
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
assert losses[-1] < losses[0]
assert sum(allocator.ranks().values()) == 4 * len(allocator.layer_names)
