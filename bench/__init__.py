"""Benchmarks. Run from the repository's root: `python -m bench.ops.optim`, or `make bench`."""
