"""The file of benchmark results: round trip, and every kind of damage named in one line."""

import json

import pytest

from benchmarks.report.results import Row, read
from tests.benchmarks.report.made import everything, results, row


def test_a_round_trip(tmp_path):
    before = everything()
    before.write(tmp_path / "a" / "results.json")
    after = read(tmp_path / "a" / "results.json")
    assert after == before
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["results.json"]


def test_what_is_done():
    found = results([row(case="a"), row(case="b", value=None, ratio=None, missing="why"), row("memory", "a")])
    assert found.done() == {("step", "a"), ("step", "b"), ("memory", "a")}


def test_achieved_is_floor_over_time():
    assert row(value=2.0, floor=0.5).achieved == 0.25
    assert row(value=2.0).achieved is None


DAMAGE = {
    "not json": (lambda content: None, "is no JSON file"),
    "a list": (lambda content: [], "no benchmark result"),
    "no rows": (lambda content: {**content, "rows": None}, "is no benchmark result"),
    "another format": (lambda content: {**content, "format": 9}, "format 9, this version reads 1"),
    "a strange field": (lambda content: {**content, "speed": 3}, "speed"),
    "a strange scale": (lambda content: {**content, "scale": "huge"}, "scale 'huge'"),
    "no versions": (lambda content: {**content, "environment": {}}, "the environment lacks 'versions'"),
}
ROW_DAMAGE = {
    "a strange unit": ({"unit": "miles"}, "row 1: unit 'miles'"),
    "a strange clock": ({"clock": "sun"}, "row 1: clock 'sun'"),
    "text for a number": ({"value": "fast"}, "row 1: value is 'fast', not a number"),
    "a negative time": ({"value": -1.0}, "row 1: value is -1.0"),
    "a truth for a number": ({"ratio": True}, "row 1: ratio is True"),
    "no value and no reason": ({"value": None}, "row 1: a row has either a value or the reason"),
    "a value and a reason": ({"missing": "why"}, "row 1: a row has either a value or the reason"),
    "a median outside": ({"p20": 5.0}, "row 1: the median 1.0 is outside of p20 5.0"),
    "a strange name": ({"colour": "red"}, "row 1: .*colour"),
    "twice": ({"case": "first"}, "row 1: step / first / adalora_fast is there twice"),
}


def check(path, said):
    with pytest.raises(ValueError, match=said) as error:
        read(path)
    assert "\n" not in str(error.value) and str(error.value).startswith(str(path))


@pytest.mark.parametrize("name", DAMAGE)
def test_damage(tmp_path, name):
    path = tmp_path / "results.json"
    results([row()]).write(path)
    damage, said = DAMAGE[name]
    content = damage(json.loads(path.read_text()))
    path.write_text("{" if content is None else json.dumps(content))
    check(path, said)


@pytest.mark.parametrize("name", ROW_DAMAGE)
def test_damage_of_a_row(tmp_path, name):
    path = tmp_path / "results.json"
    results([row(case="first"), row(case="second")]).write(path)
    changes, said = ROW_DAMAGE[name]
    content = json.loads(path.read_text())
    content["rows"][1] |= changes
    path.write_text(json.dumps(content))
    check(path, said)


def test_not_a_number_is_not_written(tmp_path):
    path = tmp_path / "results.json"
    results([row()]).write(path)
    before = path.read_text()
    with pytest.raises(ValueError):
        results([Row(suite="a", case="b", what={}, contestant="c", baseline="d", value=float("nan"))]).write(
            path
        )
    assert path.read_text() == before
