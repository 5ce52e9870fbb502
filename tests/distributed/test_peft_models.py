"""Fused PEFT models under DistributedDataParallel and fully_shard, with the callback's own steps."""

import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from adalora_fast import AdaLoraCallback, fuse
from adalora_fast.allocator.state import FILE_NAME
from tests.distributed.runs import agree
from tests.helpers.models import adapted, batch, trainable

STEPS = 16
CONFIG = {"total_step": STEPS, "tinit": 2, "tfinal": 4, "deltaT": 2}


def share(t: int) -> dict:
    """This process's half of the batch of step t, or all of it."""
    size, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    part = 4 // size
    return {name: column[rank * part : (rank + 1) * part] for name, column in batch(t % 8).items()}


def wrapped(kind: str, model):
    """``model`` as it is trained: alone, replicated or sharded, by encoder layers and with the rest."""
    if kind == "alone":
        return model
    if kind == "replicated":
        return DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (2,))
    if kind == "sharded by layer":
        for layer in model.base_model.model.bert.encoder.layer:
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def full(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def run(kind: str, foreach: bool | None = None, start: int = 0, stop: int = STEPS, folder=None):
    """PEFT's own loop; no warning is due."""
    inner = fuse(adapted("bert", **CONFIG).double())
    model = wrapped(kind, inner)
    optimizer = torch.optim.AdamW(trainable(inner), lr=2e-2, foreach=foreach)
    tuner, masks = inner.base_model, []
    model.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
        for t in range(start, stop):
            model(**share(t)).loss.backward()
            optimizer.step()
            tuner.update_and_allocate(t)
            optimizer.zero_grad()
            masks.append(tuner.rankallocator._mask.tolist())
    if folder is not None:
        save(inner, folder)
    return {"masks": masks, "weights": [full(parameter) for parameter in trainable(inner)]}


def same(found: dict, expected: dict) -> None:
    assert found["masks"] == expected["masks"]
    for ours, theirs in zip(found["weights"], expected["weights"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.fixture(scope="module")
def alone():
    return run("alone")


@pytest.mark.parametrize("foreach", [False, True], ids=["one by one", "foreach"])
@pytest.mark.parametrize("kind", ["replicated", "sharded", "sharded by layer"])
def test_equals_one_process(pair, alone, kind, foreach):
    assert 0 < sum(alone["masks"][-1]) < len(alone["masks"][-1])
    results = pair.run(run, kind, foreach)
    agree(results)
    same(results[0], alone)


def plain_run(kind: str):
    """PEFT's own loop on PEFT's own model; the masks, or why there are none."""
    inner = adapted("bert", **CONFIG).double()
    model = wrapped(kind, inner)
    optimizer = torch.optim.AdamW(trainable(inner), lr=2e-2)
    try:
        for t in range(STEPS):
            model(**share(t)).loss.backward()
            optimizer.step()
            inner.base_model.update_and_allocate(t)
            optimizer.zero_grad()
    except Exception as error:
        return type(error).__name__
    return inner.peft_config["default"].rank_pattern


def test_11_sharded_parameters(pair, alone):
    """PEFT's AdaLoRA fails under ``fully_shard`` (its regulariser or its allocator mixes shards and whole
    tensors); a fused model prunes the same triplets as in one process.
    """
    reasons = pair.run(plain_run, "sharded")
    assert all(isinstance(reason, str) for reason in reasons), reasons
    found = pair.run(run, "sharded")
    agree(found)
    same(found[0], alone)


def step_in_wrong_order():
    inner = fuse(adapted("bert", **CONFIG))
    model = wrapped("replicated", inner)
    model(**share(0)).loss.backward()
    inner.base_model.update_and_allocate(0)
    with pytest.warns(UserWarning, match=r"before optimizer.step\(\)"):
        inner.base_model.update_and_allocate(1)


def test_a_wrong_order_is_still_noticed(pair):
    pair.run(step_in_wrong_order)


# -- the callback ------------------------------------------------------------------------------


def save(model, folder) -> None:
    """The weights in whole, written by the first process, as the Trainer does it."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=options)
    if dist.get_rank() == 0:
        model.save_pretrained(folder, state_dict=weights)


def with_callback(folder, smoothing: bool, start: int = 0, stop: int = STEPS):
    """What the Trainer calls, in its order, around a sharded model; ``smoothing`` hides the model's loss."""
    callback = AdaLoraCallback(tinit=2, tfinal=4, deltaT=2)
    args = SimpleNamespace(output_dir=str(folder), deepspeed_plugin=None)
    state = SimpleNamespace(global_step=start, max_steps=STEPS, log_history=[])
    inner = fuse(adapted("bert", **CONFIG).double())
    callback.on_init_end(args, state, None, model=inner)
    model = wrapped("sharded by layer" if dist.is_initialized() else "alone", inner)
    optimizer = torch.optim.AdamW(trainable(inner), lr=2e-2)
    callback.on_train_begin(args, state, None, model=model, optimizer=optimizer)
    model.train()
    for t in range(start, stop):
        inputs = share(t)
        labels = inputs.pop("labels") if smoothing else None
        output = model(**inputs)
        loss = torch.nn.functional.cross_entropy(output.logits, labels) if smoothing else output.loss
        loss.backward()
        callback.on_pre_optimizer_step(args, state, None, model=model)
        optimizer.step()
        callback.on_optimizer_step(args, state, None, model=model)
        optimizer.zero_grad()
        state.global_step = t + 1
        callback.on_log(args, state, None, model=model, logs={})
        if state.global_step == 8 and dist.is_initialized():
            save(inner, folder / "checkpoint-8")
            callback.on_save(args, state, None, model=model)
    mask = inner.base_model.rankallocator._mask.tolist()
    if stop == STEPS:
        callback.on_train_end(args, state, None, model=model)
    return {"masks": [mask], "weights": [full(parameter) for parameter in trainable(inner)]}


@pytest.mark.parametrize("smoothing", [False, True], ids=["own loss", "label smoothing"])
def test_the_callback_around_a_sharded_model(pair, smoothing, tmp_path):
    results = pair.run(with_callback, tmp_path, smoothing)
    agree(results)
    same(results[0], with_callback(tmp_path / "alone", smoothing))
    assert {"adapter_model.safetensors", FILE_NAME} <= {p.name for p in (tmp_path / "checkpoint-8").iterdir()}


def state_of_a_resumed_run(folder):
    """At its beginning, the state that the first process wrote; by then the model is sharded."""
    callback = AdaLoraCallback(tinit=2, tfinal=4, deltaT=2)
    args = SimpleNamespace(output_dir=str(folder), deepspeed_plugin=None)
    state = SimpleNamespace(global_step=8, max_steps=STEPS, log_history=[])
    inner = fuse(adapted("bert", **CONFIG).double())
    model = wrapped("sharded by layer", inner)
    optimizer = torch.optim.AdamW(trainable(inner), lr=2e-2)
    callback.on_train_begin(args, state, None, model=model, optimizer=optimizer)
    return inner.base_model.rankallocator.state_dict()


def test_the_callback_resumes_the_state_of_a_sharded_model(pair, tmp_path):
    pair.run(with_callback, tmp_path, False, 0, 8)
    first, second = pair.run(state_of_a_resumed_run, tmp_path)
    reloaded = fuse(adapted("bert", **CONFIG).double())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it was saved before the final mask
        reloaded.load_adapter(str(tmp_path / "checkpoint-8"), "default", is_trainable=True)
    expected = reloaded.base_model.rankallocator.state_dict()
    assert expected["config"]["t"] == first["config"]["t"] == 8
    for name, tensor in expected["tensors"].items():
        assert torch.equal(first["tensors"][name], tensor), name
        assert torch.equal(second["tensors"][name], tensor), name


# -- what is refused ---------------------------------------------------------------------------


def fused_too_late():
    model = adapted("bert", **CONFIG)
    fully_shard(model.base_model.model.bert, mesh=init_device_mesh("cpu", (2,)))
    with pytest.raises(ValueError, match=r"sharded; call fuse before fully_shard"):
        fuse(model)


def test_fuse_comes_before_fully_shard(pair):
    pair.run(fused_too_late)


def test_zero_3_is_refused():
    model = adapted("bert", **CONFIG)
    for number, parameter in enumerate(model.parameters()):
        parameter.ds_id = number  # what deepspeed.zero.Init leaves on every parameter
        parameter.data = torch.empty(0)
    with pytest.raises(ValueError, match=r"DeepSpeed ZeRO-3 .* use DistributedDataParallel or fully_shard"):
        fuse(model)


def test_deepspeed_is_refused_by_the_callback():
    model = fuse(adapted("bert", **CONFIG))
    args = SimpleNamespace(output_dir="", deepspeed_plugin=object())
    state = SimpleNamespace(global_step=0, max_steps=STEPS)
    with pytest.raises(ValueError, match=r"ZeRO-1, ZeRO-2.*ZeRO-3.* use DistributedDataParallel or FSDP2"):
        AdaLoraCallback().on_train_begin(args, state, None, model=model)


def test_flattened_parameters_are_refused():
    model = fuse(adapted("bert", **CONFIG))
    layer = model.base_model.model.bert.encoder.layer[0].attention.self.query
    for factor in (layer.lora_A, layer.lora_E, layer.lora_B):
        factor["default"].data = factor["default"].data.flatten()  # as FSDP1 with use_orig_params does
    for parameter in trainable(model):
        parameter.grad = torch.zeros_like(parameter)
    with pytest.raises(ValueError, match=r"FSDP1.* use fully_shard"):
        model.base_model.rankallocator.step()
