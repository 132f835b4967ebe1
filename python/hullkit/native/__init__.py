# SPDX-License-Identifier: Apache-2.0
"""The compiled core: the operators over it, and the way from tensors to pointers."""
