"""Locks between processes, on every system that Python runs on."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from adalora_fast.environment import writing_to


@contextmanager
def locked(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock ``.NAME.lock`` beside ``path``.

    The lock belongs to the process: the system frees it when the process ends, however it ends. The file of
    the lock goes when the lock is given back; one that a killed process left behind keeps nobody off.

    Args:
        path: what is read and written under the lock. It need not exist; its folder must.
        wait: until another process gives the lock back, instead of raising an error.

    Raises:
        BlockingIOError: another process holds it.
        OSError: the file of the lock cannot be written.
    """
    file = path.with_name(f".{path.name}.lock")
    # Every call has a lock of its own: two of one process keep each other off, too.
    lock = FileLock(file, timeout=-1 if wait else 0, is_singleton=False)
    with writing_to(path.parent):
        is_ours = _acquire(lock)
    if not is_ours:
        raise BlockingIOError(f"another process is at work on {path}; wait for it")
    try:
        yield
    finally:
        # While it is held: later another process may hold it. Windows removes the file by itself on release.
        with suppress(OSError):
            file.unlink()
        lock.release()


def _acquire(lock: FileLock) -> bool:
    try:
        lock.acquire()
    except Timeout:  # an OSError, though nothing is wrong with the file
        return False
    return True
