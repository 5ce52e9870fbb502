"""Models after ``add_adapter`` under DistributedDataParallel and fully_shard, with callback and files."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from adalora_fast import AdaLoraCallback, fuse
from adalora_fast.allocator.state import FILE_NAME
from tests.distributed.runs import agree
from tests.distributed.test_peft_models import full, same, save, share
from tests.helpers.injecting import added
from tests.helpers.models import trainable

STEPS = 16


def wrapped(kind: str, model):
    if kind == "replicated":
        return DistributedDataParallel(model)
    return fully_shard(model, mesh=init_device_mesh("cpu", (2,))) if kind == "sharded" else model


def run(kind: str, folder):
    """What the Trainer calls, in its order."""
    callback = AdaLoraCallback(tinit=2, tfinal=4, deltaT=2)
    args = SimpleNamespace(output_dir=str(folder), deepspeed_plugin=None, report_to=[])
    args.should_save = not dist.is_initialized() or dist.get_rank() == 0
    state = SimpleNamespace(global_step=0, max_steps=STEPS, log_history=[])
    inner = fuse(added(total_step=STEPS).double())
    callback.on_init_end(args, state, None, model=inner)
    model = wrapped(kind, inner)
    optimizer = torch.optim.AdamW(trainable(inner), lr=2e-2)
    callback.on_train_begin(args, state, None, model=model, optimizer=optimizer)
    model.train()
    masks = []
    for t in range(STEPS):
        model(**share(t)).loss.backward()
        callback.on_pre_optimizer_step(args, state, None, model=model)
        optimizer.step()
        callback.on_optimizer_step(args, state, None, model=model)
        optimizer.zero_grad()
        state.global_step = t + 1
        masks.append(inner.rankallocator._mask.tolist())
        if state.global_step == 8 and dist.is_initialized():
            save(inner, folder / "checkpoint-8")
            callback.on_save(args, state, None, model=model)
    callback.on_train_end(args, state, None, model=model)
    return {"masks": masks, "weights": [full(parameter) for parameter in trainable(inner)]}


@pytest.mark.parametrize("kind", ["replicated", "sharded"])
def test_equals_one_process(pair, kind, tmp_path):
    alone = run("alone", tmp_path / "alone")
    assert 0 < sum(alone["masks"][-1]) < len(alone["masks"][-1])
    results = pair.run(run, kind, tmp_path)
    agree(results)
    same(results[0], alone)
    found = {path.name for path in (tmp_path / "checkpoint-8").iterdir()}
    assert {"adapter_model.safetensors", FILE_NAME} <= found
    assert ("model.safetensors" in found) == (kind == "replicated")
