"""The report as JSON: report.schema.json says what is in it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from .findings import Finding, Report, Severity

SCHEMA = Path(__file__).with_name("report.schema.json")
VERSION = 1


def _finding(finding: Finding) -> dict[str, Any]:
    return dataclasses.asdict(finding) | {"severity": finding.severity.value, "advice": finding.advice}


def as_json(report: Report) -> dict[str, Any]:
    return {
        "version": VERSION,
        "command": report.command,
        "status": report.status,
        "began": report.began,
        "ended": report.ended,
        "processes": [
            {name: value for name, value in dataclasses.asdict(process).items() if name != "records"}
            | {"source": report.sources.get(process.pid), "failure": report.failures.get(process.pid)}
            for process in report.processes
        ],
        "counts": {severity.value: len(report.of(severity)) for severity in Severity},
        "findings": [_finding(finding) for finding in report.findings],
        "unwatched": [dataclasses.asdict(each) for each in report.unwatched],
    }
