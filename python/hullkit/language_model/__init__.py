# SPDX-License-Identifier: Apache-2.0
"""Language models: their interface, their loss, and the faster functions that a pass runs."""

from .bits_per_byte import bits_per_byte

__all__ = ["bits_per_byte"]
