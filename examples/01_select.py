# SPDX-License-Identifier: Apache-2.0
"""Choose training passages for a prompt: which ones, and how many updates each deserves."""

import hullkit
from passages import embed, passages

texts = passages("bisect", "heapq", "textwrap", "json.decoder", "queue", "collections")
prompt = 'def insort(a, x):\n    """Insert item x in list a, and keep it sorted."""\n'
pool, query = embed(texts), embed([prompt])[0]  # NumPy here; torch, CuPy or JAX arrays do as well

chosen = hullkit.select(pool, query, total=12)
for row, count in zip(chosen.rows, chosen.counts, strict=True):
    if count > 0:
        print(f"{count} x", " ".join(texts[row].split()[:12]))
print(f"residual {chosen.result.residual_norm:.3f}, dual gap {chosen.result.dual_gap:.1e}")

# What the finetuning will cost: one gradient serves up to two updates.
schedule = hullkit.reuse_schedule(chosen.counts, refresh_interval=2)
print(f"{sum(burst.num_steps for burst in schedule)} updates from {len(schedule)} passes")

# Many prompts at once over one pool, and the nearest neighbours to compare with.
prompts = embed(
    ["heap queue: pop the smallest item", "wrap text at a width", "parse a json string"]
)
batch = hullkit.select(pool, prompts, total=12)
nearest = hullkit.select(pool, prompts, total=12, method="knn")
print("heaviest:", batch.rows[:, 0], "nearest:", nearest.rows[:, 0])
