"""`ummunotify audit`: what it finds in programs that change memory while it is pinned, and in correct ones."""

from __future__ import annotations

import json
import mmap
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from daemons import COMMAND
from mpi import LIBRARIES, PROGRAM
from support import DUMPS_FRAMES, LONG, require, require_root, require_source
from test_c import HERE, build, source

from ummunotify.audit.report import SCHEMA

__all__ = ["source"]  # a fixture

ROOT = Path(__file__).parents[1]
USED, KEPT, RELEASED = "used", "kept", "released"
RETURNED = 7
PAGE = mmap.PAGESIZE


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build(HERE / "audit.c", tmp_path_factory.mktemp("audit") / "audit", "-fno-omit-frame-pointer")


class Audited:
    def __init__(self, report: dict[str, Any], result: subprocess.CompletedProcess[str]) -> None:
        self.report = report
        self.findings: list[dict[str, Any]] = report["findings"]
        self.status = result.returncode
        self.text = result.stderr

    @property
    def counts(self) -> tuple[int, int, int]:
        counts = self.report["counts"]
        return counts[USED], counts[KEPT], counts[RELEASED]

    @property
    def pins(self) -> int:
        return sum(process["pins"] for process in self.report["processes"])


Audit = Callable[..., Audited]


@pytest.fixture
def audit(tmp_path: Path) -> Audit:
    """Runs a command, and checks that the report is as the schema says."""

    def run(*command: str, options: tuple[str, ...] = (), **environment: str) -> Audited:
        path = tmp_path / "report.json"
        words = [*COMMAND, "audit", "--json", str(path), *options, "--", *command]
        result = subprocess.run(
            words, env=os.environ | environment, capture_output=True, text=True, timeout=LONG, check=False
        )
        report = json.loads(path.read_text())
        jsonschema.validate(report, json.loads(SCHEMA.read_text()))
        return Audited(report, result)

    return run


def functions(stack: list[dict[str, Any]], language: str = "c") -> list[str]:
    return [frame["function"] for frame in stack if frame["language"] == language]


def test_stale_pin(program: str, audit: Audit, source: str) -> None:
    """With both stacks and the use; userfaultfd cannot say which thread it was."""
    result = audit(program, "stale", UMMUNOTIFY_SOURCE=source)
    assert result.status == RETURNED
    assert result.counts == (1, 0, 0)
    [finding] = result.findings
    pin, [change], [use] = finding["pin"], finding["changes"], finding["uses"]
    assert (pin["interface"], pin["call"], pin["length"]) == ("io_uring", "io_uring_register", PAGE)
    assert functions(pin["stack"])[:3] == ["pin_buffer", "stale", "main"]
    assert (change["start"], change["end"]) == (pin["address"], pin["address"] + pin["length"])
    assert functions(use["stack"])[:2] == ["use_buffer", "stale"]
    assert (use["address"], use["length"], use["now"]) == (pin["address"], PAGE, "memory")
    assert finding["unpin"]["call"] == "io_uring_register"
    assert pin["time"] <= change["time"] <= use["time"] <= finding["unpin"]["time"]
    place = pin["stack"][0]
    assert Path(place["file"]).name == "audit.c"
    assert "syscall" in (HERE / "audit.c").read_text().splitlines()[place["line"] - 1]
    if source == "uffd":
        assert (change["cause"], change["thread"], change["stack"]) == ("not known", 0, [])
        assert "s by a call that is not known: " in result.text
        assert "userfaultfd does not tell" in result.text
    else:
        assert (change["cause"], change["call"]) == ("munmap", "munmap")
        assert functions(change["stack"])[:2] == ["free_buffer", "stale"]
        assert "free_buffer" in result.text
    assert f"{pin['address']:#x}, pinned by io_uring: used after its memory had changed" in result.text


@pytest.mark.parametrize(("mode", "counts"), [("kept", (0, 1, 0)), ("released", (0, 0, 1)), ("correct", (0, 0, 0))])
def test_severity(program: str, audit: Audit, source: str, mode: str, counts: tuple[int, int, int]) -> None:
    result = audit(program, mode, options=("--error-exitcode", "99"), UMMUNOTIFY_SOURCE=source)
    assert result.counts == counts, result.text
    assert result.status == (99 if mode == "kept" else RETURNED)
    assert ("deregistered without a use (--all shows them)" in result.text) == (mode == "released")


