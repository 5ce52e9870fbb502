"""`adalora-fast bench report | compare`."""

import pytest

from adalora_fast.cli import main
from tests.benchmarks.report.made import everything, results, row


@pytest.fixture
def saved(tmp_path):
    def save(found, name):
        found.write(tmp_path / name)
        return str(tmp_path / name)

    return save


def test_report_prints_tables(saved, capsys):
    assert main(["bench", "report", saved(everything(), "a.json")]) == 0
    out = capsys.readouterr().out
    assert "| deberta 32x128 | 20.0 ms, 205 k tokens/s, events |" in out and "## Goals" in out


def test_report_writes_files(saved, tmp_path, capsys):
    found = everything()
    assert main(["bench", "report", saved(found, "a.json"), "--output", str(tmp_path / "out")]) == 0
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names[-1] == "step_nvidia-h200.svg" and "report.md" in names and len(names) == 9
    assert str(tmp_path / "out" / "report.md") in capsys.readouterr().out


def test_report_finds_the_newest_of_every_device(tmp_path, monkeypatch, capsys):
    for name, seconds in (
        ("gpu/2026-01-01.json", 1.0),
        ("gpu/2026-02-01.json", 2.0),
        ("cpu/2026-01-01.json", 3.0),
    ):
        found = results([row(value=seconds, ratio=None)], device=name.partition("/")[0])
        found.write(tmp_path / "benchmarks/results" / name)
    (tmp_path / "benchmarks/results/cpu/other.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "report"]) == 0
    out = capsys.readouterr().out
    assert "2.00 s" in out and "3.00 s" in out and "1.00 s" not in out


@pytest.mark.parametrize(("new", "code"), [(1.0, 0), (2.0, 1)])
def test_compare_exits_with_one_on_a_slowdown(saved, capsys, new, code):
    files = saved(results([row()]), "old.json"), saved(results([row(value=new)]), "new.json")
    assert main(["bench", "compare", *files]) == code
    assert f"{code} slower by more than 1.1" in capsys.readouterr().out


def test_bad_input_is_a_line(saved, tmp_path, capsys, monkeypatch):
    good = saved(results([row()]), "good.json")
    (tmp_path / "bad.json").write_text("{")
    monkeypatch.chdir(tmp_path)
    for arguments, said in (
        (["report", str(tmp_path / "bad.json")], "is no JSON file"),
        (["report"], "no benchmark results below benchmarks/results"),
        (["compare", good, good, "--threshold", "0.5"], "must be above 1"),
    ):
        assert main(["bench", *arguments]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
