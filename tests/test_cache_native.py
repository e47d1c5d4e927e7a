"""The cache for those who program in C and Cython: its core under ThreadSanitizer, and modules built against what is
installed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from registrar import Recorder
from support import map_memory, require, unmap_memory

import ummunotify
from ummunotify import RegistrationCache

HERE = Path(__file__).parent
SOURCES = HERE.parent / "src/libummunotify"
SECONDS = "120" if "UMMUNOTIFY_SLOW" in os.environ else "3"
PAGE = 4096

CYTHON = """
# cython: language_level=3
from libc.stdint cimport uint64_t
from ummunotify cimport (
    CacheTable, Region, Registration, umn_cache_acquire, umn_cache_release, umn_entry, umn_region_valid,
)

def hits(CacheTable cache, uint64_t address, uint64_t length, int count):
    cdef umn_entry *entry
    cdef int found = 0
    with nogil:
        for _ in range(count):
            entry = umn_cache_acquire(cache._cache, address, address + length)
            if entry is not NULL:
                found += 1
                umn_cache_release(cache._cache, entry)
    return found

def valid(Region region):
    return umn_region_valid(region._region)

def use(cache, what):
    cdef Registration registration = cache.acquire(what)
    with registration:
        return <object>registration._entry.handle
"""

C = """
#include <Python.h>
#include "cache/cache.h"

static struct umn_entry *held;

static PyObject *acquire(PyObject *self, PyObject *args)
{
	PyObject *capsule;
	unsigned long long address, length;
	struct umn_cache *cache;

	(void)self;
	if (!PyArg_ParseTuple(args, "OKK", &capsule, &address, &length))
		return NULL;
	cache = PyCapsule_GetPointer(capsule, "ummunotify.cache");
	if (!cache)
		return NULL;
	held = umn_cache_acquire(cache, address, address + length);
	return held ? Py_NewRef(held->handle) : Py_NewRef(Py_None);
}

static PyObject *release(PyObject *self, PyObject *capsule)
{
	(void)self;
	return PyBool_FromLong(umn_cache_release(PyCapsule_GetPointer(capsule, "ummunotify.cache"), held));
}

static PyMethodDef methods[] = {{"acquire", acquire, METH_VARARGS, ""}, {"release", release, METH_O, ""}, {0}};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, .m_name = "extension", .m_methods = methods};

PyMODINIT_FUNC PyInit_extension(void)
{
	return PyModule_Create(&module);
}
"""


def run(*command: str | Path) -> str:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except FileNotFoundError:
        require(str(command[0]), "it is not installed")
    except subprocess.CalledProcessError as error:
        raise AssertionError(f"{command}:\n{error.stdout}{error.stderr}") from error


def build(name: str, source: Path) -> Any:
    library = source.with_suffix(".so")
    includes = [f"-I{sysconfig.get_path('include')}", f"-I{ummunotify.get_include()}"]
    run("gcc", "-shared", "-fPIC", "-O1", "-Wall", "-Werror=implicit", *includes, source, "-o", library)
    spec = importlib.util.spec_from_file_location(name, library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_core_under_thread_sanitizer(tmp_path: Path) -> None:
    program = tmp_path / "cache_test"
    flags = ["-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-fsanitize=thread"]
    table = [SOURCES / f"{name}.c" for name in ("table/table", "table/index", "table/grace", "table/pending", "process/process")]
    tests = [HERE / "core/cache_test.c", HERE / "core/table_check.c"]
    run("gcc", *flags, f"-I{SOURCES}", f"-I{HERE / 'core'}", *tests, *table, "-o", program)
    assert "hits" in run(program, SECONDS)


def test_the_header_in_cplusplus(tmp_path: Path) -> None:
    source = tmp_path / "header.cc"
    source.write_text('#include "cache/cache.h"\n')
    run("g++", "-std=c++17", "-Wall", "-Wextra", "-fsyntax-only", f"-I{ummunotify.get_include()}", source)


def test_a_cython_module(keeper: object, tmp_path: Path) -> None:
    if importlib.util.find_spec("Cython") is None:
        require("cython", "it is not installed")
    source = tmp_path / "client.pyx"
    source.write_text(CYTHON)
    run(sys.executable, "-m", "cython", "-3", source, "-o", source.with_suffix(".c"))
    client = build("client", source.with_suffix(".c"))
    registrar = Recorder()
    memory = map_memory(2 * PAGE)
    with ummunotify.open() as notifier, RegistrationCache(registrar, notifier=notifier) as cache:
        assert client.hits(cache, memory, PAGE, 10) == 0
        handle = client.use(cache, (memory, PAGE))
        assert client.hits(cache, memory + 5, 100, 10) == 10
        region = notifier.regions[0]
        assert client.valid(region)
        unmap_memory(memory, PAGE)
        assert not client.valid(region)
        assert client.hits(cache, memory, PAGE, 10) == 0
        cache.collect()
        assert handle not in registrar.live
        assert cache.stats.hits == 10
    unmap_memory(memory + PAGE, PAGE)


def test_a_c_extension(keeper: object, tmp_path: Path) -> None:
    source = tmp_path / "extension.c"
    source.write_text(C)
    extension = build("extension", source)
    registrar = Recorder()
    memory = map_memory(2 * PAGE)
    with RegistrationCache(registrar) as cache:
        capsule = cache.capsule
        assert extension.acquire(capsule, memory, PAGE) is None
        with cache.acquire((memory, PAGE)) as registration:
            assert extension.acquire(capsule, memory, 1) == registration.handle
        assert extension.release(capsule) is False
        assert extension.acquire(capsule, memory, 1) is not None
        unmap_memory(memory, PAGE)
        assert len(registrar.live) == 1
        assert extension.release(capsule) is True
        assert len(registrar.live) == 1
        cache.collect()
        assert registrar.live == {}
    unmap_memory(memory + PAGE, PAGE)
