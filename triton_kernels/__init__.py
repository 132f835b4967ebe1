"""Triton kernels of hullkit. Importing this package needs neither a GPU nor Triton."""
