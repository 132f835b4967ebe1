# SPDX-License-Identifier: Apache-2.0
"""Every architecture of the tests' table finetuned with captured passes: rows for the docs.

    python -m bench.quality.architectures [--out FILE]

A row has the path that passes took, why they were not captured, the functions that were fused, and
the largest difference of a weight from eager passes without fused functions, divided by the bound
of the tests. It needs the `test` extra and no network. Without a GPU all passes are eager.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # models look for kernels to download

import torch
import transformers
from tqdm import tqdm

from bench.harness.rows import RESULTS, ROOT, append, commit, processor

sys.path.insert(0, str(ROOT / "tests" / "helpers"))
import _architectures as architectures

CSV = RESULTS / "architectures.csv"
FIELDS = ["architecture", "parameters", "path", "reason", "fused", "difference", "bound"]
FIELDS += ["device", "torch", "transformers", "commit", "command"]


def measured(name: str, device: torch.device) -> dict[str, Any]:
    model = architectures.build(name).to(device)
    base = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    _, wanted = architectures.adapted(model, capture=False, fuse=False)
    report, weights = architectures.adapted(model)
    for key, tensor in model.state_dict().items():
        if not torch.equal(tensor, base[key]):
            raise AssertionError(f"{name}: {key} is not restored")
    difference = architectures.largest_difference(weights, wanted)
    if difference > architectures.BOUND:
        raise AssertionError(f"{name}: {difference} from eager passes, beyond the bound")
    return {
        "architecture": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "path": report.path,
        "reason": report.reason or "",
        "fused": " ".join(report.fused),
        "difference": f"{difference:.3g}",
        "bound": f"{architectures.BOUND:.3g}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=CSV, help="append the rows to this file")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    common = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else processor(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit(),
        "command": "python -m bench.quality.architectures",
    }
    warnings.simplefilter("ignore")
    rows = [measured(name, device) | common for name in tqdm(architectures.NAMES)]
    append(arguments.out, rows, FIELDS)
    captured = sum(row["path"] == "captured" for row in rows)
    print(f"{len(rows)} architectures, {captured} captured")
    for row in rows:
        if row["reason"]:
            print(f"{row['architecture']}: {row['reason']}")


if __name__ == "__main__":
    main()
