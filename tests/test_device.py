"""/dev/ummunotify in unmodified programs: the conformance suite in C, on each source, and `ummunotify run`."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from benchmarks import device as benchmark
from daemons import COMMAND, NOBODY, Daemon
from other_users import require_another_user
from support import LONG, require_source
from test_c import HERE, build, output, sanitizing

from ummunotify._abi import SOCKET_ENVIRONMENT as SOCKET
from ummunotify.cli.config import LIB

RUN = [*COMMAND, "run"]
PRELOAD = str(LIB / "libummunotify-device.so")
EXAMPLE = Path(__file__).parents[1] / "examples" / "ummunotify_2010.c"
SUITE = sorted((HERE / "device").glob("*.c"))
CASES = [case for path in SUITE for case in re.findall(r'^\t\{"(\w+)", test_', path.read_text(), re.MULTILINE)]
BPF, DAEMON, UFFD = "bpf", "daemon as another user", "uffd"


def private_daemons() -> list[str]:
    return [name for name in os.listdir(tempfile.gettempdir()) if re.fullmatch("ummunotify-[^.-]+", name)]


@pytest.fixture(autouse=True)
def none_stays() -> Iterator[None]:
    """A program's own daemon ends with it."""
    yield
    deadline = time.monotonic() + LONG
    while private_daemons():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def public() -> Iterator[Path]:
    """A directory that other users can get into."""
    require_another_user()
    with tempfile.TemporaryDirectory(prefix="umn") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture(scope="module")
def suite(public: Path) -> str:
    flags = output(*COMMAND, "config", "--cflags").split()
    return build(SUITE[0], public / "device", *map(str, SUITE[1:]), *flags)


