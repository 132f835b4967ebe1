# SPDX-License-Identifier: Apache-2.0
"""Code written for HullFT's interfaces, on hullkit's kernels.

If a package of that shape is what you run, one line before the first query does it all:

    from hullkit.interop.hullft import patch; patch("hullft")

If you import the pieces yourself, import them from here instead, as below.
"""

from pathlib import Path

import hullkit
import numpy as np
import torch
from hullkit.interop.hullft import FWSelector, finetune_with_approach, integerize_by_geometry
from passages import embed, passages
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = Path(__file__).parents[1] / "bench" / "assets" / "pybytes"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder).float()

texts = passages("bisect", "heapq", "textwrap", "queue", "functools")
prompt = next(text for text in texts if text.startswith("def heappush("))
texts.remove(prompt)
pool, query = embed(texts), embed([prompt])[0]
n_select = 8

# The calling code, as it is.
indices, weights = FWSelector(max_iter=250, tol=1e-5).select(pool, query, n_select)
support = pool.astype("float64")[indices]
indices, weights = integerize_by_geometry(
    indices, weights, support, query.astype("float64"), n_select, swap_passes=2
)
order = np.argsort(-weights, kind="stable")
selected = [texts[i] for i in indices[order]]

base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
ids = torch.tensor(list(prompt.encode()))
print(f"base     {hullkit.bits_per_byte(model, ids, len(ids) - 1):.3f} bits per byte")
approach = {"method": "gradient_refresh", "refresh_interval": 2}
report = finetune_with_approach(model, tokenizer, selected, approach, lr=1e-4, device="cpu")
print(f"adapted  {hullkit.bits_per_byte(model, ids, len(ids) - 1):.3f}")
print(report)
model.load_state_dict(base)  # finetuned in place: putting it back is the caller's part
