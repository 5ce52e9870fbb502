"""Libraries draw no bars of their own: the progress display speaks for the whole program."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager


def without_model_bars() -> AbstractContextManager[None]:
    """Those of transformers, when it loads or saves."""
    from transformers.utils import logging

    return _off(logging.is_progress_bar_enabled, logging.disable_progress_bar, logging.enable_progress_bar)


def without_table_bars() -> AbstractContextManager[None]:
    """Those of datasets."""
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    return _off(lambda: not are_progress_bars_disabled(), disable_progress_bars, enable_progress_bars)


@contextmanager
def _off(
    are_on: Callable[[], bool], switch_off: Callable[[], None], switch_on: Callable[[], None]
) -> Iterator[None]:
    were_on = are_on()
    if were_on:
        switch_off()
    try:
        yield
    finally:
        if were_on:
            switch_on()
