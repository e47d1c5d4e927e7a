"""What a source says when it cannot be one."""

from __future__ import annotations


class UnavailableError(Exception):
    """A source does not work here. Never seen by users: `SourceUnavailableError` collects them."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(f"{reason}; {remedy}" if remedy else reason)
        self.reason = reason
        self.remedy = remedy
