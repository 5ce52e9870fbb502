"""Bottleneck adapters: the published equation, where they stand, what is trained, and whole runs."""

import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForQuestionAnswering, AutoModelForSequenceClassification

from adalora_fast.experiments.data.tasks import TASKS
from adalora_fast.experiments.methods.adapters import adapt
from adalora_fast.experiments.methods.bottleneck import (
    Bottleneck,
    check_bottlenecks,
    places_of,
    put_after,
)
from adalora_fast.experiments.models.encoders import cast_encoder
from adalora_fast.experiments.models.families import FAMILIES
from adalora_fast.experiments.models.loading import load_encoder
from adalora_fast.experiments.sweep.plan import make_plan
from tests.helpers.tiny import LAYERS, RECIPE, WIDTH, encoder_config
from tests.helpers.training_runs import TASK, StopAfter, files, read, settings, train, without_times

NARROW = replace(RECIPE, bottleneck=4)
PLACES = {  # after attention, after the feed-forward block
    "bert": ("attention.output.dense", "output.dense"),
    "electra": ("attention.output.dense", "output.dense"),
    "roberta": ("attention.output.dense", "output.dense"),
    "xlm-roberta": ("attention.output.dense", "output.dense"),
    "deberta-v2": ("attention.output.dense", "output.dense"),
    "distilbert": ("attention.out_lin", "ffn.lin2"),
    "modernbert": ("attn.Wo", "mlp.Wo"),
}
INPUTS = {"input_ids": torch.tensor([[2, 7, 8, 9, 3], [2, 6, 3, 0, 0]])}
LABELS = {
    "classification": {"labels": torch.tensor([0, 1])},
    "regression": {"labels": torch.tensor([0.5, 2.0])},
    "question_answering": {
        "start_positions": torch.tensor([1, 1]),
        "end_positions": torch.tensor([2, 1]),
    },
}
INPUTS["attention_mask"] = (INPUTS["input_ids"] != 0).long()


def plain(family, kind="classification"):
    torch.manual_seed(0)
    config = encoder_config(family)
    if kind == "question_answering":
        return AutoModelForQuestionAnswering.from_config(config).eval()
    if kind == "regression":
        config.num_labels, config.problem_type = 1, "regression"
    return AutoModelForSequenceClassification.from_config(config).eval()


def houlsby(family="bert", task="sst2", dtype=None):
    model = plain(family, TASKS[task].kind)
    if dtype is not None:
        cast_encoder(model, FAMILIES[family].head_for(TASKS[task].kind), dtype)
    return adapt(model, settings("tiny", "data", "houlsby", task=task, recipe=NARROW), TASKS[task])


def stirred(model):
    """With adapters that do something."""
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if ".adapter." in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_the_published_equation():
    """z = h + W_up f(W_down h + b_down) + b_up, written out per position, f(x) = x Φ(x)."""
    torch.manual_seed(0)
    adapter, h = Bottleneck(7, 3).double(), torch.randn(2, 5, 7, dtype=torch.float64)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    down, up = adapter.down, adapter.up
    for row in range(2):
        for position in range(5):
            x = h[row, position]
            a = [float(down.weight[i] @ x + down.bias[i]) for i in range(3)]
            f = torch.tensor([v * (1 + math.erf(v / math.sqrt(2))) / 2 for v in a], dtype=torch.float64)
            z = torch.stack([x[j] + up.weight[j] @ f + up.bias[j] for j in range(7)])
            assert torch.allclose(adapter(h)[row, position], z, rtol=0, atol=1e-12)
    assert torch.allclose(adapter.change(h), adapter(h) - h, rtol=0, atol=1e-12)


def test_gradients():
    torch.manual_seed(0)
    adapter, h = Bottleneck(4, 2).double(), torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    values = [nn.init.normal_(p).detach().requires_grad_() for p in adapter.parameters()]
    names = [name for name, _ in adapter.named_parameters()]

    def run(h, *values):
        return torch.func.functional_call(adapter, dict(zip(names, values, strict=True)), (h,))

    assert torch.autograd.gradcheck(run, (h, *values))


def test_the_start_is_near_the_identity():
    torch.manual_seed(0)
    adapter, h = Bottleneck(200, 50), torch.randn(30, 200)
    for layer in (adapter.down, adapter.up):
        assert layer.weight.abs().max() <= 0.02 and not layer.bias.any()
        assert layer.weight.std().item() == pytest.approx(0.0088, abs=2e-4)  # of N(0, 0.01²) within 0.02
    difference = (adapter(h) - h).norm() / h.norm()
    assert 0 < difference < 0.01


