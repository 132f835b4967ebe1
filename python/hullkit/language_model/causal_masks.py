# SPDX-License-Identifier: Apache-2.0
"""Causal masks of transformers that a captured pass can do without.

Its models leave the causal mask to the attention kernel, unless a CUDA graph is being captured:
then they make a mask for every pair of tokens, which takes memory and the faster kernels away.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from .replaced_globals import Replacement

_MODULE = "transformers.masking_utils"


def replacements() -> list[Replacement]:
    """For passes of one text whose positions are 0, 1, 2, ...: nothing in it is packed or padded.

    An eager pass of the same inputs finds that out on the device, and makes no mask.
    """
    space = vars(sys.modules[_MODULE]) if _MODULE in sys.modules else {}
    stand_ins: dict[str, Callable[..., Any]] = {
        "find_packed_sequence_indices": _nothing_packed,
        "is_tracing": _not_tracing,
    }
    if not stand_ins.keys() <= space.keys():  # another version
        return []
    return [Replacement(space, name, stand_in) for name, stand_in in stand_ins.items()]


def _nothing_packed(own: Callable[..., Any], *args: Any, **options: Any) -> None:
    return None


def _not_tracing(own: Callable[..., Any], tensor: Any = None) -> Any:
    # A model's own padding mask would be read next, and a capture cannot ask the device.
    return False if tensor is None else own(tensor)
