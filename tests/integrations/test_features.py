"""What people do around a training step, with PEFT's AdaLoRA and with the fused model: the same comes out."""

import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.utils import counters

from adalora_fast import fuse
from tests.helpers.models import TARGETS, adapt, adapted, awake, batch, bert, trainable
from tests.helpers.peft_models import logits
from tests.helpers.trainers import peft_model, trainer
from tests.integrations.comparing import SHORT, assert_same_run, awake_and_fused, short_run


def build(**overrides):
    return adapted("bert", **SHORT, **overrides)


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# -- checkpointing, accumulation, scaling ---------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    found = []
    for model in awake_and_fused(lambda: build(lora_dropout=0.3)):
        base = model.get_base_model()
        base.enable_input_require_grads()
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        assert base.is_gradient_checkpointing
        torch.manual_seed(0)  # dropout is drawn again where a layer is computed again
        model.train()(**batch(0)).loss.backward()
        found.append(gradients(model))
    expected, ours = found
    assert expected.keys() == ours.keys() and any("lora_A" in name for name in ours)
    for name, gradient in expected.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-6, atol=1e-8, msg=name)


def test_gradient_accumulation_by_hand():
    assert_same_run(build, accumulate=3)


def test_grad_scaler_and_clipping():
    ours = []
    for clip in (None, 0.5):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=5)
        ours.append(assert_same_run(build, scaler=scaler, clip=clip))
        assert scaler.get_scale() > 2.0**12
    left, right = (logits(model) for model in ours)
    assert not torch.equal(left, right)  # the gradients were clipped


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_is_no_less_accurate_than_pefts(dtype):
    truth, peft, ours = awake(build()).double(), awake(build()), fuse(awake(build()))
    found = []
    for model in (truth, peft, ours):
        with torch.autocast("cpu", dtype, enabled=model is not truth):
            loss = model.train()(**batch(0)).loss
        (64 * loss).backward()
        every = gradients(model)
        assert model is truth or all(gradient.dtype == torch.float32 for gradient in every.values())
        found.append((loss.item(), torch.cat([gradient.double().flatten() for gradient in every.values()])))
    (true_loss, true_gradient), (peft_loss, peft_gradient), (loss, gradient) = found
    assert abs(loss - true_loss) <= 2 * abs(peft_loss - true_loss) + torch.finfo(dtype).eps * true_loss
    assert 0 < (gradient - true_gradient).norm() <= 1.25 * (peft_gradient - true_gradient).norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_run_under_autocast_with_a_scaler_reaches_the_budget(dtype):
    model = fuse(awake(build()))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20 if dtype == torch.float16 else 2.0**8)
    first = scaler.get_scale()
    losses, _ = short_run(model, scaler=scaler, context=lambda: torch.autocast("cpu", dtype))
    assert (scaler.get_scale() < first) == (dtype == torch.float16)  # some steps overflowed and were skipped
    assert all(torch.tensor(losses).isfinite()) and sum(model.base_model.rankallocator.ranks().values()) == 26


# -- torch.compile -----------------------------------------------------------------------------------------


INDUCTOR = pytest.param(  # PyTorch's compiler for real, with the C++ that it writes
    "inductor",
    marks=[
        pytest.mark.slow,
        pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="there is no C++ compiler"),
    ],
)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", INDUCTOR])
def test_a_compiled_model_trains_as_pefts_plain_one(backend):
    torch.compiler.reset()
    peft, ours = awake_and_fused(build)
    compiled = torch.compile(ours, backend=backend, fullgraph=True)  # a graph break would be an error
    expected, found = short_run(peft), short_run(ours, called=compiled)
    assert found[0] == pytest.approx(expected[0], abs=2e-6) and found[1] == expected[1]


def test_a_compiled_trainer_run_has_no_graph_break(tmp_path):
    torch.compiler.reset()
    counters.clear()
    model = peft_model(lora_dropout=0.1)
    arguments = {"torch_compile": True, "torch_compile_backend": "eager", "dataloader_drop_last": True}
    trainer(model, tmp_path, max_steps=6, **arguments).train()
    assert counters["stats"]["unique_graphs"] > 0 and not counters["graph_break"]


# -- the Trainer's options ---------------------------------------------------------------------------------

TRAINER_OPTIONS = {
    "bf16": {"bf16": True},
    "gradient_checkpointing": {"gradient_checkpointing": True},
    "reentrant": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "accumulation": {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5},
}


