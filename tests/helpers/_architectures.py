# SPDX-License-Identifier: Apache-2.0
"""Tiny causal language models with random weights, one for each architecture of transformers.

Tests and the table of architectures in the documentation finetune each of them on two examples.
"""

from __future__ import annotations

from typing import Any

import torch
from hullkit.finetune import AdaptReport, TestTimeFinetuner
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

VOCABULARY = 64

_USUAL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
_HEADS = {"num_key_value_heads": 2}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_DEEPSEEK: dict[str, Any] = {
    **_HEADS,
    "head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}

# Sizes that an architecture needs beside the usual ones.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "apertus": {},
    "arcee": {},
    "bamba": {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1,
              "attn_layer_indices": [1]},
    "biogpt": {},
    "bitnet": {},
    "bloom": {"n_layer": 2, "n_head": 2},
    "codegen": {**_GPT, "rotary_dim": 8, "n_head": 4},
    "cohere": {},
    "cohere2": {"sliding_window": 4},
    "ctrl": {**_GPT, "dff": 48},
    "deepseek_v2": {**_DEEPSEEK, "topk_method": "greedy"},
    "deepseek_v3": _DEEPSEEK,
    "diffllama": _HEADS,
    "dots1": {**_DEEPSEEK, "head_dim": 16, "n_shared_experts": 1},
    "ernie4_5": {},
    "ernie4_5_moe": {**_EXPERTS, "moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 1},
    "exaone4": {"sliding_window": 4, "sliding_window_pattern": 2},
    "falcon": {"num_kv_heads": 1},
    "falcon_mamba": {"state_size": 8},
    "gemma": {},
    "gemma2": {"sliding_window": 4, "query_pre_attn_scalar": 16},
    "gemma3_text": {"sliding_window": 4, "query_pre_attn_scalar": 16},
    "glm": {},
    "glm4": {},
    "glm4_moe": {**_DEEPSEEK, "head_dim": 16},
    "gpt2": _GPT,
    "gpt_bigcode": _GPT,
    "gpt_neo": {"num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]],
                "window_size": 4},
    "gpt_neox": {},
    "gpt_neox_japanese": {},
    "gpt_oss": {**_LOCAL_EXPERTS, "sliding_window": 4},
    "gptj": {**_GPT, "rotary_dim": 8},
    "granite": {"logits_scaling": 4.0, "residual_multiplier": 0.5},
    "granitemoe": {**_LOCAL_EXPERTS, "logits_scaling": 4.0},
    "helium": {},
    "hunyuan_v1_dense": {},
    "jamba": {**_EXPERTS, "mamba_d_state": 8, "mamba_dt_rank": 4, "attn_layer_period": 2,
              "attn_layer_offset": 1, "expert_layer_period": 2, "use_mamba_kernels": False},
    "jetmoe": {"kv_channels": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "llama": {},
    "mamba": {"state_size": 8},
    "mamba2": {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1, "chunk_size": 8},
    "minimax": {**_LOCAL_EXPERTS, "layer_types": ["full_attention", "linear_attention"],
                "block_size": 8},
    "mistral": {"sliding_window": 4},
    "mixtral": _LOCAL_EXPERTS,
    "mpt": {"d_model": 32, "n_heads": 2, "n_layers": 2, "max_seq_len": 64},
    "nemotron": {},
    "olmo": {},
    "olmo2": {},
    "olmoe": _EXPERTS,
    "openai-gpt": _GPT,
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "persimmon": {},
    "phi": {},
    "phi3": {},
    "phimoe": {**_LOCAL_EXPERTS, "sliding_window": 4},
    "qwen2": {},
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 24},
    "qwen3": {},
    "qwen3_moe": _EXPERTS,
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": 4,
                        "block_types": ["recurrent", "attention"]},
    "seed_oss": {},
    "smollm3": {},
    "stablelm": {},
    "starcoder2": {"sliding_window": 4},
    "xglm": {"d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 2},
}  # fmt: skip

NAMES = [name for name in ARCHITECTURES if name in CONFIG_MAPPING]  # some are newer than others
COUNTS = [3, 2]
LR, EPS = 1e-3, 1e-3
# Two ways to add up float32 gradients, largest about 1, differ by some 2^-24 for each of the
# roundings on the longest path through a layer, about 32. Adam divides by sqrt(v) + eps, so one
# update differs by at most lr / eps times that.
BOUND = sum(COUNTS) * LR / EPS * 32 * 2.0**-24


def build(name: str) -> nn.Module:
    """The architecture's model, in float32 and eval mode, the same at every call."""
    torch.manual_seed(0)
    model: nn.Module = AutoModelForCausalLM.from_config(_config(name), dtype=torch.float32)
    return model.eval()


def _config(name: str) -> Any:
    """The configuration: the usual sizes as far as it has fields for them, and its own."""
    sizes = ARCHITECTURES[name]
    fields = AutoConfig.for_model(name)
    mapped = getattr(type(fields), "attribute_map", {})
    own = {mapped.get(key, key) for key in sizes}
    usual = {mapped.get(key, key): value for key, value in _USUAL.items()}
    usual = {key: size for key, size in usual.items() if key in vars(fields) and key not in own}
    return AutoConfig.for_model(name, **{**usual, **sizes})


def examples() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, VOCABULARY, (n,), generator=generator) for n in (12, 9)]


def adapted(model: nn.Module, **options: Any) -> tuple[AdaptReport, dict[str, Tensor]]:
    """The report of a query, and the finetuned weights."""
    tuner = TestTimeFinetuner(model, lr=LR, eps=EPS, **options)
    with tuner.adapted(examples(), COUNTS):
        weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert tuner.last_report is not None
    return tuner.last_report, weights


def largest_difference(weights: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    return max(float((weights[n].double() - wanted[n].double()).abs().max()) for n in wanted)
