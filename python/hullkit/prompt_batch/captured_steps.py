# SPDX-License-Identifier: Apache-2.0
"""`generate` whose steps are CUDA graphs: a step of many slots keeps the host busy, not the device.

A graph is recorded for one call of `generate`, and freed with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import update_wrapper
from traceback import clear_frames
from typing import Any

import torch
from torch import Tensor, nn

from ..finetune.capture_memory import CaptureMemory
from ..language_model.interface import MODEL_ERRORS
from .generation_settings import is_off, of_longest

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


def generate(model: Any, ids: Tensor, **options: Any) -> Any:
    """`model.generate(ids, **options)`, with captured steps inside a block of `CapturedSteps`."""
    steps = vars(model).get("forward")
    if isinstance(steps, _Steps) and steps.owner.takes(ids, options):
        try:
            with steps.recording(model, positions(ids, options)):
                return model.generate(ids, **options | _STATIC)
        except MODEL_ERRORS as error:
            lacks = isinstance(error, torch.OutOfMemoryError)
            if lacks:
                steps.owner.too_many = positions(ids, options)
            if steps.taken:
                raise
            clear_frames(error.__traceback__)
        # No token had been taken, so nothing of the caller's ran. His own error comes again here.
        out = model.generate(ids, **options)
        steps.owner.refused |= not lacks
        return out
    return model.generate(ids, **options)


def positions(ids: Tensor, options: dict[str, Any]) -> int:
    """The positions of a static cache, over all rows."""
    most: int = options["max_new_tokens"]
    return len(ids) * (ids.shape[-1] + most)


class CapturedSteps:
    """The steps of `generate` of a batch's model, as CUDA graphs.

    layers: modules whose forwards the batch replaces.
    memory: of captures, its own; None where nothing is captured.
    refused: whether steps are not captured, as one turned out to be no good.
    too_many: positions of a static cache for which there was no memory.
    """

    def __init__(
        self, model: nn.Module, layers: Iterable[nn.Module], memory: CaptureMemory | None
    ) -> None:
        self._model: Any = model
        self._layers = set(layers)
        self.memory = memory
        self.refused = memory is None or not _has_static_cache(model)
        self.too_many: int | None = None

    @contextmanager
    def block(self) -> Iterator[None]:
        """Inside the block `generate` captures steps."""
        if self.refused or "forward" in vars(self._model):
            yield
            return
        try:
            self._model.forward = _Steps(self, self._model.forward)
            yield
        finally:
            vars(self._model).pop("forward", None)

    def takes(self, ids: Tensor, options: dict[str, Any]) -> bool:
        most = options.get("max_new_tokens")
        if self.refused or not isinstance(most, int) or most < _FEWEST or self._has_hooks():
            return False
        if self.too_many is not None and positions(ids, options) >= self.too_many:
            return False
        settings: dict[str, Any] = self._model.generation_config.to_diff_dict() | options
        if settings.get("use_cache") is False:
            return False
        return all(is_off(name, settings[name]) for name in settings.keys() - _SETTINGS)

    def _has_hooks(self) -> bool:
        """Whether modules run what a replay would not."""
        everywhere = nn.modules.module
        if everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks:
            return True
        own = {*self._layers, self._model}  # their forwards are the batch's
        return any(
            module._forward_hooks
            or module._forward_pre_hooks
            or ("forward" in vars(module) and module not in own)
            for module in self._model.modules()
        )


class _Steps:
    """A model's forward. Calls that differ by the values of tensors alone are recorded.

    The first of them runs as ever, the second is recorded, too, and the third runs both ways. That
    shows whether something else that changes from one step to the next changes their logits.

    taken: whether a call has returned.
    """

    def __init__(self, owner: CapturedSteps, forward: Any) -> None:
        update_wrapper(self, forward)  # transformers looks at the arguments' names
        self.owner = owner
        self._forward = forward
        self._on = self.taken = False
        self._positions = 0
        self._facts: Any = None
        self._graph: _Graph | None = None
        self._compared = False

    @contextmanager
    def recording(self, model: nn.Module, positions: int) -> Iterator[None]:
        kept = {name: vars(model).pop(name) for name in _KEPT if name in vars(model)}
        try:
            self._on, self.taken, self._positions = True, False, positions
            yield
        finally:
            self._on, self._facts, self._graph = False, None, None
            for name in _KEPT:
                vars(model).pop(name, None)
            vars(model).update(kept)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        out = self._next(*args, **kwargs)
        self.taken = True
        return out

    def _next(self, *args: Any, **kwargs: Any) -> Any:
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
        return self._alone(kwargs)

    def _alone(self, kwargs: dict[str, Any]) -> Any:
        """The model's own forward; without the graph if there is no memory beside it."""
        before = [(counter, counter.clone()) for counter in _counters(kwargs)]
        try:
            return self._forward(**kwargs)
        except torch.OutOfMemoryError as error:
            if self._graph is None:
                raise
            clear_frames(error.__traceback__)
        self._on, self._graph = False, None
        self.owner.too_many = self._positions
        assert self.owner.memory is not None
        self.owner.memory.renew()
        for counter, value in before:
            counter.copy_(value)
        return self._forward(**kwargs)

    def _record(self, kwargs: dict[str, Any]) -> None:
        memory = self.owner.memory
        assert memory is not None
        memory.renew()  # somebody may hold the output of an earlier graph
        try:
            with memory.apart():
                self._graph = _Graph(self._forward, kwargs, memory)
        except MODEL_ERRORS as error:
            clear_frames(error.__traceback__)
            self._on = False
            if isinstance(error, torch.OutOfMemoryError):
                self.owner.too_many = self._positions
            else:
                self.owner.refused = True

    def _both(self, kwargs: dict[str, Any]) -> Any:
        assert self._graph is not None
        counters = _counters(kwargs)
        before = [counter.clone() for counter in counters]
        replayed = self._graph.replay(kwargs).logits
        for counter, value in zip(counters, before, strict=True):
            counter.copy_(value)
        out = self._alone(kwargs)  # writes the cache again
        if not self._on:
            return out
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
        if not layer.is_initialized:
            return None  # a prompt of one token
        facts += [(layer.keys.data_ptr(), layer.values.data_ptr())]
    for name, tensor in _tensors(kwargs).items():
        if tensor.device != ids.device:
            return None  # its value would be a constant of the graph
        facts.append((name, tensor.shape, tensor.dtype))
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