@pytest.mark.parametrize("case", TRAINER_OPTIONS)
def test_trainer_options(case, tmp_path):
    model = peft_model(lora_dropout=0.1)
    run = trainer(model, tmp_path, max_steps=10, **TRAINER_OPTIONS[case])
    assert torch.tensor(run.train().training_loss).isfinite()
    assert sum(model.base_model.rankallocator.ranks().values()) == 26
    assert model.base_model.rankallocator.t == 10


# -- modes ---------------------------------------------------------------------------------------------------


def test_train_and_eval_switch_dropout_and_the_orthogonality_term():
    peft, ours = awake_and_fused(lambda: build(lora_dropout=0.3))
    expected = logits(peft.eval())
    for _ in range(2):
        results = []
        for model in (peft, ours):
            torch.manual_seed(1)
            results.append(model.train()(**batch(99)))
        torch.testing.assert_close(results[1].logits, results[0].logits)
        torch.testing.assert_close(results[1].loss, results[0].loss)
        assert not torch.allclose(results[1].logits, expected)
        torch.testing.assert_close(logits(ours.eval()), expected)


def test_disabled_adapters_in_training_mode():
    peft, ours = awake_and_fused(build)
    for model in (peft, ours):
        model.train()
    with peft.disable_adapter(), ours.disable_adapter():
        expected, found = (model(**batch(0)).logits for model in (peft, ours))
    assert torch.equal(found, expected)
    assert [p.requires_grad for p in ours.parameters()] == [p.requires_grad for p in peft.parameters()]
    expected, found = (model(**batch(0)).logits for model in (peft, ours))
    torch.testing.assert_close(found, expected)
    assert len(trainable(ours)) == len(trainable(peft))


def test_a_run_goes_on_after_merging_and_unmerging():
    peft, ours = awake_and_fused(build)
    for model in (peft, ours):
        short_run(model, stop=6)
        model.merge_adapter()
        model.unmerge_adapter()
    expected, found = (short_run(model, start=6) for model in (peft, ours))
    assert found[0] == pytest.approx(expected[0], abs=2e-6) and found[1] == expected[1]


# -- models with a past, shared layers -----------------------------------------------------------------


def test_rank_pattern_of_another_run_is_dropped_with_a_warning():
    """A pattern given to a new model does not stop the allocation, neither in PEFT nor here."""
    names = fuse(build()).base_model.rankallocator.layer_names
    pattern = {f"{name}.lora_E": [True, False, True, False] for name in names}
    for given in (
        pattern,
        {f"{name}.lora_E": [True] * 4 for name in names},
        {"no.such.layer.lora_E": [True]},
    ):
        peft, ours = build(rank_pattern=dict(given)), build(rank_pattern=dict(given))
        with pytest.warns(UserWarning, match="rank_pattern is dropped"):
            fuse(ours)
        assert ours.peft_config["default"].rank_pattern is None
        assert not ours.base_model.rankallocator.is_over
        for model in (peft, ours):
            short_run(awake(model).double())
        assert sum(ours.base_model.rankallocator.ranks().values()) == 26
        found, expected = ours.base_model.peft_rank_pattern(), peft.peft_config["default"].rank_pattern
        assert found == expected


@pytest.mark.parametrize("steps", [6, 16])
def test_a_model_that_peft_trained_is_fused(steps, tmp_path):
    model = awake(build()).double()
    short_run(model, stop=steps)
    pattern = model.peft_config["default"].rank_pattern
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fuse(model)
    allocator, dropped = model.base_model.rankallocator, ["rank_pattern" in str(w.message) for w in caught]
    if steps == 16:  # finished: stays so
        assert allocator.is_over and not any(dropped)
        assert model.peft_config["default"].rank_pattern == pattern
        model.save_pretrained(tmp_path)
        saved = load_file(tmp_path / "adapter_model.safetensors")
        assert sum(len(tensor) for name, tensor in saved.items() if name.endswith("lora_E")) == 26
    else:  # in the middle: the fused model takes over
        assert any(dropped) and not allocator.is_over
        short_run(model, start=steps)
        assert sum(allocator.ranks().values()) == 26


def test_a_layer_used_by_two_names_is_one_layer():
    def tied():
        base = bert()
        layers = base.bert.encoder.layer
        layers[1].attention.self.query = layers[0].attention.self.query
        return adapt(base, TARGETS["bert"], **SHORT)

    peft, ours = awake_and_fused(tied)
    for model in (peft, ours):
        model.train()(**batch(0)).loss.backward()
    for (name, expected), found in zip(peft.named_parameters(), ours.parameters(), strict=True):
        if expected.grad is not None:
            torch.testing.assert_close(found.grad, expected.grad, msg=name)
