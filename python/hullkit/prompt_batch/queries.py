# SPDX-License-Identifier: Apache-2.0
"""Queries of a batch, their answers, and what to do with an adapted model."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import copy
from operator import index
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..language_model.cross_entropy import next_token_losses
from ..language_model.interface import (
    TokenLimits,
    check_predicted,
    check_token_ids,
    device_of,
    logits_of,
    token_limits,
    without_cache,
)
from ..language_model.lookups import checked_lookups
from .captured_steps import generate

_DEFAULT = 20  # new tokens of a `generate` that is told no number


class Query(NamedTuple):
    """One prompt's examples, and what to do with the model that they adapt.

    Examples, counts, and the ids of a `Score` or `Generate` are copied as `map` takes the query
    from its iterable, which may be long before the answer.

    Attributes:
        examples: a sequence of int64 token ids, (T,) or (1, T) with T >= 2.
        counts: (n,) integers >= 0, updates for each example; 0 skips it.
        then: called with the adapted model, in a block in which it behaves as adapted. Its result
            is the answer's value. `Score` and `Generate` are such callables. Where slots share
            passes, several may be computed at once instead of in calls. None: no value.
            Do not call the batch in it: its other slots hold other queries' factors. Parameters
            need no gradients in it, and what saves the model finds the base: use
            :meth:`PromptBatch.adapt_` and :meth:`PromptBatch.export`. It is not to change modules
            or parameters, as in a block of :meth:`PromptBatch.slot`: what can be put back is, and
            the answer has an error; a write to a parameter ends the `map`.
        lr: the learning rate; None for the batch's.
        seed: of the fresh factors; None for the batch's.

    >>> import hullkit, torch
    >>> hullkit.Query([torch.tensor([1, 2, 3])], [2]).counts
    [2]
    """

    examples: Any
    counts: Any
    then: Callable[[nn.Module], Any] | None = None
    lr: float | None = None
    seed: int | None = None


class Answer(NamedTuple):
    """What became of one query.

    Attributes:
        place: of the query among the queries, from 0.
        value: the result of its `then`; None without one or after an error.
        losses: the loss of each pass, in nats a token, in order.
        error: the exception that ended this query, or None. It touched no other query.

    >>> import hullkit
    >>> hullkit.Answer(0, 1.5, (2.0,), None).value
    1.5
    """

    place: int
    value: Any
    losses: tuple[float, ...]
    error: Exception | None


class Score:
    """A query's `then`: the mean next-token cross entropy of `ids`, in nats, a float.

    Args:
        ids: int64 (T,) or (1, T), T >= 2.

    Raises:
        TypeError, ValueError: in a call, for ids that the model has no rows or logits for, or too
            many.
        FloatingPointError: in a call, for a loss that is not finite.

    >>> import hullkit, torch
    >>> model = torch.nn.Sequential(torch.nn.Embedding(8, 4), torch.nn.Linear(4, 8))
    >>> loss = hullkit.prompt_batch.Score(torch.tensor([1, 2, 3]))(model)
    >>> isinstance(loss, float)
    True
    """

    def __init__(self, ids: Tensor) -> None:
        self.ids = ids

    def __call__(self, model: nn.Module) -> float:
        ids = _checked(self.ids, model)
        with torch.no_grad():
            logits = logits_of(model(ids, **without_cache(model)), ids)
            check_predicted("ids", self.ids.view(1, -1), TokenLimits(None, logits.shape[2], None))
            return finite_score(float(next_token_losses(logits, ids)[0]))


def finite_score(loss: float) -> float:
    """The loss of a `Score`. Raises FloatingPointError if it is not finite."""
    if not math.isfinite(loss):
        raise FloatingPointError(f"ids: expected a finite loss, got {loss}")
    return loss


def with_own_ids(then: Any) -> Any:
    """A `Score` or `Generate` that the caller's later writes to its ids do not reach."""
    then = copy(then)
    if isinstance(then.ids, Tensor):
        then.ids = then.ids.clone()
    return then


