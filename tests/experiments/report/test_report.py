"""Tables from result files."""

import json

import pytest

from adalora_fast.experiments.report import find_runs, load_results, results_table
from tests.helpers.tiny import printed, quiet_console


def result(**changes):
    plain = {
        "task": "sst2",
        "method": "fisher",
        "seed": 0,
        "sample": False,
        "primary_metric": "accuracy",
        "primary": 0.81249,
        "trainable_parameters": 1234567,
        "total_rank": 288,
        "seconds": 61.6,
    }
    return plain | changes


def text(*results, **options):
    console = quiet_console()
    console.print(results_table(list(results), **options))
    return printed(console)


def cells(*results, **options):
    """The table's columns and rows as lists of strings."""
    table = results_table(list(results), **options)
    columns = [list(column.cells) for column in table.columns]
    return [str(column.header) for column in table.columns], [list(row) for row in zip(*columns, strict=True)]


def test_one_run():
    head, rows = cells(result())
    assert head == ["method", "accuracy", "parameters trained", "total rank", "seconds"]
    assert rows == [["fisher", "0.812", "1,234,567", "288", "62"]]
    assert "sample" not in text(result())


def test_a_star_marks_a_sample_and_is_explained_once():
    shown = " ".join(text(result(), result(method="gsnr", sample=True)).split())
    assert "0.812*" in shown and shown.count("*") == 2
    assert "* trained or evaluated on a sample of the official data: not comparable" in shown
    _, rows = cells(result(), result(sample=True))
    assert [row[1] for row in rows] == ["0.812", "0.812*"]


def test_several_tasks_and_metrics():
    head, rows = cells(result(), result(task="cola", primary_metric="matthews"))
    assert head[0] == "task" and head[2] == "accuracy or matthews"
    assert [row[0] for row in rows] == ["sst2", "cola"]


def test_the_majority_class():
    _, rows = cells(result(), majority=0.2304)
    assert rows[0] == ["majority class", "0.230", "0", "–", "–"]


def test_the_majority_class_of_several_tasks_has_as_many_cells_as_the_others():
    _, rows = cells(result(), result(task="cola"), majority=0.25)
    assert "majority class" in rows[0] and rows[0][2] == "0.250"


def test_seeds_and_methods_without_ranks():
    _, rows = cells(result(seed=3), result(method="head-only", total_rank=0))
    assert rows[0][0] == "fisher (seed 3)"
    assert rows[1][3] == "–"


@pytest.mark.parametrize("name", ["[a]", "/data/[bold]/x", "[/red]"])
def test_brackets_in_a_title_are_text(name):
    assert f"sst2, {name}" in text(result(), title=f"sst2, {name}")


def write(folder, content=None):
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(content or result()))
    return folder


def test_finding_runs(tmp_path):
    one, two = write(tmp_path / "b" / "one"), write(tmp_path / "a" / "deep" / "two")
    write(tmp_path / "a" / ".three.partial")
    (tmp_path / "empty").mkdir()
    assert find_runs(tmp_path) == [two, one]
    assert find_runs(one) == [one]
    assert find_runs(tmp_path / "empty") == find_runs(tmp_path / "none") == []


def test_only_the_folders_below_decide(tmp_path):
    """Where the user keeps the runs says nothing about them."""
    inside = write(tmp_path / "results.partial" / "run")
    assert find_runs(tmp_path / "results.partial") == [inside]


def test_loading(tmp_path):
    folders = [write(tmp_path / str(i), result(primary=i / 10)) for i in range(3)]
    assert [loaded["primary"] for loaded in load_results(folders)] == [0.0, 0.1, 0.2]


@pytest.mark.parametrize("content", ["{", "[]", '{"loss": 0.1}'])
def test_a_result_that_is_none_of_ours_is_named(tmp_path, content):
    (tmp_path / "result.json").write_text(content)
    with pytest.raises(ValueError, match=r"result\.json"):
        results_table(load_results(find_runs(tmp_path)))
