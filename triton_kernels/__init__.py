# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of hullkit. Importing this package needs neither a GPU nor Triton."""
