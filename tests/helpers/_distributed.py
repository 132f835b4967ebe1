# SPDX-License-Identifier: Apache-2.0
"""A process group of one process."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest


def in_a_process_group(folder: Path, check: Callable[[], None]) -> None:
    distributed = pytest.importorskip("torch.distributed")
    if not distributed.is_available():
        pytest.skip("torch without distributed")

    def run() -> None:
        distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=0, world_size=1
        )
        try:
            check()
        finally:
            distributed.destroy_process_group()

    # torch keeps the group in a cache of the thread; a later fork by that thread waits for ever.
    with ThreadPoolExecutor(1) as alone:
        alone.submit(run).result()
