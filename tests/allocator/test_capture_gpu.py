"""A captured tail of the optimizer's step, replayed on a GPU; its stand-in on a CPU for the script itself."""

import json

import pytest
import torch

from adalora_fast import AdaLoraLinear, RankAllocator
from adalora_fast.allocator import capture
from adalora_fast.ops.importance import SIGNALS
from benchmarks.capture import compare, is_proof
from tests.helpers.kernel_cases import DEVICE, NEEDS_GPU
from tests.helpers.tape import Tape


@pytest.mark.parametrize("score", [pytest.param(score, marks=NEEDS_GPU) for score in SIGNALS])
def test_replayed_steps_are_the_eager_ones(score):
    found = compare(DEVICE, score)
    assert is_proof(found), found


def tape_of(run):
    """Recorded at the first step, repeated at all others."""
    tape = None

    def tail():
        nonlocal tape
        if tape is None:
            tape = Tape(run.tail)
        else:
            tape.replay()

    return tail


def test_the_proof_finds_a_difference():
    device = torch.device("cpu")
    found = compare(device, "sensitivity", tape_of)
    assert is_proof(found), found

    def frozen(run):
        tail = tape_of(run)

        def stops_the_clock():
            tail()
            run.allocator._clock._t.fill_(5)

        return stops_the_clock

    found = compare(device, "sensitivity", frozen)
    assert not is_proof(found) and not found["masks_equal"]


def test_nothing_unproven_is_offered(monkeypatch, tmp_path):
    model = torch.nn.Sequential(AdaLoraLinear(8, 8, 4))
    monkeypatch.setattr(capture, "PROOFS", tmp_path)

    def make():
        return RankAllocator(model, target_r=2, total_step=10, capturable=True)

    for content in (None, {"proven": False}):
        if content is not None:
            (tmp_path / "a-gpu.json").write_text(json.dumps(content))
        with pytest.raises(NotImplementedError, match=r"needs a measured run.*use capturable=False"):
            make()
        assert not hasattr(model, "rankallocator")
    (tmp_path / "another-gpu.json").write_text(json.dumps({"proven": True}))
    assert type(make()) is capture.CapturableRankAllocator
