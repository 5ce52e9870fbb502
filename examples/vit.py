"""A vision transformer: the same two lines as for text."""

import torch
from peft import AdaLoraConfig, get_peft_model
from tiny import images, show, vision
from transformers import Trainer, TrainingArguments

from adalora_fast import AdaLoraCallback, fuse

base = vision()  # AutoModelForImageClassification.from_pretrained("...", num_labels=2)
modules = dict(base.vit.named_modules())
linears = [
    name for name, module in modules.items() if "layer" in name and isinstance(module, torch.nn.Linear)
]
model = get_peft_model(
    base,
    AdaLoraConfig(
        target_modules=linears,
        modules_to_save=["classifier"],
        init_r=8,
        target_r=4,
        lora_alpha=16,
        total_step=10_000,
    ),
)
fuse(model, score="gsnr")
trainer = Trainer(
    model,
    TrainingArguments(
        "runs/vit",
        num_train_epochs=3,
        learning_rate=5e-3,
        per_device_train_batch_size=16,
        logging_steps=8,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    ),
    train_dataset=images(),
    callbacks=[AdaLoraCallback()],
)
trainer.train()

ranks = model.base_model.rankallocator.ranks()
show(ranks)
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
assert losses[-1] < losses[0]
assert sum(ranks.values()) == 4 * len(ranks)
