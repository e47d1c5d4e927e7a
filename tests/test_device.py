"""/dev/ummunotify in unmodified programs: the conformance suite in C, on each source, and `ummunotify run`."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from daemons import COMMAND, NOBODY, PATIENCE, Daemon
from support import require
from test_c import HERE, build, output

import ummunotify
from ummunotify.cli.config import LIB
from ummunotify.daemon.protocol import ENVIRONMENT as SOCKET

RUN = [*COMMAND, "run"]
PRELOAD = str(LIB / "libummunotify-device.so")
EXAMPLE = Path(__file__).parents[1] / "examples" / "ummunotify_2010.c"
CASES = re.findall(r'^\t\t\{"(\w+)", test_', (HERE / "device.c").read_text(), re.MULTILINE)
BPF, DAEMON, UFFD = "bpf", "daemon as another user", "uffd"


def private_daemons() -> list[str]:
    return [name for name in os.listdir(tempfile.gettempdir()) if re.fullmatch("ummunotify-[^.-]+", name)]


@pytest.fixture(autouse=True)
def none_stays() -> Iterator[None]:
    """A program's own daemon ends with it."""
    yield
    deadline = time.monotonic() + PATIENCE
    while private_daemons():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def public() -> Iterator[Path]:
    """A directory that other users can get into."""
    with tempfile.TemporaryDirectory(prefix="umn") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture(scope="module")
def suite(public: Path) -> str:
    return build(HERE / "device.c", public / "device", *output(*COMMAND, "config", "--cflags").split())


@pytest.fixture(scope="module")
def programs(public: Path) -> dict[str, str]:
    """Programs to be run, by name."""
    texts = {
        "open": """
            #include <fcntl.h>
            #include <stdio.h>
            int main(void) { int fd = open("/dev/ummunotify", O_RDONLY); perror("open"); return fd < 0; }
        """,
        "sleep": """
            #include <fcntl.h>
            #include <signal.h>
            #include <stdio.h>
            #include <unistd.h>
            static void caught(int number) { _exit(40 + number); }
            int main(int argc, char **argv)
            {
                (void)argv;
                if (argc > 1)
                    signal(SIGTERM, caught);
                printf("%d\\n", open("/dev/ummunotify", O_RDONLY));
                fflush(stdout);
                for (;;)
                    pause();
            }
        """,
    }
    built = {}
    for name, text in texts.items():
        source = public / f"{name}.c"
        source.write_text(text)
        built[name] = build(source, public / name)
    return built


@pytest.fixture(scope="module")
def shared_daemon(public: Path, privileged: None) -> Iterator[Daemon]:
    """One for all the cases."""
    daemon = Daemon(public)
    daemon.start()
    yield daemon
    assert daemon.end() == 0, daemon.log.read_text()
    assert "Traceback" not in daemon.log.read_text()


def call(*command: str, user: int | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        user=user,
        group=user,
        extra_groups=None if user is None else [],
        timeout=4 * PATIENCE,
    )


# ---- The interface ----


@pytest.mark.parametrize("source", [BPF, DAEMON, UFFD])
@pytest.mark.parametrize("case", CASES)
def test_interface(source: str, case: str, suite: str, request: pytest.FixtureRequest) -> None:
    if source == BPF:
        request.getfixturevalue("privileged")
        result = call(*RUN, "--source", "bpf", "--", suite, case)
    elif source == DAEMON:
        socket = request.getfixturevalue("shared_daemon").path
        result = call(suite, case, user=NOBODY, LD_PRELOAD=PRELOAD, **{SOCKET: socket})
    else:
        uffd_or_skip()
        result = call(*RUN, "--source", "uffd", "--", suite, case)
    assert (result.returncode, result.stdout, result.stderr) == (0, f"{case}\n", "")


def uffd_or_skip() -> None:
    try:
        ummunotify.open("uffd").close()
    except ummunotify.SourceUnavailableError as error:
        require("uffd", str(error))


def test_all_cases_are_found() -> None:
    assert len(CASES) == (HERE / "device.c").read_text().count("static void test_")


@pytest.mark.parametrize("source", [BPF, UFFD])
def test_program_of_2010(source: str, public: Path, request: pytest.FixtureRequest) -> None:
    if source == BPF:
        request.getfixturevalue("privileged")
    else:
        uffd_or_skip()
    flags = output(*COMMAND, "config", "--cflags").split()
    program = build(EXAMPLE, public / "ummunotify_2010", "-std=gnu99", *flags)
    result = call(*RUN, "--source", source, program)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert [line.strip() for line in lines if not line.startswith("  0x")] == [
        'sending "the first buffer"',
        "a miss",
        'sent: "the first buffer"',
        "sending it again",
        "a hit",
        'sent: "the first buffer"',
        'sending "another, at the same address"',
        "a miss",
        'sent: "another, at the same address"',
    ]


