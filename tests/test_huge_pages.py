"""Huge pages, cut at random: what has moved is invalid, and what a cut leaves where it was is not.

/proc/self/pagemap says where each page is, so this is for root.
"""

from __future__ import annotations

import array
import contextlib
import mmap
import os
import random
from collections.abc import Callable

import pytest
from support import require, require_root

from ummunotify import Notifier
from ummunotify.selftest.changes import (
    ANONYMOUS,
    FORK_PAUSE,
    HUGE_PAGE,
    MADV_DONTNEED_LOCKED,
    MREMAP_FIXED,
    MREMAP_MAYMOVE,
    PAGE,
    READ_WRITE,
    Memory,
    call,
    load,
    map_at,
    run_code,
    store,
)

LENGTH = 4 * HUGE_PAGE
UNIT = 16 * PAGE
STEPS = int(os.environ.get("UMMUNOTIFY_CHANGES", 300))


@pytest.fixture(autouse=True)
def root() -> None:
    require_root("only root may know where pages are")


def frames(address: int) -> list[int]:
    """Which page frame is mapped at each page, 0 for none."""
    with open("/proc/self/pagemap", "rb") as pagemap:
        pagemap.seek(address // PAGE * 8)
        entries = array.array("Q", pagemap.read(LENGTH // PAGE * 8))
    return [entry & (1 << 55) - 1 if entry >> 63 else 0 for entry in entries]


def is_zeros(frame: int) -> bool:
    """Is it a page of zeros, which stand for memory that was read and never written? Those of a process stay."""
    # Unbuffered: Python 3.14 would read 16,384 entries, which takes the kernel a millisecond.
    with open("/proc/kpageflags", "rb", buffering=0) as flags:
        flags.seek(frame * 8)
        return bool(int.from_bytes(flags.read(8), "little") >> 24 & 1)


def has_moved(before: int, after: int) -> bool:
    """One page of zeros is as good as another: to split a huge one is no change."""
    return before not in (0, after) and not (after and is_zeros(after) and is_zeros(before))


class Cutting:
    """What is done at random to one mapping. Each cut leaves it whole in the end, or replaces what it unmaps."""

    def __init__(self, memory: Memory, dice: random.Random) -> None:
        self.memory = memory
        self.dice = dice
        self.base = memory.address
        self.child = 0
        self.changes: dict[Callable[[int, int], None], bool] = {
            self.protect: False,
            self.lock: False,
            self.unlock: False,
            self.advise: False,
            self.fork: False,
            self.replace: True,
            self.discard: True,
            self.move_over: True,
            self.make_huge: True,
            self.touch: True,
        }
        """Whether they always may change more than the caller can tell."""

    def protect(self, address: int, length: int) -> None:
        call("mprotect", address, length, self.dice.choice((mmap.PROT_READ, READ_WRITE, READ_WRITE)))

    def lock(self, address: int, length: int) -> None:
        with contextlib.suppress(OSError):
            call("mlock", address, length)

    def unlock(self, address: int, length: int) -> None:
        call("munlock", address, length)

    def advise(self, address: int, length: int) -> None:
        for advice in self.dice.sample((mmap.MADV_DONTDUMP, mmap.MADV_DODUMP, mmap.MADV_RANDOM, mmap.MADV_NORMAL), 2):
            call("madvise", address, length, advice)

    def fork(self, address: int, length: int) -> None:
        """A child that shares the memory, for some time."""
        del address, length
        self.reap()
        self.child = run_code(FORK_PAUSE)

    def reap(self) -> None:
        if self.child:
            os.kill(self.child, 9)
            os.waitpid(self.child, 0)
            self.child = 0

    def replace(self, address: int, length: int) -> None:
        map_at(address, length)

    def discard(self, address: int, length: int) -> None:
        call("madvise", address, length, MADV_DONTNEED_LOCKED)

    def move_over(self, address: int, length: int) -> None:
        other = call("mmap", 0, length, READ_WRITE, ANONYMOUS, -1, 0)
        call("mremap", other, length, length, MREMAP_MAYMOVE | MREMAP_FIXED, address)

    def make_huge(self, address: int, length: int) -> None:
        """As in the beginning."""
        del address, length
        map_at(self.base, LENGTH)
        call("madvise", self.base, LENGTH, mmap.MADV_HUGEPAGE)
        if self.dice.random() < 0.3:  # the huge page of zeros
            for huge in range(self.base, self.base + LENGTH, HUGE_PAGE):
                load(huge)
        else:
            self.touch(self.base, LENGTH)

    def touch(self, address: int, length: int) -> None:
        call("mprotect", address, length, READ_WRITE)
        for page in range(address, address + length, PAGE):
            store(page)

    def step(self) -> tuple[str, bool, range]:
        """What was done, whether that may change more than it was told to, and to which addresses."""
        change = self.dice.choice(list(self.changes))
        first = self.dice.randrange(LENGTH // PAGE)
        last = (
            self.dice.randrange(first, LENGTH // PAGE) if self.dice.random() < 0.3 else min(first + 40, LENGTH // PAGE)
        )
        address, length = self.base + first * PAGE, max(1, last - first) * PAGE
        length = min(length, self.base + LENGTH - address)
        change(address, length)
        return change.__name__, self.changes[change], range(address, address + length)


def test_at_random(umn: Notifier) -> None:
    if umn.source == "uffd":
        pytest.skip("userfaultfd does not tell of copies on write")
    seed = random.randrange(1 << 32)
    dice = random.Random(seed)
    with Memory() as memory:
        memory.unit, memory.count = HUGE_PAGE, LENGTH // HUGE_PAGE
        memory.reserve()
        cutting = Cutting(memory, dice)
        memory.undo.callback(cutting.reap)
        try:
            cutting.make_huge(memory.address, LENGTH)
        except OSError as error:
            require("changes", f"no huge pages: {error}")
        regions = [umn.watch((memory.address + offset, UNIT)) for offset in range(0, LENGTH, UNIT)]
        needless = steps = 0
        before = frames(memory.address)
        for number in range(STEPS):
            name, much, told = cutting.step()
            after = frames(memory.address)
            pages = UNIT // PAGE
            moved = {page // pages for page in range(len(before)) if has_moved(before[page], after[page])}
            missed = [unit for unit in moved if regions[unit].valid]
            assert not missed, f"seed {seed}, step {number}: {name} of {told} moved the pages of units {missed}"
            if not much:
                steps += 1
                needless += any(
                    not region.valid and not (told.start < region.address + UNIT and region.address < told.stop)
                    for region in regions
                )
            umn.read()
            for region in regions:
                if not region.valid:
                    region.renew()
            before = frames(memory.address)
        print(f"{umn.source}: {STEPS} changes, {needless} of {steps} that cut told of more than was cut")
