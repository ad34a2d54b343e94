"""What the log says of an error."""

from __future__ import annotations

import logging
import traceback

logger = logging.getLogger("hybrid.server")


def log_failure(error: BaseException, request: str = "-") -> None:
    """The type of an error and its places in the code."""
    places = [f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)]
    logger.error("request %s failed: %s at %s", request, type(error).__name__, " < ".join(reversed(places[-8:])))
