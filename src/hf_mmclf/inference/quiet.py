"""Progress bars and notices of libraries, silenced around calls of our own. Settings of the user stay as they are."""

import logging as standard
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars
from transformers.utils import logging


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Switch off the progress bars of transformers within a block, such as that of weights that are written."""
    enabled, hub_disabled = logging.is_progress_bar_enabled(), are_progress_bars_disabled()
    logging.disable_progress_bar()  # also those of huggingface_hub
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()
            if hub_disabled:
                disable_progress_bars()


@contextmanager
def without_message(logger: str, words: str) -> Iterator[None]:
    """Drop the messages of a logger that contain some words within a block."""

    def keeps(record: standard.LogRecord) -> bool:
        return words not in record.getMessage()

    standard.getLogger(logger).addFilter(keeps)
    try:
        yield
    finally:
        standard.getLogger(logger).removeFilter(keeps)
