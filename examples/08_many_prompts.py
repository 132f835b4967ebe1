# SPDX-License-Identifier: Apache-2.0
"""Many prompts at once: low-rank adapters of all of them, trained together on one frozen model."""

import hullkit
import torch
from hullkit.prompt_batch import Score

torch.manual_seed(0)
embedding, inner, head = (
    torch.nn.Embedding(64, 32),
    torch.nn.Linear(32, 32),
    torch.nn.Linear(32, 64),
)
model = torch.nn.Sequential(embedding, torch.nn.Tanh(), inner, torch.nn.Tanh(), head)

batch = hullkit.PromptBatch(model, slots=4, rank=8, lr=1e-2)
queries = []
for _ in range(10):
    start = int(torch.randint(64, ()))
    text = (start + 3 * torch.arange(40)) % 64  # each prompt counts from a place of its own
    queries.append(hullkit.Query([text[:32]], [20], then=Score(text[32:])))
for answer in batch.map(queries):
    first, *_, last = answer.losses
    print(f"prompt {answer.place}: loss {first:.2f} to {last:.2f}, then {answer.value:.2f}")
