"""The daemon's log."""

from __future__ import annotations

import logging

log = logging.getLogger("ummunotify.daemon")


def event(level: int, what: str, **fields: object) -> None:
    """Log it with its fields: in the text as key=value, and each by itself for the journal. Never with addresses."""
    text = " ".join([what, *(f"{name}={value}" for name, value in fields.items())])
    log.log(level, "%s", text, extra={"fields": {"event": what, **fields}})
