"""Two results compared: what counts as slower, and what does not."""

import pytest

from benchmarks.report.compare import compare
from tests.benchmarks.report.made import everything, results, row


def pair(old, new, **changes):
    return results([row(value=old)]), results([row(value=new, **changes)])


def test_nothing_changed():
    found = compare(everything(), everything())
    assert not found.regressions and not found.improvements and found.unchanged == 18
    assert str(found) == "0 slower by more than 1.1, 0 faster, 18 unchanged"


def test_a_slowdown_beyond_threshold_and_spread():
    found = compare(*pair(1.0, 1.5))
    assert [str(change) for change in found.regressions] == [
        "step: a case, adalora_fast: 1.000 → 1.500 of the baseline (1.50x)"
    ]
    assert compare(*pair(1.0, 1.5), threshold=1.6).unchanged == 1
    assert compare(*pair(1.0, 1.05)).unchanged == 1


def test_noise_does_not_count():
    assert compare(*pair(1.0, 1.5, p20=0.9)).unchanged == 1  # the old median is within today's spread
    old = results([row(value=1.0, p80=1.7)])
    assert compare(old, results([row(value=1.5)])).unchanged == 1  # today's median within the old spread


def test_a_faster_one_is_no_failure():
    found = compare(*pair(1.5, 1.0))
    assert not found.regressions and len(found.improvements) == 1


def test_ratios_are_compared_and_not_times():
    old = results([row(value=1.0, ratio=1.2)])
    new = results([row(value=50.0, ratio=1.2, p20=49.0, p80=51.0)], device="another-gpu")
    found = compare(old, new)
    assert found.unchanged == 1
    assert found.notes == ["note: measured on nvidia-h200 before and another-gpu now"]


def test_what_was_measured_before_and_is_missing_now_counts():
    new = results([row(value=None, ratio=None, missing="out of memory")])
    found = compare(results([row()]), new)
    assert "missing now (out of memory)" in str(found) and len(found.regressions) == 1


def test_only_ours_is_judged():
    old = results([row(), row(contestant="peft", value=1.0)])
    new = results([row(), row(contestant="peft", value=9.0)])
    assert compare(old, new).unchanged == 1


def test_cases_of_the_old_file_alone_are_noted():
    found = compare(results([row(), row(case="another")]), results([row()]))
    assert found.notes == ["note: 1 cases of the old file are not in the new one"] and found.unchanged == 1


@pytest.mark.parametrize(
    ("old", "new", "options", "said"),
    [
        (results([row()]), results([row()]), {"threshold": 1.0}, "must be above 1, got 1.0"),
        (results([row()]), results([row()], scale="tiny"), {}, "scale 'tiny'"),
        (results([row()]), results([row(case="other")]), {}, "no case in common"),
    ],
)
def test_what_is_refused(old, new, options, said):
    with pytest.raises(ValueError, match=said):
        compare(old, new, **options)