@pytest.mark.parametrize("source", [DAEMON, UFFD])
def test_no_linear_scan(source: str, public: Path, request: pytest.FixtureRequest) -> None:
    """Counted in basic blocks that are executed, so that time does not matter."""
    environment = {"UMMUNOTIFY_SOURCE": "uffd"}
    if source == UFFD:
        uffd_or_skip()
    else:
        environment = {SOCKET: request.getfixturevalue("shared_daemon").path}
    package = Path(__file__).parents[1] / "src" / "ummunotify"
    objects = []
    for path in [*(package / "lib").glob("*.c"), *(package / "core" / f"{name}.c" for name in CORE)]:
        target = public / f"{path.parent.name}-{path.stem}.o"
        build(path, target, "-c", "-fsanitize-coverage=trace-pc", f"-I{package}")
        objects.append(str(target))
    flags = [f"-I{package / 'include'}", *objects, "-ldl"]
    result = call(build(HERE / "device_work.c", public / "device_work", *flags), **environment)
    assert result.returncode == 0, result.stderr
    counted = {what: [int(n) for n in numbers.split()] for what, _, numbers in
               (line.partition(":") for line in result.stdout.splitlines())}
    for what in ("register", "unregister", "change and read"):
        first, last = counted[what]
        assert 10 < first < last <= 3 * first, counted


CORE = ("feed", "platform", "table", "uffd")


# ---- Where there is none ----


def test_no_source(programs: dict[str, str]) -> None:
    """As without this package, but that it says why."""
    nowhere = {SOCKET: "/nowhere/socket", "UMMUNOTIFY_SOURCE": "daemon"}
    result = call(*RUN, programs["open"], **nowhere)
    assert result.returncode == 1
    complaint, error = result.stderr.splitlines()
    assert complaint.startswith("ummunotify: no /dev/ummunotify: ")
    assert "/nowhere/socket" in complaint
    assert error == "open: No such file or directory"
    for quiet in (["--quiet"], []):
        environment = nowhere | ({} if quiet else {"UMMUNOTIFY_QUIET": "1"})
        result = call(*RUN, *quiet, programs["open"], **environment)
        assert (result.returncode, result.stderr) == (1, "open: No such file or directory\n")


def test_no_such_source(programs: dict[str, str]) -> None:
    result = call(*RUN, programs["open"], UMMUNOTIFY_SOURCE="magic")
    assert result.returncode == 1
    assert "there is no source magic" in result.stderr


def test_uffd_only_if_asked_for(programs: dict[str, str], public: Path) -> None:
    result = call(programs["open"], user=NOBODY, LD_PRELOAD=PRELOAD, **{SOCKET: "/nowhere/socket"})
    assert result.returncode == 1
    assert "UMMUNOTIFY_SOURCE=uffd" in result.stderr


def test_set_uid(programs: dict[str, str], public: Path, shared_daemon: Daemon) -> None:
    """Nothing gets into such a program, and it says so."""
    program = public / "set_uid"
    shutil.copy(programs["open"], program)
    program.chmod(0o4755)
    result = call(str(program), user=NOBODY, LD_PRELOAD=PRELOAD, **{SOCKET: shared_daemon.path})
    assert (result.returncode, result.stderr) == (1, "open: No such file or directory\n")
    result = call(*RUN, "--source", "uffd", str(program))
    assert "Warning" in result.stderr
    assert "set-uid" in result.stderr


def test_static(public: Path) -> None:
    program = build(public / "open.c", public / "static", "-static")
    result = call(*RUN, "--source", "uffd", program)
    assert result.returncode == 1
    assert "Warning" in result.stderr
    assert "statically linked" in result.stderr


# ---- The command ----


def test_chooses_bpf(privileged: None, programs: dict[str, str]) -> None:
    """If there is no daemon."""
    result = call(*RUN, programs["open"], **{SOCKET: "/nowhere/socket"})
    assert (result.returncode, result.stderr) == (0, "open: Success\n")


def test_chooses_the_daemon(shared_daemon: Daemon, programs: dict[str, str]) -> None:
    result = call(*RUN, "sh", "-c", f"echo ${SOCKET}; exec {programs['open']}", **{SOCKET: shared_daemon.path})
    assert (result.returncode, result.stdout) == (0, f"{shared_daemon.path}\n")


