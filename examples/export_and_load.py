"""After the training: an exact plain LoRA adapter, which any reader of PEFT's files can load."""

import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from tiny import decoder, texts, tokenizer

from adalora_fast import fuse, to_lora

config = AdaLoraConfig(
    task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], init_r=6, target_r=3, lora_alpha=12,
    tinit=5, tfinal=10, deltaT=2, total_step=30,
)  # fmt: skip
model = fuse(get_peft_model(decoder(), config))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
model.base_model.rankallocator.attach(optimizer)
batch = tokenizer()(texts(32), return_tensors="pt")["input_ids"]
for _ in range(30):
    model(input_ids=batch, labels=batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()

lora = to_lora(model)
lora.save_pretrained("runs/lora")
print(lora.peft_config["default"].rank_pattern)

loaded = PeftModel.from_pretrained(decoder(), "runs/lora").eval()  # nothing of this package is needed here
with torch.no_grad():
    ours, plain = model.eval()(input_ids=batch).logits, loaded(input_ids=batch).logits
    base = decoder()(input_ids=batch).logits
print(f"largest difference {(ours - plain).abs().max():.1e}")
print(f"the adapter changes {(ours - base).abs().max():.2f}")
assert torch.allclose(ours, plain, atol=1e-5)
assert not torch.allclose(ours, base, atol=1e-2)