@pytest.fixture(scope="module")
def programs(public: Path) -> dict[str, str]:
    """Programs to be run, by name."""
    texts = {
        "open": """
            #include <fcntl.h>
            #include <stdio.h>
            int main(void)
            {
                int fd = open("/dev/ummunotify", O_RDONLY);

                if (fd < 0)
                    perror("open");
                else
                    fprintf(stderr, "opened\\n");
                return fd < 0;
            }
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


def call(
    *command: str, user: int | None = None, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        env=os.environ | dict(environment or {}),
        capture_output=True,
        text=True,
        user=user,
        group=user,
        extra_groups=None if user is None else [],
        timeout=LONG,
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
        result = call(suite, case, user=NOBODY, environment={"LD_PRELOAD": PRELOAD, SOCKET: socket})
    else:
        require_source("uffd")
        result = call(*RUN, "--source", "uffd", "--", suite, case)
    assert (result.returncode, result.stdout, result.stderr) == (0, f"{case}\n", ""), result.stderr


def test_all_cases_are_found() -> None:
    assert len(CASES) == sum(path.read_text().count("static void test_") for path in SUITE)


@pytest.mark.parametrize("source", [BPF, UFFD])
def test_program_of_2010(source: str, public: Path, request: pytest.FixtureRequest) -> None:
    if source == BPF:
        request.getfixturevalue("privileged")
    else:
        require_source("uffd")
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
        require_source("uffd")
    else:
        environment = {SOCKET: request.getfixturevalue("shared_daemon").path}
    program = build(HERE / "device_work.c", public / "work", *device_sources(), "-fsanitize-coverage=trace-pc")
    result = call(program, environment=environment)
    assert result.returncode == 0, result.stderr
    lines = (line.partition(":") for line in result.stdout.splitlines())
    counted = {what: [int(number) for number in numbers.split()] for what, _, numbers in lines}
    for what in ("register", "unregister", "change and read"):
        first, last = counted[what]
        assert 10 < first <= last <= 3 * first, counted


def device_sources() -> list[str]:
    """What builds a program that has the device in itself."""
    library = Path(__file__).parents[1] / "src" / "libummunotify"
    sources = sorted(
        path
        for path in library.glob("*/*.c")
        if path.parent.name in ("process", "table", "sources", "notifier", "device")
    )
    return [*map(str, sources), f"-I{library}", f"-I{library / 'include'}", '-DUMN_VERSION="0"', "-ldl"]


# ---- Where there is none ----


def test_no_source(programs: dict[str, str]) -> None:
    """As without this package, but that it says why."""
    nowhere = {SOCKET: "/nowhere/socket", "UMMUNOTIFY_SOURCE": "daemon"}
    result = call(*RUN, programs["open"], environment=nowhere)
    assert result.returncode == 1
    complaint, error = result.stderr.splitlines()
    assert complaint.startswith("ummunotify: no /dev/ummunotify: ")
    assert "/nowhere/socket" in complaint
    assert error == "open: No such file or directory"
    for quiet in (["--quiet"], []):
        environment = nowhere | ({} if quiet else {"UMMUNOTIFY_QUIET": "1"})
        result = call(*RUN, *quiet, programs["open"], environment=environment)
        assert (result.returncode, result.stderr) == (1, "open: No such file or directory\n")


def test_no_such_source(programs: dict[str, str]) -> None:
    """`run` says so before it runs the program; a program that is preloaded otherwise, when it opens the device."""
    environment = {"UMMUNOTIFY_SOURCE": "magic"}
    for command, preload, status in ((RUN, "", 2), ([], PRELOAD, 1)):
        result = call(*command, programs["open"], environment=environment | {"LD_PRELOAD": preload})
        assert result.returncode == status
        assert "there is no source 'magic'" in result.stderr


def test_uffd_only_if_asked_for(programs: dict[str, str], public: Path) -> None:
    result = call(programs["open"], user=NOBODY, environment={"LD_PRELOAD": PRELOAD, SOCKET: "/nowhere/socket"})
    assert result.returncode == 1
    assert "UMMUNOTIFY_SOURCE=uffd" in result.stderr


def test_set_uid(programs: dict[str, str], public: Path, shared_daemon: Daemon) -> None:
    """Nothing gets into such a program, and it says so."""
    require_source("uffd")
    program = public / "set_uid"
    shutil.copy(programs["open"], program)
    program.chmod(0o4755)
    result = call(str(program), user=NOBODY, environment={"LD_PRELOAD": PRELOAD, SOCKET: shared_daemon.path})
    assert (result.returncode, result.stderr) == (1, "open: No such file or directory\n")
    result = call(*RUN, "--source", "uffd", str(program))
    assert "Warning" in result.stderr
    assert "set-uid" in result.stderr


def test_static(public: Path) -> None:
    require_source("uffd")
    program = build(public / "open.c", public / "static", "-static")
    result = call(*RUN, "--source", "uffd", program)
    assert result.returncode == 1
    assert "Warning" in result.stderr
    assert "statically linked" in result.stderr


# ---- The command ----


def test_chooses_bpf(privileged: None, programs: dict[str, str]) -> None:
    """If there is no daemon."""
    result = call(*RUN, programs["open"], environment={SOCKET: "/nowhere/socket"})
    assert (result.returncode, result.stderr) == (0, "opened\n")


def test_chooses_the_daemon(shared_daemon: Daemon, programs: dict[str, str]) -> None:
    result = call(
        *RUN, "sh", "-c", f"echo ${SOCKET}; exec {programs['open']}", environment={SOCKET: shared_daemon.path}
    )
    assert (result.returncode, result.stdout) == (0, f"{shared_daemon.path}\n")


def test_insists(programs: dict[str, str]) -> None:
    result = call(*RUN, "--source", "daemon", programs["open"], environment={SOCKET: "/nowhere/socket"})
    assert result.returncode == 1
    assert result.stderr.startswith("Error: daemon does not work here: no daemon runs here")
    result = subprocess.run(
        [*RUN, "--source", "bpf", programs["open"]], preexec_fn=drop_privileges, capture_output=True, text=True
    )
    assert result.returncode == 1
    assert result.stderr.startswith("Error: bpf does not work here: loading BPF programs is not permitted")


def test_no_advice_on_kvm_where_bpf_is_forbidden(programs: dict[str, str]) -> None:
    result = call(*RUN, "--source", "bpf", programs["open"], user=NOBODY)
    assert result.returncode == 1
    assert "loading BPF programs is not permitted" in result.stderr
    assert "kvm" not in result.stderr


def test_no_process_for_a_daemon(programs: dict[str, str]) -> None:
    limited = ("prlimit", "--nproc=0", *RUN)
    result = call(*limited, "--source", "bpf", programs["open"], user=NOBODY)
    assert result.returncode == 1
    why = "no process can be started for it (Resource temporarily unavailable); raise `ulimit -u`"
    assert f"bpf does not work here: {why}\n" in result.stderr
    assert call(*limited, "true", user=NOBODY, environment={SOCKET: "/nowhere/socket"}).returncode == 0


def test_the_environment_insists_on_bpf(privileged: None, programs: dict[str, str]) -> None:
    """The program cannot load it by itself, so it gets a daemon, as with --source."""
    assert call(*RUN, programs["open"], environment={"UMMUNOTIFY_SOURCE": "bpf:kvm"}).returncode == 0


def drop_privileges() -> None:
    """What the next program can have: not CAP_SYS_ADMIN, CAP_PERFMON and CAP_BPF."""
    libc = ctypes.CDLL(None)
    for number in (21, 38, 39):
        libc.prctl(24, number)  # PR_CAPBSET_DROP


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["/nowhere/program"], 127, "Error: there is no program /nowhere/program\n"),
        (["no-such-program"], 127, "Error: there is no program no-such-program\n"),
        (["/etc/passwd"], 126, "Error: /etc/passwd may not be executed; see its permissions\n"),
        (["/etc"], 126, "Error: /etc is a directory\n"),
        (["--sauce", "uffd", "true"], 2, "No such option '--sauce'"),
        (["--source", "magic", "true"], 2, "there is no source 'magic'"),
        ([], 2, "Missing argument"),
    ],
)
def test_mistakes(arguments: list[str], status: int, says: str) -> None:
    result = call(*RUN, *arguments)
    assert result.returncode == status
    assert says in result.stderr
    assert "Traceback" not in result.stderr


def test_not_a_program(tmp_path: Path) -> None:
    for contents in (b"\0nonsense", b"#!/nowhere/interpreter\n"):
        program = tmp_path / "program"
        program.write_bytes(contents)
        program.chmod(0o755)
        result = call(*RUN, str(program))
        assert result.returncode == 126
        assert result.stderr.startswith(f"Error: {program} cannot be executed: ")


def test_exit_status_and_arguments() -> None:
    result = call(*RUN, "--", "sh", "-c", 'echo "$@"; exit 7', "-", "--source", "-x", "a b")
    assert (result.returncode, result.stdout) == (7, "--source -x a b\n")
    # The program's children are its own.
    result = call(*RUN, "sh", "-c", "cat /proc/$$/task/$$/children; exit 0")
    assert len(result.stdout.split()) == 1  # cat


def test_keeps_what_is_preloaded_already() -> None:
    result = call(*RUN, "sh", "-c", "echo $LD_PRELOAD", environment={"LD_PRELOAD": "libm.so.6"})
    assert result.stdout == f"{PRELOAD}:libm.so.6\n"


@pytest.mark.parametrize(
    ("arguments", "number", "status"),
    [
        ([], signal.SIGTERM, -signal.SIGTERM),
        ([], signal.SIGINT, -signal.SIGINT),
        ([], signal.SIGKILL, -signal.SIGKILL),
        (["catch"], signal.SIGTERM, 40 + signal.SIGTERM),
    ],
)
def test_signals(privileged: None, programs: dict[str, str], arguments: list[str], number: int, status: int) -> None:
    command = [*RUN, "--source", "bpf", programs["sleep"], *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "3\n"  # no descriptor of this command's is left in the program
        assert len(private_daemons()) == 1
        os.kill(process.pid, number)
        assert process.wait(LONG) == status


def test_terminal_signals(privileged: None, programs: dict[str, str]) -> None:
    """Ctrl-C is for the program; its daemon ends after it."""
    command = [*RUN, "--source", "bpf", programs["sleep"]]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(LONG) == -signal.SIGINT
        assert process.stdout.read() == ""  # nobody else has it open


def test_children_find_it_too(privileged: None, programs: dict[str, str]) -> None:
    result = call(*RUN, "--source", "bpf", "sh", "-c", f"{programs['open']} && {programs['open']}")
    assert (result.returncode, result.stderr) == (0, "opened\n" * 2)


def test_benchmark(privileged: None) -> None:
    """It measures what it says; how long things take is not tested."""
    passed, own = benchmark.measure(quick=True)
    assert passed.keys() == benchmark.PASSED_ON.keys()
    assert all(time > 0 for pairs in passed.values() for pair in pairs.times for time in pair)
    assert all(time > 0 for times in own.values() for time in times)
    assert len(benchmark.rows(passed, own)) == 3 + len(passed)


# ---- Sanitizers ----


@pytest.fixture(scope="module", params=["address,undefined", "thread"])
def sanitized(request: pytest.FixtureRequest, public: Path) -> str:
    """The suite, linked with the device.

    The sanitizers stand before the C library's functions themselves. So the suite calls those of preload.c by
    other names.
    """
    options = sanitizing(request.param)
    sources = device_sources()
    preload = next(source for source in sources if source.endswith("preload.c"))
    rest = [source for source in sources if source != preload]
    names = re.findall(r"(\w+);", (Path(preload).with_name("preload.map")).read_text().partition("local:")[0])
    renamed = [word for name in names for word in ("--redefine-sym", f"{name}=preloaded_{name}")]
    objects = []
    for source in (*SUITE, Path(preload)):
        target = public / f"{request.param}-{source.stem}.o"
        build(source, target, "-c", *(word for word in rest if word.startswith("-I")), *options)
        subprocess.run(["objcopy", *renamed, str(target)], check=True)
        objects.append(str(target))
    return build(Path(objects[0]), public / f"device-{request.param}", *objects[1:], *rest, *options)


@pytest.mark.parametrize("case", CASES)
def test_sanitizers(case: str, sanitized: str, shared_daemon: Daemon) -> None:
    if "thread" in sanitized and case in ("clone", "threads_inside"):
        pytest.skip("ThreadSanitizer's own locks do not know of clone")
    # Quiet, since the sanitizer's functions come first, on purpose.
    result = call(sanitized, case, environment={SOCKET: shared_daemon.path, "UMMUNOTIFY_QUIET": "1"})
    assert (result.returncode, result.stdout, result.stderr) == (0, f"{case}\n", ""), result.stderr