class Generate:
    """A query's `then`: the tokens that `model.generate(ids, **options)` adds, int64 (N,).

    Greedy ones of several slots are continued together where slots share passes. Rounding may then
    change a token, and all after it.

    Args:
        ids: int64 (T,) or (1, T), the prompt, T >= 1.
        options: of transformers' `generate`.

    Raises:
        TypeError, ValueError: in a call, for ids that the model has no rows for, or too many; for a
            length that is no int; where a table of positions ends before the text does.

    >>> import hullkit, torch
    >>> hullkit.prompt_batch.Generate(torch.tensor([1, 2]), max_new_tokens=5).options
    {'max_new_tokens': 5}
    """

    def __init__(self, ids: Tensor, **options: Any) -> None:
        self.ids = ids
        self.options = options

    def __call__(self, model: nn.Module) -> Tensor:
        ids = _checked(self.ids, model, fewest=1)
        return _tokens(continued(model, ids, self.options))[0, ids.shape[1] :]


def continued(model: nn.Module, ids: Tensor, options: dict[str, Any]) -> Any:
    """`_continued`, where options may be inputs of the forward that look up rows of tables."""
    with checked_lookups(options):
        return _continued(model, ids, options)


def _continued(model: nn.Module, ids: Tensor, options: dict[str, Any]) -> Any:
    """`generate`, which on a GPU would end the process where a text leaves a table of positions.

    Raises ValueError where a text has not ended by then, TypeError for a length that is no int.
    """
    configs = _configs(model, options)
    name, length = _length(options, configs)
    if options.get(name) is not None:
        options = options | {name: length}
    positions, before = token_limits(model).positions, ids.shape[1]
    if positions is None or (not configs and length is None):
        return generate(model, ids, **options)
    # The last new token is read by nobody.
    room = positions + 1 if name == "max_length" else positions + 1 - before
    if (_DEFAULT if length is None else length) <= room:
        return generate(model, ids, **options)
    out = generate(model, ids, **options | {name: room})
    if length is None:  # transformers ends there, too, if its configuration has the positions
        return out
    made = _tokens(out)[:, before:]
    end = _setting("eos_token_id", options, configs)
    ends = torch.as_tensor([] if end is None else end, device=made.device)
    if made.shape[1] == positions + 1 - before and not torch.isin(made, ends).any(1).all():
        after = "" if name == "max_length" else f" after {before} tokens"
        raise ValueError(
            f"{name}: expected at most {room}{after}, since the model has {positions} positions, "
            f"got {length}, and a text that does not end before"
        )
    return out


def before_a_step(model: nn.Module, text: Tensor, options: dict[str, Any]) -> Tensor | None:
    """As much of a text (T,) as leaves room in the model's positions for one step more.

    None where `generate` makes no step by a cache.
    """
    configs, positions = _configs(model, options), token_limits(model).positions
    if not configs or _setting("use_cache", options, configs) is False or positions == 1:
        return None
    return text if positions is None else text[: positions - 1]


def _length(options: dict[str, Any], configs: list[Any]) -> tuple[str, int | None]:
    """The option that bounds a text, and its value, as transformers finds them; None without."""
    for name in ("max_new_tokens", "max_length"):
        value = _setting(name, options, configs)
        # A configuration that nobody changed may have a `max_length`, which bounds nothing.
        fresh = getattr(type(configs[0])(), name, None) if configs else None
        if value is None or (options.get(name) is None and value == fresh):
            continue
        try:
            return name, index(value)
        except TypeError:
            got = f"{type(value).__name__} ({value!r})"
            raise TypeError(f"{name}: expected an int, got {got}") from None
    return "max_new_tokens", None


def _configs(model: nn.Module, options: dict[str, Any]) -> list[Any]:
    """The configurations that `generate` reads: that among the options, and the model's."""
    found = (options.get("generation_config"), getattr(model, "generation_config", None))
    return [config for config in found if config is not None]


def _setting(name: str, options: dict[str, Any], configs: list[Any]) -> Any:
    """The first that is set: the option, or that of a configuration."""
    values = (options.get(name), *(getattr(config, name, None) for config in configs))
    return next((value for value in values if value is not None), None)


def _tokens(out: Any) -> Tensor:
    """The tokens that `generate` returns, also where `return_dict_in_generate` is set."""
    tokens: Tensor = out if isinstance(out, Tensor) else out.sequences
    return tokens


def _checked(ids: Tensor, model: nn.Module, fewest: int = 2) -> Tensor:
    """`ids` as (1, T) on the model's device. An index outside a table would end the process."""
    tokens = check_token_ids("ids", ids, token_limits(model), fewest)
    return tokens.to(device_of(model, tokens))
