"""Figures of a process's notifiers and caches for Prometheus: `pip install 'ummunotify[metrics]'`.

    exporter = Exporter()
    cache = RegistrationCache(exporter.timed(registrar, "weights"))
    exporter.add(cache, "weights")
    prometheus_client.start_http_server(9400)

`examples/grafana.json` is a dashboard that shows them, and those of the daemon.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable
from typing import Any, Generic, TypeVar

from prometheus_client import REGISTRY, CollectorRegistry, Histogram, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from ._cache import RegistrationCache
from .errors import ClosedError
from .notifier import Notifier
from .registrars import Registrar
from .types import CacheStats

_Handle = TypeVar("_Handle")

_SECONDS = [unit * times for unit in (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1) for times in (1, 2.5, 5)]
"""Upper bounds of what a registrar takes: locking a page 1 us, pinning gigabytes a second."""
_GAUGES = {
    "registrations": "Registered now, or being registered",
    "registered_bytes": "Registered now, or being registered",
    "in_use": "Registrations that are in use",
    "in_use_bytes": "Of the registrations that are in use",
    "not_deregistered": "Registrations that the registrar failed to deregister, and that still count",
}
_COUNTERS = {
    "hits": "Calls of acquire that were given what was registered",
    "misses": "Calls of acquire that had to register",
    "evictions": "Registrations that were given up for others, because of a limit",
    "merges": "Registrations that became part of a larger one",
    "retries": "Times that memory changed while it was being registered",
    "uncached": "Registrations for one use, as nothing tells of changes of that memory",
    "failed_deregistrations": "Times that the registrar failed to deregister",
}
assert set(_GAUGES) | set(_COUNTERS) | {"stale"} == set(CacheStats._fields)


class Exporter(Collector):
    """Figures of what was added, as long as it is open. Keeps nothing alive.

    `registry` is where it registers itself; None: nowhere. One exporter serves all notifiers and caches of a process.
    Any thread may call any method. In the child of a fork a cache's figures begin at 0, and its parent's notifiers are
    left out.
    """

    def __init__(self, registry: CollectorRegistry | None = REGISTRY) -> None:
        self._lock = threading.Lock()
        self._caches: dict[str, weakref.ref[RegistrationCache[Any]]] = {}
        self._notifiers: dict[str, weakref.ref[Notifier]] = {}
        self._seconds = Histogram(
            "ummunotify_cache_registrar_seconds",
            "What the registrar took, whether or not it succeeded",
            ["cache", "call"],
            buckets=_SECONDS,
            registry=None,
        )
        if registry is not None:
            registry.register(self)

    def add(self, what: Notifier | RegistrationCache[Any], name: str) -> None:
        """`name` is the label `notifier` or `cache` of its figures. ValueError if another one that is open has it."""
        with self._lock:
            if isinstance(what, Notifier):
                _put(self._notifiers, name, what)
            else:
                _put(self._caches, name, what)

    def timed(self, registrar: Registrar[_Handle], name: str) -> Registrar[_Handle]:
        """The same registrar for a cache of this name, measured."""
        return _Timed(registrar, self._seconds.labels(name, "register"), self._seconds.labels(name, "deregister"))

    def collect(self) -> Iterable[Metric]:
        with self._lock:
            caches = {name: cache for name, ref in self._caches.items() if (cache := ref()) and not cache.closed}
            notifiers = {name: umn for name, ref in self._notifiers.items() if (umn := ref()) and not umn.closed}
        yield from self._of_notifiers(notifiers)
        yield from self._of_caches(caches)
        yield from self._seconds.collect()

    def _of_notifiers(self, notifiers: dict[str, Notifier]) -> Iterable[Metric]:
        labels = ["notifier", "source"]
        regions = GaugeMetricFamily("ummunotify_notifier_regions", "Watched regions", labels=labels)
        size = GaugeMetricFamily("ummunotify_notifier_bytes", "Shared memory of the table", labels=labels)
        changes = CounterMetricFamily("ummunotify_notifier_changes", "Changes that hit a region", labels=labels)
        overflows = CounterMetricFamily(
            "ummunotify_notifier_overflows",
            "Times that all regions counted as changed, most of them needlessly",
            labels=labels,
        )
        for name, umn in notifiers.items():
            try:
                stats, generation, where = umn.stats, umn.generation, [name, umn.source]
            except ClosedError:  # by another thread, or it is the parent's
                continue
            regions.add_metric(where, stats.regions)
            size.add_metric(where, stats.bytes)
            changes.add_metric(where, generation)
            overflows.add_metric(where, stats.overflows)
        return regions, size, changes, overflows

    def _of_caches(self, caches: dict[str, RegistrationCache[Any]]) -> Iterable[Metric]:
        found = [(name, cache.stats, cache.causes) for name, cache in caches.items()]
        for field, what in _GAUGES.items():
            gauge = GaugeMetricFamily(f"ummunotify_cache_{field}", what, labels=["cache"])
            for name, stats, _ in found:
                gauge.add_metric([name], getattr(stats, field))
            yield gauge
        for field, what in _COUNTERS.items():
            counter = CounterMetricFamily(f"ummunotify_cache_{field}", what, labels=["cache"])
            for name, stats, _ in found:
                counter.add_metric([name], getattr(stats, field))
            yield counter
        stale = CounterMetricFamily(
            "ummunotify_cache_stale", "Registrations whose memory was changed, by what", labels=["cache", "cause"]
        )
        for name, _, causes in found:
            for cause, count in causes.items():
                stale.add_metric([name, cause], count)
        yield stale


_Named = TypeVar("_Named", Notifier, RegistrationCache[Any])


def _put(named: dict[str, weakref.ref[_Named]], name: str, what: _Named) -> None:
    other = named[name]() if name in named else None
    if other is not None and other is not what and not other.closed:
        raise ValueError(f"another one that is open has the name {name!r}")
    named[name] = weakref.ref(what)


class _Timed(Generic[_Handle]):
    """All else is the registrar's own."""

    def __init__(self, registrar: Registrar[_Handle], registering: Histogram, deregistering: Histogram) -> None:
        self._registrar = registrar
        self._registering = registering
        self._deregistering = deregistering

    def __getattr__(self, name: str) -> Any:
        return getattr(self._registrar, name)

    def register(self, address: int, length: int) -> _Handle:
        with self._registering.time():
            return self._registrar.register(address, length)

    def deregister(self, handle: _Handle) -> None:
        with self._deregistering.time():
            self._registrar.deregister(handle)
