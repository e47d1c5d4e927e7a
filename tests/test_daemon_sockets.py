"""Where the daemon listens: it replaces only what a daemon has left, and no other user can replace its socket."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from daemons import COMMAND, NOBODY, Child
from support import require

from ummunotify.daemon import private
from ummunotify.daemon.listening import check_directory, listening
from ummunotify.errors import UnavailableError

KINDS = [socket.SOCK_SEQPACKET, socket.SOCK_STREAM]


@pytest.fixture(autouse=True)
def root() -> None:
    if os.geteuid():
        require("root", "the tests make files of other users")


@pytest.fixture
def folder() -> Iterator[Path]:
    """A directory of root's that others may enter."""
    with tempfile.TemporaryDirectory(prefix="umn") as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@pytest.fixture(params=KINDS, ids=lambda kind: kind.name)
def kind(request: pytest.FixtureRequest) -> socket.SocketKind:
    """Of `--socket`, and of `--metrics`."""
    kind: socket.SocketKind = request.param
    return kind


def bound(path: Path, kind: socket.SocketKind) -> socket.socket:
    made = socket.socket(socket.AF_UNIX, kind)
    made.bind(str(path))
    return made


def leave(path: Path, kind: socket.SocketKind) -> None:
    """A dead socket, as a daemon leaves it."""
    with listening(str(path), kind):
        pass


def state(path: Path) -> tuple[int, int, bytes]:
    """Changes if what is at `path` is replaced."""
    what = os.lstat(path)
    return what.st_ino, what.st_mtime_ns, path.read_bytes() if path.is_file() else b""


def refused(path: Path | str, kind: socket.SocketKind) -> str:
    with pytest.raises(UnavailableError) as caught, listening(str(path), kind):
        pass
    return str(caught.value)


def test_a_dead_socket_of_a_daemon_is_replaced(folder: Path, kind: socket.SocketKind) -> None:
    path = folder / "socket"
    for mode in (0o666, 0o600):
        with listening(str(path), kind, mode=mode) as listener, socket.socket(socket.AF_UNIX, kind) as client:
            assert stat.S_IMODE(path.stat().st_mode) == mode
            client.connect(str(path))
            listener.accept()[0].close()


@pytest.mark.parametrize("path", ["", "/var/tmp/" + 99 * "x"])
def test_a_path_that_no_socket_can_have(path: str, kind: socket.SocketKind) -> None:
    assert refused(path, kind).endswith("; choose another path")
    assert not path or not os.path.exists(f"{path}.lock")


def test_what_listens_is_left_alone(folder: Path, kind: socket.SocketKind) -> None:
    path = folder / "socket"
    with listening(str(path), kind):
        before = state(path)
        assert "a daemon listens" in refused(path, kind)
        assert state(path) == before
    # Programs that know nothing of the lock, with a full queue too, and with a socket of another kind.
    for theirs in KINDS:
        path.unlink()
        with bound(path, theirs) as listener, contextlib.ExitStack() as stack:
            listener.listen(0)
            for _ in range(4):
                waiting = stack.enter_context(socket.socket(socket.AF_UNIX, theirs | socket.SOCK_NONBLOCK))
                before = state(path)
                assert "a program listens" in refused(path, kind)
                assert state(path) == before
                waiting.connect_ex(str(path))


def file(path: Path) -> None:
    path.write_text("precious")


def symlink(path: Path) -> None:
    leave(path.with_name("other"), socket.SOCK_SEQPACKET)
    path.symlink_to("other")


def another_programs_socket(path: Path) -> None:
    bound(path, socket.SOCK_SEQPACKET).close()


def another_users_socket(path: Path) -> None:
    leave(path, socket.SOCK_SEQPACKET)
    os.chown(path, NOBODY, NOBODY)


def another_users_lock(path: Path) -> None:
    leave(path, socket.SOCK_SEQPACKET)
    os.chown(f"{path}.lock", NOBODY, NOBODY)


def symbolic_lock(path: Path) -> None:
    leave(path, socket.SOCK_SEQPACKET)
    os.rename(f"{path}.lock", path.with_name("lock"))
    Path(f"{path}.lock").symlink_to("lock")


def hard_lock(path: Path) -> None:
    leave(path, socket.SOCK_SEQPACKET)
    os.link(f"{path}.lock", path.with_name("lock"))


def lock_that_is_a_fifo(path: Path) -> None:
    os.mkfifo(f"{path}.lock")


@pytest.mark.parametrize(
    "make",
    [
        file,
        os.mkdir,
        os.mkfifo,
        symlink,
        another_programs_socket,
        another_users_socket,
        another_users_lock,
        symbolic_lock,
        hard_lock,
        lock_that_is_a_fifo,
    ],
)
def test_what_is_not_a_daemons_is_left_alone(
    folder: Path, kind: socket.SocketKind, make: Callable[[Path], None]
) -> None:
    path = folder / "socket"
    make(path)
    before = {each: state(each) for each in folder.iterdir() if each.name != "socket.lock"}
    assert str(path) in refused(path, kind)
    assert {each: state(each) for each in folder.iterdir() if each.name != "socket.lock"} == before


