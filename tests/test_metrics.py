"""What a process tells of its caches and notifiers: why its hit rate is low, Prometheus's figures, the dashboard."""

from __future__ import annotations

import json
import mmap
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from registrar import Recorder
from support import in_child, map_memory, probes, remap, require_module, require_source, unmap_memory

import ummunotify
from ummunotify import CacheStats, Notifier, RegistrationCache
from ummunotify.explain import explain
from ummunotify.selftest.changes import PAGE, madvise
from ummunotify.types import NO_CALL

require_module("prometheus_client")
from prometheus_client import CollectorRegistry, generate_latest  # noqa: E402

from ummunotify.daemon.metrics import _Figures  # noqa: E402
from ummunotify.metrics import Exporter  # noqa: E402

DASHBOARD = Path(__file__).parents[1] / "examples/grafana.json"
SIZE = 8 * PAGE


@pytest.fixture
def memory() -> Iterator[int]:
    address = map_memory(SIZE)
    yield address
    unmap_memory(address, SIZE)


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


def use(cache: RegistrationCache[int], address: int) -> None:
    with cache.acquire((address, PAGE)):
        pass


# ---- explain ----


@pytest.mark.parametrize("source", [*probes(), "uffd"])
def test_causes(source: str, memory: int) -> None:
    require_source(source)
    with ummunotify.open(source) as umn, RegistrationCache(Recorder(), notifier=umn, call_sites=True) as cache:
        assert cache.causes == {}
        assert cache.explain() == "nothing was acquired so far"
        for _ in range(3):
            use(cache, memory)
            remap(memory)
        use(cache, memory)
        madvise(memory, PAGE, mmap.MADV_DONTNEED)
        use(cache, memory)
        use(cache, memory)
        causes = cache.causes
        assert list(causes.items()) == [(NO_CALL if source == "uffd" else "munmap", 3), ("madvise", 1)]
        assert sum(causes.values()) == cache.stats.stale
        first, *others = cache.explain().splitlines()
        assert first == "16.7% of 6 uses were hits, 5 had to register"
        assert others[0] == "4 registrations went stale, as their memory was changed:"
        assert [line.partition(":")[0] for line in others[1 : 1 + len(causes)]] == [
            f"  {count} by {cause}" for cause, count in causes.items()
        ]
        assert ("userfaultfd" in others[1]) == (source == "uffd")
        assert others[1 + len(causes) :] == [
            "at least 1 were of memory that was not registered before, or not all of it",
            "most registrations were made at:",
            f"  5 {__file__}:{use.__code__.co_firstlineno + 1}, use",
        ]


def test_call_sites_are_counted_where_asked_for(keeper: Notifier, memory: int) -> None:
    with RegistrationCache(Recorder()) as cache:
        use(cache, memory)
        assert "made at" not in cache.explain()


def test_other_reasons() -> None:
    stats = CacheStats(*[0] * len(CacheStats._fields))._replace(
        hits=100, misses=100, evictions=1000, merges=2, retries=3, uncached=4
    )
    assert explain(stats, {}, None).splitlines() == [
        "50.0% of 200 uses were hits, 100 had to register",
        "1,000 registrations were given up for others: raise max_bytes, max_registrations or the registrar's own limit",
        "2 registrations became part of a larger one",
        "4 registrations were for one use, as nothing tells of changes of that memory here: see `ummunotify doctor`",
        "3 times memory changed while it was being registered",
    ]


# ---- Prometheus ----


