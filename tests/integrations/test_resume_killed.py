"""A run that is killed and resumed from its last checkpoint ends as if nothing had happened."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers.trainer_utils import get_last_checkpoint

from tests.helpers.peft_models import no_warning, same_state, same_weights
from tests.helpers.trainers import STEPS
from tests.integrations.killed import make

KILLS = {
    "warm-up": "after:3",
    "budget": "between:11",
    "before the final mask": "between:18",
    "final": "after:21",
}
LAYERS = 13


@pytest.fixture(scope="module", autouse=True)
def deterministic():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The model of a run that nobody stopped."""
    run = make(tmp_path_factory.mktemp("whole"))
    run.train()
    return run.model


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The folder with what is left of the killed runs."""
    folder, root = tmp_path_factory.mktemp("killed"), Path(__file__).parents[2]
    command = [sys.executable, "-m", "tests.integrations.killed", str(folder), *KILLS.values()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.mark.parametrize("phase", KILLS)
def test_the_resumed_run_is_the_whole_run(whole, killed, phase):
    step = int(KILLS[phase].partition(":")[2])
    folder = killed / str(step)
    assert get_last_checkpoint(str(folder)).endswith(f"checkpoint-{(step - 1) // 2 * 2}")
    run = make(folder, seed=77)  # nothing may come from the new model
    with no_warning():
        run.train(resume_from_checkpoint=True)
    assert run.state.global_step == STEPS
    ours, theirs = run.model.base_model.rankallocator, whole.base_model.rankallocator
    assert ours.rank_pattern() == theirs.rank_pattern() and sum(ours.ranks().values()) == 2 * LAYERS
    assert same_weights(run.model, whole)
    assert same_state(ours.state_dict(), theirs.state_dict())
