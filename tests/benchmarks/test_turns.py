"""Contestants in turns: how many rounds, who begins, and ceilings that only grow."""

import time

from benchmarks.roofline import Ceilings
from benchmarks.turns import WARM_UP, take_turns


def test_everyone_has_every_round_and_begins_as_often():
    called = []
    times = take_turns({name: lambda name=name: called.append(name) for name in "abc"}, rounds=6)
    assert {name: len(taken) for name, taken in times.items()} == {"a": 6, "b": 6, "c": 6}
    rounds = ["".join(called[i : i + 3]) for i in range(0, len(called), 3)]
    assert len(rounds) == WARM_UP + 6 and rounds[:4] == ["abc", "bca", "cab", "abc"]


def test_short_rounds_are_repeated_until_the_time_is_over():
    began = time.perf_counter()
    times = take_turns({"a": lambda: time.sleep(0.01)}, rounds=4, seconds=0.2)
    assert 4 < len(times["a"]) <= 20 and time.perf_counter() - began >= 0.2
    assert len(take_turns({"a": lambda: None}, rounds=2, seconds=9.0)["a"]) == 20


def test_the_best_of_two_ceilings():
    one = Ceilings(1.0, {"float32": 5.0, "bfloat16": 1.0})
    other = Ceilings(2.0, {"float32": 3.0, "bfloat16": 4.0})
    assert one.best(other) == Ceilings(2.0, {"float32": 5.0, "bfloat16": 4.0})
