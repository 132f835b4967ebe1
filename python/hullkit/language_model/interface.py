# SPDX-License-Identifier: Apache-2.0
"""The interface of a language model: its inputs, its limits, and whether it can train."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .._checks import check_tensor, has_memory

IGNORED = -100  # the label of a token that is not scored, as in F.cross_entropy
# What models raise that do not take something. Other errors may be a signal's.
MODEL_ERRORS = (RuntimeError, ValueError, TypeError, LookupError, AttributeError)


def check_module(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")


def check_one_process(model: nn.Module) -> None:
    """Refuses models whose ranks share gradients: each rank has prompts of its own."""
    for name, module in model.named_modules():
        if isinstance(module, DistributedDataParallel):
            where = f"it in {name!r}" if name else "one"
            raise TypeError(
                f"model: expected one without DistributedDataParallel, got {where}, which would "
                "train each rank's prompt with the mean of all ranks' gradients; pass its .module"
            )


def device_of(model: nn.Module, default: Tensor) -> torch.device:
    """The device of the model's inputs: that of its first parameter in memory, or of `default`.

    Offloaded weights are on the meta device until their layer runs; hooks move its inputs.
    """
    here = (p.device for p in model.parameters() if not p.is_meta)
    return next(here, default.device)


def trial(device: torch.device) -> AbstractContextManager[None]:
    """A block for a forward that only shows something: later random numbers are as without it."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def forward_parameters(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    """The parameters of the model's forward, also behind torch.compile."""
    return inspect.signature(getattr(model, "_orig_mod", model).forward).parameters


def is_compiled(model: nn.Module) -> bool:
    """Whether the model, or a part of it, goes through torch.compile already."""
    return any(map(_is_compiled, model.modules()))


def _is_compiled(module: nn.Module) -> bool:
    if "_orig_mod" in module._modules or module.__dict__.get("_compiled_call_impl") is not None:
        return True
    forward = module.__dict__.get("forward", type(module).forward)
    # torch.compiler.disable keeps the function that it wraps under this name, too.
    compiled = hasattr(forward, "_torchdynamo_orig_callable")
    return compiled and not getattr(forward, "_torchdynamo_disable", False)


def without_cache(model: nn.Module) -> dict[str, bool]:
    """Options with which the model's forward keeps no keys and values, of use for generation only.

    PEFT's models hand options on to the model inside them. Nobody knows which options a model takes
    that hands them on otherwise; `caches.py` sees to those.
    """
    parameters = forward_parameters(model)
    model = getattr(model, "_orig_mod", model)
    inner = getattr(model, "get_base_model", None)
    if callable(inner) and any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        learned = getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", True)
        parameters = {} if learned else forward_parameters(inner())
    return {"use_cache": False} if "use_cache" in parameters else {}


def is_prompt_learning(module: nn.Module) -> bool:
    """Whether the module is a model of PEFT's with learned prompts or prefixes."""
    try:
        active = getattr(module, "active_peft_config", None)
    except (AttributeError, KeyError):
        return False
    return getattr(active, "is_prompt_learning", False) is True


def logits_of(output: Any, ids: Tensor, before: int = 0) -> Tensor:
    """The logits (K, T, V) in a causal language model's output for ids (K, T).

    They are (K, before + T, V) if the model puts `before` positions of its own before the ids.
    """
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise TypeError(
            "model output: expected a tensor of logits or an object with .logits, "
            f"got {type(output).__name__}"
        )
    lengths = (ids.shape[1], ids.shape[1] + before)
    if logits.ndim != 3 or len(logits) != len(ids) or logits.shape[1] not in lengths:
        expected = f"({len(ids)}, {ids.shape[1]}, V)"
        raise ValueError(f"logits: expected shape {expected}, got {tuple(logits.shape)}")
    return logits


def at_least_float32(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


class TokenLimits(NamedTuple):
    """The limits of a sequence. None where a limit is not known.

    On a GPU an index outside a table ends the process.
    """

    vocabulary: int | None  # token ids are below this
    labels: int | None  # predicted ids are below this
    positions: int | None  # the most tokens


_NOT_HERE = (
    "expected parameters in memory, got {!r} on the meta device (offloaded, or not loaded yet)"
)


# How names of transformers' models end whose logits are of a whole text.
_OF_TEXTS = ("ForSequenceClassification", "ForMultipleChoice")


def _check_causal(model: nn.Module) -> None:
    """Refuses what shows in its configuration or name that it has no logits of next tokens."""
    own = getattr(model, "_orig_mod", model)
    inner = getattr(own, "get_base_model", lambda: own)()  # of PEFT's
    names = [kind.__name__ for one in (own, inner) for kind in type(one).__mro__]
    found = None
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) is True:
        found = f"an encoder-decoder, {name_of(model)}"
    elif any(name.endswith(_OF_TEXTS) for name in names):
        found = f"one whose logits are of a whole text, {name_of(model)}"
    if found is not None:
        raise ValueError(f"model: expected a causal language model, got {found}")


