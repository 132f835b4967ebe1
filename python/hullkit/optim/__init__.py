# SPDX-License-Identifier: Apache-2.0
"""Optimizers that make several updates with one gradient, and weighted accumulation of gradients.

`Adam`, `AdamW` and `SGD` take the arguments of torch.optim's and keep its state, under its names:
`state_dict` goes either way. `step(num_steps=k)` makes k consecutive updates with the gradients at
hand for the memory traffic of one, in one launch for all parameters of a group.
"""

from .accumulate import accumulate_
from .adam import Adam, AdamW
from .sgd import SGD

__all__ = ["SGD", "Adam", "AdamW", "accumulate_"]
