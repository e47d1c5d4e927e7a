"""The RDMA registrar without RDMA; with it: vm/test_rdma.py."""

from __future__ import annotations

import sys

import pytest

from ummunotify.registrars import RegistrarUnavailableError
from ummunotify.registrars.verbs import VerbsRegistrar


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyverbs", None)
    with pytest.raises(RegistrarUnavailableError, match="python3-pyverbs"):
        VerbsRegistrar("rxe0")
