"""What the pages show works: each block of code or shell lines is run by a test, or has a reason here why not."""

from __future__ import annotations

import ast
import asyncio
import ctypes
import inspect
import mmap
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from markdown_it import MarkdownIt
from support import DUMPS_FRAMES, require, require_source

import ummunotify
from ummunotify.registrars.mlock import MlockRegistrar
from ummunotify.selftest.changes import madvise

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]

GENERATED = ["docs/benchmarks.md", "docs/support.md"]

OUTPUT = "what a program prints, or what is not code"
FORM = "a form: the program that it names is the reader's"
SYSTEM = "it changes the host; tests/test_daemon_systemd.py tests the units, tools/fresh-machine what is installed"
TESTS = {
    "README.md": {
        "a = mmap": "pseudocode; `ummunotify demo` does it",
        "import mmap, ummunotify": "test_daemon.py: test_the_first_example_of_the_readme",
        "0x7f0c1e400000": OUTPUT,
        "make demo": "it is what runs these tests, on a fresh machine too: tools/fresh-machine",
        "apt-get update": "it installs packages: tools/fresh-machine",
        "umn = ummunotify.open()": "test_docs.py: test_readme_methods",
        "cache = ummunotify.Reg": "test_docs.py: test_readme_cache",
    },
    "docs/architecture.md": {"munmap ──>": OUTPUT, "records.c ": OUTPUT},
    "docs/audit.md": {
        "ummunotify audit -- python": "test_docs.py: test_audit",
        "process 4711": OUTPUT,
        "ummunotify audit -- PROGRAM": FORM,
        "mpiexec -n 64": FORM,
        "ummunotify audit -- ummunotify run": "test_audit.py: test_with_another_preloaded_library",
        "# freed at the end": "test_audit.py: test_suppressions",
        "import mmap, ummunotify": "test_stacks.py: test_example",
    },
    "docs/c.md": {
        "#include <stdio.h>": "test_docs.py: test_c_program",
        "cc program.c": "test_docs.py: test_c_program",
        'extern "C"': "test_docs.py: test_rust_declarations",
        "// #cgo": "there is no Go here",
        "ummunotify run --": FORM,
        "mpirun -np 4": FORM,
        "on a miss:": "pseudocode; test_device.py runs examples/ummunotify_2010.c",
    },
    "docs/cache.md": {
        "import numpy": "test_docs.py: test_cache_python",
        "a = mmap": OUTPUT,
        "import ctypes": "test_docs.py: test_cache_python",
        "with ummunotify.Reg": "test_docs.py: test_cache_python",
        "62.5% of": OUTPUT,
        "import prometheus_client": "test_docs.py: test_cache_python",
        "#include <err.h>": "test_docs.py: test_cache_c",
        "from libc.stdint": "test_docs.py: test_cache_cython",
        "pip install cython": "test_docs.py: test_cache_cython",
    },
    "docs/containers.md": {
        "docker run": "there is no Docker here; test_daemon_users.py runs clients in namespaces",
        "volumes:": "there is no Kubernetes here",
    },
    "docs/daemon.md": {
        "apt-get install": SYSTEM,
        "[Service]": SYSTEM,
        "# ummunotify status": OUTPUT,
        "/opt/ummunotify/bin/pip": SYSTEM,
        "systemctl disable": SYSTEM,
    },
    "docs/engines.md": {
        "import ummunotify": "agent and tensor are the program's; test_engines.py: test_recycled_memory does the same",
        "from ummunotify.registrars.mooncake": "as before, with the program's engine",
        "pip install": "test_engines.py: test_recycled_memory",
        "Registrations kept": OUTPUT,
    },
    "docs/install.md": {
        "this kernel is too old": OUTPUT,
        "python3 -m venv": "`make wheels` does it with each wheel",
        "apt-get install": SYSTEM,
        "apt-get build-dep": "`make packages-test` does it, on a machine of its own",
        "meson setup": "test_c.py: test_installed_by_itself",
    },
    "docs/libfabric.md": {
        "ummunotify run --libfabric": FORM,
        "ummunotify: libfabric's": OUTPUT,
        "#include <ummunotify.h>": "test_docs.py: test_libfabric_c",
        "cc program.c -lfabric": "test_docs.py: test_libfabric_c",
    },
    "docs/model.md": {"region = umn.watch": "test_docs.py: test_model_order"},
    "docs/mpi.md": {
        "ummunotify run --libfabric": FORM,
        "ummunotify run --ucx": FORM,
        "mpiexec -n 64": FORM,
        "pip install mpi4py": "test_mpi.py: test_ranks",
    },
    "docs/rdma.md": {
        "Without ummunotify": OUTPUT,
        "apt-get install": "it needs a kernel with rdma_rxe: tests/vm/test_rdma.py runs the example in guests",
        ".venv/bin/python tests/vm/run.py": "`make vmtest` does it, in minutes",
        "from ummunotify import": "it needs an RDMA device: tests/vm/test_rdma.py",
    },
    "docs/replaces.md": {"srun": "there is no Slurm here"},
    "docs/selftest.md": {"ummunotify selftest": "test_docs.py: test_selftest_commands"},
    "docs/ucx.md": {"ummunotify run --ucx": FORM, "ummunotify: ranks (4001)": OUTPUT},
}
"""Of each block, by how it begins: the test that runs it, or why none does."""


