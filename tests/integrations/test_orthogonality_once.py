"""γ ∇R reaches the gradients once per optimizer step, whoever builds the loss.

λ is zero in these models, so that the task gives lora_A and lora_B no gradient: what they have is R's.
"""

import copy

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainerCallback, TrainingArguments

from adalora_fast import AdaLoraCallback, fuse, orthogonality_loss
from adalora_fast.allocator.regulariser import MISSING_FOR
from tests.helpers import models
from tests.helpers.models import adapted, trainable
from tests.helpers.peft_models import no_warning

GAMMA = 0.5
CONFIG = {"total_step": 1000, "tinit": 10, "tfinal": 10, "orth_reg_weight": GAMMA}


def fused(task_type: str | None = "SEQ_CLS", **options):
    model = fuse(adapted("bert", **{**CONFIG, "task_type": task_type}).double(), **options)
    return model.train()


def batch() -> dict:
    return models.batch(5)


def sides(model) -> list[torch.Tensor]:
    """lora_A and lora_B of every layer."""
    factors = model.base_model.rankallocator.factors()
    return [factor for layer in factors for factor in (layer.lora_A, layer.lora_B)]


def share_of_r(model) -> float:
    """How many times γ ∇R the gradients hold; they must be a multiple of it."""
    alone = copy.deepcopy(model)
    for parameter in alone.parameters():
        parameter.grad = None
    (GAMMA * orthogonality_loss(alone)).backward()
    wanted = torch.cat([factor.grad.flatten() for factor in sides(alone)])
    found = torch.cat([factor.grad.flatten() for factor in sides(model)])
    share = (found.dot(wanted) / wanted.dot(wanted)).item()
    torch.testing.assert_close(found, share * wanted, rtol=1e-9, atol=1e-12)
    return share


def labelled(model, inputs):
    return model(**inputs).loss


def from_logits(model, inputs):
    inputs = dict(inputs)
    labels = inputs.pop("labels")
    return cross_entropy(model(**inputs).logits, labels)


def discarded(model, inputs):
    """The labels stay in the inputs, and the loss that the model returns is not used."""
    return cross_entropy(model(**inputs).logits, inputs["labels"])


def labelled_then_not(model, inputs):
    return labelled(model, inputs) + from_logits(model, inputs)


def not_then_labelled(model, inputs):
    return from_logits(model, inputs) + labelled(model, inputs)


def twice(model, inputs):
    return labelled(model, inputs) + labelled(model, inputs)


def weighed(model, inputs):
    return 0.25 * labelled(model, inputs)


def measured_first(model, inputs):
    """Somebody looks at the gradient's norm before the backward pass."""
    loss = labelled(model, inputs)
    torch.autograd.grad(loss, trainable(model), retain_graph=True)
    return loss


def by_hand(model, inputs):
    return from_logits(model, inputs) + GAMMA * orthogonality_loss(model)


LOSSES = {
    labelled: 1,
    from_logits: 1,
    discarded: 1,
    labelled_then_not: 1,
    not_then_labelled: 1,
    twice: 2,  # under attach() alone every loss gives R the weight that it has there
    weighed: 0.25,
    measured_first: 1,
    by_hand: 1,
}


def step(model, loss, micro_batches: int = 1, clip: float | None = None, weight: float = 1.0):
    """One optimizer step that changes nothing; the gradients stay."""
    allocator = model.base_model.rankallocator
    optimizer = torch.optim.SGD(trainable(model), lr=0.0)
    allocator.attach(optimizer, automatic=False)
    for _ in range(micro_batches):
        (weight * loss(model, batch())).backward()
    if clip is not None:
        torch.nn.utils.clip_grad_norm_(trainable(model), clip)
    optimizer.step()
    allocator.detach()
    return share_of_r(model)


@pytest.mark.parametrize("task_type", ["SEQ_CLS", None])
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
def test_under_attach_alone_the_losss_weight_counts(loss, task_type):
    assert step(fused(task_type), loss) == pytest.approx(LOSSES[loss], rel=1e-9)


@pytest.mark.parametrize("task_type", ["SEQ_CLS", None])
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
def test_under_the_callback_it_acts_once(loss, task_type):
    model = fused(task_type)
    model.base_model.rankallocator.regulariser.act_once(None)
    assert step(model, loss) == pytest.approx(1, rel=1e-9)


@pytest.mark.parametrize("loss", [labelled, from_logits, labelled_then_not], ids=lambda loss: loss.__name__)
@pytest.mark.parametrize(
    "weight", [1.0, 0.25, 2.0]
)  # divided by the micro-batches, or multiplied by processes
def test_under_the_callback_accumulation_changes_nothing(loss, weight):
    model = fused()
    model.base_model.rankallocator.regulariser.act_once(None)
    assert step(model, loss, micro_batches=4, weight=weight) == pytest.approx(1, rel=1e-9)
    for parameter in model.parameters():
        parameter.grad = None
    assert step(model, loss, micro_batches=4, weight=weight) == pytest.approx(1, rel=1e-9)  # in every step