def value(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
    return registry.get_sample_value(f"ummunotify_{name}", labels)


def test_figures(keeper: Notifier, memory: int, registry: CollectorRegistry) -> None:
    exporter = Exporter(registry)
    recorder = Recorder(granularity=PAGE)
    with ummunotify.open() as umn, RegistrationCache(exporter.timed(recorder, "weights")) as cache:
        exporter.add(umn, "mine")
        exporter.add(cache, "weights")
        with cache.acquire((memory + 1, 1)) as registration:
            assert recorder.live[registration.handle] == (memory, PAGE)  # the attributes are the registrar's
            assert value(registry, "cache_in_use_bytes", cache="weights") == PAGE
        use(cache, memory)
        remap(memory)
        use(cache, memory)
        recorder.register_errors = iter([OSError(1, "not this one")])
        with pytest.raises(ummunotify.RegistrationError, match="Operation not permitted"):
            use(cache, memory + PAGE)
        stats = cache.stats
        for field in CacheStats._fields:
            if field != "stale":
                found = [value(registry, f"cache_{field}{total}", cache="weights") for total in ("", "_total")]
                assert [each for each in found if each is not None] == [getattr(stats, field)]
        assert stats.stale == 1
        (cause,) = cache.causes
        assert value(registry, "cache_stale_total", cache="weights", cause=cause) == 1
        calls = {
            call: value(registry, "cache_registrar_seconds_count", cache="weights", call=call)
            for call in ("register", "deregister")
        }
        assert calls == {"register": 3, "deregister": 1}
        with umn.watch((memory, PAGE)):
            where = {"notifier": "mine", "source": umn.source}
            assert value(registry, "notifier_regions", **where) == 1
            assert value(registry, "notifier_bytes", **where) == umn.stats.bytes > 0
            before = value(registry, "notifier_changes_total", **where)
            remap(memory)
            assert umn.changed
            assert value(registry, "notifier_changes_total", **where) == umn.generation != before
        assert value(registry, "notifier_overflows_total", **where) == 0
    assert value(registry, "cache_hits_total", cache="weights") is None  # closed
    assert value(registry, "notifier_regions", **where) is None


def test_names(keeper: Notifier, memory: int, registry: CollectorRegistry) -> None:
    exporter = Exporter(registry)
    with RegistrationCache(Recorder()) as cache, RegistrationCache(Recorder()) as other:
        exporter.add(cache, "a")
        exporter.add(cache, "a")
        exporter.add(other, "b")
        with pytest.raises(ValueError, match="another one that is open has the name 'a'"):
            exporter.add(other, "a")
        use(other, memory)
        assert [value(registry, "cache_misses_total", cache=name) for name in "ab"] == [0, 1]
        assert generate_latest(registry).decode().count("# TYPE ummunotify_cache_misses_total") == 1
        cache.close()
        exporter.add(other, "a")
        assert value(registry, "cache_misses_total", cache="a") == 1


def test_nothing_is_kept_alive(keeper: Notifier, registry: CollectorRegistry) -> None:
    exporter = Exporter(registry)
    exporter.add(RegistrationCache(Recorder()), "gone")
    exporter.add(ummunotify.open(), "gone")
    assert b"gone" not in generate_latest(registry)


def test_figures_in_a_child(keeper: Notifier, memory: int, registry: CollectorRegistry) -> None:
    exporter = Exporter(registry)
    with ummunotify.open() as umn, RegistrationCache(Recorder()) as cache:
        exporter.add(umn, "parents")
        exporter.add(cache, "cache")
        use(cache, memory)
        remap(memory)
        use(cache, memory)
        assert cache.causes

        def child() -> None:
            assert b"parents" not in generate_latest(registry)
            assert value(registry, "cache_misses_total", cache="cache") == 0
            assert cache.causes == {}

        in_child(child)
        assert value(registry, "cache_misses_total", cache="cache") == 2


def test_dashboard(registry: CollectorRegistry) -> None:
    """Each figure that it shows is one that there is."""
    exporter = Exporter(registry)
    exporter.timed(Recorder(), "")
    known = set(re.findall(r"^# TYPE (\w+)", generate_latest(registry).decode(), re.M))
    summary = SimpleNamespace(clients=0, tables=0, ready=0, memory=0, seconds=0, runs=0, run_time_ns=0, skipped=0)
    daemon: Any = SimpleNamespace(summary=lambda: summary, records=list, counters={"came": 0, "left": 0})
    known |= {family.name + "_total" * (family.type == "counter") for family in _Figures(daemon).collect()}
    panels = json.loads(DASHBOARD.read_text())["panels"]
    expressions = [target["expr"] for panel in panels for target in panel.get("targets", ())]
    shown = {name.removesuffix("_bucket") for name in re.findall(r"\bummunotify_\w+", " ".join(expressions))}
    assert shown <= known
    assert known - shown == {
        "ummunotify_uptime_seconds",
        "ummunotify_invalidations",
        "ummunotify_cache_registrar_seconds_created",
    }
    assert all(expression.count("(") == expression.count(")") for expression in expressions)