def test_all(program: str, audit: Audit) -> None:
    assert "then deregistered without a use\n" in audit(program, "released", options=("--all",)).text


@pytest.fixture
def kernel() -> None:
    """A source that tells which thread made a change."""
    require_source("bpf")


@pytest.mark.usefixtures("kernel")
class TestCircumstances:
    def test_freed_by_malloc(self, program: str, audit: Audit) -> None:
        [finding] = audit(program, "freed").findings
        assert finding["severity"] == USED
        assert (finding["changes"][0]["cause"], finding["changes"][0]["call"]) == ("munmap", "free")
        assert functions(finding["changes"][0]["stack"])[:2] == ["free_block", "freed"]

    def test_freed_by_another_thread(self, program: str, audit: Audit) -> None:
        [finding] = audit(program, "thread").findings
        [change] = finding["changes"]
        assert finding["severity"] == USED
        assert change["thread_name"] == "cleaner"
        assert change["thread"] != finding["pin"]["thread"]
        assert functions(change["stack"])[:2] == ["free_buffer", "thread_that_frees"]

    @pytest.mark.skipif(os.uname().machine != "x86_64", reason="it makes the system call by an instruction")
    def test_freed_by_a_bare_system_call(self, program: str, audit: Audit) -> None:
        """It has the stack that the kernel gives, and not that of the thread's next call."""
        [change] = audit(program, "bare").findings[0]["changes"]
        assert (change["cause"], change["call"]) == ("munmap", "")
        assert functions(change["stack"])[:2] == ["bare", "main"]

    def test_no_stacks(self, program: str, audit: Audit) -> None:
        [finding] = audit(program, "stale", options=("--no-stacks",)).findings
        assert (finding["severity"], finding["changes"][0]["cause"]) == (USED, "munmap")
        assert (finding["pin"]["stack"], finding["changes"][0]["stack"], finding["uses"][0]["stack"]) == ([], [], [])

    def test_child(self, program: str, audit: Audit) -> None:
        """What a child frees is its own; what it pins is in the same report."""
        result = audit(program, "child")
        [finding] = result.findings
        assert finding["severity"] == USED
        first, second = result.report["processes"]
        assert (finding["process"], second["parent"]) == (second["pid"], first["pid"])
        assert (first["pins"], second["pins"]) == (1, 1)

    def test_truncated_by_another_process(self, program: str, audit: Audit) -> None:
        [finding] = audit(program, "truncated", options=("--mlock",)).findings
        assert (finding["severity"], finding["pin"]["interface"]) == (KEPT, "mlock")
        change = finding["changes"][0]
        assert change["other"]
        assert (change["cause"], change["process_name"]) == ("truncate", "cutter")
        assert functions(change["stack"])[1:3] == ["shrink", "truncated"]

    def test_mlock_is_no_pin_unless_asked(self, program: str, audit: Audit) -> None:
        assert audit(program, "truncated").pins == 0

    @pytest.mark.parametrize(("mode", "number"), [("killed", signal.SIGKILL), ("crash", signal.SIGSEGV)])
    def test_signal(self, program: str, audit: Audit, mode: str, number: int) -> None:
        """What was recorded stays."""
        result = audit(program, mode)
        assert result.status == 128 + number
        assert result.report["status"] == -number
        assert [each["severity"] for each in result.findings] == [KEPT if mode == "killed" else USED]
        assert not result.report["processes"][0]["ended"]

    def test_rank_that_is_killed(self, program: str, audit: Audit, tmp_path: Path) -> None:
        """Then mpiexec ends the other one. What both did is in the report."""
        wheel = LIBRARIES["wheel"]
        wheel.require()
        script = (
            'if [ "$PMI_RANK" = 1 ]; then "$0" kept; touch "$1"; exec sleep 1000; fi; '
            'while [ ! -e "$1" ]; do sleep 0.1; done; exec "$0" killed'
        )
        ranks = [wheel.launcher, "-n", "2", "sh", "-c", script, program, str(tmp_path / "ready")]
        result = audit(*ranks, **wheel.environment)
        assert result.status not in (0, RETURNED)
        assert sorted(finding["command"] for finding in result.findings) == [f"{program} kept", f"{program} killed"]
        assert result.counts == (0, 2, 0)

    def test_ten_thousand_pins(self, program: str, audit: Audit) -> None:
        result = audit(program, "many")
        assert result.pins == 10_000
        assert result.counts == (0, 0, 6)
        first, *others = sorted(finding["pin"]["address"] for finding in result.findings)
        assert [address - first for address in others] == [PAGE, 2 * PAGE, 3 * PAGE, 4 * PAGE, 8990 * PAGE]

    def test_told_by_two_machines(self, program: str, audit: Audit) -> None:
        """The kernel tells each virtual machine of a process, and so the audit twice; it is one change all the same."""
        require_source("bpf:kvm")
        result = audit(program, "machine")
        assert result.counts == (0, 0, 200)
        for finding in result.findings:
            assert [change["cause"] for change in finding["changes"]] == ["munmap", "mmap"]

    def test_exec(self, program: str, audit: Audit) -> None:
        result = audit(program, "exec")
        assert result.status == 0
        [finding] = result.findings
        assert (finding["severity"], finding["command"]) == (KEPT, f"{program} exec")
        assert [process["command"] for process in result.report["processes"]] == [f"{program} exec", "audit nothing"]

    def test_descriptors_that_the_program_closes(self, program: str, audit: Audit) -> None:
        [finding] = audit(program, "descriptors").findings
        assert finding["severity"] == USED
        assert functions(finding["changes"][0]["stack"])[:2] == ["free_buffer", "descriptors"]

    def test_python(self, audit: Audit) -> None:
        """One command finds the bug that is planted in the example; with Python's frames, if it gives them."""
        result = audit(sys.executable, str(ROOT / "examples/stale_buffer.py"))
        assert result.status == 1
        [finding] = [each for each in result.findings if each["severity"] == USED]
        assert finding["use_count"] == 7
        assert ("read" in functions(finding["pin"]["stack"], "python")) == DUMPS_FRAMES
        assert ("new_buffer" in functions(finding["changes"][0]["stack"], "python")) == DUMPS_FRAMES
        assert ("read_fixed" in functions(finding["uses"][0]["stack"], "python")) == DUMPS_FRAMES

    def test_demo(self, audit: Audit) -> None:
        """The error that its first half shows, a read and a write through a stale buffer; its second half has none."""
        result = audit(*COMMAND, "demo")
        assert result.status == 0, result.text
        assert result.counts[:2] == (1, 0)
        finding = result.findings[0]
        assert finding["use_count"] == len(finding["uses"]) == 2
        stacks = [finding["pin"]["stack"], finding["changes"][0]["stack"], *(use["stack"] for use in finding["uses"])]
        assert all(stacks)
        assert all(("_without" in functions(stack, "python")) == DUMPS_FRAMES for stack in stacks)

    def test_file_server(self, audit: Audit) -> None:
        """It maps a buffer for each connection. The cache deregisters what has changed before it uses the address."""
        command = [sys.executable, str(ROOT / "examples/file_server.py"), "--connections", "20"]
        result = audit(*command, options=("--error-exitcode", "99"))
        assert (result.status, result.counts[:2]) == (0, (0, 0)), result.text
        assert audit(*command, "--naive").counts[0] > 0


