"""What judges PEFT's suite (`make peft-suite` runs it): comparison, choice of tests, unpacking."""

import io
import tarfile
from types import SimpleNamespace

import pytest
from peft import AdaLoraConfig, LoraConfig

from tests.helpers.peft_models import one_line
from tests.peft_suite import fetch as fetching
from tests.peft_suite.compare import Outcomes, errors, summary
from tests.peft_suite.fetch import fetch, unpack_tests
from tests.peft_suite.plugin import Tally, concerns_adalora

PLAIN = {"a": "passed", "b": "passed", "c": "skipped", "d": "offline"}


def judged(fused: dict[str, str], plain: dict[str, str] = PLAIN, **differences: str) -> list[str]:
    left, right = Outcomes(ends=plain, fused={}), Outcomes(ends=fused, fused={"a": 3})
    return errors(left, right, differences)


def test_all_as_it_must_be():
    assert judged({"a": "passed", "b": "passed"}) == []
    assert judged({"a": "passed", "b": "differs"}, b="a reason") == []


@pytest.mark.parametrize("end", ["failed", "skipped", "offline", "differs", None])
def test_an_unlisted_difference(end):
    fused = {"a": "passed"} | ({"b": end} if end else {})
    (line,) = judged(fused)
    assert line.startswith("b: passes with PEFT's models") and (end or "not run") in line


def test_a_listed_one_that_passes():
    (line,) = judged({"a": "passed", "b": "passed"}, b="a reason")
    assert line.startswith("b: passes, but is listed")


@pytest.mark.parametrize(("name", "end"), [("gone", "not there"), ("c", "skipped"), ("d", "offline")])
def test_a_listed_one_that_is_gone_or_never_passed(name, end):
    (line,) = judged({"a": "passed", "b": "passed"}, **{name: "a reason"})
    assert line.startswith(f"{name}: listed") and end in line


def test_a_failure_of_peft_itself_that_is_no_missing_hub():
    (line,) = judged({"a": "passed", "b": "passed"}, {**PLAIN, "e": "failed"})
    assert line.startswith("e: fails with PEFT's own models")


def test_summary():
    plain, fused = (
        Outcomes(ends=PLAIN, fused={}),
        Outcomes(ends={"a": "passed", "b": "differs"}, fused={"a": 2}),
    )
    assert summary(plain, fused) == (
        "1 pass in both (1 on fused models, the others make none), 1 differ as listed, "
        "1 cannot run offline, 1 skipped by PEFT"
    )


def report(when: str, outcome: str, **properties) -> SimpleNamespace:
    wasxfail = {"wasxfail": ""} if properties.pop("expected", False) else {}
    return SimpleNamespace(
        nodeid="t",
        when=when,
        outcome=outcome,
        failed=outcome == "failed",
        skipped=outcome == "skipped",
        user_properties=list(properties.items()),
        **wasxfail,
    )


@pytest.mark.parametrize(
    ("reports", "end"),
    [
        (
            [report("setup", "passed"), report("call", "passed", fused=1), report("teardown", "passed")],
            "passed",
        ),
        (
            [report("setup", "passed"), report("call", "passed", fused=1), report("teardown", "failed")],
            "failed",
        ),
        ([report("setup", "skipped"), report("teardown", "passed")], "skipped"),
        ([report("setup", "failed", offline=True), report("teardown", "passed")], "offline"),
        ([report("setup", "passed"), report("call", "failed", fused=0, offline=True)], "offline"),
        ([report("setup", "passed"), report("call", "skipped", fused=1, expected=True)], "differs"),
        ([report("setup", "passed"), report("call", "passed", fused=1, expected=True)], "passed"),
    ],
)
def test_how_a_test_ended(reports, end):
    tally = Tally()
    for one in reports:
        tally.note(one)
    assert tally.ends == {"t": end}


def test_the_choice_of_tests():
    def item(nodeid="test_x", function=lambda: LoraConfig, **params):
        call = {"callspec": SimpleNamespace(params=params)} if params else {}
        return SimpleNamespace(nodeid=nodeid, function=function, **call)

    assert concerns_adalora(item("test_x[Vanilla MLP 1 AdaLoRA]"))
    assert concerns_adalora(item(function=lambda: AdaLoraConfig))
    assert concerns_adalora(item(case=["mlp", (AdaLoraConfig, {})]))
    assert concerns_adalora(item(config=AdaLoraConfig(total_step=5)))
    assert not concerns_adalora(item())
    assert not concerns_adalora(item(config=LoraConfig(), function=lambda: AdaLoraConfig))


def archive(path, **members: str) -> None:
    with tarfile.open(path, "w:gz") as file:
        for name, text in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(text)
            file.addfile(member, io.BytesIO(text.encode()))


def test_unpacking(tmp_path):
    archive(
        tmp_path / "a.tar.gz", **{"p-1/tests/test_a.py": "x = 1", "p-1/setup.py": "y", "p-1/tests/c/d": ""}
    )
    unpack_tests(tmp_path / "a.tar.gz", "p-1/tests/", tmp_path / "out")
    found = {
        str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()
    }
    assert found == {"test_a.py", "c/d", "__init__.py"}


@pytest.mark.parametrize("name", ["p-1/tests/../../evil", "p-1/tests//etc/evil"])
def test_unpacking_never_leaves_the_folder(name, tmp_path):
    archive(tmp_path / "a.tar.gz", **{name: "x"})
    try:
        unpack_tests(tmp_path / "a.tar.gz", "p-1/tests/", tmp_path / "out" / "in")
    except tarfile.FilterError:
        assert not (tmp_path / "out" / "in" / "__init__.py").exists()
    outside = [path for path in tmp_path.rglob("evil") if not path.is_relative_to(tmp_path / "out" / "in")]
    assert not outside


def test_an_archive_without_tests(tmp_path):
    archive(tmp_path / "a.tar.gz", **{"p-1/setup.py": "y"})
    with one_line(SystemExit, "a.tar.gz has no p-1/tests/", "make peft-suite again"):
        unpack_tests(tmp_path / "a.tar.gz", "p-1/tests/", tmp_path / "out")


def test_no_package_index(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with one_line(
        SystemExit, "make peft-suite needs the source distribution of peft", "pip could not get it"
    ):
        fetch(tmp_path)
    assert not list(tmp_path.iterdir())


def test_another_version_than_the_pinned_one(monkeypatch):
    monkeypatch.setattr(fetching.metadata, "version", lambda name: "0.1")
    with one_line(SystemExit, "peft 0.1 is installed", "make venv"):
        fetching.pinned_version()
