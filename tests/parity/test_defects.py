"""Known defects of PEFT's AdaLoRA (0.21.2), one test each: what plain PEFT does, and what a fused model does.

Where PEFT mends one, its half of the test fails, and a row of docs/peft.md changes. The eleventh needs two
processes: ``tests/distributed/test_peft_models.py::test_11_sharded_parameters``.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from peft import AdaLoraConfig, PeftModel
from safetensors.torch import load_file
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from adalora_fast import fuse
from adalora_fast.integrations.layers import adapter_layers
from tests.helpers.models import ENCODER_LINEARS, VOCABULARY, adapt, adapted, awake, batch, bert, deberta
from tests.helpers.peft_models import adamw, logits, no_warning, one_line, steps
from tests.helpers.trainers import STEPS, trainer

SHORT = {"total_step": 20, "tinit": 2, "tfinal": 4, "target_modules": ["query", "value"]}  # 4 layers
INITIAL, TARGET = 16, 8  # triplets of them


def plain(**overrides) -> PeftModel:
    """PEFT's AdaLoRA on four layers, rank 4 to a mean of 2 in 20 steps."""
    return adapt(bert(), **{**SHORT, "targets": SHORT["target_modules"], **overrides})


def fused(**overrides) -> PeftModel:
    return fuse(plain(**overrides))


def ready(model: PeftModel, step: int = 0) -> None:
    """Gradients of one batch."""
    model.train()(**batch(step % 8)).loss.backward()


def living(model: PeftModel) -> int:
    """Triplets with λ ≠ 0."""
    return sum(int((p != 0).sum()) for name, p in model.named_parameters() if "lora_E" in name)


@contextmanager
def heard() -> Iterator[list[str]]:
    """The UserWarnings of the block."""
    found: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield found
    found.extend(str(warning.message) for warning in caught if warning.category is UserWarning)


def in_the_wrong_order(model: PeftModel) -> None:
    """A whole run that calls the allocator before the optimizer."""
    optimizer = adamw(model)
    for step in range(SHORT["total_step"]):
        ready(model, step)
        model.base_model.update_and_allocate(step)
        optimizer.step()
        optimizer.zero_grad()


def test_01_the_allocator_before_the_optimizer():
    """PEFT: the last optimizer step brings pruned triplets back, without a word."""
    theirs, ours = plain(), fused()
    with heard() as said:
        in_the_wrong_order(theirs)
    assert living(theirs) > TARGET and not said
    with heard() as said:
        in_the_wrong_order(ours)
    assert len(said) == 1 and "before optimizer.step()" in said[0]
    ours.base_model.rankallocator.finalize()
    assert living(ours) <= TARGET


@pytest.mark.parametrize("target_r", [4, 5])
def test_02_a_target_that_is_not_below_the_initial_rank(target_r):
    """PEFT: ``kthvalue`` raises in the middle of the training."""
    model = plain(target_r=target_r)
    with pytest.raises((RuntimeError, IndexError), match="kthvalue"):
        steps(model, adamw(model), 0, SHORT["total_step"])
    with one_line(ValueError, f"{4 * target_r} triplets", "smaller than the initial one (16)", "init_r"):
        fused(target_r=target_r)


def test_03_the_step_of_the_final_mask_is_missed():
    """PEFT: there is no rank pattern, and the step after raises."""
    final = SHORT["total_step"] - SHORT["tfinal"]
    theirs, ours = plain(deltaT=100), fused(deltaT=100)
    optimizer = adamw(theirs)
    steps(theirs, optimizer, 1, final)
    assert theirs.peft_config["default"].rank_pattern is None
    with pytest.raises(AttributeError, match="NoneType"):
        steps(theirs, optimizer, final + 1, final + 2)
    optimizer = adamw(ours)
    steps(ours, optimizer, 1, final)
    with heard() as said:
        steps(ours, optimizer, final + 1, SHORT["total_step"])
    assert len(said) == 1 and f"step {final}" in said[0] and "missed" in said[0]
    assert sum(ours.base_model.rankallocator.ranks().values()) == TARGET == living(ours)


