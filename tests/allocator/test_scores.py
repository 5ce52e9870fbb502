"""The scores as data: names, defaults, and adding one's own."""

import pytest
import torch

from adalora_fast.allocator import scores
from adalora_fast.allocator.scores import (
    get_score,
    register_score,
    resolve_smoothing,
    score_names,
    statistic_names,
)


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    monkeypatch.setattr(scores, "_scores", dict(scores._scores))


def fisher(w, g, state):
    return g * g


@pytest.mark.parametrize(
    ("name", "smoothing", "min_updates"),
    [
        ("sensitivity", "ema_uncertainty", 1),
        ("movement", "ema", 1),
        ("fisher", "ema", 1),
        ("gsnr", "none", 2),
        ("magnitude", "none", 1),
    ],
)
def test_built_in(name, smoothing, min_updates):
    score = get_score(name)
    assert (score.name, score.smoothing, score.min_updates) == (name, smoothing, min_updates)
    assert score.function is None and score.source
    assert resolve_smoothing(score, None) == smoothing
    assert name in score_names()


@pytest.mark.parametrize("smoothing", ["ema_uncertainty", "ema", "sum", "none"])
@pytest.mark.parametrize("name", ["sensitivity", "movement", "fisher", "gsnr", "magnitude"])
def test_every_smoothing_goes_with_every_score(name, smoothing):
    assert resolve_smoothing(get_score(name), smoothing) == smoothing
    kept = statistic_names(name, smoothing)
    assert len(kept) == len(set(kept)) >= 1
    if name == "gsnr":
        assert kept[:2] == ("mean", "variance")


@pytest.mark.parametrize("name", ["Sensitivity", "", "entropy", None])
def test_unknown_score(name):
    with pytest.raises(
        ValueError, match=r"score .* is not one of .*'sensitivity'.*register_score\(\) adds your own"
    ):
        get_score(name)


@pytest.mark.parametrize("smoothing", ["EMA", "", "median"])
def test_unknown_smoothing(smoothing):
    with pytest.raises(ValueError, match=f"smoothing '{smoothing}' is not one of"):
        resolve_smoothing(get_score("fisher"), smoothing)
    with pytest.raises(ValueError, match=f"smoothing '{smoothing}' is not one of"):
        register_score("mine", fisher, smoothing=smoothing)
    assert "mine" not in score_names()


def test_register():
    score = register_score("mine", fisher, smoothing="ema", source="a note", min_updates=3)
    assert get_score("mine") is score and score.function is fisher
    assert (score.smoothing, score.source, score.min_updates) == ("ema", "a note", 3)
    assert score_names()[-1] == "mine"
    assert statistic_names("mine", "ema") == ("ema",)


def test_a_name_is_taken_once():
    register_score("mine", fisher)
    for name in ("mine", "sensitivity"):
        with pytest.raises(ValueError, match=f"'{name}' exists already; choose another name"):
            register_score(name, fisher)
    assert get_score("sensitivity").function is None


@pytest.mark.parametrize("function", [None, 3, "fisher"])
def test_the_function_must_be_callable(function):
    with pytest.raises(TypeError, match=r"must be callable as function\(w, g, state\)"):
        register_score("mine", function)
    assert "mine" not in score_names()


def test_a_score_cannot_be_changed():
    with pytest.raises(AttributeError):
        get_score("fisher").smoothing = "none"


def test_functions_of_the_built_in_scores_agree_with_their_names():
    from adalora_fast.ops.importance import SIGNALS

    w, g = torch.tensor([2.0, -3.0]), torch.tensor([-1.0, -4.0])
    want = {
        "sensitivity": [2.0, 12.0],
        "movement": [2.0, -12.0],
        "fisher": [1.0, 16.0],
        "magnitude": [2.0, 3.0],
    }
    for name, value in want.items():
        assert SIGNALS[name](w.clone(), g.clone()).tolist() == value