UCX = {"OMPI_MCA_pml": "ucx", "OMPI_MCA_osc": "ucx", "OMPI_MCA_pml_ucx_tls": "any", "OMPI_MCA_pml_ucx_devices": "any"}


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize(("library", "environment"), [("wheel", {}), ("openmpi", {}), ("openmpi", UCX)])
def test_mpi(audit: Audit, tmp_path: Path, library: str, environment: dict[str, str]) -> None:
    """Ranks that change memory all the time: each message is right, as without. tests/vm has them on RDMA."""
    which = LIBRARIES[library]
    which.require(always=library == "wheel")
    program = tmp_path / "mpi"
    subprocess.run([which.compiler, "-O1", "-o", program, PROGRAM], check=True)
    ranks = (which.launcher, "-n", "2", str(program), "send", "32768", "300")  # some 100 at a time
    result = audit(*ranks, **which.environment, **environment)
    assert result.status == 0, result.text
    assert sum(str(program) == process["command"].split()[0] for process in result.report["processes"]) == 2
    assert result.findings == []


@pytest.mark.usefixtures("kernel")
class TestUnusualPrograms:
    """They are correct, and do what they do without the audit."""

    @pytest.mark.parametrize("mode", ["cancelled", "handler", "small_stack", "ends"])
    def test_ends_as_it_would(self, program: str, audit: Audit, mode: str) -> None:
        result = audit(program, mode)
        assert result.status == RETURNED, result.text
        assert result.pins

    def test_handler_that_jumps_away(self, program: str, audit: Audit) -> None:
        """Nothing stays locked, and what comes later is found."""
        result = audit(program, "jumps")
        assert (result.status, result.counts) == (RETURNED, (1, 0, 0)), result.text

    def test_addresses_that_the_kernel_refuses(self, program: str, audit: Audit) -> None:
        result = audit(program, "asks")
        assert (result.status, result.pins) == (RETURNED, 0), result.text

    @pytest.mark.parametrize("mode", ["recycled", "vforks"])
    def test_descriptors_of_rings(self, program: str, audit: Audit, mode: str) -> None:
        result = audit(program, mode)
        assert (result.status, result.counts) == (RETURNED, (1, 0, 0)), result.text

    def test_full_disk(self, program: str, tmp_path: Path) -> None:
        """What has no room is left out. The program is not ended by SIGBUS."""
        require_root("it mounts a small file system")
        script = 'mount -t tmpfs -o size=64k none "$0" && TMPDIR="$0" exec "$@"'
        command = [
            "unshare",
            "-m",
            "sh",
            "-c",
            script,
            str(tmp_path),
            *COMMAND,
            "audit",
            "--json",
            "-",
            program,
            "full",
        ]
        result = subprocess.run(command, capture_output=True, text=True, timeout=LONG, check=False)
        assert result.returncode == RETURNED, result.stderr
        [process] = json.loads(result.stdout)["processes"]
        assert process["pins"] == 50
        assert process["lost"]


