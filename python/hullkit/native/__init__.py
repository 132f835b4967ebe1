# SPDX-License-Identifier: Apache-2.0
"""The compiled core: the operators over it, and the calls of its kernels."""
