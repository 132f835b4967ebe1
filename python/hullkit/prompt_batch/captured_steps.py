# SPDX-License-Identifier: Apache-2.0
"""`generate` whose steps are CUDA graphs: a step of many slots keeps the host busy, not the device.

A graph is recorded for one call of `generate`, and freed with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import update_wrapper
from traceback import clear_frames
from typing import Any

import torch
from torch import Tensor, nn

from ..finetune.capture_memory import CaptureMemory

# Recording, and a step that runs twice to be compared, take as long as a few steps.
_FEWEST = 16
_CACHES = "transformers.cache_utils"
_NAMES_OF_CACHES = ("past_key_values", "cache")
_STATIC = {"cache_implementation": "static", "disable_compile": True}
# What transformers keeps on a model whose cache was static.
_KEPT = ("_cache", "_previous_max_cache_length")
# Options and settings that change no more than which token is taken, and when a row ends.
_SETTINGS = {
    "attention_mask", "bos_token_id", "do_sample", "eos_token_id", "logits_processor", "max_length",
    "max_new_tokens", "min_new_tokens", "min_p", "pad_token_id", "repetition_penalty",
    "stopping_criteria", "temperature", "top_k", "top_p", "transformers_version", "use_cache",
    "_from_model_config",
}  # fmt: skip
_FACTORS = {"length_penalty", "num_beams", "num_return_sequences"}  # off with a 1
# What a model raises that takes no such cache. Others are a signal's.
_OF_CACHES = (RuntimeError, ValueError, TypeError, LookupError, AttributeError)
# Rotary positions that depend on the longest row, by a question that the device would answer.
_OF_LONGEST = {"dynamic", "longrope"}


def generate(model: Any, ids: Tensor, **options: Any) -> Any:
    """`model.generate(ids, **options)`, with captured steps inside a block of `CapturedSteps`."""
    steps = vars(model).get("forward")
    if isinstance(steps, _Steps) and steps.owner.takes(model, options):
        try:
            with steps.recording(model):
                return model.generate(ids, **options | _STATIC)
        except _OF_CACHES as error:
            clear_frames(error.__traceback__)
            lacks = isinstance(error, torch.OutOfMemoryError)
        out = model.generate(ids, **options)  # here the caller's own error comes again
        steps.owner.refused = not lacks
        return out
    return model.generate(ids, **options)


class CapturedSteps:
    """Of a model in a batch.

    memory: of captures; None where nothing is captured.
    refused: whether steps are not captured, as one turned out to be no good.
    """

    def __init__(self, model: nn.Module, memory: CaptureMemory | None) -> None:
        self._model = model
        self.memory = memory
        self.refused = memory is None or not _has_static_cache(model)

    @contextmanager
    def block(self) -> Iterator[None]:
        """Inside the block `generate` captures steps."""
        if self.refused:
            yield
            return
        before = vars(self._model).get("forward")
        try:
            self._model.forward = _Steps(self, self._model.forward)
            yield
        finally:
            vars(self._model).pop("forward", None)
            if before is not None:
                self._model.forward = before

    def takes(self, model: Any, options: dict[str, Any]) -> bool:
        most = options.get("max_new_tokens")
        if self.refused or not isinstance(most, int) or most < _FEWEST:
            return False
        settings: dict[str, Any] = model.generation_config.to_diff_dict() | options
        if settings.get("use_cache") is False:
            return False
        return all(_is_off(name, settings[name]) for name in settings.keys() - _SETTINGS)


def _is_off(name: str, value: Any) -> bool:
    if isinstance(value, Tensor):
        return False
    return not value or (name in _FACTORS and value == 1)


class _Steps:
    """A model's forward. Calls that differ by the values of tensors alone are recorded.

    The first of them runs as ever, the second is recorded, too, and the third runs both ways, which
    shows whether anything else has changed from one to the next.
    """

    def __init__(self, owner: CapturedSteps, forward: Any) -> None:
        update_wrapper(self, forward)  # transformers looks at the arguments' names
        self.owner = owner
        self._forward = forward
        self._on = False
        self._facts: Any = None
        self._graph: _Graph | None = None
        self._compared = False

    @contextmanager
    def recording(self, model: nn.Module) -> Iterator[None]:
        kept = {name: vars(model).pop(name) for name in _KEPT if name in vars(model)}
        try:
            self._on = True
            yield
        finally:
            self._on, self._facts, self._graph = False, None, None
            for name in _KEPT:
                vars(model).pop(name, None)
            vars(model).update(kept)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        on = self._on and not self.owner.refused and not args
        facts = _facts(kwargs) if on else None
        if facts is None or facts != self._facts:
            self._facts, self._graph, self._compared = facts, None, False
            return self._forward(*args, **kwargs)
        if self._graph is None:
            self._record(kwargs)
        elif self._compared:
            return self._graph.replay(kwargs)
        else:
            return self._both(kwargs)
        return self._forward(**kwargs)

    def _record(self, kwargs: dict[str, Any]) -> None:
        memory = self.owner.memory
        assert memory is not None
        try:
            with memory.apart():
                self._graph = _Graph(self._forward, kwargs, memory)
        except Exception as error:
            clear_frames(error.__traceback__)
            memory.renew()
            self._on = False
            if not isinstance(error, _OF_CACHES):
                raise
            self.owner.refused = not isinstance(error, torch.OutOfMemoryError)

    def _both(self, kwargs: dict[str, Any]) -> Any:
        assert self._graph is not None
        counters = _counters(kwargs)
        before = [counter.clone() for counter in counters]
        replayed = self._graph.replay(kwargs).logits
        for counter, value in zip(counters, before, strict=True):
            counter.copy_(value)
        out = self._forward(**kwargs)  # writes the cache again
        self._compared = torch.allclose(replayed, out.logits, rtol=0, atol=0, equal_nan=True)
        self.owner.refused = not self._compared
        return out


class _Graph:
    """A captured step."""

    def __init__(self, forward: Any, kwargs: dict[str, Any], memory: CaptureMemory) -> None:
        self._inputs = {name: tensor.clone() for name, tensor in _tensors(kwargs).items()}

        def recorded() -> None:
            self._out = forward(**_with(kwargs, self._inputs))

        self._graph = memory.record(0, recorded)

    def replay(self, kwargs: dict[str, Any]) -> Any:
        """The output, which the next replay overwrites."""
        for name, tensor in _tensors(kwargs).items():
            self._inputs[name].copy_(tensor)
        self._graph.replay()
        return self._out


def _tensors(kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """Tensors among arguments and in their dicts, which masks of several kinds come in."""
    found = {}
    for name, value in kwargs.items():
        if isinstance(value, Tensor):
            found[name] = value
        elif type(value) is dict:
            found |= {f"{name}.{key}": t for key, t in value.items() if isinstance(t, Tensor)}
    return found


def _with(kwargs: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The arguments with other tensors."""
    return {
        name: tensors.get(name, value)
        if type(value) is not dict
        else {key: tensors.get(f"{name}.{key}", one) for key, one in value.items()}
        for name, value in kwargs.items()
    }


