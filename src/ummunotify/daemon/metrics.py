"""Figures for Prometheus, in the daemon's own event loop."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Collection, Iterable, Iterator

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from .._peers import close, receive
from ..errors import UnavailableError
from .listening import BACKLOG, listening
from .server import Server

_CONNECTIONS = 8
"""At a time; one more ends the oldest."""
_REQUEST_MOST = 8192
_REST = 4
"""The figures are not made anew for so many times as long as it took, which grows with the clients."""


class _Figures(Collector):
    def __init__(self, server: Server) -> None:
        self._server = server

    def collect(self) -> Iterable[Metric]:
        summary, records, counters = self._server.summary(), self._server.records(), self._server.counters
        for name, what, value in (
            ("clients", "Notifiers that are open", summary.clients),
            ("clients_limit", "Notifiers that may be open", summary.tables),
            ("tables_ready", "Tables that wait for clients", summary.ready),
            ("memory_bytes", "Kernel memory of all tables", summary.memory),
            ("regions", "Watched regions of all clients", sum(record.regions for record in records)),
            ("invalidations", "Changes that hit, of the clients that there are", sum(r.generation for r in records)),
            ("uptime_seconds", "Since the daemon started", summary.seconds),
        ):
            yield GaugeMetricFamily(f"ummunotify_{name}", what, value)
        counts: tuple[tuple[str, str, float], ...] = (
            ("clients_served", "Notifiers that were opened", counters["came"]),
            ("program_runs", "Runs of the BPF program, while the kernel counts them", summary.runs),
            ("program_seconds", "Their time", summary.run_time_ns / 1e9),
            ("program_skipped", "Runs that the kernel skipped: should be 0", summary.skipped),
        )
        for name, what, count in counts:
            yield CounterMetricFamily(f"ummunotify_{name}", what, count)
        refused = CounterMetricFamily("ummunotify_refused", "What clients were refused", labels=["why"])
        for why in counters.keys() - {"came", "left"}:
            refused.add_metric([why], counters[why])
        yield refused


@contextlib.contextmanager
def listen(address: str, owners: Collection[int] = ()) -> Iterator[socket.socket]:
    """A listening socket at `unix:PATH` or `HOST:PORT`, a loopback address; for `owners` see `listening`.

    ValueError, UnavailableError, OSError.
    """
    kind, _, rest = address.partition(":")
    if kind == "unix" and rest:
        with listening(rest, socket.SOCK_STREAM, owners=owners) as listener:
            yield listener
        return
    host, _, port = address.rpartition(":")
    if host not in ("127.0.0.1", "[::1]", "localhost") or not (port.isdecimal() and int(port) < 1 << 16):
        raise ValueError(f"metrics are served at unix:PATH or 127.0.0.1:PORT, not at {address!r}")
    family = socket.AF_INET6 if "[" in host else socket.AF_INET
    try:
        listener = socket.create_server((host.strip("[]"), int(port)), family=family, backlog=BACKLOG)
    except OSError as error:
        why = os.strerror(error.errno or 0)
        raise UnavailableError(f"metrics cannot be served at {address}: {why}", "choose another port") from None
    with listener:
        yield listener


class Endpoint:
    """Answers whatever it is asked by HTTP with the figures."""

    def __init__(self, server: Server, listener: socket.socket) -> None:
        self._loop = server.loop
        self._listener = listener
        self._registry = CollectorRegistry()
        self._registry.register(_Figures(server))
        self._open: dict[socket.socket, bytes] = {}
        self._text = b""
        self._next = 0.0  # when to make it anew
        listener.setblocking(False)
        server.loop.watch(listener, self._accept)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return
        connection.setblocking(False)
        if len(self._open) >= _CONNECTIONS:
            self._close(next(iter(self._open)))
        self._open[connection] = b""
        self._loop.watch(connection, lambda: self._hear(connection))

    def _hear(self, connection: socket.socket) -> None:
        if connection not in self._open:
            return
        try:
            data = receive(connection.fileno(), 4096) or b""
            self._open[connection] += data
            if data and b"\r\n\r\n" not in self._open[connection] and len(self._open[connection]) < _REQUEST_MOST:
                return
            if data:
                body = self.text()
                head = (
                    f"HTTP/1.0 200 OK\r\nContent-Type: text/plain; version=0.0.4\r\nContent-Length: {len(body)}\r\n\r\n"
                )
                # A few KiB, which an empty send buffer takes at once.
                connection.send(head.encode() + body)
        except BlockingIOError:
            return
        except OSError:
            pass
        self._close(connection)

    def text(self) -> bytes:
        """The figures. Those who ask without pause take no more than a part of the daemon's time."""
        begun = time.monotonic()
        if begun >= self._next:
            self._text = generate_latest(self._registry)
            now = time.monotonic()
            self._next = now + _REST * (now - begun)
        return self._text

    def _close(self, connection: socket.socket) -> None:
        del self._open[connection]
        self._loop.unwatch(connection)
        if connection.family == socket.AF_UNIX:
            close(connection.detach())
        else:
            connection.close()
