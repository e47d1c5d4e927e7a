"""The cache for those who program in C and Cython: programs and modules built against what is installed."""

from __future__ import annotations

import importlib.util
import mmap
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from registrar import Recorder
from support import map_memory, require, require_source, unmap_memory

import ummunotify
from ummunotify import RegistrationCache

PACKAGE = Path(ummunotify.__file__).parent
HEADERS, LIBRARIES = PACKAGE / "include", PACKAGE / "lib"
PAGE = mmap.PAGESIZE

CYTHON = """
# cython: language_level=3
from libc.stdint cimport uint64_t
from ummunotify cimport (
    Registration, RegistrationCache, ummunotify_cache_find, ummunotify_cache_release, ummunotify_registration,
)

def hits(RegistrationCache cache, uint64_t address, uint64_t length, int count):
    cdef ummunotify_registration *registration
    cdef int found = 0
    with nogil:
        for _ in range(count):
            registration = ummunotify_cache_find(cache._cache, <void *>address, length)
            if registration is not NULL:
                found += 1
                ummunotify_cache_release(cache._cache, registration)
    return found

def use(cache, what):
    cdef Registration registration = cache.acquire(what)
    with registration:
        return <object>registration._registration.handle
"""

C = """
#include <Python.h>
#include "ummunotify_cache.h"

static struct ummunotify_registration *held;

static PyObject *acquire(PyObject *self, PyObject *args)
{
	PyObject *capsule;
	unsigned long long address, length;
	struct ummunotify_cache *cache;

	(void)self;
	if (!PyArg_ParseTuple(args, "OKK", &capsule, &address, &length))
		return NULL;
	cache = PyCapsule_GetPointer(capsule, "ummunotify.cache");
	if (!cache)
		return NULL;
	held = ummunotify_cache_find(cache, (void *)address, length);
	return held ? Py_NewRef(held->handle) : Py_NewRef(Py_None);
}

static PyObject *release(PyObject *self, PyObject *capsule)
{
	(void)self;
	return PyBool_FromLong(ummunotify_cache_release(PyCapsule_GetPointer(capsule, "ummunotify.cache"), held));
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
    link = [f"-L{LIBRARIES}", "-lummunotify", f"-Wl,-rpath,{LIBRARIES}"]
    run("gcc", "-shared", "-fPIC", "-O1", "-Wall", "-Werror=implicit", *includes, source, "-o", library, *link)
    spec = importlib.util.spec_from_file_location(name, library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_header_in_cplusplus(tmp_path: Path) -> None:
    source = tmp_path / "header.cc"
    source.write_text("#include <ummunotify_cache.h>\n")
    run("g++", "-std=c++17", "-Wall", "-Wextra", "-pedantic", "-fsyntax-only", f"-I{HEADERS}", source)


def test_c_without_python(keeper: object, tmp_path: Path) -> None:
    require_source("uffd")
    program = tmp_path / "cache"
    flags = ["-std=c11", "-D_DEFAULT_SOURCE", "-Wall", "-Wextra", "-Werror", f"-I{HEADERS}"]
    link = [f"-L{LIBRARIES}", "-lummunotify", f"-Wl,-rpath,{LIBRARIES}"]
    run("gcc", *flags, Path(__file__).parent / "c/cache.c", "-o", program, *link)
    environment = {**os.environ, "UMMUNOTIFY_SOURCE": "uffd"}  # bpf needs a feeder
    assert subprocess.run([program], env=environment).returncode == 0


def test_a_cython_module(keeper: object, tmp_path: Path) -> None:
    if importlib.util.find_spec("Cython") is None:
        require("cython", "it is not installed")
    source = tmp_path / "client.pyx"
    source.write_text(CYTHON)
    run(sys.executable, "-m", "cython", "-3", source, "-o", source.with_suffix(".c"))
    client = build("client", source.with_suffix(".c"))
    registrar = Recorder()
    memory = map_memory(2 * PAGE)
    with RegistrationCache(registrar) as cache:
        assert client.hits(cache, memory, PAGE, 10) == 0
        handle = client.use(cache, (memory, PAGE))
        assert client.hits(cache, memory + 5, 100, 10) == 10
        unmap_memory(memory, PAGE)
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
