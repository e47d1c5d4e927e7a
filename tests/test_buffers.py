"""What can be watched: everything whose elements lie next to each other in this process's memory."""

import ctypes
import mmap
from collections.abc import Callable
from typing import Any

import pytest
from support import require, require_module

import ummunotify

np = require_module("numpy")

ARRAY = np.arange(12, dtype=np.int64).reshape(3, 4)


class Interface:
    """Has the array interface and nothing else, as arrays of elements that buffers cannot have do."""

    def __init__(self, **interface: Any) -> None:
        self.__array_interface__ = interface


class Tensor:
    """A DLPack tensor that is nothing else."""

    def __init__(self, array: Any, device: tuple[int, int] = (1, 0)) -> None:
        self._array = array
        self._device = device

    def __dlpack__(self) -> Any:
        return self._array.__dlpack__()

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._device


@pytest.fixture(scope="module")
def notifier() -> Any:
    try:
        opened = ummunotify.open()
    except ummunotify.SourceUnavailableError as error:
        require("bpf", str(error))
    with opened:
        yield opened


@pytest.mark.parametrize(
    "array",
    [
        ARRAY,
        ARRAY.T,
        ARRAY[1:2],
        ARRAY[:, ::1],
        np.array(3.0),
        np.zeros((5, 1, 7))[:, :, :],
        np.zeros(3, "M8[ns]"),
        np.zeros(3, "U5"),
        np.zeros(3, [("a", "i4"), ("b", "S3")]),
    ],
    ids=lambda array: f"{array.dtype}{array.shape}",
)
@pytest.mark.parametrize("wrap", [lambda array: array, lambda array: Interface(**array.__array_interface__)])
def test_arrays(notifier: ummunotify.Notifier, array: Any, wrap: Callable[[Any], Any]) -> None:
    with notifier.watch(wrap(array)) as region:
        assert (region.address, region.length) == (array.ctypes.data, array.nbytes)


@pytest.mark.parametrize("array", [ARRAY, ARRAY.T, ARRAY[1:], np.zeros(5, np.complex64), np.array(True)])
def test_dlpack(notifier: ummunotify.Notifier, array: Any) -> None:
    for device in [(1, 0), (3, 0)]:
        with notifier.watch(Tensor(array, device)) as region:
            assert (region.address, region.length) == (array.ctypes.data, array.nbytes)


@pytest.mark.parametrize(
    ("buffer", "length"),
    [
        (mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), 4096),
        ((ctypes.c_int * 4)(), 16),
        (bytearray(5), 5),
        (memoryview(b"abcde")[1:3], 2),
        ((ARRAY.ctypes.data, 7), 7),
    ],
)
def test_buffers(notifier: ummunotify.Notifier, buffer: Any, length: int) -> None:
    with notifier.watch(buffer) as region:
        assert region.length == length


def test_strings_of_an_interface_have_four_bytes_a_character(notifier: ummunotify.Notifier) -> None:
    with notifier.watch(Interface(data=(ARRAY.ctypes.data, False), shape=(2,), typestr="<U3")) as region:
        assert region.length == 24


@pytest.mark.parametrize(
    ("what", "why"),
    [
        (ARRAY[:, ::2], "next to each other"),
        (ARRAY[::-1], "next to each other"),
        (np.broadcast_to(np.zeros(3), (2, 3)), "next to each other"),
        (Interface(**ARRAY[:, ::2].__array_interface__), "next to each other"),
        (Interface(data=bytearray(8), shape=(1,), typestr="<f8"), "where its data is"),
        (Tensor(ARRAY[::2]), "next to each other"),
        (Tensor(ARRAY, (2, 0)), r"on a device \(of DLPack's type 2\)"),
    ],
)
def test_what_has_no_one_range(notifier: ummunotify.Notifier, what: Any, why: str) -> None:
    with pytest.raises(ummunotify.InvalidBufferError, match=f"cannot watch this {type(what).__name__}.*{why}"):
        notifier.watch(what)


@pytest.mark.parametrize("what", [object(), "text", 3, None, (1, 2, 3), [4096, 1]])
def test_what_is_no_memory(notifier: ummunotify.Notifier, what: Any) -> None:
    with pytest.raises(TypeError, match=r"expected a buffer or a pair \(address, length\), not"):
        notifier.watch(what)
