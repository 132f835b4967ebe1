# SPDX-License-Identifier: Apache-2.0
"""Adapters: hullkit behind the interfaces of other test-time-finetuning code, one module each."""