class Block(NamedTuple):
    language: str
    text: str


def blocks(page: str) -> list[Block]:
    """Those of a page, but for what makes the site."""
    tokens = MarkdownIt().parse((ROOT / page).read_text())
    found = [Block(token.info, token.content) for token in tokens if token.type in ("fence", "code_block")]
    return [block for block in found if not block.language.startswith("{")]


def block(page: str, start: str) -> str:
    [found] = [each.text for each in blocks(page) if each.text.startswith(start)]
    return found


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_tested_or_has_a_reason(page: str) -> None:
    known = TESTS.get(page, {})
    found = [each.text for each in blocks(page)]
    assert [text for text in found if not text.startswith(tuple(known))] == []
    assert [start for start in known if not any(text.startswith(start) for text in found)] == []
    for test in known.values():
        if named := re.fullmatch(r"(test_\w+\.py): (test_\w+)", test):
            assert f"def {named[2]}(" in (ROOT / "tests" / named[1]).read_text()


@pytest.mark.parametrize("page", [page for page in PAGES if page not in GENERATED])
def test_lines_wrap_at_100(page: str) -> None:
    lines = (ROOT / page).read_text().splitlines()
    prose = [
        token.map for token in MarkdownIt().enable("table").parse("\n".join(lines)) if token.type == "paragraph_open"
    ]
    assert [line for first, end in filter(None, prose) for line in lines[first:end] if len(line) > 100] == []


