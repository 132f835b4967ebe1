"""The layout of what changes from launch to launch: a record [HEAD + T] int64 on the device."""

from __future__ import annotations

NUM_OPTIONS = 10
LIMIT = 10  # the word of a record that bounds num_steps: a captured launch has its own for good
BROKEN = 11  # the word that Adam's kernel sets at a gradient that is not finite
SEED = 12  # of stochastic rounding
HEAD = 13  # words before the gradients' addresses
FACTOR = 9  # the option that clipping by global norm writes, on the device
NO_LIMIT = 2**31 - 1
