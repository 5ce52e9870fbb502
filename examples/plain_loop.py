"""Without PEFT and Trainer: AdaLoraLinear layers, a RankAllocator, and a training loop of one's own."""

import torch
from tiny import show
from torch import nn

from adalora_fast import AdaLoraLinear, RankAllocator, orthogonality_loss

torch.manual_seed(0)
STEPS = 200
model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 4))
for place in (0, 2, 4):  # the base is frozen, the adapter is trained
    model[place] = AdaLoraLinear.from_linear(model[place], 8, alpha=16)
trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=5e-3)
allocator = RankAllocator(model, target_r=3, tinit=20, tfinal=60, deltaT=5, total_step=STEPS, score="fisher")
allocator.attach(optimizer)  # from here on it follows every optimizer.step()

x, teacher = torch.randn(512, 16), torch.randn(16, 4)
y = x @ teacher
losses = []
for _ in range(STEPS):
    rows = torch.randint(0, len(x), (64,))
    loss = nn.functional.mse_loss(model(x[rows]), y[rows])
    (loss + 0.1 * orthogonality_loss(model)).backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
allocator.finalize()

show(allocator.ranks())
print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")
assert losses[-1] < losses[0] / 2
assert sum(allocator.ranks().values()) == 3 * 3