@pytest.mark.parametrize("page", PAGES)
def test_python_is_python(page: str) -> None:
    for each in blocks(page):
        if each.language == "python":
            compile(each.text, page, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


def shell(lines: str, folder: Path, **environment: str) -> str:
    """Run them as a reader does, in this folder, with the environment's programs in PATH. What they print."""
    path = os.pathsep.join([str(BIN), os.environ["PATH"]])
    done = subprocess.run(
        ["sh", "-e", "-c", lines],
        cwd=folder,
        env=os.environ | {"PATH": path} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


# ---- README ----


def test_readme_methods(keeper: object) -> None:
    """A thread changes the buffer until it is no longer watched, then closes the notifier, which ends the iteration."""
    delivered: list[ummunotify.Invalidation] = []
    with mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE) as buf:
        names: dict[str, Any] = {"ummunotify": ummunotify, "buf": buf, "callback": delivered.append}
        address = ctypes.addressof(ctypes.c_char.from_buffer(buf))
        code = compile(
            block("README.md", "umn = ummunotify.open()"), "README.md", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        )
        pause = threading.Event()

        def change() -> None:
            while "region" not in names or names["umn"].regions:
                buf[0] = 1
                madvise(address, mmap.PAGESIZE, mmap.MADV_DONTNEED)
                pause.wait(0.001)
            names["umn"].close()

        thread = threading.Thread(target=change)

        async def run() -> None:
            thread.start()
            result = eval(code, names)
            assert inspect.iscoroutine(result)
            await result

        asyncio.run(run())
        thread.join()
    assert names["umn"].closed
    assert names["region"].cookie == 42


def test_readme_cache(keeper: object) -> None:
    posted: list[tuple[object, int, int]] = []
    array = bytearray(1 << 16)
    names: dict[str, Any] = {
        "ummunotify": ummunotify,
        "registrar": MlockRegistrar(),
        "array": array,
        "post": lambda *what: posted.append(what),
    }
    exec(block("README.md", "cache = ummunotify.Reg"), names)
    names["cache"].close()
    assert [length for _, _, length in posted] == [len(array)]


def measured(section: str, what: str) -> list[str]:
    """The cells of the row of docs/benchmarks.md that begins so, in this section."""
    text = (ROOT / "docs/benchmarks.md").read_text().partition(f"<!-- section {section} -->")[2].partition("<!--")[0]
    [row] = [line for line in text.splitlines() if line.startswith(f"| {what} |")]
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_readme_figures() -> None:
    """They are those of the benchmarks."""
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert "takes less than 20 ns in Python and 2 ns in C" in readme
    assert float(measured("watching", "`region.valid` in Python")[2].split()[0]) < 20
    assert float(measured("watching", "the check in C (`umn_region_valid`)")[2].split()[0]) < 2
    assert "takes 1.2 to 1.4 times as long" in readme
    for where in ("outside all regions", "each hits a region, at random"):
        ratio = measured("watching", f"mmap + touch + munmap, 100,000 watched, {where}")[2]
        assert 1.15 <= float(ratio.partition("x")[0]) < 1.45
    assert "about 66 bytes of shared memory" in readme
    assert 60 < float(measured("watching", "shared memory for each of 100,000 regions")[2].split()[0]) < 72
    assert "a munmap of watched memory takes 15 to 90 us" in readme
    for where, low, high in (("the same CPU", 13, 17), ("another CPU", 80, 100)):
        cells = measured("uffd", f"munmap of a watched page, the reader on {where}")
        added = float(cells[2].partition("(+")[2].split()[0])
        assert low < float(cells[3].rpartition(":")[2].split()[0]) + added < high
    assert "a hit takes less than 0.5 us" in readme
    assert float(measured("cache", "`with cache.acquire(array): pass`")[2].split()[0]) < 500


def test_counts_of_the_support_matrix() -> None:
    rows: dict[str, list[str]] = {}
    for line in (ROOT / "docs/support.md").read_text().splitlines():
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        if len(cells) == 7 and cells[0].isdigit():
            rows[name] = cells  # seen, missed, blind, refused, needless, not here, failed
    assert all(cells[1] == "0" and cells[6] == "0" for name, cells in rows.items() if ": " in name)
    decisions = " ".join((ROOT / "docs/decisions.md").read_text().split())
    missed = rows["libfabric memhooks"][1], rows["UCX"][1]
    assert "libfabric's memhooks miss {} kinds of change, and UCX's hooks {}.".format(*missed) in decisions
    replaces = (ROOT / "docs/replaces.md").read_text()
    for name, of in (
        ("libfabric memhooks 1.17", "libfabric memhooks"),
        ("libfabric userfaultfd 1.17", "libfabric uffd"),
        ("UCX 1.13", "UCX"),
        ("ummunotify, `bpf:kvm`, Linux 6.18", "6.18: bpf:kvm"),
    ):
        seen, lost, _, refused, *_ = rows[of]
        assert f"| {name} | {seen} | {lost} | {refused} |" in replaces
    seen, lost, blind, refused, *_ = rows["6.18: uffd"]
    kinds = f"{lost} ({blind} kinds it does not see, which leave pinned memory alone or are documented)"
    assert f"| ummunotify, `uffd`, Linux 6.18 | {seen} | {kinds} | {refused} |" in replaces


# ---- Pages ----


def test_model_order(umn: ummunotify.Notifier) -> None:
    names = {"umn": umn, "buf": bytearray(1 << 16), "register": lambda buf: buf}
    exec(block("docs/model.md", "region = umn.watch"), names)


def test_cache_python(keeper: object, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    found = [each.text for each in blocks("docs/cache.md") if each.language == "python"]
    for text in found:
        exec(text, names)
    assert names["reg"].__class__ is ummunotify.Registration
    assert re.match(r"LockedRange\(.*\) \d+ 4000000\n", capsys.readouterr().out)
    assert len([line for line in found[1].split("class ")[1].splitlines() if line]) <= 10
    names["cache"].close()


def test_cache_c(tmp_path: Path) -> None:
    require_source("uffd")
    use = '#include <stdio.h>\nint main(void) { static char b[4096]; transfer(b, 100); return puts("done") < 0; }\n'
    (tmp_path / "program.c").write_text(block("docs/cache.md", "#include <err.h>") + use)
    build = "cc -Wall -Werror program.c -o program $(ummunotify config --cflags --libs) && ./program"
    assert shell(build, tmp_path, UMMUNOTIFY_SOURCE="uffd") == "done\n"


def test_cache_cython(tmp_path: Path) -> None:
    (tmp_path / "hits.pyx").write_text(block("docs/cache.md", "from libc.stdint"))
    install, _, lines = block("docs/cache.md", "pip install cython").partition("\n")
    assert install == "pip install cython"  # it is there
    use = (
        "import hits, mmap, ummunotify\n"
        "from ummunotify.registrars.mlock import MlockRegistrar\n"
        "memory = bytearray(1 << 16)\n"
        "with ummunotify.RegistrationCache(MlockRegistrar()) as cache:\n"
        "    with cache.acquire(memory) as reg:\n"
        "        print(hits.is_registered(cache, reg.address, reg.length), hits.is_registered(cache, 4096, 1))\n"
        "    try:\n        hits.is_registered(None, 0, 1)\n"
        "    except TypeError:\n        print('None is refused')\n"
    )
    (tmp_path / "use.py").write_text(use)
    assert shell(f"{lines}\npython use.py", tmp_path) == "True False\nNone is refused\n"


def test_c_program(tmp_path: Path) -> None:
    require_source("uffd")
    (tmp_path / "program.c").write_text(block("docs/c.md", "#include <stdio.h>"))
    lines, _, expected = block("docs/c.md", "cc program.c").partition("\n\n")
    assert shell(lines, tmp_path, UMMUNOTIFY_SOURCE="uffd") == expected


def test_rust_declarations() -> None:
    """There is no compiler for them here, but the names are the header's."""
    header = Path(ummunotify.get_include(), "ummunotify.h").read_text()
    names = re.findall(r"fn (\w+)\(", block("docs/c.md", 'extern "C"'))
    assert len(names) == 3
    assert [name for name in names if f" {name}(" not in header.replace("*", " ")] == []


def test_libfabric_c(tmp_path: Path) -> None:
    """It compiles, with what is left out of it."""
    includes, _, body = block("docs/libfabric.md", "#include <ummunotify.h>").partition("\n\n")
    body = re.sub(r"^fi_\w+\(\.\.\.\);$", "", body, flags=re.MULTILINE)
    source = f"#include <err.h>\n#include <stdlib.h>\n{includes}\nint main(void) {{ {body} return !monitor; }}\n"
    (tmp_path / "program.c").write_text(source)
    if not Path("/usr/include/rdma/fabric.h").exists():
        require("libfabric", "libfabric-dev is not installed")
    shell("cc -Wall -Werror " + block("docs/libfabric.md", "cc program.c -lfabric").partition("cc ")[2], tmp_path)


def test_selftest_commands(tmp_path: Path) -> None:
    require_source("bpf:kvm")
    assert "no miss" in shell(block("docs/selftest.md", "ummunotify selftest"), tmp_path)


def test_audit() -> None:
    """What the page shows of the report is in it."""
    require_source("bpf")
    command = block("docs/audit.md", "ummunotify audit -- python").split()
    environment = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    said = re.sub(r"[^\s(]*/(?=examples/|Modules/)", "", result.stdout + result.stderr)
    shown = block("docs/audit.md", "process 4711")
    changing = r"0x[0-9a-f]+|\b4711\b|\d+\.\d{3} s"
    for line in shown.splitlines():
        # Where this Python has no debug information mmap's functions have no lines.
        if line.strip() not in ("", "...") and "mmapmodule" not in line and not re.match(r" +#", line):
            pattern = re.escape(re.sub(changing, "@", line)).replace("@", r"\S+( s)?")
            assert re.search(pattern, said), line
    if not DUMPS_FRAMES:
        return  # the page says what is missing then
    for function in ("read", "new_buffer", "main"):
        assert re.search(rf"#\d+ {function} \(examples/stale_buffer\.py:\d+\)", said)
    lines = (ROOT / "examples/stale_buffer.py").read_text().splitlines()
    for number in re.findall(r"stale_buffer\.py:(\d+)", shown):
        assert f"stale_buffer.py:{number})" in said
        assert lines[int(number) - 1].strip()
