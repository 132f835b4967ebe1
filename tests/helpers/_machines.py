# SPDX-License-Identifier: Apache-2.0
"""How long a state machine runs: in CI for seconds, in `make fuzz-python` for minutes."""

from __future__ import annotations

from hypothesis import HealthCheck, Phase, settings

CI_EXAMPLES = 100  # hypothesis's own number, of which a machine takes a share


def budget(examples: int, steps: int) -> settings:
    """`examples` runs of `steps` rules, the same in every run. Longer profiles multiply them.

    CI reports a failure as it was found: making it shorter takes minutes.
    """
    profile = settings()
    longer = profile.max_examples > CI_EXAMPLES
    return settings(
        profile,
        max_examples=max(1, examples * profile.max_examples // CI_EXAMPLES),
        stateful_step_count=steps,
        derandomize=not longer,
        phases=[Phase.generate, Phase.shrink] if longer else [Phase.generate],
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
