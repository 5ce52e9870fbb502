"""The orthogonality term under TRL, whose trainers build their losses: γ∇R once per optimizer step."""

import warnings

import pytest
import torch

from adalora_fast import fuse

pytest.importorskip("trl", reason="trl is not installed")

from tests.integrations.trl_cases import StopAt, factors_of, llama, make, peft_model, settings

KINDS = ["SFT", "DPO", "KTO", "GRPO", "RLOO"]
RATE, GAMMA = 0.5, 0.7


def first_step(kind: str, folder, gamma: float, given: bool, **options):
    """Factors before and after one step of plain gradient descent, and ∇R before it."""
    if kind in ("GRPO", "RLOO"):
        options["beta"] = 0.1
    stop = StopAt(1)
    model, config = llama(), settings(orth_reg_weight=gamma)
    torch.manual_seed(1)
    if given:
        model, config = fuse(peft_model(orth_reg_weight=gamma)), None
    plain = {"optim": "sgd", "learning_rate": RATE, "max_grad_norm": 0.0, **options}
    run = make(kind, model, folder, stop, peft_config=config, **plain)
    before = factors_of(run.model)
    parameters = run.model.base_model.rankallocator.parameters()
    penalty = run.model.base_model.orthogonality_loss()
    gradients = torch.autograd.grad(penalty, parameters, allow_unused=True, materialize_grads=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(the run ended after|final allocation rests)")
        run.train()
    return before, stop.factors, gradients


@pytest.mark.parametrize(("given", "accumulation"), [(False, 2), (True, 1)], ids=["peft_config", "fused"])
@pytest.mark.parametrize("kind", KINDS)
def test_its_gradient_acts_once_per_optimizer_step(kind, accumulation, given, tmp_path):
    options = {"given": given, "gradient_accumulation_steps": accumulation}
    before, without, _ = first_step(kind, tmp_path, 0.0, **options)
    start, with_term, gradients = first_step(kind, tmp_path, GAMMA, **options)
    assert all(torch.equal(left, right) for left, right in zip(before, start, strict=True))
    for i, gradient in enumerate(gradients):
        if i % 3 != 1:  # λ is zero: the task gives A and B no gradient
            assert torch.equal(without[i], before[i]) and gradient.abs().max() > 0
        expected = -RATE * GAMMA * gradient
        torch.testing.assert_close(with_term[i] - without[i], expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    "options", [{"label_smoothing_factor": 0.1}, {"loss_type": "dft"}, {"packing": True}], ids=str
)
def test_whatever_the_loss_of_sft(options, tmp_path):
    before, without, _ = first_step("SFT", tmp_path, 0.0, False, **options)
    _, with_term, gradients = first_step("SFT", tmp_path, GAMMA, False, **options)
    assert not torch.equal(without[1], before[1])
    for i, gradient in enumerate(gradients):
        torch.testing.assert_close(with_term[i] - without[i], -RATE * GAMMA * gradient, rtol=1e-4, atol=1e-7)
