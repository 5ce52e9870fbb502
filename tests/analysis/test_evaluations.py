"""What has been evaluated is not evaluated again, whatever ended the command."""

import json
import os
import signal

import pytest
import torch

from adalora_fast.analysis.analyses import analyze_connectivity
from adalora_fast.analysis.evaluations import Evaluations, mixture_of
from adalora_fast.analysis.progress import AnalysisProgress
from adalora_fast.analysis.rows import Evaluation, RowSet
from tests.helpers.tiny import printed, quiet_console

NAMES = ("lora-2", "lora-4", "adalora-0")


def evaluation(loss):
    return Evaluation(loss=loss, metrics={"accuracy": 0.5})


def numbers(result):
    """A result less what names the machine and the moment."""
    return {name: value for name, value in result.items() if name != "environment"}


@pytest.fixture
def counted(monkeypatch):
    """How often a model is evaluated."""
    done = []
    original = RowSet.evaluate
    monkeypatch.setattr(RowSet, "evaluate", lambda *given: done.append(1) or original(*given))
    return done


@pytest.fixture(autouse=True)
def without_figures(monkeypatch):
    """They take longer than the rest."""
    monkeypatch.setattr("adalora_fast.analysis.plots.connectivity_figures", lambda *given: [])


@pytest.fixture(scope="module")
def whole(runs):
    """The result that nobody interrupted."""
    return analyze_connectivity([runs[name] for name in NAMES], points=5)


def test_a_mixture_is_the_same_both_ways():
    assert mixture_of(["b", "a"], [0.3, 0.7]) == mixture_of(["a", "b"], [1 - 0.3, 0.3])
    assert mixture_of(["b", "a"], [0.3, 0.7]) != mixture_of(["a", "b"], [0.3, 0.7])
    assert mixture_of(["a", "b"], [1.0, 0.0]) == mixture_of(["a"], [1.0])


def test_kept_and_found_again(tmp_path):
    path, numbers = tmp_path / "kept.jsonl", [0.1 + 0.2, 1 / 3]
    with Evaluations(path, "these") as done:
        for place, loss in enumerate(numbers):
            done.add(mixture_of([f"{place}"], [1.0]), evaluation(loss))
        with (
            pytest.raises(BlockingIOError, match=r"another process is at work on .*kept"),
            Evaluations(path, "x"),
        ):
            pass
    with Evaluations(path, "these") as done:
        assert [done.get(mixture_of([f"{i}"], [1.0])).loss for i in range(2)] == numbers  # to the last bit
        assert (done.others, done.damaged) == (0, 0) and mixture_of(["2"], [1.0]) not in done
    with Evaluations(path, "others") as done:
        assert done.others == 2 and mixture_of(["0"], [1.0]) not in done
    with pytest.raises(OSError, match="--output"), Evaluations(tmp_path / "no" / "folder", "x"):
        pass


@pytest.mark.parametrize("torn", [b'{"rows": "these", "mix', b'{"rows"', b"\xff\xfe"])
def test_half_a_line_is_taken_away(tmp_path, torn):
    path, one = tmp_path / "kept.jsonl", mixture_of(["a"], [1.0])
    with Evaluations(path, "these") as done:
        done.add(one, evaluation(1.0))
    before = path.read_bytes()
    path.write_bytes(before + torn)
    with Evaluations(path, "these") as done:
        assert done.get(one) == evaluation(1.0) and done.damaged == 0
        done.add(mixture_of(["b"], [1.0]), evaluation(2.0))
    assert [json.loads(line)["loss"] for line in path.read_text().splitlines()] == [1.0, 2.0]
    path.write_bytes(torn + b"\n[]\n" + before)
    with Evaluations(path, "these") as done:
        assert done.damaged == 2 and one in done


def test_killed(runs, whole, tmp_path, counted):
    """SIGKILL in the middle of the seventh line; then the same numbers as if nothing had happened."""
    folders = [runs[name] for name in NAMES]
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # the parent's threads are not here
        add = Evaluations.add

        def dies(self, mixture, value):
            if len(self._known) == 6:
                self._file.write(b'{"rows": "')
                os.kill(os.getpid(), signal.SIGKILL)
            add(self, mixture, value)

        Evaluations.add = dies
        try:
            analyze_connectivity(folders, points=5, output=tmp_path)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert not (tmp_path / "connectivity.json").exists()
    assert len((tmp_path / "connectivity.jsonl").read_bytes().splitlines()) == 7
    console = quiet_console()
    found = analyze_connectivity(folders, points=5, output=tmp_path, progress=AnalysisProgress(console))
    assert "6 of 12 evaluations are in" in printed(console)
    assert len(counted) == 6 and numbers(found) == numbers(whole)
    assert numbers(analyze_connectivity(folders, points=5, output=tmp_path)) == numbers(whole)
    assert len(counted) == 6


def test_more_runs_points_and_other_settings(runs, tmp_path, counted):
    first = analyze_connectivity([runs["lora-2"], runs["lora-4"]], points=3, output=tmp_path)
    assert len(counted) == 3
    folders = [runs[name] for name in NAMES]
    more = analyze_connectivity(folders, points=3, output=tmp_path)
    assert len(counted) == 3 + 3  # one end and the middles of two paths
    assert more["paths"][0]["loss"] == first["paths"][0]["loss"]
    analyze_connectivity(folders, points=5, output=tmp_path)
    assert len(counted) == 6 + 6  # of the three paths, the quarters
    console = quiet_console()
    analyze_connectivity(folders[:2], points=3, rows=20, output=tmp_path, progress=AnalysisProgress(console))
    assert len(counted) == 12 + 3
    assert "12 lines of" in printed(console) and "other rows or settings" in printed(console)
    half = analyze_connectivity(folders[:2], points=3, output=tmp_path, precision="bf16")
    assert len(counted) == 15 + 3 and half["precision"] == "bf16"
    assert half["paths"][0]["loss"] != first["paths"][0]["loss"]
    assert half["paths"][0]["loss"] == pytest.approx(first["paths"][0]["loss"], rel=0.02)


def test_chosen_pairs(runs, tmp_path, counted):
    folders = [runs[name] for name in ("lora-2", "adalora-0", "lora-4")]
    again = [*folders, runs["lora-2"]]
    result = analyze_connectivity(again, points=3, pairs="within", output=tmp_path)
    assert [(path["a"], path["b"]) for path in result["paths"]] == [(0, 1)] and len(counted) == 2
    assert result["ends"][2:] == [None, None] and result["convexity_gap"][0][2] is None
    assert result["group_means"][0][1] is None and result["group_means"][0][0] == pytest.approx(0, abs=1e-6)
    assert "1 of 1" not in (tmp_path / "connectivity.md").read_text()
