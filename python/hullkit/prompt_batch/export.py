# SPDX-License-Identifier: Apache-2.0
"""A slot as an adapter of PEFT."""

from __future__ import annotations

import re
from pathlib import Path

from torch import Tensor, nn

from .layers import Layer


def write_adapter(
    model: nn.Module,
    factors: dict[str, tuple[Tensor, Tensor]],
    layers: list[Layer],
    directory: Path,
    rank: int,
    alpha: float,
    rslora: bool,
) -> None:
    """adapter_config.json and adapter_model.safetensors.

    factors: each layer's A (R, I) and B (O, R) by its name.
    """
    import peft
    from safetensors.torch import save_file

    # PEFT's class for language models expects the methods of transformers' models.
    causal = hasattr(model, "prepare_inputs_for_generation")
    # PEFT takes a name for that of every module which ends with it, but an expression as a whole.
    others = [name for name, _ in model.named_modules() if name not in factors]
    ends = tuple(f".{name}" for name in factors)
    exact = any(name.endswith(ends) for name in others)
    directory.mkdir(parents=True, exist_ok=True)
    peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # PEFT divides; a fraction is fine
        use_rslora=rslora,
        target_modules="|".join(map(re.escape, factors)) if exact else [*factors],
        fan_in_fan_out=not all(isinstance(layer.module, nn.Linear) for layer in layers),
        inference_mode=True,
        task_type="CAUSAL_LM" if causal else None,
        base_model_name_or_path=getattr(model, "name_or_path", None),
    ).save_pretrained(str(directory))
    tensors = {}
    for name, (a, b) in factors.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = a.cpu().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = b.cpu().contiguous()
    save_file(tensors, str(directory / "adapter_model.safetensors"), metadata={"format": "pt"})
