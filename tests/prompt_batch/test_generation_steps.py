# SPDX-License-Identifier: Apache-2.0
"""Models whose cache mixes rows are continued alone, or refused."""

from __future__ import annotations

from typing import Any

import hullkit
import pytest
import torch
from _models import VOCABULARY, gpt2, llama, rwkv
from _prompts import DEVICE, batch_of, text
from hullkit.prompt_batch import Generate
from torch import Tensor, nn

pytestmark = [pytest.mark.usefixtures("one_thread")]
if DEVICE.type == "cuda":
    pytestmark += [pytest.mark.gpu]

OPTIONS: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


def mixing() -> nn.Module:
    """As RWKV of transformers 5, where a step adds the state of all rows to each."""
    model = llama()
    forward = type(model).forward

    def mixed(self: Any, input_ids: Tensor, **options: Any) -> Any:
        out = forward(self, input_ids, **options)
        if input_ids.shape[1] == 1:  # by the cache
            out.logits = out.logits.mean(0, keepdim=True).expand_as(out.logits)
        return out

    model.__class__ = type("MixingSteps", (type(model),), {"forward": mixed})
    return model


def queries(options: dict[str, Any] = OPTIONS) -> list[hullkit.Query]:
    thens = [Generate(text(4, 10 + seed), **options) for seed in range(3)]
    return [hullkit.Query([text(12, seed)], [3], then) for seed, then in enumerate(thens)]


def values(
    slots: int, model: nn.Module, options: dict[str, Any] = OPTIONS, precision: str = "tf32"
) -> list[list[int]]:
    answers = [*batch_of(model.to(DEVICE), slots, precision=precision).map(queries(options))]
    assert [answer.error for answer in answers] == [None] * 3
    return [answer.value.tolist() for answer in answers]


@pytest.mark.parametrize("make", [mixing, rwkv, llama])
@pytest.mark.parametrize("precision", ["float32", "tf32"])
def test_a_cache_that_mixes_rows(make: Any, precision: str) -> None:
    alone = values(1, make(), precision=precision)
    assert values(3, make(), precision=precision) == alone
    model: Any = make().to(DEVICE)
    model.generation_config.eos_token_id = None
    batch = batch_of(model, 3, precision=precision)
    batch.adapt_([query._replace(then=None) for query in queries()])
    ids = torch.stack([text(4, 10 + seed) for seed in range(3)]).to(DEVICE)
    if make is mixing:
        with pytest.raises(ValueError, match=r"in a step of generate, .*; use_cache=False"):
            batch.generate(ids, **OPTIONS)
    elif make is llama:
        assert batch.generate(ids, **OPTIONS)[:, 4:].tolist() == alone
    assert batch.generate(ids, use_cache=False, **OPTIONS)[:, 4:].tolist() == alone
    model.generation_config.use_cache = False
    assert batch.generate(ids, **OPTIONS)[:, 4:].tolist() == alone


def test_a_prompt_as_long_as_the_table_of_positions() -> None:
    model = gpt2().to(DEVICE)
    batch = batch_of(model, 2)
    ids = torch.stack([text(64, seed) for seed in range(2)]).to(DEVICE)
    assert batch.generate(ids, **OPTIONS | {"max_new_tokens": 1}).shape == (2, 65)


def test_a_step_after_an_end_is_tried_too() -> None:
    """Every token is one that ends a text."""
    model: Any = mixing().to(DEVICE)
    model.generation_config.eos_token_id = [*range(VOCABULARY - 2)]
    batch = batch_of(model, 2)
    ids = torch.stack([text(4, seed) for seed in range(2)]).to(DEVICE)
    with pytest.raises(ValueError, match="in a step of generate"):
        batch.generate(ids, **OPTIONS)


@pytest.mark.filterwarnings("ignore:Using the model-agnostic default `max_length`:UserWarning")
def test_texts_without_a_bound_are_as_long_as_alone() -> None:
    alone = values(1, llama(), {"do_sample": False})
    assert values(3, llama(), {"do_sample": False}) == alone


def test_no_end_is_not_the_models_own() -> None:
    options = OPTIONS | {"max_new_tokens": 20}
    own: Any = llama()
    [[*_, end], *_] = values(1, own, options | {"max_new_tokens": 3, "eos_token_id": []})
    found = []
    for slots, ends in ((1, {}), (1, {"eos_token_id": []}), (3, {"eos_token_id": []})):
        model: Any = llama()
        model.generation_config.eos_token_id = end
        found.append(values(slots, model, options | ends))
    of_model, alone, together = found
    assert min(map(len, of_model)) < 20
    assert [len(tokens) for tokens in alone] == [20] * 3
    assert together == alone
