"""One run on two processes, as torchrun starts it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.experiments.sweep.test_sweep import DEFAULTS
from tests.helpers.tiny import write_sst2
from tests.helpers.training_runs import files, lines, read, settings, train

ROOT = Path(__file__).parents[3]


@pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this PyTorch is built without torch.distributed"
)
def test_two_processes_train_one_run(encoder, tmp_path):
    """The same folder as from one process: rows evaluated once and in order, the loss not counted twice."""
    data = write_sst2(tmp_path / "data", train=44, validation=25)  # 25 rows: the last batch is filled up
    (tmp_path / "recipe.json").write_text(json.dumps({"defaults": DEFAULTS}))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [
        "-m",
        "adalora_fast",
        "train",
        "--task",
        "sst2",
        "--model",
        str(encoder),
        "--data-dir",
        str(data),
    ]
    command += ["--recipe", str(tmp_path / "recipe.json"), "--output", str(tmp_path / "two")]
    environment = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command,
        env={**os.environ, **environment, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("total rank 24") == 1  # one of them speaks
    train(settings(encoder, data), tmp_path / "one")
    assert files(tmp_path / "two") == files(tmp_path / "one")
    two, one = (read(tmp_path / name, "result.json") for name in ("two", "one"))
    assert two["steps"] == one["steps"] == 12 and two["total_rank"] == 24
    assert two["train_loss"] == pytest.approx(one["train_loss"], rel=0.05)
    assert two["metrics"]["validation"]["loss"] == pytest.approx(
        one["metrics"]["validation"]["loss"], rel=0.05
    )
    predictions, expected = (
        load_file(tmp_path / name / "predictions.safetensors") for name in ("two", "one")
    )
    assert torch.equal(predictions["validation/labels"], expected["validation/labels"])
    correct = predictions["validation/labels"] == predictions["validation/predictions"]
    assert correct.double().mean().item() == pytest.approx(two["primary"])
    for key in ("budget", "mask"):  # of one process alone
        steps = [line["step"] for line in lines(tmp_path / "two", "allocation.jsonl") if key in line]
        assert steps == sorted(set(steps)) and (key == "mask" or steps[-1] == 12)
