"""Running a module's tests once per backend of an op."""

import os

import pytest

from adalora_fast.ops.dispatch import backend


def force(name: str) -> None:
    """Choose ``name`` for every op, as the environment variable does; "auto" undoes it."""
    os.environ[backend.VARIABLE] = name
    backend.choose.cache_clear()
    backend.kernel.cache_clear()


def each_backend(op: str, *names: str):
    """An automatic fixture for a test module: all its tests, once with each of the backends ``names``.

    "auto" is what users have: the fastest for each op.
    """

    @pytest.fixture(scope="module", params=names, autouse=True)
    def backend_in_use(request):
        before = os.environ.get(backend.VARIABLE, "auto")
        force(request.param)  # the interpreter of Triton runs only where it is asked for
        reason = None if request.param == "auto" else backend._refusal(op, request.param, "cpu")
        if reason is not None:
            force(before)
            pytest.skip(reason)
        yield request.param
        force(before)

    return backend_in_use
