"""How long Hypothesis searches: seconds, or with HYPOTHESIS_PROFILE=long an hour or so."""

from __future__ import annotations

import os
from contextlib import suppress

with suppress(ImportError):
    from hypothesis import HealthCheck, Phase, settings

    slow = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
    # The same examples each time: a test that fails is the fault of the change before it.
    settings.register_profile(
        "short", max_examples=60, derandomize=True, deadline=None, database=None, suppress_health_check=slow
    )
    settings.register_profile(
        "long", max_examples=20_000, deadline=None, phases=[Phase.generate, Phase.shrink], suppress_health_check=slow
    )
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "short"))