@pytest.mark.parametrize("task", ["sst2", "stsb", "squad"])
@pytest.mark.parametrize("family", PLACES)
def test_two_in_every_layer_and_only_they_and_the_head_are_trained(family, task):
    kind = TASKS[task].kind
    model, before = houlsby(family, task), plain(family, kind)
    head = FAMILIES[family].head_for(kind)
    expected = {name for name, _ in before.named_parameters() if not set(head).isdisjoint(name.split("."))}
    assert expected
    adapters = [name for name, module in model.named_modules() if isinstance(module, Bottleneck)]
    ends = [f".{i}.{place}.adapter" for i in range(LAYERS) for place in PLACES[family]]
    assert len(adapters) == len(ends)
    assert all(name.endswith(end) for name, end in zip(adapters, ends, strict=True))
    parts = ("down.weight", "down.bias", "up.weight", "up.bias")
    assert trained(model) == expected | {f"{name}.{part}" for name in adapters for part in parts}
    model(**INPUTS, **LABELS[kind]).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    idle = {name for name, gradient in gradients.items() if gradient is None or not gradient.any()}
    # of answers the same for all positions, so that the loss does not see it
    assert idle <= ({f"{head[-1]}.bias"} if kind == "question_answering" else set())


@pytest.mark.parametrize("family", PLACES)
def test_the_base_is_as_it_was(family):
    """The same names and tensors; with adapters that do nothing, the same outputs."""
    model, before = houlsby(family).eval(), plain(family)
    names = {name for name in model.state_dict() if ".adapter." not in name}
    assert names == set(before.state_dict())
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.state_dict().items())
    near, exact = model(**INPUTS).logits, before(**INPUTS).logits
    assert not torch.equal(near, exact) and torch.allclose(near, exact, atol=1e-3)
    for module in model.modules():
        if isinstance(module, Bottleneck):
            nn.init.zeros_(module.up.weight)
    assert torch.equal(model(**INPUTS).logits, exact)


def test_before_the_residual_connection_and_the_norm():
    model = houlsby("bert").eval()
    block = model.bert.encoder.layer[0].attention.output
    nn.init.normal_(block.dense.adapter.up.bias)
    x, residual = torch.randn(1, 3, WIDTH), torch.randn(1, 3, WIDTH)
    h = x @ block.dense.weight.T + block.dense.bias
    expected = block.LayerNorm(block.dense.adapter(h) + residual)
    assert torch.allclose(block(x, residual), expected, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["bert", "deberta-v2", "modernbert"])
def test_a_base_in_half_precision(family, dtype):
    model, exact = stirred(houlsby(family, dtype=dtype)), stirred(houlsby(family))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    place = next(iter(places_of(model).values()))
    x = torch.randn(2, place.in_features)
    assert place.weight.dtype == place(x.to(dtype)).dtype == dtype
    output = model(**INPUTS, labels=torch.tensor([0, 1]))
    assert torch.allclose(output.logits, exact(**INPUTS).logits, atol=0.05, rtol=0.05)
    output.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_the_sum_is_made_in_the_adapters_precision():
    """A change of h below its rounding is rounded once, with the sum."""
    adapter, h = Bottleneck(4, 2), torch.full((1, 4), 1.0, dtype=torch.bfloat16)
    nn.init.constant_(adapter.up.bias, 0.003)  # bfloat16 has 1, 1.0078
    nn.init.zeros_(adapter.up.weight)
    assert torch.equal(adapter(h), torch.full_like(h, 1.0))
    nn.init.constant_(adapter.up.bias, 0.005)
    assert torch.equal(adapter(h), torch.full_like(h, 1.0078125))


def test_autocast_and_compile():
    model = stirred(houlsby("bert")).eval()
    exact = model(**INPUTS).logits
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(model(**INPUTS).logits.float(), exact, atol=0.05, rtol=0.05)
    place = next(iter(places_of(model).values()))
    compiled = torch.compile(place, backend="eager", fullgraph=True)
    x = torch.randn(2, WIDTH)
    assert torch.allclose(compiled(x), place.adapter(nn.functional.linear(x, place.weight, place.bias)))
    torch._dynamo.reset()


