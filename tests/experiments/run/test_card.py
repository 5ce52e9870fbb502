"""The model card of a run: what was trained on what, how well, by which command, and no path."""

import sys
from pathlib import Path

import pytest

from adalora_fast.integrations.export import export_folder
from tests.helpers.training_runs import read, settings, train

RUNS = {"sensitivity": {}, "lora-r2": {"method": "lora"}}


@pytest.mark.parametrize("label", RUNS)
def test_a_run_s_card(label, encoder, data_dir, tmp_path, monkeypatch):
    words = ["adalora-fast", "train", "--model", str(encoder), f"--output={tmp_path / 'out'}", "--seed", "0"]
    monkeypatch.setattr(sys, "argv", [f"/some/where/bin/{words[0]}", *words[1:]])
    train(settings(encoder, data_dir, **RUNS[label]), tmp_path / "out")
    text = (tmp_path / "out" / "adapter" / "README.md").read_text()
    result = read(tmp_path / "out", "result.json")
    for path in (tmp_path, data_dir, encoder.parent, Path("/some/where")):
        assert str(path) not in text, path
    assert "More Information Needed" not in text
    assert f"| validation | {result['primary']:.4g} |" in text
    assert "train 40 rows, validation 24 rows" in text
    assert f"`adalora-fast train --model {encoder.name} --output=out --seed 0`" in text
    assert "transformers 5" in text or "transformers 4" in text
    assert "learning rate" in text and f"{result['steps']} steps" in text
    ranks = read(tmp_path / "out", "ranks.json")["ranks"]
    for name, rank in ranks.items():
        assert text.count(f"| `{name}` | {rank} |") == 1
    if label != "sensitivity":
        return
    assert "score `sensitivity`, smoothing `ema_uncertainty`" in text
    export_folder(tmp_path / "out" / "adapter", tmp_path / "lora")
    exported = (tmp_path / "lora" / "README.md").read_text()
    assert f"| validation | {result['primary']:.4g} |" in exported and "score `sensitivity`" in exported
    assert str(tmp_path) not in exported and str(encoder.parent) not in exported
