"""One task under three importance scores: where each of them leaves its rank."""

import torch
from peft import AdaLoraConfig, get_peft_model
from tiny import encoder, sentences

from adalora_fast import fuse

rows = sentences()
ids = torch.tensor([row["input_ids"] for row in rows])
labels = torch.tensor([row["labels"] for row in rows])


def train(score: str) -> dict[str, int]:
    """The same start, data and schedule; only the score differs."""
    torch.manual_seed(1)
    config = AdaLoraConfig(
        task_type="SEQ_CLS", target_modules=["query", "key", "value"], init_r=8, target_r=3, lora_alpha=16,
        tinit=10, tfinal=30, deltaT=5, total_step=96,
    )  # fmt: skip
    model = fuse(get_peft_model(encoder(), config), score=score)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    allocator = model.base_model.rankallocator
    allocator.attach(optimizer)
    for step in range(96):
        part = slice(16 * (step % 16), 16 * (step % 16) + 16)
        loss = model(input_ids=ids[part], labels=labels[part]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"{score}: loss {loss.item():.3f}, churn of the last mask {allocator.last_mask_change.churn:.0%}")
    return allocator.ranks()


found = {score: train(score) for score in ("sensitivity", "movement", "fisher")}
for name in found["sensitivity"]:
    print(name, *(f"{score} {ranks[name]}" for score, ranks in found.items()), sep="  ")
assert all(sum(ranks.values()) == 3 * len(ranks) for ranks in found.values())