def test_04_saved_in_the_middle_of_the_budget(tmp_path):
    """PEFT: weights are cut down to the present budget, the statistics are lost; a model made from that goes
    on to a budget that is too small, and one that is there cannot load it.
    """
    middle = 8
    theirs, ours = plain(), fused()
    for model, folder in ((theirs, tmp_path / "theirs"), (ours, tmp_path / "ours")):
        steps(model, adamw(model), 0, middle)
        assert TARGET < living(model) < INITIAL
        model.save_pretrained(folder)
    assert ranks_in(tmp_path / "theirs") == living(theirs) < INITIAL
    again = PeftModel.from_pretrained(bert(), tmp_path / "theirs", is_trainable=True)
    assert not again.base_model.rankallocator.exp_avg_ipt
    steps(again, adamw(again), middle, SHORT["total_step"])
    assert living(again) < TARGET
    with pytest.raises(RuntimeError, match="size mismatch"):
        plain().load_adapter(tmp_path / "theirs", "default", is_trainable=True)

    assert ranks_in(tmp_path / "ours") == INITIAL
    loaded, allocator = fused(), ours.base_model.rankallocator
    loaded.load_adapter(tmp_path / "ours", "default", is_trainable=True)
    state = loaded.base_model.rankallocator.state_dict()
    assert state["config"]["t"] == middle and loaded.base_model.rankallocator.budget == allocator.budget
    expected = allocator.state_dict()["tensors"]
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state["tensors"].items())
    steps(loaded, adamw(loaded), middle, SHORT["total_step"])
    assert living(loaded) == TARGET


def ranks_in(folder) -> int:
    """Triplets in a checkpoint."""
    tensors = load_file(folder / "adapter_model.safetensors")
    return sum(len(tensor) for name, tensor in tensors.items() if name.endswith("lora_E"))


def test_05_one_infinite_gradient():
    """PEFT: it is in the moving averages for good."""
    theirs, ours = plain(), fused()
    for model in (theirs, ours):
        optimizer = adamw(model)
        steps(model, optimizer, 0, 5)
        ready(model, 5)
        next(p for name, p in model.named_parameters() if "lora_B" in name).grad[0, 0] = float("inf")
        model.base_model.update_and_allocate(5)  # a GradScaler has skipped the optimizer's step
        optimizer.zero_grad()
        steps(model, optimizer, 6, 12)
    averages = theirs.base_model.rankallocator.exp_avg_ipt.values()
    assert not all(average.isfinite().all() for average in averages)
    tensors = ours.base_model.rankallocator.state_dict()["tensors"].values()
    assert all(tensor.isfinite().all() for tensor in tensors)


def test_06_an_adapted_module_without_a_gradient():
    """PEFT: ``None`` is multiplied."""
    theirs, ours = plain(), fused()
    for model in (theirs, ours):
        ready(model)
        adamw(model).step()
        for parameter in model.base_model.model.bert.encoder.layer[0].attention.self.query.parameters():
            parameter.grad = None
    with pytest.raises(TypeError, match="NoneType"):
        theirs.base_model.update_and_allocate(0)
    ours.base_model.update_and_allocate(0)
    assert ours.base_model.rankallocator.t == 1


def test_07_labels_for_an_adapter_in_inference_mode():
    """PEFT: it looks for the adapter under training, and there is none."""
    theirs, ours = plain(inference_mode=True), fused(inference_mode=True)
    with pytest.raises(AttributeError, match="trainable_adapter_name"):
        theirs(**batch(0))
    for mode in (True, False):
        assert ours.train(mode)(**batch(0)).loss.isfinite()


def scales(model: PeftModel) -> list[float]:
    """What every layer multiplies B diag(λ) A by."""
    found = []
    for layer in adapter_layers(model).values():
        factors = layer.lora_B["default"] @ (layer.lora_A["default"] * layer.lora_E["default"])
        delta = layer.get_delta_weight("default")
        found.append((delta.flatten() @ factors.flatten() / factors.square().sum()).item())
    return found


SCALES = {
    "use_rslora": ({"use_rslora": True}, [8 / 4**0.5] * 4),
    "alpha_pattern": ({"alpha_pattern": {"layer.0.*query": 2, "layer.1.*value": 6.0}}, [0.5, 2, 2, 1.5]),
}


@pytest.mark.parametrize("option", SCALES)
def test_08_a_scale_of_its_own(option, tmp_path):
    """PEFT: ``use_rslora`` and ``alpha_pattern`` are taken and change nothing."""
    options, expected = SCALES[option]
    theirs, ours = awake(plain(**options)), awake(fused(**options))
    with no_warning():
        assert scales(theirs) == pytest.approx([8 / 4] * 4, rel=1e-4)
    assert scales(ours) == pytest.approx(expected, rel=1e-4)
    ours.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(bert(), tmp_path)), logits(ours))