def test_a_frozen_first_layer_does_not_end_the_step_early():
    model = fused()
    allocator = model.base_model.rankallocator
    for factor in allocator.factors()[0]:
        factor.requires_grad_(False)
    allocator.regulariser.act_once(None)
    optimizer = torch.optim.SGD(trainable(model), lr=0.0)
    allocator.attach(optimizer, automatic=False)
    for _ in range(4):
        labelled(model, batch()).backward()
    optimizer.step()
    found = [factor.grad.clone() for factor in sides(model)[2:]]
    for factor in sides(model):
        factor.grad = None
    (GAMMA * orthogonality_loss(model)).backward()
    for one, other in zip(found, sides(model)[2:], strict=True):
        torch.testing.assert_close(one, other.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("after", [labelled, from_logits], ids=lambda loss: loss.__name__)
def test_a_backward_pass_that_is_thrown_away_does_not_take_the_term_along(after):
    model = fused()
    model.base_model.rankallocator.regulariser.act_once(None)
    labelled(model, batch()).backward()
    model.zero_grad()
    assert step(model, after) == pytest.approx(1, rel=1e-9)


def test_the_models_own_loss_is_clipped_with_its_term_and_others_get_it_afterwards():
    own, other = fused(), fused()
    for model in (own, other):
        model.base_model.rankallocator.regulariser.act_once(None)
    assert step(own, labelled, clip=1e-3) < 0.5
    assert step(other, from_logits, clip=1e-3) == pytest.approx(1, rel=1e-9)


def test_the_value_is_in_the_models_loss_and_can_be_read():
    model = fused()
    regulariser = model.base_model.rankallocator.regulariser
    total, task = labelled(model, batch()), from_logits(model, batch())
    assert total.item() == pytest.approx(task.item() + GAMMA * orthogonality_loss(model).item())
    assert regulariser.value.item() == pytest.approx(orthogonality_loss(model).item())


def test_a_step_without_any_adapter_gradient_stays_without():
    model = fused()
    allocator = model.base_model.rankallocator
    head = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([*trainable(model), head], lr=0.1)
    allocator.attach(optimizer, automatic=False)
    head.sum().backward()
    optimizer.step()
    assert all(factor.grad is None for factor in sides(model))


def test_it_reaches_a_layer_that_took_no_part():
    model = fused()
    allocator = model.base_model.rankallocator
    optimizer = torch.optim.SGD(trainable(model), lr=0.0)
    allocator.attach(optimizer, automatic=False)
    from_logits(model, batch()).backward()
    for factor in allocator.factors()[3]:
        factor.grad = None
    optimizer.step()
    assert share_of_r(model) == pytest.approx(1, rel=1e-9)


@pytest.mark.parametrize("once", [False, True], ids=["attach", "callback"])
@pytest.mark.parametrize("by_name", [False, True])
def test_an_optimizer_with_a_closure(once, by_name):
    """The loss is built inside the step, here twice: what it brings counts, nothing is added before it."""
    model = fused()
    allocator = model.base_model.rankallocator
    optimizer = torch.optim.LBFGS(trainable(model), lr=0.0, max_iter=2)
    allocator.attach(optimizer, automatic=False)
    if once:
        allocator.regulariser.act_once(None)

    def closure():
        optimizer.zero_grad()
        loss = labelled(model, batch())
        loss.backward()
        return loss

    from_logits(model, batch()).backward()  # stale gradients, to which the term must not be added
    for _ in range(2):
        optimizer.step(closure=closure) if by_name else optimizer.step(closure)
        assert share_of_r(model) == pytest.approx(1, rel=1e-9)


# -- mixed precision -------------------------------------------------------------------------------


def scaled_step(model, loss, scaler, fused_optimizer: bool, unscale: bool, spoil: bool = False):
    allocator = model.base_model.rankallocator
    optimizer = torch.optim.Adam(trainable(model), lr=0.0, fused=fused_optimizer)
    allocator.attach(optimizer, automatic=False)
    scaler.scale(loss(model, batch())).backward()
    if spoil:
        sides(model)[0].grad.fill_(torch.inf)
    if unscale:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    allocator.detach()


@pytest.mark.parametrize(
    "loss", [labelled, from_logits, labelled_then_not, twice], ids=lambda loss: loss.__name__
)
@pytest.mark.parametrize("fused_optimizer", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("unscale", [False, True], ids=["left scaled", "unscaled"])
def test_with_a_grad_scaler(loss, fused_optimizer, unscale):
    model = fused()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    model.base_model.rankallocator.regulariser.act_once(scaler)
    scaled_step(model, loss, scaler, fused_optimizer, unscale)
    assert share_of_r(model) == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("to_none", [True, False])
def test_a_step_that_the_scaler_skips_does_not_cost_the_next_one_its_term(to_none):
    model = fused()
    regulariser = model.base_model.rankallocator.regulariser
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    regulariser.act_once(scaler)
    scaled_step(model, labelled, scaler, False, True, spoil=True)
    if not to_none:
        regulariser.forget()  # the callback does so after every step
    for parameter in trainable(model):
        parameter.grad = None if to_none else torch.zeros_like(parameter)
    scaled_step(model, labelled, scaler, False, True)
    assert share_of_r(model) == pytest.approx(1, rel=1e-6)


# -- the task's gradient ---------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [labelled, from_logits, discarded], ids=lambda loss: loss.__name__)
@pytest.mark.parametrize("once", [False, True], ids=["attach", "callback"])
@pytest.mark.parametrize("fused_optimizer", [False, True], ids=["plain", "scaled"])
def test_scores_of_the_task_leave_out_exactly_what_was_added(loss, once, fused_optimizer):
    """g² of the task's gradient is the same with and without the term, clipped gradients included."""
    found = []
    for gamma in (GAMMA, 1e-30):
        config = {**CONFIG, "orth_reg_weight": gamma}
        model = fuse(adapted("bert", **config).double(), score="fisher", score_gradient="task").train()
        torch.manual_seed(1)
        for values in model.base_model.rankallocator.lambdas():
            torch.nn.init.normal_(values)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0, enabled=fused_optimizer)
        if once:
            model.base_model.rankallocator.regulariser.act_once(scaler)
        allocator = model.base_model.rankallocator
        optimizer = torch.optim.Adam(trainable(model), lr=0.0, fused=fused_optimizer)
        allocator.attach(optimizer, automatic=True)
        scaler.scale(loss(model, batch())).backward()
        scaler.step(optimizer)
        found.append(allocator._statistics.values.clone())
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-14)


