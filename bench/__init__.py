# SPDX-License-Identifier: Apache-2.0
"""Benchmarks. Run from the repository's root: `python -m bench.ops.optim`, or `make bench`."""
