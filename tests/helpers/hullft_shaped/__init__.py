# SPDX-License-Identifier: Apache-2.0
"""Test-time-finetuning code in the shape of the code published with HullFT, written for the tests.

Interfaces as published, procedures as method and reference say: naive NumPy, torch.optim, clones of
every gradient. What `hullkit.interop.hullft` must fit into, and be compared with.
"""
