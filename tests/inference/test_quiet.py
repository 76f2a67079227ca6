import logging

import pytest
from huggingface_hub.utils import are_progress_bars_disabled
from transformers.utils import logging as transformers_logging

from hf_mmclf.inference.quiet import no_progress_bars, without_message


@pytest.mark.parametrize("enabled", [True, False])
def test_the_users_setting_of_progress_bars_stays(enabled):
    (transformers_logging.enable_progress_bar if enabled else transformers_logging.disable_progress_bar)()
    try:
        with pytest.raises(OSError, match="disk"), no_progress_bars():
            assert not transformers_logging.is_progress_bar_enabled()
            raise OSError("disk")
        assert transformers_logging.is_progress_bar_enabled() == enabled
        assert are_progress_bars_disabled() != enabled
    finally:
        transformers_logging.enable_progress_bar()


def test_one_message_is_dropped_within_the_block(caplog):
    logger = logging.getLogger("some.library")
    with without_message("some.library", "not reliable"):
        logger.warning("time is %s reliable", "not")
        logger.warning("a weight is missing")
    logger.warning("time is not reliable")
    assert caplog.messages == ["a weight is missing", "time is not reliable"]
