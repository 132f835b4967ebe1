# SPDX-License-Identifier: Apache-2.0
"""Energy that a device has used: NVML's counter of a GPU, RAPL's of a processor."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path

import torch

RAPL = Path("/sys/class/powercap")
Reader = Callable[[], float]  # joules since some moment


def meter(device: torch.device) -> Reader | None:
    """Reads the joules used so far by the device; None where nothing counts them."""
    return _nvml(device) if device.type == "cuda" else _rapl()


def _nvml(device: torch.device) -> Reader | None:
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"  # NVML's numbers are not torch's
    handle, energy = ctypes.c_void_p(), ctypes.c_ulonglong()
    if library.nvmlInit_v2() != 0:
        return None
    if library.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(handle)) != 0:
        return None

    def millijoules() -> int:
        return int(library.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(energy)))

    if millijoules() != 0:
        return None

    def joules() -> float:
        millijoules()
        return energy.value / 1e3

    return joules


def _rapl() -> Reader | None:
    counters = sorted(RAPL.glob("intel-rapl:[0-9]/energy_uj"))  # one for each processor's package
    if not counters or not all(os.access(counter, os.R_OK) for counter in counters):
        return None
    return lambda: sum(int(counter.read_text()) for counter in counters) / 1e6