# -- loops without callback and attach() -----------------------------------------------------------


def run_by_hand(model, loss, steps: int) -> None:
    optimizer = torch.optim.SGD(trainable(model), lr=1e-3)
    for t in range(steps):
        loss(model, batch()).backward()
        optimizer.step()
        model.base_model.update_and_allocate(t)
        optimizer.zero_grad()


@pytest.mark.parametrize("loss", [from_logits, discarded], ids=lambda loss: loss.__name__)
def test_a_term_that_never_acts_is_named_once(loss):
    with pytest.warns(UserWarning, match="orthogonality term reached no gradient") as said:
        run_by_hand(fused(), loss, 2 * MISSING_FOR)
    assert sum("orthogonality" in str(each.message) for each in said) == 1


@pytest.mark.parametrize("loss", [labelled, by_hand], ids=lambda loss: loss.__name__)
@pytest.mark.parametrize("task_type", ["SEQ_CLS", None])
def test_a_term_that_acts_is_not_warned_of(loss, task_type):
    with no_warning():
        run_by_hand(fused(task_type), loss, 2 * MISSING_FOR)


def test_without_a_task_type_a_forgotten_allocator_is_noticed_too(monkeypatch):
    monkeypatch.setattr("adalora_fast.integrations.fused.FORGOTTEN_AFTER", 3)
    model = fused(None)
    optimizer = torch.optim.SGD(trainable(model), lr=1e-3)
    with pytest.warns(UserWarning, match="no allocator step"):
        for _ in range(6):
            labelled(model, batch()).backward()
            optimizer.step()
            optimizer.zero_grad()


# -- copies and compiled models --------------------------------------------------------------------


def test_a_copy_has_a_term_of_its_own():
    model = fused()
    model.base_model.rankallocator.regulariser.act_once(None)
    other = copy.deepcopy(model)
    labelled(other, batch()).backward()
    assert other.base_model.rankallocator.regulariser.acted
    assert not model.base_model.rankallocator.regulariser.acted
    assert step(model, twice) == pytest.approx(1, rel=1e-9)


@pytest.mark.parametrize("loss", [labelled, from_logits, twice], ids=lambda loss: loss.__name__)
def test_in_a_compiled_model(loss):
    torch.compiler.reset()
    model = fused()
    model.base_model.rankallocator.regulariser.act_once(None)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        for parameter in model.parameters():
            parameter.grad = None
        assert step(model, lambda _, inputs: loss(compiled, inputs)) == pytest.approx(1, rel=1e-9)


# -- the Trainer -----------------------------------------------------------------------------------


class FirstGradients(TrainerCallback):
    """Keeps the share of γ ∇R in the gradients of the first optimizer step, where λ is still zero."""

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step == 0:
            self.share = share_of_r(model)


class WithoutTheModelsLoss(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        return from_logits(model, inputs)


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("kind", [Trainer, WithoutTheModelsLoss], ids=["own loss", "from logits"])
@pytest.mark.parametrize(
    "arguments", [{}, {"gradient_accumulation_steps": 4}, {"label_smoothing_factor": 0.1}], ids=str
)
def test_under_the_trainer(family, kind, arguments, tmp_path):
    watch = FirstGradients()
    settings = {"max_steps": 2, "per_device_train_batch_size": 2, "max_grad_norm": 0.0, "learning_rate": 0.0}
    run = kind(
        model=adapted(family, **CONFIG).double(),
        args=TrainingArguments(
            str(tmp_path), use_cpu=True, report_to=[], save_strategy="no", **settings, **arguments
        ),
        train_dataset=models.examples(16),
        callbacks=[AdaLoraCallback(), watch],
    )
    run.train()
    assert watch.share == pytest.approx(1, rel=1e-6)
