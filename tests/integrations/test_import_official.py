"""Checkpoints of AdaLoRA's own code: their layers written down again here, and what is refused."""

import pickle

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn

from adalora_fast import fuse, import_official, to_lora
from adalora_fast.integrations.layers import adapter_layers
from tests.helpers.models import TARGETS, adapted, batch, bert, trained_weights
from tests.helpers.peft_models import logits, no_warning, one_line
from tests.helpers.small_model import make_allocator, make_model
from tests.integrations.exporting import kept_of, off

RANK, ALPHA = 4, 8


class OfficialLinear(nn.Linear):
    """y = x Wᵀ + b + α / (ranknum + 1e-5) · x (A ⊙ E)ᵀ Bᵀ."""

    def adapt(self, generator: torch.Generator, kept: list[int]) -> "OfficialLinear":
        draw = lambda *shape: nn.Parameter(0.4 * torch.randn(*shape, generator=generator))  # noqa: E731
        self.lora_A, self.lora_B = draw(RANK, self.in_features), draw(self.out_features, RANK)
        self.lora_E = draw(RANK, 1)
        with torch.no_grad():
            self.lora_E[sorted(set(range(RANK)) - set(kept))] = 0.0
        self.ranknum = nn.Parameter(torch.full((1,), float(RANK)), requires_grad=False)
        return self

    def forward(self, x: Tensor) -> Tensor:
        delta = x @ (self.lora_A * self.lora_E).T @ self.lora_B.T
        return super().forward(x) + delta * ALPHA / (self.ranknum + 1e-5)


def official(trained_pooler: bool = False) -> nn.Module:
    """A BERT as the official code would have left it after training."""
    model = bert()
    generator = torch.Generator().manual_seed(2)
    for index, name in enumerate(
        adapter_layers(adapted("bert", target_modules=TARGETS["bert"][:3]).base_model.model)
    ):
        layer = model.get_submodule(name)
        layer.__class__ = OfficialLinear
        layer.adapt(generator, kept_of(index))
    with torch.no_grad():
        model.classifier.weight += 1.0
        if trained_pooler:
            model.bert.pooler.dense.weight += 1.0
    return model.eval()


def target(fused: bool = True, **config) -> PeftModel:
    model = adapted("bert", target_modules=TARGETS["bert"][:3], **config)
    return (fuse(model) if fused else model).eval()


def expected(model: nn.Module) -> Tensor:
    inputs = batch(99)
    with torch.no_grad():
        return model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("fused", [False, True], ids=["peft", "fused"])
@pytest.mark.parametrize("by_file", [False, True])
def test_the_same_outputs(fused, by_file, prefix, tmp_path):
    theirs, model = official(), target(fused)
    source = {prefix + name: tensor for name, tensor in theirs.state_dict().items()}
    if by_file:
        save_file(source, tmp_path / "model.safetensors")
        source = tmp_path / "model.safetensors"
    with no_warning():
        assert import_official(source, model) == []
    assert off(logits(model), expected(theirs)) <= 1e-6
    with no_warning():  # and as a LoRA, with the pruned triplets dropped
        lora = to_lora(model)
    assert off(logits(lora), expected(theirs)) <= 1e-6
    assert list(lora.adalora_ranks.values()) == [len(kept_of(i)) for i in range(6)]


def test_scales_that_only_fused_layers_know():
    theirs, model = official(), target(alpha_pattern={"query": 3}, use_rslora=True)
    import_official(theirs.state_dict(), model)
    assert off(logits(model), expected(theirs)) <= 1e-6


def test_a_merged_base_is_not_taken():
    """The official code saves W + ΔW where it was evaluated last."""
    theirs, model = official(), target()
    state = theirs.state_dict()
    for name in adapter_layers(model.base_model.model):
        state[f"{name}.weight"] = state[f"{name}.weight"] + 1.0
    assert import_official(state, model) == []
    assert off(logits(model), expected(theirs)) <= 1e-6


def test_other_trained_weights_are_named():
    model = target()
    with pytest.warns(
        UserWarning, match="1 tensors .* the first is bert.pooler.dense.weight; .*modules_to_save"
    ):
        assert import_official(official(trained_pooler=True).state_dict(), model) == [
            "bert.pooler.dense.weight"
        ]
    theirs, model = official(trained_pooler=True), target(modules_to_save=["pooler"])
    with no_warning():
        import_official(theirs.state_dict(), model)
    assert off(logits(model.double()), expected(theirs.double())) <= 1e-6


def test_without_peft():
    theirs, model = make_model(ranks=(4, 4, 4)), make_model(ranks=(4, 4, 4))
    state = {**theirs.state_dict(), "0.ranknum": torch.tensor(4.0)}
    with torch.no_grad():
        for layer in (model[0], model[2], model[4]):
            layer.lora_E.zero_()
    import_official(state, model)
    x = torch.randn(3, 6, dtype=torch.float64)
    assert torch.equal(model(x), theirs(x))