@pytest.mark.parametrize("option", ["--socket", "--metrics"])
def test_the_command_says_so(folder: Path, option: str) -> None:
    pytest.importorskip("prometheus_client")
    path = folder / "precious"
    path.write_text("precious")
    options = ["--socket", str(folder / "socket"), "--metrics", f"unix:{folder / 'metrics'}"]
    options[options.index(option) + 1] = str(path) if option == "--socket" else f"unix:{path}"
    said = subprocess.run([*COMMAND, "daemon", *options], capture_output=True, text=True)
    assert said.returncode == 1
    assert f"{path} is there and is not a socket" in said.stderr
    assert "Traceback" not in said.stderr
    assert path.read_text() == "precious"


# ---- the directory ----


def test_directories_that_no_other_user_can_write_to(folder: Path) -> None:
    check_directory(folder)
    (folder / "sticky").mkdir()
    os.chmod(folder / "sticky", 0o1777)
    (folder / "sticky" / "ours").mkdir()
    (folder / "link").symlink_to(folder / "sticky" / "..")
    check_directory(folder / "link" / "sticky" / "ours")
    for umask in (0o000, 0o077):  # also one that it makes itself
        before = os.umask(umask)
        try:
            with listening(str(folder / f"{umask:o}" / "socket"), socket.SOCK_STREAM):
                assert stat.S_IMODE((folder / f"{umask:o}").stat().st_mode) & 0o022 == 0
        finally:
            os.umask(before)


def test_directories_above_the_sockets_are_not_made(folder: Path, kind: socket.SocketKind) -> None:
    """A mistyped path leaves nothing behind."""
    assert f"there is no {folder}/typo/more" in refused(folder / "typo" / "more" / "below" / "socket", kind)
    assert not list(folder.iterdir())
    (folder / "file").touch()
    assert f"{folder}/file is no directory" in refused(folder / "file" / "socket", kind)


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o757])
@pytest.mark.parametrize("depth", [0, 1])
def test_a_directory_that_others_can_write_to(folder: Path, mode: int, depth: int) -> None:
    inner = folder / "a" / "b"
    inner.mkdir(parents=True)
    os.chmod(inner if depth else inner.parent, mode)
    assert "writable to others" in refused(inner / "socket", socket.SOCK_STREAM)
    assert not list(inner.iterdir())


def test_a_directory_of_another_users(folder: Path) -> None:
    theirs = folder / "theirs"
    theirs.mkdir()
    os.chown(theirs, NOBODY, NOBODY)
    inner = theirs / "ours"
    inner.mkdir()
    for directory in (theirs, inner):
        assert f"belongs to uid {NOBODY}" in refused(directory / "socket", socket.SOCK_STREAM)
        check_directory(directory, [NOBODY])


def test_a_symbolic_link_of_another_users(folder: Path) -> None:
    (folder / "ours").mkdir()
    link = folder / "link"
    link.symlink_to("ours")
    check_directory(link)
    os.lchown(link, NOBODY, NOBODY)
    assert f"belongs to uid {NOBODY}" in refused(link / "socket", socket.SOCK_STREAM)
    # On the way of a link of root's, too.
    (folder / "more").symlink_to(link)
    with pytest.raises(UnavailableError, match=f"{link} belongs"):
        check_directory(folder / "more")
    (folder / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="symbolic links"):
        check_directory(folder / "loop")


def test_another_user_cannot_take_the_place(folder: Path) -> None:
    """In a directory like /tmp: neither before nor after."""
    os.chmod(folder, 0o1777)
    path = folder / "socket"

    def attack(_: object) -> list[str]:
        attempts: dict[str, Callable[[], object]] = {
            "unlink": path.unlink,
            "rename": lambda: path.rename(folder / "gone"),
            "unlock": lambda: os.unlink(f"{path}.lock"),
        }
        failed = []
        for name, act in attempts.items():
            try:
                act()
            except PermissionError:
                failed.append(name)
        return failed

    with listening(str(path), socket.SOCK_STREAM, mode=0o666):
        assert Child(attack).result() == ["unlink", "rename", "unlock"]
    path.unlink()

    def precede(_: object) -> None:
        bound(path, socket.SOCK_STREAM).close()

    Child(precede).result()
    assert "no daemon of this user's" in refused(path, socket.SOCK_STREAM)


def test_the_socket_of_a_programs_own_daemon(folder: Path, privileged: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    os.chmod(folder, 0o777)
    with pytest.raises(UnavailableError, match="writable to others"):
        private.start()
    assert not list(folder.iterdir())
