"""The suites of whole models and of growth, walked at tiny sizes on a CPU."""

import sys
from dataclasses import replace
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
from torch import nn

from adalora_fast.environment import environment
from adalora_fast.ops.dispatch import backend
from benchmarks import peers
from benchmarks.measure import measure
from benchmarks.report.results import Results, Row, read
from benchmarks.suites import SCALES, Case, growth, inference, memory, models, step

CPU = torch.device("cpu")
SUITES = {"step": step, "inference": inference, "memory": memory, "growth": growth}
FAMILIES = ("deberta", "bert")


def setting(family: str = "bert") -> models.Setting:
    return models.Setting(model=f"tiny {family}", batch=2, length=8, dtype=torch.float32, device=CPU).tiny()


def first_case(suite: str, part: str = "") -> Case:
    return next(case for case in SUITES[suite].cases("tiny", CPU) if part in case.name)


def rows_of(case: Case) -> dict[str, Row]:
    return {row.contestant: row for row in measure(case, None, CPU, rounds=2)}


@pytest.mark.parametrize("suite", SUITES)
def test_everybody_passes_the_gate_and_is_measured(suite, tmp_path):
    results = Results(device="cpu", environment=environment(), scale="tiny")
    for case in SUITES[suite].cases("tiny", CPU):
        rows = rows_of(case)
        assert tuple(rows) == case.contestants
        missing = {name: row.missing for name, row in rows.items() if row.missing}
        assert set(missing) == {"peft compiled"} & set(rows), missing
        assert all("CUDA only" in reason for reason in missing.values())
        assert rows[case.baseline].ratio == 1.0
        assert all(row.value > 0 and row.unit == case.unit for row in rows.values() if not row.missing)
        results.rows += rows.values()
    path = tmp_path / "results.json"
    results.write(path)
    assert read(path).rows == results.rows


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("suite", SUITES)
def test_cases_are_listed_without_the_device(suite, scale, device):
    cases = SUITES[suite].cases(scale, torch.device(device))
    names = [case.name for case in cases]
    assert names and len(set(names)) == len(names)
    for case in cases:
        assert case.suite == suite and case.baseline in case.contestants
        assert all(type(value) in (str, int, float, bool) for value in case.what.values())
        assert case.what.get("tokens", 1) == case.what.get("batch", 1) * case.what.get(
            "length", case.what.get("tokens", 1)
        )
    if scale == "tiny" and device == "cpu":
        assert all(tuple(case.build().contestants) == case.contestants for case in cases)


@pytest.mark.parametrize("suite", SUITES)
def test_an_unknown_scale_is_refused(suite):
    with pytest.raises(ValueError, match="scale 'huge' is none of full, quick, tiny"):
        SUITES[suite].cases("huge", CPU)


