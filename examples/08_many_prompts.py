# SPDX-License-Identifier: Apache-2.0
"""Many prompts at once: examples are selected for a block of prompts in one call, while the block
before it is adapted, each prompt with low-rank adapters of its own on one frozen model."""

from collections.abc import Iterator

import hullkit
import torch
from hullkit.prompt_batch import Score, prefetched

torch.manual_seed(0)
embedding, inner, head = (
    torch.nn.Embedding(64, 32),
    torch.nn.Linear(32, 32),
    torch.nn.Linear(32, 64),
)
model = torch.nn.Sequential(embedding, torch.nn.Tanh(), inner, torch.nn.Tanh(), head)


def counting(start: int, step: int) -> torch.Tensor:
    return (start + step * torch.arange(40)) % 64


def embedded(ids: torch.Tensor) -> torch.Tensor:
    """A text's embedding: how often it has each token, and makes each step."""
    steps = (ids[1:] - ids[:-1]) % 64
    both = [torch.bincount(x, minlength=64).float() / len(x) for x in (ids, steps)]
    return torch.cat(both)


corpus = [counting(start, step) for step in (1, 3, 5, 7, 9) for start in range(0, 64, 4)]
pool = torch.stack([embedded(ids) for ids in corpus])
prompts = [counting(int(torch.randint(64, ())), step) for step in (3, 7, 1, 9, 5, 3, 1, 7, 9, 5)]


def queries(block: int) -> Iterator[hullkit.Query]:
    """A query for each prompt. One native call selects for a whole block of them."""
    for first in range(0, len(prompts), block):
        asked = prompts[first : first + block]
        wanted = torch.stack([embedded(ids) for ids in asked])
        chosen = hullkit.select(pool, wanted, 20)
        for ids, rows, counts in zip(asked, chosen.rows, chosen.counts, strict=True):
            kept = [(int(r), int(c)) for r, c in zip(rows, counts, strict=True) if c > 0]
            examples = [corpus[row] for row, _ in kept]
            yield hullkit.Query(examples, [count for _, count in kept], then=Score(ids))


batch = hullkit.PromptBatch(model, slots=4, rank=8, lr=1e-2)
for answer in batch.map(prefetched(queries(block=4), ahead=8)):
    if answer.error is not None:
        raise answer.error
    first, *_, last = answer.losses
    print(f"prompt {answer.place}: loss {first:.2f} to {last:.2f}, its own {answer.value:.2f}")