def check_scorable(model: nn.Module) -> None:
    """Refuses models without logits of next tokens, and parameters on the meta device, unless
    accelerate's hooks bring them in a pass."""
    _check_causal(model)
    missing = next((name for name, p in model.named_parameters() if p.is_meta), None)
    if missing is not None and not any("_hf_hook" in vars(m) for m in model.modules()):
        raise ValueError(f"model: {_NOT_HERE.format(missing)}")


def check_trainable(model: nn.Module) -> None:
    """Refuses models without logits of next tokens, and what torch or a snapshot would fail with
    in a pass or later."""
    _check_causal(model)
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(
                f"model: expected modules of Python, got one of torch.jit: {path or 'the model'!r}"
            )
        for slots in (module._parameters, module._buffers):
            for key, tensor in slots.items():
                # Subclasses may keep their values elsewhere, as quantised weights do.
                if type(tensor) in (Tensor, nn.Parameter):
                    _check_memory(path, key, tensor)
        for key, parameter in module._parameters.items():
            if parameter is not None:
                _check_autograd(path, key, parameter)
        embeds = isinstance(module, (nn.Embedding, nn.EmbeddingBag))
        if embeds and module.sparse and module.weight.requires_grad:
            raise ValueError(
                f"model: expected dense gradients, got an embedding with sparse=True: {path!r}"
            )


def name_of(model: nn.Module) -> str:
    return type(getattr(model, "_orig_mod", model)).__name__


def _check_memory(path: str, key: str, tensor: Tensor) -> None:
    if tensor.layout is not torch.strided:
        raise ValueError(
            f"model: expected strided tensors, got {tensor.layout}: {_joined(path, key)!r}"
        )
    if not (tensor.is_meta or has_memory(tensor)):
        raise ValueError(
            "model: expected tensors with memory for all of their elements, got one whose "
            f"storage was freed: {_joined(path, key)!r}"
        )


def _check_autograd(path: str, key: str, parameter: Tensor) -> None:
    if nn.parameter.is_lazy(parameter):
        raise ValueError(
            "model: expected parameters with a shape, got a lazy one that no forward has run "
            f"yet: {_joined(path, key)!r}"
        )
    if parameter.is_meta:
        raise ValueError(f"model: {_NOT_HERE.format(_joined(path, key))}")
    if parameter.is_inference():
        raise ValueError(
            "model: expected parameters that autograd can use, got one made in "
            f"torch.inference_mode(): {_joined(path, key)!r}"
        )


def _joined(path: str, key: str) -> str:
    return f"{path}.{key}".lstrip(".")


def token_limits(model: nn.Module) -> TokenLimits:
    """The limits that the model's tables and configuration tell."""
    vocabulary = _vocabulary_size(model)
    return TokenLimits(vocabulary, _predicted(model) or vocabulary, _positions(model))


def check_token_ids(name: str, ids: Any, limits: TokenLimits, fewest: int = 2) -> Tensor:
    """`ids` as (1, T), after checking type, dtype, rank, T and the range of the ids."""
    tokens = check_tensor(name, ids)
    if tokens.dtype != torch.int64:
        raise TypeError(f"{name}: expected dtype torch.int64, got {tokens.dtype}")
    if tokens.ndim not in (1, 2) or (tokens.ndim == 2 and tokens.shape[0] != 1):
        raise ValueError(f"{name}: expected shape (T,) or (1, T), got {tuple(tokens.shape)}")
    if tokens.is_meta:
        raise ValueError(f"{name}: expected a tensor with values, got one on the meta device")
    if tokens.shape[-1] < fewest:
        raise ValueError(f"{name}: expected at least {fewest} tokens, got {tokens.shape[-1]}")
    if limits.positions is not None and tokens.shape[-1] > limits.positions:
        raise ValueError(
            f"{name}: expected at most {limits.positions} tokens, the model's positions, "
            f"got {tokens.shape[-1]}"
        )
    _check_range(name, tokens, limits.vocabulary)
    return tokens.reshape(1, -1)


def check_labels(name: str, labels: Tensor, limits: TokenLimits) -> None:
    """Checks the range of labels, which are indices into the logits."""
    _check_range(name, labels, limits.labels)


def check_predicted(name: str, ids: Tensor, limits: TokenLimits) -> None:
    """Checks all but the first of the ids (1, T) that `check_token_ids` has returned as labels.

    Most models have a logit for every id: then nothing is left to check.
    """
    ids_end, labels_end = limits.vocabulary, limits.labels
    if labels_end is not None and (ids_end is None or labels_end < ids_end):
        check_labels(name, ids[:, 1:], limits)


def _check_range(name: str, ids: Tensor, end: int | None) -> None:
    low, high = (int(x) for x in torch.aminmax(ids))
    if low < 0 or (end is not None and high >= end):
        wanted = "ids >= 0" if end is None else f"ids in [0, {end})"
        raise ValueError(f"{name}: expected {wanted}, got {low if low < 0 else high}")


