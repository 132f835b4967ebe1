# SPDX-License-Identifier: Apache-2.0
"""Greedy continuations of several slots in one call of the model's `generate`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..language_model.interface import device_of
from .neighbours import difference
from .queries import Generate

# Other options and settings may look at the rows of a batch, at padding or at a total length.
_OPTIONS = {"max_new_tokens", "min_new_tokens", "do_sample", "eos_token_id", "pad_token_id"}
_SETTINGS = _OPTIONS - {"min_new_tokens"} | {
    "bos_token_id", "cache_implementation", "max_length", "temperature", "top_k", "top_p",
    "transformers_version", "use_cache", "_from_model_config",
}  # fmt: skip
# Settings that are off with a 1; all are with None, False and 0.
_FACTORS = {"length_penalty", "num_beams", "num_return_sequences", "repetition_penalty"}
_TRIED = 64  # tokens of a prompt
_BOUND = 0.1  # relative, between logits that should be the same, in half precision


class Plan(NamedTuple):
    """How a prompt is continued greedily. Prompts of equal plans can be so together."""

    most: int  # new tokens
    fewest: int
    end: tuple[int, ...]  # tokens

    @classmethod
    def of(cls, then: Generate, model: nn.Module) -> Plan | None:
        """None for what has to be called alone."""
        config: Any = getattr(model, "generation_config", None)
        options = then.options
        if not hasattr(config, "to_diff_dict"):
            return None
        for name, value in config.to_diff_dict().items():
            if value and name not in _SETTINGS and not (name in _FACTORS and value == 1):
                return None
        if not {"max_new_tokens"} <= options.keys() <= _OPTIONS:
            return None
        if options.get("do_sample", config.do_sample):
            return None
        end, padding = (
            _ids(options.get(name, getattr(config, name)))
            for name in ("eos_token_id", "pad_token_id")
        )
        if None in options.values():
            return None  # which may mean none, or the model's own
        most, fewest = options["max_new_tokens"], options.get("min_new_tokens", 0)
        if not all(isinstance(value, int) for value in (most, fewest, *end, *padding)):
            return None
        # Alone, a prompt that holds padding is continued without it.
        if not set(padding) <= set(end) and bool((then.ids == padding[0]).any()):
            return None
        return cls(most, fewest, end)


def _ids(value: Any) -> tuple[Any, ...]:
    return () if value is None else tuple(value) if isinstance(value, list) else (value,)


class _Idle:
    """Ends the rows that nobody asked for."""

    def __init__(self, rows: Tensor) -> None:
        self._rows = rows

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return self._rows


class Continuations:
    """Of a batch's slots. The first prompts of several lengths show whether padding changes one."""

    def __init__(self, batch: Any) -> None:
        self._batch = batch
        self._pads: bool | None = None

    def together(self, prompts: Mapping[int, Tensor], plan: Plan) -> dict[int, Tensor]:
        """What each slot's prompt (T,) is continued with, (N,). Empty if they cannot be so at once.

        Slots between them have a row of the call too, which ends with its first token.
        """
        longest = max(len(prompt) for prompt in prompts.values())
        if any(len(prompt) < longest for prompt in prompts.values()):
            if self._pads is None:
                self._pads = self._takes_padding(*next(iter(prompts.items())))
            if not self._pads:
                return {}
        first, last = min(prompts), max(prompts)
        some = next(iter(prompts.values()))
        rows = [prompts.get(slot, some) for slot in range(first, last + 1)]
        ids, mask, padding = _left_padded(rows, longest)
        with self._batch.using(first, len(rows)) as model, torch.no_grad():
            ids, mask = (t.to(device_of(model, t)) for t in (ids, mask))
            idle = [slot not in prompts for slot in range(first, last + 1)]
            ends = [_Idle(torch.tensor(idle, device=ids.device))] if any(idle) else []
            end = {"eos_token_id": list(plan.end)} if plan.end else {}
            out = model.generate(
                ids, attention_mask=mask, stopping_criteria=ends, do_sample=False,
                max_new_tokens=plan.most, min_new_tokens=plan.fewest, pad_token_id=padding,
                **end,
            )  # fmt: skip
        made = out[:, longest:]
        return {slot: _ended(made[slot - first], plan.end) for slot in prompts}

    def _takes_padding(self, slot: int, prompt: Tensor) -> bool:
        """Whether the first token's logits are the same with padding before the prompt."""
        prompt = prompt[:_TRIED]
        found = []
        for length in (len(prompt), len(prompt) + 8):
            ids, mask, padding = _left_padded([prompt], length)
            with self._batch.using(slot, 1) as model, torch.no_grad():
                ids, mask = (t.to(device_of(model, t)) for t in (ids, mask))
                out = model.generate(
                    ids, attention_mask=mask, max_new_tokens=1, do_sample=False,
                    return_dict_in_generate=True, output_logits=True, pad_token_id=padding,
                )  # fmt: skip
            found.append(out.logits[0])
        return difference(*found) <= _BOUND


def _left_padded(prompts: list[Tensor], length: int) -> tuple[Tensor, Tensor, int]:
    """Ids and attention mask (R, length), and the id before prompts and behind their ends."""
    padding = int(prompts[0][0])  # the model has a row for it; it may have none for its own
    ids = torch.full((len(prompts), length), padding, dtype=torch.int64, device="cpu")
    mask = torch.zeros_like(ids)
    for own, kept, prompt in zip(ids, mask, prompts, strict=True):
        own[length - len(prompt) :] = prompt
        kept[length - len(prompt) :] = 1
    return ids, mask, padding


def _ended(made: Tensor, end: tuple[int, ...]) -> Tensor:
    """A row up to its first end, without the padding behind it."""
    for place, token in enumerate(made.tolist()):
        if token in end:
            return made[: place + 1].clone()
    return made.clone()