def a_tenth_too_large(model: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_E." in name:
                parameter.mul_(1.1)


@pytest.mark.parametrize("name", ["adalora_fast", "adalora_fast reference"])
@pytest.mark.parametrize("suite", ["step", "memory"])
def test_training_that_computes_something_else_is_missing(monkeypatch, suite, name):
    right = models.TRAINERS[name]

    def wrong(chosen):
        training = right(chosen)
        a_tenth_too_large(training.model)
        return training

    monkeypatch.setitem(models.TRAINERS, name, wrong)
    rows = rows_of(first_case(suite))
    assert "the loss of step 0 is" in rows[name].missing
    assert rows["peft"].value and rows["frozen"].value


def test_training_that_does_not_allocate_is_missing(monkeypatch):
    def forgetful(chosen):
        training = models.train_fused(chosen)
        training.allocate = None
        return training

    monkeypatch.setitem(models.TRAINERS, "adalora_fast", forgetful)
    assert "the loss of step 1 is" in rows_of(first_case("step"))["adalora_fast"].missing


@pytest.mark.parametrize("suite", ["step", "memory"])
def test_a_loss_that_is_no_number_is_missing(monkeypatch, suite):
    def broken(chosen):
        training = models.train_lora(chosen)
        with torch.no_grad():
            next(parameter for parameter in training.model.parameters()).fill_(float("nan"))
        return training

    monkeypatch.setitem(models.TRAINERS, "peft lora", broken)
    assert rows_of(first_case(suite))["peft lora"].missing == "AssertionError: peft lora: the loss is nan"


@pytest.mark.parametrize("name", ["adalora_fast", "adalora_fast compacted", "peft merged"])
def test_inference_that_computes_something_else_is_missing(monkeypatch, name):
    def wrong(chosen):
        model = inference.pruned(chosen)
        a_tenth_too_large(model)
        return model

    monkeypatch.setitem(inference.MODELS, name, wrong)
    rows = rows_of(first_case("inference"))
    assert "logits differ from PEFT's" in rows[name].missing
    assert rows["peft"].value


def test_bookkeeping_that_prunes_others_is_missing(monkeypatch):
    def wrong(model, parameters):
        for parameter in parameters:
            parameter.grad = parameter.grad.flip(0)
        return growth.step_peft(model, parameters)

    monkeypatch.setitem(growth.ALLOCATORS, "adalora_fast", wrong)
    assert "prunes others than PEFT" in rows_of(first_case("growth", "3 layers"))["adalora_fast"].missing
    monkeypatch.setitem(growth.ALLOCATORS, "adalora_fast", lambda model, parameters: lambda: None)
    assert "does not keep" in rows_of(first_case("growth", "3 layers"))["adalora_fast"].missing


def test_a_layer_that_computes_something_else_is_missing(monkeypatch):
    right = peers.PEERS["adalora_fast"]
    monkeypatch.setitem(
        peers.PEERS, "adalora_fast", lambda layer: right(replace(layer, scaling=1.1 * layer.scaling))
    )
    assert "relative error of y" in rows_of(first_case("growth", "layer by"))["adalora_fast"].missing


def test_growth_says_what_varies():
    for case in growth.cases("full", CPU):
        assert case.what["varies"] in ("layers", "rank", "tokens")
        assert type(case.what[case.what["varies"]]) is int
    series = {}
    for case in growth.cases("full", CPU):
        what = case.what
        rest = tuple((key, value) for key, value in what.items() if key != what["varies"])
        series.setdefault(rest, set()).add(what[what["varies"]])
    assert sorted(len(values) for values in series.values()) == [4, 5, 5, 5]


def test_steps_stay_in_the_middle_of_the_schedule():
    chosen = models.settings("tiny", CPU)[0]
    training = models.train_fused(chosen)
    for _ in range(3):
        training()
    allocator = training.model.base_model.rankallocator
    layers = len(allocator.ranks())
    assert chosen.target_rank * layers < allocator.budget < chosen.rank * layers
    assert sum(allocator.ranks().values()) == allocator.budget
    assert not allocator.is_final


@pytest.mark.parametrize("family", FAMILIES)
def test_compacted_models_have_no_pruned_triplet(family):
    chosen = setting(family)
    model = inference.compacted(chosen)
    lambdas = [p for name, p in model.named_parameters() if ".lora_E." in name]
    assert all((parameter != 0).all() for parameter in lambdas)
    assert sum(len(parameter) for parameter in lambdas) == chosen.target_rank * len(lambdas)
    assert len({len(parameter) for parameter in lambdas}) > 1
    assert not any(".lora_" in name for name, _ in inference.MODELS["peft merged"](chosen).named_parameters())


def test_positions_that_are_kept_change_nothing():
    chosen = setting("deberta")
    tokens = models.make_batch(chosen)["input_ids"]
    with torch.no_grad():
        expected = inference.pruned(chosen).eval()(input_ids=tokens).logits
    run = inference.forward("peft", chosen)
    assert torch.equal(run(), expected) and torch.equal(run(), expected)


def test_what_is_kept_for_the_backward_leaves_parameters_out(monkeypatch):
    def linear(chosen):
        model, x = nn.Linear(4, 3), torch.ones(5, 4)
        return models.Training(chosen, model, lambda: model(x).square().sum())

    monkeypatch.setitem(models.TRAINERS, "frozen", linear)
    assert memory.kept_for_the_backward("frozen", setting()) == 4 * (5 * 4 + 5 * 3)


def test_what_is_kept_for_the_backward_is_the_same_every_time():
    for name in ("peft", "adalora_fast"):
        counts = {memory.kept_for_the_backward(name, setting("deberta")) for _ in range(2)}
        assert len(counts) == 1


@pytest.mark.parametrize(("model", "adapted"), [("deberta-v3-base", 72), ("minilm-l6", 36)])
def test_the_adapted_linears_are_those_of_the_real_models(model, adapted):
    chosen = models.Setting(model=model, batch=1, length=1, dtype=torch.bfloat16, device=torch.device("meta"))
    targets = tuple(f".{target}" for target in models.TARGETS[chosen.size.family])
    named = models.base_model(chosen).named_modules()
    found = [name for name, module in named if isinstance(module, nn.Linear) and name.endswith(targets)]
    assert len(found) == chosen.what()["adapted"] == adapted


def test_the_reference_backend_is_a_matter_of_the_context():
    before = backend.choose("importance", "cpu").backend
    with models.reference_backend():
        assert backend.choose("importance", "cpu").backend == "reference"
    assert backend.choose("importance", "cpu").backend == before


class OtherNorm(nn.Module):
    """Stands for Liger's norm, which needs a GPU."""

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight, self.bias = (nn.Parameter(torch.empty(hidden_size)) for _ in range(2))
        self.eps = eps

    def forward(self, x):
        return nn.functional.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


@pytest.fixture
def liger(monkeypatch):
    """A package of Liger's name, with a norm."""
    for name in ("liger_kernel", "liger_kernel.transformers"):
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules["liger_kernel.transformers"].LigerLayerNorm = OtherNorm


def test_liger_takes_part_where_it_is_installed(liger):
    case = first_case("step")
    assert "peft + liger norms" in case.contestants
    assert rows_of(case)["peft + liger norms"].value


@pytest.mark.parametrize("family", FAMILIES)
def test_liger_replaces_every_norm(liger, family):
    base = models.base_model(setting(family))
    norms = sum(isinstance(module, nn.LayerNorm) for module in base.modules())
    swapped = list(models.with_liger_norms(base).modules())
    assert norms > 4 and sum(isinstance(module, OtherNorm) for module in swapped) == norms
    assert not any(isinstance(module, nn.LayerNorm) for module in swapped)
