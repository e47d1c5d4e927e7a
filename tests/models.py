"""Runs the models. Not in support.py, which the guests import too: there hypothesis takes seconds to load."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test


def run_model(model: type[RuleBasedStateMachine], *, examples: int, slow: int, steps: int) -> None:
    """Compare a model with the real thing, in so many examples of so many steps.

    `slow`: with UMMUNOTIFY_SLOW. UMMUNOTIFY_EXAMPLES is how many in any case, for emulated guests.
    """
    run_state_machine_as_test(
        model,
        settings=settings(
            max_examples=int(
                os.environ.get("UMMUNOTIFY_EXAMPLES", slow if "UMMUNOTIFY_SLOW" in os.environ else examples)
            ),
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