def test_ignored_signals_stay_ignored() -> None:
    """A shell script's background commands ignore these two."""
    result = subprocess.run(
        [
            "sh",
            "-c",
            'trap "" INT QUIT; exec "$@"',
            "sh",
            *COMMAND,
            "audit",
            "sh",
            "-c",
            "kill -INT $$; kill -QUIT $$; exit 3",
        ],
        capture_output=True,
        check=False,
    )
    assert result.returncode == 3


def test_signals_are_passed_on() -> None:
    script = "trap 'exit 4' USR1; kill -USR1 $PPID; for i in 1 2 3 4 5 6 7 8 9; do sleep 1; done"
    assert subprocess.run([*COMMAND, "audit", "sh", "-c", script], capture_output=True, check=False).returncode == 4


def test_signals_to_the_command_alone() -> None:
    """Ctrl-C is for both, and is not sent on; what is sent to the command is."""
    script = "trap 'exit 4' INT; echo ready; while :; do sleep 0.1; done"
    with subprocess.Popen(
        [*COMMAND, "audit", "sh", "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as audit:
        assert audit.stdout is not None
        assert audit.stdout.readline() == b"ready\n"
        audit.send_signal(signal.SIGINT)
        _, said = audit.communicate()
    assert audit.returncode == 4
    assert b"Nothing was pinned" in said


@pytest.mark.parametrize("command", ["audit", "run"])
def test_script_without_an_interpreter(tmp_path: Path, command: str) -> None:
    """Shells run it by themselves."""
    script = tmp_path / "script"
    script.write_text('exit "$1"\n')
    script.chmod(0o755)
    words = [*COMMAND, command, "--source", "uffd", str(script), "5"]
    assert subprocess.run(words, capture_output=True, check=False).returncode == 5


def test_address_sanitizer(audit: Audit, tmp_path: Path) -> None:
    """Its shared library has to be the first that is preloaded."""
    program = build(HERE / "audit.c", tmp_path / "audit", "-fsanitize=address", "-fno-omit-frame-pointer")
    result = audit(program, "stale", ASAN_OPTIONS="detect_leaks=0")
    assert (result.status, result.counts) == (RETURNED, (1, 0, 0)), result.text
    assert functions(result.findings[0]["pin"]["stack"])[:2] == ["pin_buffer", "stale"]


def test_names_that_steer_a_terminal(program: str, audit: Audit, tmp_path: Path) -> None:
    other = tmp_path / "\x1b[31m[bold]"
    os.link(program, other)
    result = audit(str(other), "kept")
    assert "\x1b" not in result.text
    assert "\\x1b[31m[bold] kept" in result.text


def test_standard_output_is_closed() -> None:
    command = ["sh", "-c", 'exec "$@" >&-', "sh", *COMMAND, "audit", "--json", "-", "true"]
    result = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    assert result.returncode == 2
    assert "standard output is closed" in result.stderr


def test_nothing_pinned(program: str, audit: Audit) -> None:
    result = audit(program, "nothing", options=("--error-exitcode", "99"))
    assert (result.status, result.pins) == (0, 0)
    assert "Nothing was pinned" in result.text


def test_static_program(tmp_path: Path) -> None:
    program = build(HERE / "audit.c", tmp_path / "static", "-static")
    result = subprocess.run([*COMMAND, "audit", program, "stale"], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "statically linked, so nothing can be preloaded into it: it cannot be audited" in result.stderr


def test_no_program() -> None:
    result = subprocess.run([*COMMAND, "audit", "/nowhere"], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (127, "Error: there is no program /nowhere\n")


@pytest.mark.parametrize(
    ("line", "suppressed"),
    [("use:use_buffer", True), ("pin:st*le", True), ("any:audit.c", True), ("change:use_buffer", False)],
)
def test_suppressions(program: str, audit: Audit, tmp_path: Path, line: str, suppressed: bool) -> None:
    known = tmp_path / "known"
    known.write_text(f"# what we know\n\n{line}  # since 2024\n")
    result = audit(program, "stale", options=("--suppressions", str(known), "--error-exitcode", "99"))
    assert result.findings[0]["suppressed"] == suppressed
    assert result.status == (RETURNED if suppressed else 99)
    assert ("1 suppressed" in result.text) == suppressed


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"race:free_buffer\n", ":1: a line is pin:, change:, use: or any: and a pattern, not 'race:free_buffer'"),
        (b"# none\npin:\n", ":2: a line is pin:, change:, use: or any: and a pattern, not 'pin:'"),
        (b"pin:\xff\n", " is not text in UTF-8"),
    ],
)
def test_suppressions_that_are_wrong(tmp_path: Path, content: bytes, says: str) -> None:
    known = tmp_path / "known"
    known.write_bytes(content)
    command = [*COMMAND, "audit", "--suppressions", str(known), "true"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert f"Invalid value for --suppressions: {known}{says}\n" in result.stderr


def test_no_directory_for_the_records() -> None:
    """Nothing can be written, so tempfile finds none."""
    command = f"ulimit -f 0; exec {' '.join(COMMAND)} audit true"
    result = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.startswith("Error: the audit needs a temporary directory: No usable temporary directory")
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("option", ["--json", "--html"])
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("/nowhere/report", "'/nowhere/report' cannot be written: No such file"),
        ("--", "name of a file is missing before '--'"),
    ],
)
def test_a_report_that_cannot_be_written(tmp_path: Path, option: str, name: str, says: str) -> None:
    """It is said before the program runs."""
    result = subprocess.run(
        [*COMMAND, "audit", option, name, "touch", "ran"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert says in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_liburing(audit: Audit, tmp_path: Path) -> None:
    library = next(Path("/usr/lib").glob("*-linux-gnu/liburing.so.2"), None)
    if library is None:
        require("liburing", "apt-get install liburing2")
    result = audit(build(HERE / "audit_liburing.c", tmp_path / "liburing", str(library)))
    assert result.counts == (1, 0, 0)
    [finding] = result.findings
    assert finding["pin"]["call"] == "io_uring_register_buffers"
    assert finding["uses"][0]["call"] == "io_uring_submit"
    assert finding["unpin"]["call"] == "io_uring_queue_exit"
    assert result.pins == 3


def test_structures_of_libibverbs(tmp_path: Path) -> None:
    if not Path("/usr/include/infiniband/verbs.h").exists():
        require("verbs", "apt-get install libibverbs-dev")
    build(HERE / "audit_abi.c", tmp_path / "abi", f"-I{ROOT}/src/libummunotify")


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("outer", ["audit", "run"])
def test_with_another_preloaded_library(audit: Audit, tmp_path: Path, outer: str) -> None:
    """Which stands before the same functions. Each plugin gets those of its own library, which no other code sees."""
    program = build(HERE / "audit_verbs.c", tmp_path / "verbs")
    plugins = []
    for number in "12":
        library = build(HERE / "audit_verbs.c", tmp_path / f"library{number}.so", "-DVERBS", "-shared", "-fPIC")
        flags = ("-DPLUGIN", "-shared", "-fPIC", library, f"-Wl,-rpath,{tmp_path}")
        plugins.append(build(HERE / "audit_verbs.c", tmp_path / f"plugin{number}.so", *flags))
    run = [*COMMAND, "run", "--ucx", "--quiet", "--"]
    if outer == "audit":
        result = audit(*run, program, *plugins)
        assert (result.status, result.counts) == (0, (0, 0, 2)), result.text
        assert "stale" in functions(result.findings[0]["pin"]["stack"])
    else:
        inner = [*COMMAND, "audit", "--all", "--", program, *plugins]
        done = subprocess.run([*run, *inner], capture_output=True, text=True, timeout=LONG, check=False)
        assert done.returncode == 0, done.stderr
        assert "2 changed and deregistered without a use" in done.stderr


def test_cuda(audit: Audit, tmp_path: Path) -> None:
    """A library of these names in place of CUDA's: no GPU is needed to see which calls pass by."""
    driver = build(HERE / "audit_cuda.c", tmp_path / "libcuda.so", "-shared", "-fPIC", "-DDRIVER")
    program = build(HERE / "audit_cuda.c", tmp_path / "cuda", driver, f"-Wl,-rpath,{tmp_path}")
    result = audit(program)
    assert result.pins == 2
    [finding] = result.findings
    assert (finding["severity"], finding["pin"]["call"]) == (KEPT, "cuMemHostRegister_v2")


class Page(HTMLParser):
    """What is in the page; everything is closed in the order in which it was opened."""

    VOID = ("meta", "input", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.links: list[str] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        self.found[f"{tag}.{values.get('class', '')}"] += 1
        self.links += [values[name] or "" for name in ("href", "src") if name in values]
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found[f"{tag}.{dict(attributes).get('class', '')}"] += 1

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_page(program: str, audit: Audit, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    awkward = tmp_path / "<b>audit & \xe9<"
    awkward.mkdir()
    copy = Path(shutil.copy(program, awkward))
    [finding] = audit(str(copy), "stale", options=("--html", str(path))).findings
    page = Page(path.read_text())
    assert (page.found["article.used"], page.found["path.change"], page.found["circle.use"]) == (1, 1, 1)
    assert page.found["rect.stale"] == 1
    assert page.links == ["#finding-1"]  # nothing from anywhere else
    assert f"{finding['pin']['address']:#x}" in page.texts
    assert {"pin_buffer", "use_buffer"} <= set(page.texts)
    assert any(str(copy) in each for each in page.texts)


def test_page_without_findings(program: str, audit: Audit, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    audit(program, "correct", options=("--html", str(path)))
    page = Page(path.read_text())
    assert not page.found["form."]
    assert any("101 pins" in each for each in page.texts)
