"""A whole step's figures and the step as one graph, at tiny sizes on a CPU with a stand-in for the graph."""

import json
import sys

import pytest
import torch

from benchmarks import whole_step
from benchmarks.suites import models

CPU = torch.device("cpu")
SETTING = whole_step.setting_for(CPU, tiny=True)


def repeated(step):
    """A graph's stand-in: it runs the step again, and writes the loss to the same place."""
    loss = torch.zeros(())

    def replay():
        loss.copy_(step())

    return replay, loss


def test_eager_figures():
    saved = []
    found = whole_step.eager(SETTING, 2, lambda so_far: saved.append(json.dumps(so_far)))
    assert list(found) == list(whole_step.NAMES)
    assert list(json.loads(saved[0])) == ["frozen"]  # what is known is kept
    for name, figures in found.items():
        assert 0 < figures["host ms"]["median"] <= figures["step ms"]["median"] * 1.01
        parts = figures["host ms by part"]
        assert list(parts) == ["forward", "backward", "clipping and optimizer", "allocator", "zero_grad"]
        assert figures["relative to frozen"] > 0, name
    assert found["frozen"]["relative to frozen"] == 1.0


def test_a_contestant_that_fails_costs_no_other_its_figure(monkeypatch):
    def broken(setting):
        raise RuntimeError("out of luck\nand more")

    monkeypatch.setitem(models.TRAINERS, "peft lora", broken)
    monkeypatch.setattr(whole_step, "NAMES", ("frozen", "peft lora"))
    found = whole_step.eager(SETTING, 1, lambda so_far: None)
    assert found["peft lora"] == {"missing": "RuntimeError: out of luck"}
    assert found["frozen"]["step ms"]["median"] > 0


def test_a_graph_needs_a_cuda_device():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    found = whole_step.graphs(SETTING, 1, lambda so_far: None)
    reason = "RuntimeError: a CUDA graph needs a CUDA device; none is visible"
    assert found == {name: {"missing": reason} for name in whole_step.NAMES}


def test_replayed_steps_and_the_allocator_after_them():
    found = whole_step.graphs(SETTING, 1, lambda so_far: None, capture=repeated)
    assert not [figures["missing"] for figures in found.values() if "missing" in figures]
    with_allocator = {name for name, figures in found.items() if "replay and allocator ms" in figures}
    assert with_allocator == {"peft", "adalora_fast"}


def test_a_graph_that_forgets_part_of_the_step_is_not_timed(monkeypatch):
    def forgetful(step):
        """Replays the first step's loss and moves nothing."""
        loss = step()
        return (lambda: None), loss

    monkeypatch.setattr(whole_step, "NAMES", ("adalora_fast",))
    found = whole_step.graphs(SETTING, 1, lambda so_far: None, capture=forgetful)
    assert "the loss of replayed step" in found["adalora_fast"]["missing"]


def test_the_command(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(whole_step, "NAMES", ("frozen",))
    path = tmp_path / "step.json"
    monkeypatch.setattr(sys, "argv", ["whole_step", "--output", str(path), "--tiny", "--rounds", "1"])
    assert whole_step.main() == 0
    content = json.loads(path.read_text())
    assert content["benchmark"] == "whole_step" and content["contestants"]["frozen"]["loss"] > 0
    assert "1.00 x frozen" in capsys.readouterr().out
