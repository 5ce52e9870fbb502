"""The Hugging Face Trainer with AdaLoraCallback in two processes, started by the usual launchers."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.distributed import train
from tests.distributed.runs import agree

LAUNCHERS = {
    "torchrun": "torch.distributed.run --nproc-per-node=2 --rdzv-backend=c10d --rdzv-endpoint=localhost:0",
    "accelerate": "accelerate.commands.launch --multi_gpu --num_processes=2 --num_machines=1 "
    "--mixed_precision=no --dynamo_backend=no --main_process_port=0",  # without a GPU it takes the CPU
}
ROOT = Path(__file__).parents[2]


def launch(launcher: str, *arguments) -> list[dict]:
    """What ``tests.distributed.train`` left in both processes, each started by ``launcher``."""
    command = [sys.executable, "-m", *LAUNCHERS[launcher].split(), "-m", "tests.distributed.train"]
    done = subprocess.run(
        [*command, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return [torch.load(Path(arguments[0]) / f"rank{rank}.pt") for rank in range(2)]


def comparable(found: dict) -> dict:
    """As ``agree`` takes it."""
    return {"masks": found["masks"], "weights": list(found["weights"].values())}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(folder, what both processes of a whole run left)."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, launch("torchrun", folder, 4)


def test_equals_one_process_with_all_of_the_batch(whole, tmp_path):
    _, results = whole
    agree([comparable(found) for found in results])
    run, masks = train.make(tmp_path, 8)
    run.train()
    expected = train.result(run, masks)
    assert len(masks.seen) == 24 and 0 < sum(masks.seen[-1]) < len(masks.seen[-1])
    assert results[0]["masks"] == expected["masks"]
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(results[0]["weights"][name], weight, rtol=1e-10, atol=1e-12, msg=name)


def test_the_orthogonality_term_acts_once(whole):
    """Over accumulated batches, in a loss that is summed by ``num_items_in_batch`` times two processes."""
    _, results = whole
    assert [found["shares"]["free"] for found in results] == pytest.approx([1, 1], rel=1e-6)
    clipped = [found["shares"]["clipped"] for found in results]
    assert clipped[0] == pytest.approx(clipped[1], rel=1e-9) and 0 < clipped[0] < 0.5


def test_resumes_exactly(whole, tmp_path):
    folder, expected = whole
    checkpoint = tmp_path / f"checkpoint-{train.SAVED}"
    shutil.copytree(folder / checkpoint.name, checkpoint)
    for found, before in zip(launch("accelerate", tmp_path, 4, checkpoint), expected, strict=True):
        assert found["masks"] == before["masks"][train.SAVED :]
        for part in ("weights", "state"):
            for name, tensor in before[part].items():
                assert torch.equal(found[part][name], tensor), name
