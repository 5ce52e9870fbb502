"""Hysteresis, remembered λ and scores of λ alone, against a loop over triplets in plain Python; and what an
allocator tells of its masks.
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adalora_fast import AdaLoraLinear, register_score
from adalora_fast.allocator import scores
from adalora_fast.allocator.stability import MaskChange, defended, exchange
from adalora_fast.ops import select_triplets
from tests.helpers.scoring import SCORES, SMOOTHINGS
from tests.helpers.small_model import (  # fmt: skip
    SCHEDULE,
    backward,
    kept,
    lambdas,
    make_allocator,
    make_model,
    make_optimizer,
    parameters_of,
    same,
    snapshot,
    train,
)

CHURNING = {"score": "movement", "smoothing": "none", "deltaT": 1}  # masks that change at every step


def selected(order, budget):
    return select_triplets(order, torch.tensor(budget)).tolist()


class TestHysteresis:
    def test_a_pruned_triplet_returns_only_if_it_beats_a_kept_one_by_the_bonus(self):
        values = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0, 4.9, 4.1], dtype=torch.float64)
        kept_before = torch.tensor([1, 1, 1, 0, 0, 0, 0], dtype=torch.bool)
        quarter, upper = sorted(values.tolist())[1], sorted(values.tolist())[4]
        for h in (0.0, 0.1, 0.5, 1.0, 3.0):
            bonus = h * (upper - quarter)
            key = [
                (-(v + bonus * k), i) for i, (v, k) in enumerate(zip(values.tolist(), kept_before.tolist()))
            ]
            best = {i for _, i in sorted(key)[:3]}
            assert selected(defended(values, kept_before, h), 3) == [i in best for i in range(7)], h

    def test_strong_enough_it_freezes_the_mask(self):
        values, before = torch.randn(40), torch.rand(40) < 0.5
        assert selected(defended(values, before, 1e6), int(before.sum())) == before.tolist()

    def test_the_order_among_the_kept_survives_a_bonus_that_dwarfs_them(self):
        """In float32, 1e-12 + 1 is 1: the weakest kept would tie, and the lower position win."""
        values = torch.tensor([1e-12, 3e-12, 2e-12, 0.5, 1.0, 1.5, 2.0, 2.5])
        before = torch.tensor([1, 1, 1, 0, 0, 0, 0, 0], dtype=torch.bool)
        assert selected(defended(values, before, 3.0), 2) == [i in (1, 2) for i in range(8)]

    def test_what_is_no_number_is_pruned_first_and_moves_no_other(self):
        values = torch.tensor([float("nan"), 1.0, 2.0, 3.0, 4.0, float("nan")])
        before = torch.tensor([1, 1, 0, 0, 1, 0], dtype=torch.bool)
        plain = torch.tensor([-9.0, 1.0, 2.0, 3.0, 4.0, -9.0])
        assert selected(defended(values, before, 0.4), 4) == [False, True, True, True, True, False]
        assert selected(defended(values, before, 9.0), 2) == [False, True, False, False, True, False]
        assert selected(defended(plain, torch.zeros_like(before), 0.4), 2) == [0, 0, 0, 1, 1, 0]

    @pytest.mark.parametrize("values", [[0.0] * 8, [0.0] * 7 + [1.0], [float("nan")] * 8])
    def test_scores_without_spread_still_defend_their_places(self, values):
        before = torch.tensor([0, 0, 0, 1, 1, 0, 0, 1], dtype=torch.bool)
        found = selected(defended(torch.tensor(values), before, 1.0), 3)
        assert sum(found) == 3
        if not math.isnan(values[0]):
            assert found == before.tolist()

    @given(st.lists(st.floats(-5, 5, width=16), min_size=1, max_size=30), st.integers(0, 30), st.data())
    def test_without_a_bonus_it_is_the_plain_selection(self, values, budget, data):
        before = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values))))
        values = torch.tensor(values)
        assert selected(defended(values, before, 0.0), budget) == selected(values, budget)

    def test_the_scores_that_are_told_have_no_bonus(self):
        runs = [start(**CHURNING, hysteresis=h) for h in (0.0, 50.0)]
        for run in runs:
            train(*run, range(4))  # the first mask: everything was kept, so nothing can be defended
        assert torch.equal(runs[0][2].scores(), runs[1][2].scores())

    def test_less_churn(self):
        changes = {}
        for h in (0.0, 1.0, 1e6):
            run, changes[h] = start(**CHURNING, hysteresis=h), 0
            for t in range(9):
                train(*run, [t])
                changes[h] += run[2].last_mask_change.revived if t > 2 else 0
        assert changes[0.0] > changes[1.0] >= changes[1e6] == 0

    @pytest.mark.parametrize(
        ("value", "error"),
        [
            (-0.1, ValueError),
            (math.inf, ValueError),
            (math.nan, ValueError),
            (True, TypeError),
            ("1", TypeError),
        ],
    )
    def test_what_is_no_hysteresis(self, value, error):
        with pytest.raises(error, match="hysteresis must be"):
            make_allocator(make_model(), hysteresis=value)


def start(dtype=torch.float64, kind=torch.optim.AdamW, **options):
    model = make_model(dtype=dtype)
    return model, make_optimizer(model, kind), make_allocator(model, **options)


class TestRememberedLambda:
    def test_the_rule_triplet_by_triplet(self):
        """The loop: what is remembered, when it comes back, and that regrown values are dropped."""
        model, optimizer, allocator = start(**CHURNING, remember=True)
        memory, before, returned = [0.0] * 12, [True] * 12, 0
        for t in range(SCHEDULE["total_step"]):
            backward(model, t)
            optimizer.step()
            current = lambdas(model).tolist()
            allocator.step()
            optimizer.zero_grad()
            after, want = kept(allocator), list(current)
            for i in range(12):
                if after[i] and not before[i]:
                    want[i], memory[i], returned = current[i] + memory[i], 0.0, returned + (memory[i] != 0)
                elif before[i] and not after[i]:
                    want[i], memory[i] = 0.0, current[i]
                elif not after[i]:
                    want[i] = 0.0
            assert lambdas(model).tolist() == want, f"step {t}"
            before = after
        assert returned > 3, "nothing came back: the test saw nothing"
        assert len(allocator._remembered) == 0, "kept beyond the final mask"

    def test_off_is_the_run_without_it(self):
        runs = [start(**CHURNING), start(**CHURNING, remember=False, hysteresis=0.0, triplet="full")]
        for run in runs:
            train(*run, range(SCHEDULE["total_step"]))
        assert same(*(snapshot(run[0], run[2]) for run in runs))

    def test_exchange(self):
        memory = torch.tensor([0.0, 1.0, 2.0, 3.0])
        before, after = torch.tensor([1, 0, 0, 1]).bool(), torch.tensor([0, 1, 0, 1]).bool()
        added, new = exchange(memory, before, after, torch.tensor([10.0, 20.0, 30.0, 40.0]))
        assert added.tolist() == [0, 1, 0, 0] and new.tolist() == [10, 0, 2, 3]

    def test_copies_of_lambda_in_the_optimizer_get_it_too(self):
        """Slow weights that did not know of it would take it back."""
        model, optimizer, allocator = start(**CHURNING, remember=True)
        allocator.attach(optimizer, automatic=False)
        layers = [m for m in model.modules() if isinstance(m, AdaLoraLinear)]
        train(model, optimizer, allocator, [0])
        for layer in layers:
            optimizer.state[layer.lora_E]["slow"] = layer.lora_E.detach().clone()
        checked = 0
        for t in range(1, 9):
            backward(model, t)
            slow = torch.cat([optimizer.state[layer.lora_E]["slow"].flatten() for layer in layers])
            optimizer.step()
            before, memory = torch.tensor(kept(allocator)), allocator._remembered.clone()
            allocator.step()
            optimizer.zero_grad()
            returns = torch.tensor(kept(allocator)) & ~before
            now = torch.cat([optimizer.state[layer.lora_E]["slow"].flatten() for layer in layers])
            assert torch.equal(now[returns], (slow + memory)[returns])
            checked += int(returns.sum())
        assert checked

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_lambda_keeps_its_type(self, dtype):
        model = make_model(dtype=torch.float32).to(dtype)
        run = model, make_optimizer(model, torch.optim.SGD), make_allocator(model, **CHURNING, remember=True)
        train(*run, range(9))
        assert {p.dtype for p in parameters_of(run[0])} == {dtype}
        assert run[2]._remembered.dtype == torch.float32

    def test_after_reset_and_rebind_nothing_is_remembered(self):
        run = start(**CHURNING, remember=True)
        train(*run, range(6))
        assert run[2]._remembered.any()
        run[2].rebind()
        assert not run[2]._remembered.any() and len(run[2]._remembered) == 12

    def test_what_is_no_choice(self):
        with pytest.raises(TypeError, match="remember must be True or False, got 'yes'"):
            make_allocator(make_model(), remember="yes")


class TestLambdaAlone:
    @pytest.mark.parametrize("smoothing", SMOOTHINGS)
    @pytest.mark.parametrize("score", SCORES)
    def test_its_score_is_the_term_of_lambda(self, score, smoothing):
        """As long as both prune nothing their runs are one, and S has P's and Q's means besides."""
        options = {"score": score, "smoothing": smoothing, "tinit": 5, "deltaT": 1}
        full, alone = start(**options), start(**options, triplet="lambda")
        full[2].keep_terms = alone[2].keep_terms = True
        for run in (full, alone):
            train(*run, range(7))
        terms = full[2].score_terms()
        torch.testing.assert_close(alone[2].scores(), terms["lora_E"])
        torch.testing.assert_close(sum(terms.values()), full[2].scores())
        assert alone[2]._statistics.values.shape[1] == 12
        assert not any(alone[2].score_terms()[kind].any() for kind in ("lora_A", "lora_B"))

    def test_movement_of_the_task_is_lambdas_own(self):
        """Σ_j P_ji ∂L/∂P_ji = λ_i ∂L/∂λ_i = Σ_j Q_ij ∂L/∂Q_ij, so that for the w that the gradient was taken
        at S_i = −λ_i ∂L/∂λ_i (1 + 1/d1 + 1/d2) (docs/maths.md).
        """
        model = make_model()
        allocator = make_allocator(model, score="movement", smoothing="none")
        allocator.keep_terms = True
        backward(model, 0, gamma=0)
        layers = [m for m in model.modules() if isinstance(m, AdaLoraLinear)]
        want = [
            -(layer.lora_E * layer.lora_E.grad).flatten()
            * (1 + 1 / layer.lora_A.shape[1] + 1 / layer.lora_B.shape[0])
            for layer in layers
        ]
        statistics, parameters = allocator._statistics, allocator.parameters()
        statistics.update_(parameters, [p.grad for p in parameters])
        torch.testing.assert_close(statistics.scores(parameters), torch.cat(want).detach())

    def test_the_budget_is_exact(self):
        run = start(triplet="lambda", **CHURNING, hysteresis=0.5, remember=True)
        for t in range(SCHEDULE["total_step"]):
            train(*run, [t])
            assert sum(kept(run[2])) == run[2].budget
        assert sum(kept(run[2])) == SCHEDULE["target_total_rank"]

    def test_a_registered_score_gets_the_lambdas_alone(self, monkeypatch):
        monkeypatch.setattr(scores, "_scores", dict(scores._scores))
        shapes = []
        register_score("seen", lambda w, g, state: (shapes.append(w.shape), (w * g).abs())[1])
        run = start(score="seen", triplet="lambda")
        train(*run, range(4))
        assert shapes and all(shape[-1] == 1 for shape in shapes)

    def test_what_is_no_triplet(self):
        with pytest.raises(ValueError, match=r"triplet 'P' is not one of \('full', 'lambda'\)"):
            make_allocator(make_model(), triplet="P")


class TestWeightsBeforeTheStep:
    def test_they_are_those_at_which_the_gradient_was_taken(self):
        model, optimizer, allocator = start(score="sensitivity", smoothing="none", weights="before", tinit=5)
        allocator.attach(optimizer, automatic=False)
        backward(model, 0)
        want = torch.cat([(p * p.grad).abs().detach().flatten() for p in parameters_of(model)]).sort().values
        optimizer.step()
        allocator.step()
        torch.testing.assert_close(allocator._statistics.values[0].sort().values, want)
        after = torch.cat([(p * p.grad).abs().detach().flatten() for p in parameters_of(model)]).sort().values
        assert not torch.allclose(after, want), "the optimizer changed nothing: the test saw nothing"

    def test_without_the_optimizer_they_are_not_known(self):
        model, optimizer, allocator = start(weights="before")
        backward(model, 0)
        optimizer.step()
        with pytest.raises(ValueError, match=r"weights='before' needs .* call attach\(optimizer\)"):
            allocator.step()
        with pytest.raises(ValueError, match=r"weights 'during' is not one of \('after', 'before'\)"):
            make_allocator(make_model(), weights="during")


class TestWhatAnAllocatorTells:
    def test_every_mask(self):
        run, before = start(**CHURNING), [True] * 12
        assert run[2].last_mask_change is None and run[2].mask_number == 0
        for t in range(SCHEDULE["total_step"]):
            train(*run, [t])
            if t <= SCHEDULE["tinit"]:
                continue
            after = kept(run[2])
            if t <= 9:
                pairs = list(zip(before, after, strict=True))
                assert run[2].last_mask_change == MaskChange(
                    kept=sum(after), revived=pairs.count((False, True)), dropped=pairs.count((True, False))
                )
                assert run[2].mask_number == t - SCHEDULE["tinit"]
            before = after

    def test_churn_is_the_revived_share_of_the_kept(self):
        assert MaskChange(kept=8, revived=2, dropped=5).churn == 0.25
        assert MaskChange(kept=0, revived=0, dropped=5).churn == 0.0

    def test_terms_are_kept_on_request_only(self):
        run = start()
        train(*run, range(5))
        assert run[2].scores() is not None and run[2].score_terms() is None

    def test_a_loaded_state_has_had_no_mask(self):
        run = start(**CHURNING)
        train(*run, range(6))
        run[2].load_state_dict(run[2].state_dict())
        assert run[2].last_mask_change is None and run[2].mask_number == 0