QUERY = "bert.encoder.layer.1.attention.self.query"
DAMAGES = {
    "missing factor": (lambda s: s.pop(f"{QUERY}.lora_E"), ("lacks", f"{QUERY}.lora_E")),
    "missing head": (lambda s: s.pop("classifier.weight"), ("lacks", "classifier.weight")),
    "other width": (lambda s: s.update({f"{QUERY}.lora_A": torch.ones(4, 24)}), ("(4, 24)", "(4, 16)")),
    "other rank": (lambda s: s.update({f"{QUERY}.lora_A": torch.ones(6, 16)}), ("rank 6", "init_r=6")),
    "other scale": (lambda s: s[f"{QUERY}.ranknum"].fill_(12.0), ("ranknum", "12.0", "4.0")),
    "NaN": (lambda s: s[f"{QUERY}.lora_B"].fill_(float("nan")), (f"{QUERY}.lora_B", "NaN")),
    "infinite head": (lambda s: s["classifier.bias"].fill_(float("inf")), ("classifier.bias", "infinite")),
    "another layer": (
        lambda s: s.update({"bert.pooler.dense.lora_A": torch.ones(4, 16)}),
        ("bert.pooler.dense", "target_modules"),
    ),
    "no tensor": (lambda s: s.update(extra="text"), ("extra", "str")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_refused_and_nothing_changed(damage):
    spoil, pieces = DAMAGES[damage]
    state = {name: tensor.clone() for name, tensor in official().state_dict().items()}
    spoil(state)
    model = target()
    weights = trained_weights(model)
    with one_line(ValueError, *pieces):
        import_official(state, model)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in trained_weights(model).items())


class Boom:
    """Unpickling it would show."""

    def __reduce__(self):
        return pytest.fail, ("unpickled",)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "checkpoint"])
def test_pickles_are_not_opened(name, tmp_path):
    (tmp_path / name).write_bytes(pickle.dumps(Boom()))
    with one_line(ValueError, tmp_path / name, "only .safetensors", "save_file"):
        import_official(tmp_path / name, target())


def test_a_pickle_under_another_name(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(pickle.dumps(Boom()))
    with one_line(ValueError, path, "not a readable checkpoint"):
        import_official(path, target())
    with one_line(ValueError, "no file", tmp_path / "nowhere.safetensors"):
        import_official(tmp_path / "nowhere.safetensors", target())


def test_a_plain_model():
    with one_line(TypeError, "BertForSequenceClassification", "get_peft_model"):
        import_official(official().state_dict(), bert())


# -- and then no training ----------------------------------------------------------------------


KEPT = sum(len(kept_of(index)) for index in range(6))


@pytest.mark.parametrize("target_r", [1, 2, 3])
def test_finalize_keeps_what_was_trained(target_r):
    """Of more triplets than the budget the largest |λ|; of fewer, all."""
    theirs, model = official(), target(init_r=4, target_r=target_r)
    import_official(theirs.state_dict(), model)
    allocator = model.base_model.rankallocator
    sizes = torch.cat([values.detach().flatten() for values in allocator.lambdas()]).abs()
    with pytest.warns(UserWarning, match=r"the largest \|λ\| are kept"):
        allocator.finalize()
    kept = torch.tensor([keep for layer in allocator.rank_pattern().values() for keep in layer])
    budget = 6 * target_r
    assert kept.sum() == budget and sizes[kept].min() >= sizes[~kept].max()
    assert budget < KEPT or off(logits(model), expected(theirs)) <= 1e-6


def test_an_allocator_that_was_elsewhere_starts_again():
    """Its statistics and its mask were of other weights."""
    model = target(total_step=12, tinit=0, tfinal=4, deltaT=1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(12):
        model.train()(**batch(step)).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    theirs, allocator = official(), model.base_model.rankallocator
    assert allocator.is_final
    import_official(theirs.state_dict(), model)
    assert allocator.t == 0 and not allocator.is_final
    assert off(logits(model.eval()), expected(theirs)) <= 1e-6


def test_a_native_model_imports_and_keeps_what_was_trained():
    model = make_model((4, 4, 4), dtype=torch.float32)
    names = [name for name, _ in model.named_modules() if name in ("0", "2", "4")]
    source = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name in names:
        source[f"{name}.lora_E"][1:3] = 0
        source[f"{name}.lora_E"][3] = 2.0
    other = make_model((4, 4, 4), dtype=torch.float32, seed=1)
    allocator = make_allocator(other, target_total_rank=6)
    import_official(source, other)
    with pytest.warns(UserWarning, match=r"the largest \|λ\| are kept"):
        allocator.finalize()
    assert list(allocator.rank_pattern().values()) == 3 * [[True, False, False, True]]
