"""README.md is short, its script runs as it stands, and its commands exist."""

import re
from pathlib import Path

import pytest
from peft import LoraConfig

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.M | re.S)


def test_it_is_read_in_a_minute():
    assert len(README.splitlines()) <= 100


def test_the_script_trains_and_prints_ranks(tmp_path, monkeypatch, capsys):
    """In an empty folder, without a hub: the loss falls, the budget is met, plain LoRA is saved."""
    (script,) = blocks("python")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    exec(compile(script, "README.md", "exec"), {"__name__": "__main__"})
    out = capsys.readouterr().out
    steps = re.findall(r"^step (\d+): loss ([\d.]+), total rank (\d+)$", out, re.M)
    losses, totals = [float(loss) for _, loss, _ in steps], [int(total) for *_, total in steps]
    assert [int(step) for step, *_ in steps] == [20, 40, 60, 80, 100]
    assert losses[-1] < losses[0] - 0.2
    assert totals == sorted(totals, reverse=True) and totals[-1] == 14 * 4
    ranks = {layer: int(rank) for layer, rank in re.findall(r"^(model\.\S+) +(\d+) #*$", out, re.M)}
    assert len(ranks) == 14 and sum(ranks.values()) == totals[-1]
    assert len(set(ranks.values())) > 1, "the allocation left every layer at the same rank"
    saved = LoraConfig.from_pretrained(tmp_path / "adapter")
    assert saved.peft_type == "LORA" and saved.r == max(ranks.values())


@pytest.mark.parametrize("target", ["demo", "test", "docs"])
def test_its_commands_are_targets(target):
    assert re.search(rf"\bmake {target}\b", README)
    assert re.search(rf"^{target}:.*##", (ROOT / "Makefile").read_text(), re.M)


def test_the_quickstart_stands_as_it_is():
    """Others read these lines by machine."""
    (first, *_) = blocks("bash")
    clone, demo, test = first.splitlines()
    assert clone == "git clone <this repository> && cd adalora_fast"
    assert demo.startswith("make demo ") and test.startswith("make test ")
