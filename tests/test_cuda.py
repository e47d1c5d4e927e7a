"""The CUDA registrar, on a fake of the driver, and on the real one where there is a GPU."""

from __future__ import annotations

import ctypes
import mmap
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import in_child, map_memory, require, unmap_memory

from ummunotify import (
    DeregistrationError,
    RegistrarError,
    RegistrarUnavailableError,
    RegistrationCache,
    RegistrationError,
    RegistrationLimitError,
)
from ummunotify.registrars.cuda import CudaRegistrar, HostRegistration

PAGE = mmap.PAGESIZE
SIZE = 8 * PAGE
FAKE = Path(__file__).parent / "cuda/fake_driver.c"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> str:
    if not shutil.which("gcc"):
        require("gcc", "it is not installed")
    library = str(tmp_path_factory.mktemp("cuda") / "libfake.so")
    subprocess.run(["gcc", "-shared", "-fPIC", "-Wall", "-Wextra", "-o", library, str(FAKE)], check=True)
    return library


@pytest.fixture
def fake(library: str) -> Iterator[ctypes.CDLL]:
    fake = ctypes.CDLL(library)
    yield fake
    assert fake.fake_registered() == 0
    assert fake.fake_retained() == 0
    assert fake.fake_pushed() == 0


@pytest.fixture
def registrar(fake: ctypes.CDLL, library: str) -> Iterator[CudaRegistrar]:
    with CudaRegistrar(library=library) as registrar:
        yield registrar


@pytest.fixture
def memory() -> Iterator[int]:
    address = map_memory(SIZE)
    yield address
    unmap_memory(address, SIZE)


def test_it_registers(registrar: CudaRegistrar, fake: ctypes.CDLL, memory: int) -> None:
    handle = registrar.register(memory, SIZE)
    assert (handle.address, handle.length, handle.device_address) == (memory, SIZE, memory + (1 << 60))
    assert fake.fake_registered() == 1
    registrar.deregister(handle)
    assert fake.fake_registered() == 0
    for strange in (handle, HostRegistration(memory, SIZE, 0)):
        with pytest.raises(RegistrarError, match="not registered here"):
            registrar.deregister(strange)


def test_what_the_driver_refuses(registrar: CudaRegistrar, fake: ctypes.CDLL, memory: int) -> None:
    handle = registrar.register(memory, PAGE)
    with pytest.raises(RegistrationError, match=r"some error \(712\); other code has registered") as caught:
        registrar.register(memory, SIZE)
    assert not isinstance(caught.value, RegistrationLimitError)
    fake.fake_fail(b"cuMemHostRegister_v2", 2)
    with pytest.raises(RegistrationLimitError, match=r"out of memory \(2\); deregister"):
        registrar.register(memory + PAGE, PAGE)
    fake.fake_fail(b"cuMemHostGetDevicePointer_v2", 4711)
    with pytest.raises(RegistrationError, match=r"cannot map .*unknown error \(4711\)"):
        registrar.register(memory + PAGE, PAGE)
    assert fake.fake_registered() == 1
    fake.fake_fail(b"cuMemHostUnregister", 1)
    with pytest.raises(RegistrarError, match="cannot deregister"):
        registrar.deregister(handle)
    registrar.deregister(handle)


def test_closed(library: str, fake: ctypes.CDLL, memory: int) -> None:
    registrar = CudaRegistrar(library=library)
    registrar.register(memory, PAGE)
    registrar.close()
    registrar.close()
    assert fake.fake_registered() == 0
    with pytest.raises(RegistrarError, match="closed"):
        registrar.register(memory, PAGE)


def test_a_child(registrar: CudaRegistrar, fake: ctypes.CDLL, memory: int) -> None:
    handle = registrar.register(memory, PAGE)

    def child() -> None:
        with pytest.raises(RegistrarError, match="does not work in a forked child"):
            registrar.register(memory + PAGE, PAGE)
        registrar.close()
        assert fake.fake_registered() == 1

    in_child(child)
    registrar.deregister(handle)


def test_no_driver(fake: ctypes.CDLL, library: str) -> None:
    with pytest.raises(RegistrarUnavailableError, match=r"cannot be loaded.*install NVIDIA's driver"):
        CudaRegistrar(library="libno-such-thing.so.1")
    with pytest.raises(RegistrarUnavailableError, match=r"device 7 cannot be used: cuDeviceGet.*\(101\)"):
        CudaRegistrar(7, library=library)
    fake.fake_fail(b"cuInit", 100)
    with pytest.raises(RegistrarUnavailableError, match=r"device 0 cannot be used: cuInit.*\(100\)"):
        CudaRegistrar(library=library)


def test_through_the_cache(keeper: object, registrar: CudaRegistrar, fake: ctypes.CDLL, memory: int) -> None:
    """The driver refuses what is registered already, so the cache has to deregister first."""
    with RegistrationCache(registrar) as cache:
        for page in range(7):
            cache.acquire((memory + page * PAGE + 10, PAGE)).release()
        assert fake.fake_registered() == 1
        unmap_memory(memory, PAGE)
        map_memory(PAGE, memory)
        with cache.acquire((memory, SIZE)) as registration:
            assert registration.handle.length == SIZE
            assert fake.fake_registered() == 1
        fake.fake_fail(b"cuMemHostUnregister", 1)
        with pytest.raises(DeregistrationError):
            cache.flush()
        cache.flush()
        assert fake.fake_registered() == 0


def test_threads_through_the_cache(keeper: object, registrar: CudaRegistrar, memory: int) -> None:
    """They ask for overlapping memory: the driver must never be asked to register a page twice."""
    failures: list[BaseException] = []
    refused = 0

    def run(number: int) -> None:
        nonlocal refused
        try:
            for i in range(200):
                start = (number + i) % 7 * PAGE
                try:
                    cache.acquire((memory + start, 2 * PAGE)).release()
                except RegistrationError as error:
                    if "in use" not in str(error):  # by another thread, just then
                        raise
                    refused += 1
                if i % 10 == 0:
                    cache.invalidate((memory + start, 1))
        except BaseException as error:
            failures.append(error)

    with RegistrationCache(registrar) as cache:
        threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]
        assert refused < 800


def test_a_gpu(keeper: object, memory: int) -> None:
    """The device writes to memory that was mapped anew."""
    try:
        registrar = CudaRegistrar()
    except RegistrarUnavailableError as error:
        require("cuda", str(error), always=False)
    driver = ctypes.CDLL("libcuda.so.1")
    with registrar, RegistrationCache(registrar) as cache:
        for value in range(1, 20):
            with cache.acquire((memory, SIZE)) as registration, registrar._ours():
                target = ctypes.c_uint64(registration.handle.device_address)
                assert driver.cuMemsetD8_v2(target, ctypes.c_ubyte(value), ctypes.c_size_t(SIZE)) == 0
                assert driver.cuCtxSynchronize() == 0
            assert ctypes.string_at(memory, SIZE) == bytes([value]) * SIZE
            unmap_memory(memory, SIZE)
            map_memory(SIZE, memory)
        assert cache.stats.misses == 19
