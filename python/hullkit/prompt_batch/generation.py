# SPDX-License-Identifier: Apache-2.0
"""Greedy continuations of several slots in one call of the model's `generate`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..language_model.interface import device_of
from .captured_steps import generate
from .generation_settings import FACTORS, is_off, of_longest
from .neighbours import difference
from .queries import Generate, before_a_step

# Other options and settings may look at the rows of a batch, at padding or at a total length.
_SETTINGS = {
    "bos_token_id", "cache_implementation", "do_sample", "eos_token_id", "max_length",
    "max_new_tokens", "min_new_tokens", "pad_token_id", "temperature", "top_k", "top_p",
    "transformers_version", "use_cache", "_from_model_config",
}  # fmt: skip
_OPTIONS = FACTORS | {
    "do_sample", "eos_token_id", "max_new_tokens", "min_new_tokens", "pad_token_id",
}  # fmt: skip
# Bounds of the `difference` of logits that should be the same. Neither is derived from a model.
_BOUND, _BOUND_OF_HALVES = 1e-2, 0.1


class Plan(NamedTuple):
    """How a prompt is continued greedily. Prompts of equal plans can be so together."""

    most: int  # new tokens
    fewest: int
    end: tuple[int, ...]  # tokens
    off: tuple[tuple[str, Any], ...]  # options that switch a setting of the model off

    @classmethod
    def of(cls, then: Generate, model: nn.Module) -> Plan | None:
        """None for what has to be called alone."""
        config: Any = getattr(model, "generation_config", None)
        options = then.options
        if not hasattr(config, "to_diff_dict") or not options.keys() <= _OPTIONS:
            return None
        # None may mean none, or the model's own.
        if "max_new_tokens" not in options or any(value is None for value in options.values()):
            return None
        settings = config.to_diff_dict() | options
        end, padding = (_ids(settings.get(name)) for name in ("eos_token_id", "pad_token_id"))
        most, fewest = options["max_new_tokens"], settings.get("min_new_tokens") or 0
        if not all(isinstance(value, int) for value in (most, fewest, *end, *padding)):
            return None
        if settings.get("do_sample") or ("eos_token_id" in options and not end):
            return None
        if not all(is_off(name, settings[name]) for name in settings.keys() - _SETTINGS):
            return None
        off = tuple((name, options[name]) for name in sorted(FACTORS & options.keys()))
        if any(isinstance(value, (list, tuple, dict)) for _, value in off):
            return None
        # Alone, a prompt that holds padding is continued without it.
        if not set(padding) <= set(end) and bool((then.ids == padding[0]).any()):
            return None
        return cls(most, fewest, end, off)


def _ids(value: Any) -> tuple[Any, ...]:
    return () if value is None else tuple(value) if isinstance(value, list) else (value,)


class _Idle:
    """Ends the rows that nobody asked for."""

    def __init__(self, rows: Tensor) -> None:
        self._rows = rows

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return self._rows


class Continuations:
    """How the slots of a batch continue their prompts, several in one call where that is right.

    most: prompts of a call, fewer after one for which there was no memory, and one where a cache
    mixes rows.
    refused: whether padding before a prompt changes what the model says, so that only prompts of
    one length are continued together.
    """

    def __init__(self, batch: Any) -> None:
        self._batch = batch
        # So much padding was found to change nothing, before so long a row ended.
        self._tried = self._longest = 0
        self.most: int = batch.slots
        self.refused = any(of_longest(module) for module in batch.model.modules())

    def together(
        self, prompts: Mapping[int, Tensor], plan: Plan, positions: int | None
    ) -> dict[int, Tensor]:
        """What each slot's prompt (T,) is continued with, (N,). Empty if they cannot be so at once.

        Slots between them have a row of the call too, which ends with its first token.

        positions: the model's. Rows that have ended go on with the others, and must not pass them.
        """
        text = before_a_step(self._batch.model, next(iter(prompts.values())), {})
        if text is not None and self._batch._neighbours.steps_mix_rows(text):
            self.most = 1
            return {}
        lengths = [len(prompt) for prompt in prompts.values()]
        longest = max(lengths)
        if positions is not None and longest + plan.most > positions:
            return {}
        most = max(longest - self._longest, longest - min(lengths) - self._tried)
        if longest > min(lengths) and most > 0 and not self._takes_padding(prompts, longest):
            return {}
        first, last = min(prompts), max(prompts)
        some = next(iter(prompts.values()))
        rows = [prompts.get(slot, some) for slot in range(first, last + 1)]
        idle = [slot not in prompts for slot in range(first, last + 1)]
        end = {"eos_token_id": list(plan.end)} if plan.end else {}
        with self._batch._using(first, len(rows)) as model, torch.no_grad():
            ids, mask, padding = _left_padded(rows, longest, model)
            ends = [_Idle(torch.tensor(idle, device=ids.device))] if any(idle) else []
            out = generate(
                model, ids, attention_mask=mask, stopping_criteria=ends, do_sample=False,
                max_new_tokens=plan.most, min_new_tokens=plan.fewest, pad_token_id=padding,
                **end, **dict(plan.off),
            )  # fmt: skip
        made = out[:, longest:]
        return {slot: _ended(made[slot - first], plan.end) for slot in prompts}

    def _takes_padding(self, prompts: Mapping[int, Tensor], longest: int) -> bool:
        """Whether the shortest prompt's first token has the same logits with padding before it."""
        if self.refused:
            return False
        slot, prompt = min(prompts.items(), key=lambda item: len(item[1]))
        found = []
        self.refused = True  # should there be an error
        for length in (len(prompt), longest):
            with self._batch._using(slot, 1) as model, torch.no_grad():
                ids, mask, padding = _left_padded([prompt], length, model)
                out = model.generate(
                    ids, attention_mask=mask, max_new_tokens=1, do_sample=False,
                    return_dict_in_generate=True, output_logits=True, pad_token_id=padding,
                )  # fmt: skip
                half = torch.is_autocast_enabled(ids.device.type) or any(
                    p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters()
                )
            found.append(out.logits[0])
        bound, dtype = (_BOUND_OF_HALVES, torch.bfloat16) if half else (_BOUND, torch.float32)
        moved = difference(found[0], found[1], dtype)
        self.refused = moved > bound  # numbers that are not finite tell nothing of the model
        if moved <= bound:
            self._tried, self._longest = longest - len(prompt), longest
        return moved <= bound