def test_insists(programs: dict[str, str]) -> None:
    result = call(*RUN, "--source", "daemon", programs["open"], **{SOCKET: "/nowhere/socket"})
    assert result.returncode == 1
    assert result.stderr.startswith("Error: daemon does not work here: no daemon runs here")
    result = call(*RUN, "--source", "bpf", programs["open"], user=NOBODY)
    assert result.returncode == 1
    assert result.stderr.startswith("Error: bpf does not work here: loading BPF programs is not permitted")


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["/nowhere/program"], 127, "Error: there is no program /nowhere/program\n"),
        (["no-such-program"], 127, "Error: there is no program no-such-program\n"),
        (["/etc/passwd"], 126, "Error: /etc/passwd may not be executed; see its permissions\n"),
        (["/etc"], 126, "Error: /etc is a directory\n"),
        (["--sauce", "uffd", "true"], 2, "No such option: --sauce"),
        (["--source", "magic", "true"], 2, "'magic' is not one of"),
        ([], 2, "Missing argument"),
    ],
)
def test_mistakes(arguments: list[str], status: int, says: str) -> None:
    result = call(*RUN, *arguments)
    assert result.returncode == status
    assert says in result.stderr
    assert "Traceback" not in result.stderr


def test_not_a_program(tmp_path: Path) -> None:
    for text in ("nonsense", "#!/nowhere/interpreter\n"):
        program = tmp_path / "program"
        program.write_text(text)
        program.chmod(0o755)
        result = call(*RUN, str(program))
        assert result.returncode == 126
        assert result.stderr.startswith(f"Error: {program} cannot be executed: ")


def test_exit_status_and_arguments() -> None:
    result = call(*RUN, "--", "sh", "-c", 'echo "$@"; exit 7', "-", "--source", "-x", "a b")
    assert (result.returncode, result.stdout) == (7, "--source -x a b\n")
    # The program's children are its own.
    result = call(*RUN, "sh", "-c", "ps --no-headers --ppid $$ -o comm | grep -v ps")
    assert result.stdout == ""


def test_keeps_what_is_preloaded_already() -> None:
    result = call(*RUN, "sh", "-c", "echo $LD_PRELOAD", LD_PRELOAD="libm.so.6")
    assert result.stdout == f"{PRELOAD}:libm.so.6\n"


@pytest.mark.parametrize(("arguments", "number", "status"), [
    ([], signal.SIGTERM, -signal.SIGTERM),
    ([], signal.SIGINT, -signal.SIGINT),
    ([], signal.SIGKILL, -signal.SIGKILL),
    (["catch"], signal.SIGTERM, 40 + signal.SIGTERM),
])
def test_signals(
    privileged: None, programs: dict[str, str], arguments: list[str], number: int, status: int
) -> None:
    command = [*RUN, "--source", "bpf", programs["sleep"], *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "3\n"  # no descriptor of this command's is left in the program
        assert len(private_daemons()) == 1
        os.kill(process.pid, number)
        assert process.wait(PATIENCE) == status


def test_terminal_signals(privileged: None, programs: dict[str, str]) -> None:
    """Ctrl-C is for the program; its daemon ends after it."""
    command = [*RUN, "--source", "bpf", programs["sleep"]]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(PATIENCE) == -signal.SIGINT
        assert process.stdout.read() == ""  # nobody else has it open


def test_children_find_it_too(privileged: None, programs: dict[str, str]) -> None:
    result = call(*RUN, "--source", "bpf", "sh", "-c", f"{programs['open']} && {programs['open']}")
    assert (result.returncode, result.stderr) == (0, "open: Success\n" * 2)


# ---- Sanitizers ----


@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_sanitizers(sanitizer: str, public: Path, shared_daemon: Daemon) -> None:
    """Linked into the suite, as they do not go together with preloading."""
    package = Path(__file__).parents[1] / "src" / "ummunotify"
    sources = [*(package / "lib").glob("*.c"), *(package / "core" / f"{name}.c" for name in CORE)]
    flags = [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", f"-I{package}", f"-I{package / 'include'}", "-ldl"]
    program = build(HERE / "device.c", public / "sanitized", *map(str, sources), *flags)
    with contextlib.ExitStack() as failed:
        for case in CASES:
            if case in NOT_SANITIZED:
                continue
            result = call(program, case, **{SOCKET: shared_daemon.path})
            failed.callback(check_result, case, result)


def check_result(case: str, result: subprocess.CompletedProcess[str]) -> None:
    assert (result.returncode, result.stdout) == (0, f"{case}\n"), result.stderr


NOT_SANITIZED: dict[str, str] = {}
"""Why not."""
