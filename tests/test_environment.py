"""What is written beside a result, and the report of `python -m adalora_fast`."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

import adalora_fast
from adalora_fast import __main__ as report_module
from adalora_fast import environment as module
from adalora_fast.environment import environment, git_commit, package_versions, write_json
from adalora_fast.ops.dispatch import backend


@pytest.fixture
def backends(monkeypatch):
    """Set the override; registrations and choices are restored afterwards."""
    monkeypatch.setattr(backend, "_implementations", dict(backend._implementations))

    def override(value):
        monkeypatch.setenv(backend.VARIABLE, value)
        backend.choose.cache_clear()
        backend.kernel.cache_clear()

    monkeypatch.delenv(backend.VARIABLE, raising=False)
    backend.choose.cache_clear()
    yield override
    backend.choose.cache_clear()
    backend.kernel.cache_clear()


def test_environment_is_json_and_says_what_ran_where(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/adalora-fast", "demo", "--fast"])
    content = json.loads(json.dumps(environment()))
    assert set(content) == {"started", "commit", "versions", "machine", "command"}
    assert content["command"] == ["adalora-fast", "demo", "--fast"]  # no path of the user's machine
    assert content["started"].endswith("+00:00")
    assert content["machine"]["processors"] == os.cpu_count() and content["machine"]["threads"] >= 1
    assert set(content["machine"]) == {"platform", "processor", "processors", "threads", "gpus"}


def test_versions():
    versions = package_versions()
    assert versions["python"] == ".".join(map(str, sys.version_info[:3]))
    import peft
    import torch

    assert versions["torch"] == torch.__version__ and versions["peft"] == peft.__version__
    assert set(versions) <= {"python", *module.PACKAGES}


def test_a_package_that_is_not_installed_is_left_out(monkeypatch):
    def version(name):
        if name == "datasets":
            raise module.PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(module, "version", version)
    assert "datasets" not in package_versions() and package_versions()["torch"] == "1.0"


@pytest.fixture
def repository(tmp_path):
    def git(*arguments):
        names = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *names, *arguments], cwd=tmp_path, check=True, capture_output=True)

    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "code.py").write_text("1\n")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "one")
    return tmp_path


def test_commit(repository):
    package = repository / "package"
    commit = git_commit(package)
    assert len(commit) == 40 and set(commit) <= set("0123456789abcdef")
    (repository / "notes.txt").write_text("beside the package")
    (repository / "benchmarks" / "results" / "cpu").mkdir(parents=True)
    (repository / "benchmarks" / "results" / "cpu" / "today.json").write_text("{}")
    assert git_commit(package) == commit
    for edited in (repository / "benchmarks" / "suite.py", package / "code.py"):
        before = edited.read_text() if edited.exists() else None
        edited.write_text("2\n")
        assert git_commit(package) == f"{commit}+changes"
        edited.unlink() if before is None else edited.write_text(before)
    assert git_commit(package) == commit


def test_no_commit(tmp_path, repository, monkeypatch):
    (repository / "venv").mkdir()
    (repository / "venv" / "installed.py").write_text("")
    assert git_commit(repository / "venv") is None  # a copy inside somebody else's repository
    monkeypatch.setenv("PATH", "")
    assert git_commit(repository / "package") is None  # no git at all


def test_no_commit_outside_of_a_repository(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_commit(tmp_path) is None


def test_json_is_written_whole(tmp_path):
    path = tmp_path / "deep" / "file.json"
    write_json(path, {"a": [1, 2.5, None], "β": "ü"})
    assert json.loads(path.read_text()) == {"a": [1, 2.5, None], "β": "ü"}
    assert path.read_text().endswith("\n") and [p.name for p in path.parent.iterdir()] == ["file.json"]


@pytest.mark.parametrize("failure", ["content", "replace", "disk"])
def test_json_or_nothing(tmp_path, monkeypatch, failure):
    path = tmp_path / "file.json"
    write_json(path, {"old": 1})
    content = {"new": 2}
    if failure == "content":
        content = {"new": object()}
    elif failure == "replace":
        monkeypatch.setattr(module.os, "replace", lambda *a: (_ for _ in ()).throw(OSError("no")))
    else:
        write = module.Path.write_text

        def half(self, text, *arguments, **options):
            write(self, text[:3])
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(module.Path, "write_text", half)
    with pytest.raises((TypeError, OSError)):
        write_json(path, content)
    monkeypatch.undo()
    assert json.loads(path.read_text()) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["file.json"]


def sections(text):
    """{device: {op: (backend, {other backend: reason})}} of the report."""
    found, ops, reasons = {}, {}, {}
    for line in text.splitlines():
        words = line.split()
        if line.startswith("on "):
            ops = found.setdefault(words[1], {})
        elif line.startswith("    not "):
            reasons[words[1]] = " ".join(words[2:])
        elif found and len(words) == 2:
            reasons = {}
            ops[words[0]] = (words[1], reasons)
    return found


def test_report_names_every_op_and_a_reason_for_every_not(backends):
    text = report_module.report()
    assert text.startswith(f"adalora_fast {adalora_fast.__version__}\n")
    for name, version in package_versions().items():
        assert name == "adalora_fast" or any(line.split() == [name, version] for line in text.splitlines())
    found = sections(text)
    assert set(found) == {"cpu", "cuda"}
    for device, ops in found.items():
        assert tuple(ops) == backend.OPS
        for op, (chosen, reasons) in ops.items():
            assert chosen == backend.choose(op, device).backend
            assert set(reasons) == set(backend.BACKENDS) - {chosen}
            assert all(reasons.values())


def test_report_without_a_gpu_says_why(backends):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    why = "built without CUDA" if torch.version.cuda is None else "no CUDA device is visible"
    text = report_module.report()
    assert why in text and "on cuda (if there were one)" in text


def test_report_of_a_forced_backend(backends):
    backends("reference")
    for ops in sections(report_module.report()).values():
        assert {chosen for chosen, _ in ops.values()} == {"reference"}


def test_report_of_a_backend_that_serves_one_device(backends):
    """Forcing the CPU's kernels is right on the CPU; the report says so, and why not on a GPU."""

    def refusal(device_type):
        return None if device_type == "cpu" else "it runs on the CPU only"

    for op in backend.OPS:
        backend.register(op, "cpu", SimpleNamespace(), refusal)
    backends("cpu")
    text = report_module.report()
    assert {chosen for chosen, _ in sections(text)["cpu"].values()} == {"cpu"}
    assert "it runs on the CPU only" in text


@pytest.mark.parametrize("value", ["nonsense", "cuda,cpu"])
def test_an_unknown_backend_is_one_line(backends, capsys, monkeypatch, value):
    backends(value)
    monkeypatch.setattr(sys, "argv", ["adalora_fast"])
    assert report_module.main() == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"adalora_fast: ADALORA_FAST_BACKEND={value!r} is not one of")
    assert captured.err.count("\n") == 1


def test_as_a_command():
    done = subprocess.run(
        [sys.executable, "-m", "adalora_fast"],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {backend.VARIABLE: "nonsense"},
        cwd=os.path.dirname(os.path.dirname(__file__)),
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "ADALORA_FAST_BACKEND='nonsense'" in done.stderr


def test_arguments_go_to_the_command_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["adalora_fast", "report", str(tmp_path)])
    assert report_module.main() == 2
    assert capsys.readouterr().err == (
        f"adalora-fast: no complete run below {tmp_path}; give the folder that holds them\n"
    )
