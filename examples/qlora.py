"""QLoRA: the base in four bits (NF4 with double quantisation), gradient checkpointing, adaptive ranks."""

import torch
from peft import AdaLoraConfig, get_peft_model, prepare_model_for_kbit_training
from tiny import LLAMA_LINEARS, decoder, show, texts, tokenizer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from adalora_fast import fuse

decoder().save_pretrained("runs/base")  # stands for a model on the hub
base = AutoModelForCausalLM.from_pretrained(
    "runs/base",
    quantization_config=BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,  # torch.bfloat16 on a GPU
    ),
    device_map="cpu",
)
base = prepare_model_for_kbit_training(base, gradient_checkpointing_kwargs={"use_reentrant": False})
config = AdaLoraConfig(
    task_type="CAUSAL_LM", target_modules=LLAMA_LINEARS, init_r=8, target_r=4, lora_alpha=16,
    tinit=5, tfinal=15, deltaT=2, total_step=40,
)  # fmt: skip
model = fuse(get_peft_model(base, config))
model.train()
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
allocator = model.base_model.rankallocator
allocator.attach(optimizer)
batch = tokenizer()(texts(16), return_tensors="pt")["input_ids"]
losses = []
for _ in range(40):
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())

show(allocator.ranks())
kinds = {type(module).__name__ for module in base.modules() if "4bit" in type(module).__name__}
print(f"{kinds} under the adapters; loss {losses[0]:.2f} -> {losses[-1]:.2f}")
assert kinds and losses[-1] < losses[0]
assert sum(allocator.ranks().values()) == 4 * len(allocator.layer_names)
