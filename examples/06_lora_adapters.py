# SPDX-License-Identifier: Apache-2.0
"""Test-time finetuning of LoRA adapters alone (PEFT): small gradients, small optimizer state."""

from pathlib import Path

import hullkit
import peft
import torch
from passages import embed, passages
from transformers import AutoModelForCausalLM

torch.manual_seed(0)
folder = Path(__file__).parents[1] / "bench" / "assets" / "pybytes"
model = AutoModelForCausalLM.from_pretrained(folder).float()
config = peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"])
model = peft.get_peft_model(model, config)
model.print_trainable_parameters()

texts = passages("bisect", "heapq", "textwrap", "queue", "functools")
prompt = next(text for text in texts if text.startswith("def heappush("))
texts.remove(prompt)
chosen = hullkit.select(embed(texts), embed([prompt])[0], total=8)
used = chosen.counts > 0
examples = [torch.tensor(list(texts[row].encode())) for row in chosen.rows[used]]
ids = torch.tensor(list(prompt.encode()))

before = hullkit.bits_per_byte(model, ids, len(ids) - 1)
tuner = hullkit.TestTimeFinetuner(model, lr=2e-3)  # trains what requires a gradient
with tuner.adapted(examples, chosen.counts[used]) as adapted:
    after = hullkit.bits_per_byte(adapted, ids, len(ids) - 1)
    start = ids[None, :20]
    out = adapted.generate(input_ids=start, max_new_tokens=40, do_sample=False)[0]
print(f"bits per byte: {before:.3f}, adapted {after:.3f}")
print("continued:", repr(bytes(out.tolist()).decode(errors="replace")))