def _facts(kwargs: dict[str, Any]) -> Any:
    """All of a step but its tensors' values; None for a call that is not known to be a step."""
    ids = kwargs.get("input_ids")
    caches = [kwargs[name] for name in _NAMES_OF_CACHES if kwargs.get(name) is not None]
    if not (isinstance(ids, Tensor) and ids.is_cuda and ids.ndim == 2 and ids.shape[1] == 1):
        return None
    if len(caches) != 1 or not _is_static(caches[0]):
        return None
    facts: list[Any] = [id(caches[0])]
    for layer in caches[0].layers:
        facts += [(layer.keys.data_ptr(), layer.values.data_ptr())]
    facts += [(n, t.shape, t.dtype, t.device) for n, t in _tensors(kwargs).items()]
    for name, value in kwargs.items():
        if value is None or isinstance(value, (bool, int, str)):
            facts.append((name, value))
        elif isinstance(value, dict):
            if not all(one is None or isinstance(one, Tensor) for one in value.values()):
                return None
        elif not isinstance(value, Tensor) and name not in _NAMES_OF_CACHES:
            return None
    return facts


def _counters(kwargs: dict[str, Any]) -> list[Tensor]:
    """What a step changes in its cache but for keys and values, which it would write again."""
    [cache] = (kwargs[name] for name in _NAMES_OF_CACHES if kwargs.get(name) is not None)
    return [
        value
        for layer in cache.layers
        for name, value in vars(layer).items()
        if isinstance(value, Tensor) and name not in ("keys", "values")
    ]


def _is_static(cache: Any) -> bool:
    """Whether all layers keep every token's keys and values, at addresses that stay."""
    layers = getattr(cache, "layers", None) or [None]
    kinds = {(type(layer).__module__, type(layer).__qualname__) for layer in layers}
    return kinds == {(_CACHES, "StaticLayer")}


def _has_static_cache(model: Any) -> bool:
    config = getattr(model, "config", None)
    if not getattr(model, "_can_compile_fullgraph", False) or config is None:
        return False
    if getattr(config, "_attn_implementation", None) not in ("sdpa", "eager"):
        return False  # others get masks that grow
    if any(of_longest(module) for module in model.modules()):
        return False
    from transformers import StaticCache

    text = config.get_text_config(decoder=True)
    return _is_static(StaticCache(config=text, max_cache_len=1))


def of_longest(module: nn.Module) -> bool:
    kinds = getattr(module, "rope_type", None)
    return not _OF_LONGEST.isdisjoint(kinds.values() if isinstance(kinds, dict) else [kinds])
