"""Hypothesis where it is installed; where it is not, property tests skip and say so, and the others run."""

import pytest

try:
    from hypothesis import given, settings
    from hypothesis import strategies as st
except ImportError:

    class _Absent:
        """Stands for every strategy."""

        def __getattr__(self, name: str):
            return lambda *arguments, **options: self

    st = _Absent()

    def given(*arguments, **options):
        """Skip the test."""
        return pytest.mark.skip(reason="hypothesis is not installed; pip install hypothesis")

    def settings(**options):
        """Nothing to set."""
        return lambda function: function


__all__ = ["given", "settings", "st"]
