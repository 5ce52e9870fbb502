"""The pair of processes that the tests of this folder share."""

import pytest

from tests.distributed.processes import Processes


class Pair:
    """Started when first needed, and anew after a failure, which may have left it out of step."""

    def __init__(self) -> None:
        self._processes: Processes | None = None

    def run(self, function, *arguments, **options):
        if self._processes is None:
            self._processes = Processes()
        try:
            return self._processes.run(function, *arguments, **options)
        except BaseException:
            self.end()
            raise

    def end(self) -> None:
        if self._processes is not None:
            self._processes.end()
        self._processes = None


@pytest.fixture(scope="session")
def pair():
    pair = Pair()
    yield pair
    pair.end()
