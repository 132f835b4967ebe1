# SPDX-License-Identifier: Apache-2.0
"""The calls that `make sanitize` makes on a GPU are calls that can be made."""

from __future__ import annotations

import every_call
import pytest
import torch


@pytest.mark.usefixtures("one_thread")
def test_every_call() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert every_call.run(device) == 4 * 3 * 3 * 17 + 2 + 2 + 2 + 2