def longest_padded(model: nn.Module) -> int:
    """The length up to which a sequence may be padded within the model's positions.

    If no table of positions is known, it is the length in the model's configuration. Without one it
    is the number of rows of the smallest embedding, which may be the table of positions.
    """
    known = _positions(model)
    if known is not None:
        return known
    configured = _configured(model)
    if configured:
        return max(0, min(configured) - virtual_tokens(model))
    return min(
        (m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)), default=0
    )


def knows_longest(model: nn.Module) -> bool:
    """Whether a table of positions or the configuration bounds `longest_padded`."""
    return _positions(model) is not None or bool(_configured(model))


def virtual_tokens(model: nn.Module) -> int:
    """Positions that PEFT's learned prompts and prefixes take before the first token."""
    try:
        active = getattr(model, "active_peft_config", None)
    except (AttributeError, KeyError):
        return 0
    count = getattr(active, "num_virtual_tokens", None)
    return count if isinstance(count, int) else 0


def _vocabulary_size(model: nn.Module) -> int | None:
    """The number of token ids that the model has rows for; None if that is not known."""
    known = getattr(_embeddings(model, "input"), "num_embeddings", None)
    if isinstance(known, int):
        return known
    size = getattr(_config(model), "vocab_size", None)
    if isinstance(size, int):
        return size
    # Other things may be looked up, too, so only the largest embedding bounds the ids. The largest
    # may be the table of positions, where that of the tokens is a plain parameter.
    rows = [
        module.num_embeddings
        for path, module in model.named_modules()
        if isinstance(module, nn.Embedding) and not _is_position_table(_WRAPPING.sub("", path))
    ]
    return max(rows, default=None)


def tells_labels(model: nn.Module) -> bool:
    """Whether the model tells how many logits it has. If not, `token_limits` takes the ids'."""
    return _predicted(model) is not None


def _predicted(model: nn.Module) -> int | None:
    """The rows of the last layer: as many as the embedding's, unless one of them was resized."""
    size = getattr(_embeddings(model, "output"), "out_features", None)
    return size if isinstance(size, int) else None


# The names that configurations of transformers have for the number of positions.
_LENGTHS = (
    "max_position_embeddings",
    "n_positions",
    "max_target_positions",
    "max_seq_len",
    "n_ctx",
)
# Words in the name of a table of absolute positions: `wpe`, `embed_positions`, `pos_emb`, ...
_POSITION = {"wpe", "pos", "position", "positions", "positional"}
_OTHERWISE = {"rel", "relative", "rotary", "rope", "alibi", "bias", "type", "types", "ids"}
# Names of parts whose positions are not those of tokens.
_NOT_TEXT = re.compile("vision|visual|image|pixel|patch|video|audio|speech")
# Names of the modules that PEFT wraps around an embedding.
_WRAPPING = re.compile(r"\.(base_layer|original_module|modules_to_save\.[^.]*)$")


def _positions(model: nn.Module) -> int | None:
    """The number of tokens that a table of absolute positions has rows for; None without a table.

    A table is recognised by its name, and by a number of rows that the configuration confirms: a
    table of such a name may also be for an image's patches. Without a configuration the name is
    enough. Computed positions (rotary, ALiBi, tables that grow) have no limit.
    """
    config = _config(model)
    configured = _configured(model)
    # MPT in transformers computes ALiBi for so many positions, and cuts it from there.
    limits = [*configured] if getattr(config, "model_type", None) == "mpt" else []
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            rows = module.num_embeddings
            offset = getattr(module, "offset", 0)
            start = offset if isinstance(offset, int) else 0
            if module.padding_idx is not None and start == 0:
                start = module.padding_idx + 1
            path = _WRAPPING.sub("", path)
            if _is_position_table(path) and (config is None or configured & {rows, rows - start}):
                limits.append(rows - start)
        for name, buffer in module._buffers.items():
            rows = len(buffer) if buffer is not None and buffer.ndim == 2 else 0
            if rows in configured and _is_position_table(f"{path}.{name}"):
                limits.append(rows)
    return max(0, min(limits) - virtual_tokens(model)) if limits else None


def _is_position_table(path: str) -> bool:
    words = set(path.rpartition(".")[2].lower().split("_"))
    return bool(words & _POSITION) and not words & _OTHERWISE and not _NOT_TEXT.search(path.lower())


def _configured(model: nn.Module) -> set[int]:
    config = _config(model)
    lengths = (getattr(config, name, None) for name in _LENGTHS)
    return {length for length in lengths if isinstance(length, int) and length > 0}


def _config(model: nn.Module) -> Any:
    """The model's configuration; in a model of several parts, that of the part that reads text."""
    config = getattr(model, "config", None)
    find = getattr(config, "get_text_config", None)
    return find(decoder=True) if callable(find) else config


def _embeddings(model: nn.Module, which: str) -> Any:
    find = getattr(model, f"get_{which}_embeddings", None)
    try:
        return find() if callable(find) else None
    except (NotImplementedError, AttributeError):
        return None
