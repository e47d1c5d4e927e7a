"""Every exception that ummunotify raises on purpose.

Each is an `UmmunotifyError`, and where it fits also the built-in exception that callers may expect.
When one is raised nothing has changed: no region was added, removed or renewed. The words of most come from the C
library, which says the same to C programs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence


class UmmunotifyError(Exception):
    """The base class of them all."""


class InvalidRangeError(UmmunotifyError, ValueError):
    """An address range that is empty, wraps round or does not lie in user space."""

    def __init__(self, message: str, address: int = 0, length: int = 0) -> None:
        super().__init__(message)
        self.address = address
        self.length = length


class InvalidBufferError(UmmunotifyError, BufferError):
    """A buffer without one address range: not contiguous, or released."""


class CookieInUseError(UmmunotifyError, ValueError):
    """A region with this cookie is already watched through the same notifier."""

    def __init__(self, cookie: int) -> None:
        super().__init__(f"a region with cookie {cookie:#x} is already watched")
        self.cookie = cookie


class InvalidCookieError(UmmunotifyError, ValueError):
    """A cookie that is not an unsigned 64-bit number."""

    def __init__(self, cookie: object) -> None:
        super().__init__(f"a cookie is a number from 0 to 2**64 - 1, not {cookie!r}")
        self.cookie = cookie


class UnknownRegionError(UmmunotifyError, ValueError):
    """A region that is no longer watched, or that belongs to another notifier."""


class UnsupportedMemoryError(UmmunotifyError):
    """Memory whose changes the source cannot see, or not all of them.

    `mapping` is the one to blame, as /proc/self/maps has it, or None. `reason` says why.
    """

    def __init__(self, message: str, address: int, length: int, mapping: str | None, reason: str) -> None:
        super().__init__(message)
        self.address = address
        self.length = length
        self.mapping = mapping
        self.reason = reason


class TooManyRegionsError(UmmunotifyError):
    """A limit is reached: `max_regions` regions are watched, or the table cannot grow (the message says why not)."""


class TooManyNotifiersError(UmmunotifyError):
    """The source works, and has no room for another notifier of this process; a weaker source is not taken instead."""


class ClosedError(UmmunotifyError, ValueError):
    """The notifier was closed."""


class ForkedError(ClosedError):
    """The notifier belongs to the process that this one was forked from; open a new one here."""


class DescriptorClosedError(UmmunotifyError, OSError):
    """The program has closed or replaced a descriptor of the notifier that is needed for this (`os.closerange`, ...).

    Changes are seen all the same, but this cannot be waited for, or the table cannot grow.
    """


class UnknownSourceError(UmmunotifyError, ValueError):
    """A source or a probe that there is not, asked for by an argument or by UMMUNOTIFY_SOURCE."""


class SourceUnavailableError(UmmunotifyError, RuntimeError):
    """No source of invalidations works here.

    `reasons` says for each source that was tried what is missing and what to do about it.
    """

    def __init__(self, message: str, reasons: Mapping[str, str]) -> None:
        super().__init__(message)
        self.reasons = dict(reasons)


class StacksUnavailableError(SourceUnavailableError):
    """No source here gives the stacks of changes: only a BPF program of the process's own does."""


class UnavailableError(Exception):
    """A source does not work here. Never seen by users: `SourceUnavailableError` collects them."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(f"{reason}; {remedy}" if remedy else reason)
        self.reason = reason
        self.remedy = remedy


class DescriptorLostError(UnavailableError):
    """The program has closed a descriptor of this library's that is needed."""


class RegistrarError(UmmunotifyError):
    """A registrar was used wrongly (closed, in a forked child, a handle that is not its own)."""


class RegistrarUnavailableError(RegistrarError):
    """This registrar cannot work here: a missing package, device, permission or kernel feature."""


class RegistrationError(RegistrarError):
    """The memory was not registered."""


class RegistrationLimitError(RegistrationError):
    """The memory was not registered because a limit is reached; deregistering other helps."""


class DeregistrationError(RegistrarError):
    """Memory that is not used could not be deregistered.

    It counts as registered; flushing or closing the cache tries again. `errors` is what the registrar raised, once for
    each registration.
    """

    def __init__(self, errors: Sequence[Exception]) -> None:
        super().__init__(
            f"{len(errors)} registrations could not be deregistered ({errors[0]}); they count as registered until it "
            "succeeds: flush or close the cache to try again"
        )
        self.errors = list(errors)