def test_08_biases_of_the_factors():
    """PEFT: ``lora_bias`` is taken and makes no bias."""
    model = plain(lora_bias=True)
    assert not any("lora_B" in name and "bias" in name for name, _ in model.named_parameters())
    with one_line(ValueError, "lora_bias=True", "set lora_bias=False"):
        fuse(model)


def test_09_the_random_frozen_pooler_of_deberta():
    """PEFT: its default targets adapt ``pooler.dense``, which is drawn at random and stays so."""
    with heard() as said:
        model = adapt(deberta(), None)
    dense = model.base_model.model.pooler.dense
    assert "default" in dense.lora_A and not dense.base_layer.weight.requires_grad and not said
    with heard() as said:
        fuse(model)
    assert len(said) == 1 and "pooler.dense" in said[0] and "modules_to_save" in said[0]
    with no_warning():
        fuse(adapt(deberta(), None, modules_to_save=["pooler"]))
        fuse(adapt(deberta(), ["query_proj"]))
        fuse(adapt(bert(), ENCODER_LINEARS))  # its pooler is pretrained with it
        fuse(adapt(causal(), ["q_proj", "lm_head"], task_type="CAUSAL_LM"))  # and so is this head


def causal() -> LlamaForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes))


def test_10_the_allocator_is_forgotten():
    """PEFT: the budget never moves, without a word."""
    theirs, ours = plain(), fused()
    for model in (theirs, ours):
        optimizer = adamw(model)
        with heard() as said:
            for _ in range(105):
                model.train()(**batch(0, size=1, length=2)).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        assert bool(said) == (model is ours)
    assert len(said) == 1 and "the budget never moves" in said[0] and "AdaLoraCallback" in said[0]


def test_12_the_number_of_steps(tmp_path):
    """PEFT: it has to be known before there is a Trainer to ask."""
    with pytest.raises(ValueError, match="total_step"):
        AdaLoraConfig(total_step=None)
    model = plain(total_step=10_000, tinit=0, tfinal=0)  # any number
    trainer(model, tmp_path).train()
    assert model.base_model.rankallocator.schedule.total_step == STEPS
    assert model.peft_config["default"].total_step == STEPS
    assert sum(model.base_model.rankallocator.ranks().values()) == TARGET


@torch.no_grad()
def test_13_the_orthogonality_term_in_evaluation():
    """PEFT: it is in the evaluation's loss."""
    theirs, ours, base = plain(), fused(), bert().eval()
    expected = base(**batch(0)).loss  # a new adapter computes what its base computes
    assert theirs.eval()(**batch(0)).loss > expected + 0.1
    torch.testing.assert_close(ours.eval()(**batch(0)).loss, expected)
    with torch.enable_grad():
        torch.testing.assert_close(ours.train()(**batch(0)).loss, theirs.train()(**batch(0)).loss)


class Waits(TorchFunctionMode):
    """Counts the calls that hand a tensor's numbers to Python: on a GPU each waits for the device."""

    NAMES = ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "cpu", "numpy", "nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, function, types, arguments=(), options=None):
        self.count += getattr(function, "__name__", "") in self.NAMES
        return function(*arguments, **(options or {}))


class Operations(TorchDispatchMode):
    """Counts operations."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.count += 1
        return function(*arguments, **(options or {}))


def test_14_waiting_for_the_device_and_operations():
    """PEFT: an allocation waits once per layer and once more, and launches dozens of operations per layer
    (benchmarks/op_counts.py counts whole training steps).
    """
    counts = {}
    for name, model in (("theirs", adapted("bert", **LONG)), ("ours", fuse(adapted("bert", **LONG)))):
        optimizer = adamw(model)
        steps(model, optimizer, 0, 6)
        ready(model, 6)
        optimizer.step()
        counts[name] = counted(lambda tuner=model.base_model: tuner.update_and_allocate(6))
    layers = len(adapter_layers(model))
    assert layers == 13
    assert counts["theirs"][0] == layers + 1 and counts["theirs"][1] > 20 * layers
    assert counts["ours"][0] == 0 and counts["ours"][1] < counts["theirs"][1] / 10


LONG = {"total_step": 20, "tinit": 2, "tfinal": 4}


def counted(call: Callable[[], None]) -> tuple[int, int]:
    """How often ``call`` waits for the device, and how many operations it asks for."""
    with Waits() as waits, Operations() as operations:
        call()
    return waits.count, operations.count
