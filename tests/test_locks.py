"""Locks between processes hold, are freed however their owner ends, and leave nothing behind."""

import os
import subprocess
import sys
from pathlib import Path

import filelock
import pytest

from adalora_fast.locks import locked

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
HOLD = """
import sys
from pathlib import Path
from adalora_fast.locks import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of ``path`` until its standard input is closed."""
    started = []

    def hold(path):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(path)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT,
        )  # fmt: skip
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield hold
    for process in started:
        process.kill()
        process.communicate()


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_another_process_is_kept_off_until_the_lock_is_given_back(holder, tmp_path):
    path = tmp_path / "run"
    process = holder(path)
    line = f"another process is at work on {path}; wait for it"
    with pytest.raises(BlockingIOError) as refused, locked(path):
        pytest.fail("both have it")
    assert str(refused.value) == line
    with locked(tmp_path / "other"):  # a neighbour is free
        pass
    process.communicate(timeout=30)
    with locked(path):
        assert files(tmp_path) == [".run.lock"]
    assert files(tmp_path) == []


def test_a_killed_process_frees_its_lock(holder, tmp_path):
    path = tmp_path / "run"
    process = holder(path)
    process.kill()
    process.wait(timeout=30)
    assert files(tmp_path) == [".run.lock"]  # its file stays and keeps nobody off
    with locked(path):
        pass
    assert files(tmp_path) == []


def test_waiting(holder, tmp_path):
    path = tmp_path / "plan.json"
    first = holder(path)
    waiting = HOLD.replace("(sys.argv[1]))", "(sys.argv[1]), wait=True)")
    second = subprocess.Popen(
        [sys.executable, "-c", waiting, str(path)],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT,
    )  # fmt: skip
    with pytest.raises(subprocess.TimeoutExpired):
        second.wait(timeout=1)
    first.communicate(timeout=30)
    assert second.communicate(timeout=30)[0] == "held\n" and second.returncode == 0
    assert files(tmp_path) == []


def test_two_of_one_process(tmp_path):
    with (
        locked(tmp_path / "a"),
        pytest.raises(BlockingIOError, match=r"at work on .*a; wait"),
        locked(tmp_path / "a"),
    ):
        pytest.fail("both have it")


def test_a_lock_that_its_owner_took_away_keeps_nobody_off(tmp_path, monkeypatch):
    """A opens the file that B is about to remove: what A gets then must not count as the lock."""
    if sys.platform == "win32":
        pytest.skip("Windows removes no file that is open")
    import fcntl

    real, removed = fcntl.flock, []

    def removed_meanwhile(file, how):
        if not removed:
            removed.append((tmp_path / ".run.lock").unlink())
        return real(file, how)

    monkeypatch.setattr(fcntl, "flock", removed_meanwhile)
    with pytest.raises(BlockingIOError), locked(tmp_path / "run"):
        pytest.fail("it is no lock")
    assert removed and files(tmp_path) == []
    with locked(tmp_path / "run", wait=True):
        assert files(tmp_path) == [".run.lock"]


def test_the_error_of_the_block_is_the_blocks_own(tmp_path):
    with pytest.raises(filelock.Timeout), locked(tmp_path / "run"):
        raise filelock.Timeout("elsewhere")
    with pytest.raises(OSError, match=r"^disk$"), locked(tmp_path / "run"):
        raise OSError("disk")
    assert files(tmp_path) == []


@pytest.mark.parametrize("wait", [False, True])
def test_a_place_where_no_lock_can_be(tmp_path, wait):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(OSError, match=r"^cannot write to .*file \(.*\); choose another --output$"),
        locked(tmp_path / "file" / "run", wait=wait),
    ):
        pytest.fail("written")


def test_no_module_needs_posix():
    """Locks go through filelock: `fcntl` and its like would end the import on Windows."""
    posix = ("fcntl", "resource", "pwd", "grp", "termios")
    for path in (Path(__file__).parents[1] / "adalora_fast").rglob("*.py"):
        lines = path.read_text(encoding="utf-8").splitlines()
        found = [line for line in lines if line.strip().startswith(tuple(f"import {name}" for name in posix))]
        assert not found, (path, found)