def neighbouring(prompts: dict[int, Tensor]) -> list[dict[int, Tensor]]:
    """Parts in each of which at least half of the slots from the first to the last have a prompt: a
    call has a row for all of them."""
    parts: list[dict[int, Tensor]] = []
    first = 0
    for slot in sorted(prompts):
        if not parts or slot - first + 1 > 2 * (len(parts[-1]) + 1):
            parts.append({})
            first = slot
        parts[-1][slot] = prompts[slot]
    return parts


def _left_padded(
    prompts: list[Tensor], length: int, model: nn.Module
) -> tuple[Tensor, Tensor, int]:
    """Ids and attention mask (R, length) where the model takes them, and the id before prompts and
    behind their ends."""
    padding = int(prompts[0][0])  # the model has a row for it; it may have none for its own
    ids = torch.full((len(prompts), length), padding, dtype=torch.int64, device="cpu")
    mask = torch.zeros_like(ids)
    for own, kept, prompt in zip(ids, mask, prompts, strict=True):
        own[length - len(prompt) :] = prompt
        kept[length - len(prompt) :] = 1
    device = device_of(model, ids)
    return ids.to(device), mask.to(device), padding


def _ended(made: Tensor, end: tuple[int, ...]) -> Tensor:
    """A row up to its first end, without the padding behind it."""
    for place, token in enumerate(made.tolist()):
        if token in end:
            return made[: place + 1].clone()
    return made.clone()
