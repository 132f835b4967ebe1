# SPDX-License-Identifier: Apache-2.0
"""Adapt a language model to one prompt, score and continue it, and have the model back."""

from pathlib import Path

import hullkit
import torch
from passages import embed, passages
from transformers import AutoModelForCausalLM

torch.manual_seed(0)
folder = Path(__file__).parents[1] / "bench" / "assets" / "pybytes"
model = AutoModelForCausalLM.from_pretrained(folder).float()  # 4M parameters, a token a byte


def tokens(text: str) -> torch.Tensor:
    return torch.tensor(list(text.encode()))


texts = passages("bisect", "heapq", "textwrap", "queue", "functools")
held_out = [text for text in texts if text.startswith(("def heappush(", "def heapify("))]
texts = [text for text in texts if text not in held_out]
pool, queries = torch.from_numpy(embed(texts)), torch.from_numpy(embed(held_out))
prompt, query = tokens(held_out[0]), queries[0]


def score(model: torch.nn.Module) -> float:
    return hullkit.bits_per_byte(model, prompt, num_bytes=len(prompt) - 1)


chosen = hullkit.select(pool, query, total=8)
examples = [tokens(texts[row]) for row in chosen.rows[chosen.counts > 0]]

tuner = hullkit.TestTimeFinetuner(model, lr=1e-4, refresh_interval=2)
before = score(model)
with tuner.adapted(examples, chosen.counts[chosen.counts > 0]) as adapted:
    print(f"bits per byte: {before:.3f}, adapted {score(adapted):.3f}")
    start = prompt[None, :20]
    out = adapted.generate(start, max_new_tokens=40, do_sample=False)[0]
    print("continued:", repr(bytes(out.tolist()).decode(errors="replace")))
assert score(model) == before  # the base weights are back, bit for bit
report = tuner.last_report
print(f"{report.num_updates} updates from {report.num_passes} passes")

# Nearest-neighbour test-time training: an update for each neighbour, nearest first, and a reset.
plain = hullkit.TestTimeFinetuner(model, lr=1e-4, refresh_interval=1)
for text, query in zip(held_out, queries, strict=True):
    ids = tokens(text)
    neighbours = hullkit.knn(pool, query, k=3).indices
    with plain.adapted([tokens(texts[row]) for row in neighbours], [1, 1, 1]) as adapted:
        print(f"3 neighbours: {hullkit.bits_per_byte(adapted, ids, len(ids) - 1):.3f}")
