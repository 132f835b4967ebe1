# SPDX-License-Identifier: Apache-2.0
"""Many prompts on several workers by Ray: selected, adapted to, scored, and written as they finish.

Here two processes of this machine work. On a cluster `ray.init()` finds the others; with GPUs pass
`num_gpus=1` to `map_batches`. Run it again after a stop: finished rows are not done again.
"""

import sys
import tempfile
from pathlib import Path

import hullkit
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data
import torch
from hullkit.interop.ray import AdaptRows, Setup, unfinished
from passages import embed, passages

MODULES = ("argparse", "bisect", "csv", "enum", "functools", "heapq", "queue", "random")
HELD_OUT = 16
ROOT = Path(__file__).resolve().parents[1]


def tokens(text: str) -> torch.Tensor:
    return torch.tensor(list(text.encode()))


def setup() -> Setup:
    """The model, the corpus and the rules of one worker, made in its own process."""
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)  # one worker a core
    folder = ROOT / "bench" / "assets" / "pybytes"
    model = AutoModelForCausalLM.from_pretrained(folder).float()
    texts = passages(*MODULES)[HELD_OUT:]
    pool = torch.from_numpy(embed(texts))

    def choose(block):
        prompts = torch.from_numpy(embed(block["text"].tolist()))
        chosen = hullkit.select(pool, prompts, total=6)  # all prompts of the block at once
        return [
            ([tokens(texts[row]) for row in rows[counts > 0]], counts[counts > 0])
            for rows, counts in zip(chosen.rows, chosen.counts, strict=True)
        ]

    def use(model, row):
        ids = tokens(row["text"])
        return {"bits_per_byte": hullkit.bits_per_byte(model, ids, len(ids) - 1)}

    tuner = hullkit.TestTimeFinetuner(model, lr=1e-4)
    return Setup(tuner, choose, use, columns={"bits_per_byte": pa.float64()})


def main(out: str) -> None:
    prompts = [{"id": i, "text": text} for i, text in enumerate(passages(*MODULES)[:HELD_OUT])]
    packages = [str(Path(__file__).parent)]  # workers import passages, too
    ray.init(num_cpus=2, runtime_env={"env_vars": {"PYTHONPATH": ":".join(packages)}})
    rows = unfinished(ray.data.from_items(prompts), out, key="id")
    rows.map_batches(
        AdaptRows,
        fn_constructor_args=[setup, ["id"]],
        compute=ray.data.ActorPoolStrategy(size=2),
        batch_size=4,
        batch_format="pyarrow",  # columns that are kept keep their types
        num_cpus=0.5,  # a processor that no actor holds writes rows meanwhile
    ).write_parquet(out)
    ray.shutdown()
    rows = pq.read_table(out).to_pylist()
    done = [row["bits_per_byte"] for row in rows if row["error"] is None]
    mean = sum(done) / max(1, len(done))
    print(f"{len(done)} prompts, mean bits per byte {mean:.3f}; {len(rows) - len(done)} failed")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(sys.argv[1] if len(sys.argv) > 1 else folder)
