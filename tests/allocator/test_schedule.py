"""The budget's schedule against a table worked out by hand, and its invariants."""

from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from adalora_fast.allocator.schedule import BudgetSchedule

GOOD = {"initial": 96, "target": 48, "tinit": 3, "tfinal": 4, "deltaT": 2, "total_step": 17}


def naive(t, *, initial, target, tinit, tfinal, deltaT, total_step):
    """(budget, whether to mask), a transcription of the specification's cases."""
    final = min(total_step - tfinal, total_step - 1)
    if t == final:
        return target, True
    if t > final:
        return target, False
    if t <= tinit:
        return initial, False
    fraction = 1 - (t - tinit) / (total_step - tfinal - tinit)
    return int(target + (initial - target) * fraction**3), t % deltaT == 0


def test_by_hand():
    """b(0) = 10, b(T) = 2, tinit = 2, T - tfinal = 6: b = 2 + 8 (1 - (t - 2) / 4)³."""
    schedule = BudgetSchedule(initial=10, target=2, tinit=2, tfinal=4, deltaT=1, total_step=10)
    assert [schedule.budget(t) for t in range(12)] == [10, 10, 10, 5, 3, 2, 2, 2, 2, 2, 2, 2]
    assert [t for t in range(12) if schedule.masks_at(t)] == [3, 4, 5, 6]
    assert schedule.final_step == 6


@pytest.mark.parametrize(
    ("changes", "masked"),
    [
        ({}, [4, 6, 8, 10, 12, 13]),
        ({"deltaT": 1}, list(range(4, 14))),
        ({"deltaT": 5}, [5, 10, 13]),
        ({"deltaT": 100}, [13]),
        ({"tfinal": 0}, [4, 6, 8, 10, 12, 14, 16]),
        ({"tfinal": 1}, [4, 6, 8, 10, 12, 14, 16]),
        ({"tinit": 0, "tfinal": 0, "deltaT": 7}, [7, 14, 16]),
        ({"tinit": 12}, [13]),
        ({"tinit": 16, "tfinal": 0}, [16]),
        ({"tinit": 0, "tfinal": 0, "total_step": 1}, [0]),
        ({"tinit": 0, "tfinal": 1, "total_step": 2}, [1]),
    ],
    ids=str,
)
def test_mask_steps(changes, masked):
    schedule = BudgetSchedule(**{**GOOD, **changes})
    assert [t for t in range(schedule.total_step + 3) if schedule.masks_at(t)] == masked
    assert schedule.budget(schedule.final_step) == schedule.target


@given(
    initial=st.integers(1, 3000),
    cut=st.floats(0, 1),
    total_step=st.integers(1, 300),
    tinit=st.integers(0, 300),
    tfinal=st.integers(0, 300),
    deltaT=st.integers(1, 50),
)
def test_invariants(initial, cut, total_step, tinit, tfinal, deltaT):
    assume(tinit + tfinal < total_step)
    target = max(1, int(initial * cut))
    values = {
        "initial": initial,
        "target": target,
        "tinit": tinit,
        "tfinal": tfinal,
        "deltaT": deltaT,
        "total_step": total_step,
    }
    schedule = BudgetSchedule(**values)
    budgets = [schedule.budget(t) for t in range(total_step + 2)]
    assert all(type(b) is int and target <= b <= initial for b in budgets)
    assert all(earlier >= later for earlier, later in pairwise(budgets))
    for t in range(total_step + 2):
        assert (budgets[t], schedule.masks_at(t)) == naive(t, **values)
    assert schedule.final_step < total_step, "the final mask falls within the run"
    assert sum(schedule.masks_at(t) for t in range(schedule.final_step, total_step + 2)) == 1


@pytest.mark.parametrize("name", ["initial", "target", "tinit", "tfinal", "deltaT", "total_step"])
@pytest.mark.parametrize("value", [1.0, "8", None, True, float("nan")], ids=repr)
def test_integers_only(name, value):
    with pytest.raises(TypeError, match=f"{name} must be an integer, got {value!r}"):
        BudgetSchedule(**{**GOOD, name: value})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"total_step": 0}, "total_step must be at least 1, got 0"),
        ({"total_step": -5}, "total_step must be at least 1, got -5"),
        ({"tinit": -1}, r"tinit \(-1\) and tfinal \(4\) must not be negative"),
        ({"tfinal": -2}, r"tinit \(3\) and tfinal \(-2\) must not be negative"),
        ({"deltaT": 0}, "deltaT must be at least 1, got 0"),
        ({"deltaT": -3}, "deltaT must be at least 1, got -3"),
        ({"tinit": 13}, r"tinit \(13\) \+ tfinal \(4\) must be smaller than total_step \(17\); shorten"),
        ({"tfinal": 17, "tinit": 0}, r"must be smaller than total_step \(17\)"),
        ({"target": 0}, "at least 1 triplet, got 0"),
        ({"target": -1}, "at least 1 triplet, got -1"),
        ({"target": 97}, r"target budget \(97 triplets\) exceeds the initial one \(96\)"),
    ],
    ids=str,
)
def test_out_of_range(changes, said):
    with pytest.raises(ValueError, match=said) as error:
        BudgetSchedule(**{**GOOD, **changes})
    assert "\n" not in str(error.value)


def test_it_cannot_be_changed():
    with pytest.raises(AttributeError):
        BudgetSchedule(**GOOD).target = 3
    with pytest.raises(TypeError):
        BudgetSchedule(96, 48, total_step=17)