def test_an_adapter_goes_where_its_place_is():
    place = nn.Linear(3, 3, device="meta")
    put_after(place, Bottleneck(3, 2))
    assert place.adapter.down.weight.device == place.weight.device


@pytest.mark.parametrize("method", ["houlsby", "fusion", "full", "head", "bitfit"])
def test_no_matrices_for_what_adapts_none(method):
    with pytest.raises(ValueError, match=rf"matrices is \['query'\], but {method} adapts none; leave it out"):
        settings("tiny", "data", method, recipe=replace(RECIPE, matrices=("query",)))


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("lora", {"adapters": ("a", "b")}, "adapters are given to the method 'lora'"),
        ("houlsby", {"adapters": ("a",)}, "adapters are given to the method 'houlsby'"),
        ("fusion", {}, "two or more different runs, not from "),
        ("fusion", {"adapters": ("a",)}, "two or more different runs, not from .'a'."),
        ("fusion", {"adapters": ("a", "b", "a")}, "two or more different runs"),
    ],
)
def test_settings_that_do_not_fit(method, options, message):
    asked = settings("tiny", "data", method, **options)
    with pytest.raises(ValueError, match=message) as error:
        check_bottlenecks(asked)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=message):
        adapt(plain("bert"), asked, TASK)


def test_no_sweep_of_fusions(tmp_path):
    def plan(arms, **overrides):
        options = {"recipe": "minilm-glue", "model": "minilm", "tasks": ["sst2"], "arms": arms, "seeds": [0]}
        return make_plan(**options, overrides=overrides)

    assert plan(["houlsby", "lora"]).arms == ("houlsby", "lora")
    for arms in (["houlsby", "fusion"], ["fusion-small"]):
        with pytest.raises(ValueError, match="adalora-fast train --method fusion --adapters RUN RUN"):
            plan(arms)
    with pytest.raises(ValueError, match="matrices is"):
        plan(["houlsby"], matrices=["query"])


@pytest.fixture(scope="module")
def run(encoder, data_dir):
    return settings(encoder, data_dir, "houlsby", recipe=NARROW)


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory):
    path = tmp_path_factory.mktemp("houlsby") / "run"
    train(run, path)
    return path


def test_a_whole_run(folder, run, encoder):
    assert {"adapter/trained.safetensors", "result.json"} <= files(folder)
    assert not [name for name in files(folder) if name.startswith("adapter/") and "trained" not in name]
    result, saved = read(folder, "result.json"), load_file(folder / "adapter" / "trained.safetensors")
    assert result["method"] == result["arm"] == "houlsby" and result["total_rank"] == 0
    head = WIDTH * WIDTH + WIDTH + 2 * WIDTH + 2
    assert result["trainable_parameters"] == 2 * LAYERS * (2 * 4 * WIDTH + 4 + WIDTH) + head
    assert sum(tensor.numel() for tensor in saved.values()) == result["trainable_parameters"]
    before = load_file(encoder / "model.safetensors")
    assert not torch.equal(saved["bert.pooler.dense.weight"], before["pooler.dense.weight"])
    assert all(saved[name].any() for name in saved if name.endswith("adapter.up.bias"))


def test_the_saved_tensors_are_the_run(folder, run):
    """On the base, they give the predictions that the run has written down."""
    from adalora_fast.experiments.data.tasks import load_split

    model, tokenizer = load_encoder(run, TASK)
    model = adapt(model, run, TASK).eval()
    saved = load_file(folder / "adapter" / "trained.safetensors")
    assert set(saved) == trained(model)
    model.load_state_dict(saved, strict=False)
    split = load_split(TASK, "validation", run.data_dir)
    with torch.no_grad():
        logits = model(**tokenizer(*split.texts, padding=True, return_tensors="pt")).logits
    expected = load_file(folder / "predictions.safetensors")["validation/logits"]
    assert torch.allclose(logits, expected, atol=1e-5)


def test_an_interrupted_run_ends_like_one_that_was_not(folder, run, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(run, tmp_path / "run", progress=StopAfter(7))
    train(run, tmp_path / "run")
    ours, theirs = (without_times(read(path, "result.json")) for path in (tmp_path / "run", folder))
    assert {name for name in ours if ours[name] != theirs[name]} <= {"resumed", "train_loss"}
    assert ours["resumed"] is True
    ours, theirs = (
        load_file(path / "adapter" / "trained.safetensors") for path in (tmp_path / "run", folder)
    )
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
