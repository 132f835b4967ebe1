# SPDX-License-Identifier: Apache-2.0
"""The report to paste into a bug report: `python -m hullkit`."""

from __future__ import annotations

import argparse
import platform
import sys

import torch

from . import build_info


def main() -> None:
    argparse.ArgumentParser(prog="python -m hullkit", description=__doc__).parse_args()
    info = build_info()
    rows = {
        "hullkit": info["version"],
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "platform": platform.platform(),
        "compiler": info["compiler"],
        "CPU kernels": info["simd"],
        "threads": torch.get_num_threads(),
        "CUDA": (
            f"built with runtime {info['cuda_runtime']} for {info['cuda_architectures']}"
            if info["cuda"]
            else "not in this build"
        ),
    }
    for number, device in enumerate(info["cuda_devices"]):
        rows[f"cuda:{number}"] = device
    if info["cuda_problem"]:
        rows["no CUDA because"] = info["cuda_problem"]
    for name, value in rows.items():
        print(f"{name:<16} {value}")


if __name__ == "__main__":
    main()
