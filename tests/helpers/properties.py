"""Hypothesis where it is installed; where it is not, property tests skip and say so, and the others run."""

import pytest

try:
    from hypothesis import HealthCheck, assume, example, given, settings
    from hypothesis import strategies as st
except ImportError:

    class _Absent:
        """Stands for every strategy."""

        def __getattr__(self, name: str):
            return lambda *arguments, **options: self

    st = HealthCheck = _Absent()

    def assume(condition: object) -> None:
        """Called in tests that do not run."""

    def example(*arguments, **options):
        """Nothing to run it with."""
        return lambda function: function

    def given(*arguments, **options):
        """Skip the test."""
        return pytest.mark.skip(reason="hypothesis is not installed; pip install hypothesis")

    def settings(**options):
        """Nothing to set."""
        return lambda function: function


__all__ = ["HealthCheck", "assume", "example", "given", "settings", "st"]
