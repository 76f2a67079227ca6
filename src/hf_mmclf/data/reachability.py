"""Whether the Hub can be reached, asked once and before anything is loaded from it."""

from pathlib import Path

import httpx2
from huggingface_hub import constants, is_offline_mode
from huggingface_hub.utils import get_session


def check_reachable(name: str) -> None:
    """
    Check that the Hub can be reached. The libraries that load from it try for minutes.

    Args:
        name (`str`): What is loaded. Files and folders need no Hub.

    Raises:
        `ConnectionError`: If the Hub does not answer within five seconds.
    """
    if is_offline_mode() or Path(name).exists():
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except httpx2.TransportError as error:
        raise ConnectionError(
            f"{name!r} cannot be loaded, because {constants.ENDPOINT} cannot be reached ({error}); if it is in the "
            "cache, set HF_HUB_OFFLINE=1; else give files of this machine, or train with --from_scratch"
        ) from error
