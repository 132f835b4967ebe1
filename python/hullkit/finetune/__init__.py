# SPDX-License-Identifier: Apache-2.0
"""A model adapted to one prompt and taken back: schedule, passes, updates, restore."""

from .report import AdaptReport
from .schedule import Reuse, reuse_schedule
from .tuner import TestTimeFinetuner

__all__ = ["AdaptReport", "Reuse", "TestTimeFinetuner", "reuse_schedule"]
