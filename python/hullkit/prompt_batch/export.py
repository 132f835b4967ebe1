# SPDX-License-Identifier: Apache-2.0
"""A slot as an adapter of PEFT."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import warnings
from copy import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..language_model.interface import trial
from .borrowed import Borrowed
from .layers import Layer


def write_adapter(
    model: nn.Module,
    factors: dict[str, tuple[Tensor, Tensor]],
    layers: list[Layer],
    directory: str | Path,
    rank: int,
    alpha: float,
    rslora: bool,
    check: bool,
) -> None:
    """adapter_config.json and adapter_model.safetensors.

    factors: each layer's A (R, I) and B (O, R) by its name.
    check: whether PEFT must load the same factors into the same layers; else ValueError, and
        nothing is written.
    """
    if not isinstance(directory, (str, os.PathLike)):
        raise TypeError(f"directory: expected a str or a path, got {type(directory).__name__}")
    import peft
    from safetensors.torch import save_file

    # PEFT's class for language models expects the methods of transformers' models.
    causal = hasattr(model, "prepare_inputs_for_generation")
    # PEFT takes a name for that of every module which ends with it, but an expression as a whole.
    others = [name for name, _ in model.named_modules() if name not in factors]
    ends = tuple(f".{name}" for name in factors)
    exact = any(name.endswith(ends) for name in others)
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # PEFT divides; a fraction is fine
        use_rslora=rslora,
        target_modules="|".join(map(re.escape, factors)) if exact else [*factors],
        fan_in_fan_out=not all(isinstance(layer.module, nn.Linear) for layer in layers),
        inference_mode=True,
        task_type="CAUSAL_LM" if causal else None,
        base_model_name_or_path=getattr(model, "name_or_path", None),
    )
    tensors = {}
    for name, (a, b) in factors.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = a.cpu().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = b.cpu().contiguous()
    with tempfile.TemporaryDirectory() as made:
        config.save_pretrained(made)
        save_file(tensors, f"{made}/adapter_model.safetensors", metadata={"format": "pt"})
        if check:
            _check_loads(model, made, factors)
        target = Path(directory)
        target.mkdir(parents=True, exist_ok=True)
        # Another file system may run full: files get their names once all are whole.
        with tempfile.TemporaryDirectory(dir=target) as near:
            for path in Path(made).iterdir():
                shutil.copyfile(path, Path(near, path.name))
            for path in Path(near).iterdir():
                path.replace(target / path.name)


def _check_loads(model: nn.Module, made: str, factors: dict[str, tuple[Tensor, Tensor]]) -> None:
    """PEFT changes some models' targets to names that they have in other files, and refuses some
    layers. A layer that has two names would get an adapter under one of them."""
    from peft import PeftModel

    device = next(iter(factors.values()))[0].device
    names: dict[nn.Module, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        first = names.setdefault(module, name)
        if first in factors and first != name:
            raise ValueError(f"model: expected one name for each layer, got {first!r} and {name!r}")
    try:
        # PEFT freezes parameters, which the replica shares, and draws factors.
        with Borrowed(model, [], trial(device)), warnings.catch_warnings():  # what follows tells
            warnings.simplefilter("ignore")
            loaded: Any = PeftModel.from_pretrained(_replica(model, {}), made)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise ValueError(
            "target: expected layers that PEFT adapts in this model, got some that it refuses "
            f"({error}); a batch with other layers as its target can be exported"
        ) from error
    layers = dict(loaded.base_model.model.named_modules())
    for name, pair in factors.items():
        own = [getattr(layers[name], part, {}) for part in ("lora_A", "lora_B")]
        same = ("default" in part and torch.equal(part["default"].weight.to(f), f)
                for part, f in zip(own, pair, strict=True))  # fmt: skip
        if not all(same):
            raise ValueError(
                f"target: expected layers that PEFT adapts in this model, got {name!r}, for which "
                "it takes another layer, or none; a batch with other layers as its target can be "
                "exported"
            )


def _replica(module: nn.Module, made: dict[nn.Module, nn.Module]) -> nn.Module:
    """The same modules over the same tensors, for changes of structure."""
    if module not in made:
        own = made[module] = type(module).__new__(type(module))
        for name, value in module.__dict__.items():  # hooks and parameters are in dicts
            own.__dict__[name] = copy(value) if isinstance(value, dict) else value
        own.__dict__.pop("forward", None)  # of a slot, if the export is in its block
        own._modules = {
            name: None if part is None else _replica(part, made)
            for name, part in module._modules.items()
        }
    return made[module]
