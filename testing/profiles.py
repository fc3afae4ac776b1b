"""How long and how randomly hypothesis looks: `ci` and `fuzz`, by name."""

from __future__ import annotations

from hypothesis import HealthCheck, Phase, settings
from hypothesis.database import DirectoryBasedExampleDatabase

SEARCH = (Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink)
SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]


def register_profiles() -> None:
    """Make both profiles known to hypothesis.

    `ci` draws the same examples every time and keeps nothing; `fuzz` draws others every time and
    starts with those that failed before.
    """
    settings.register_profile(
        "ci",
        derandomize=True,
        database=None,
        deadline=None,
        stateful_step_count=6,
        phases=SEARCH,
        suppress_health_check=SLOW,
    )
    settings.register_profile(
        "fuzz",
        derandomize=False,
        database=DirectoryBasedExampleDatabase(".hypothesis/fuzz"),
        deadline=None,
        stateful_step_count=8,
        phases=SEARCH,
        suppress_health_check=SLOW,
        print_blob=False,
    )
