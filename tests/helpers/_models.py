# SPDX-License-Identifier: Apache-2.0
"""Small causal language models, and everything about one that must be back after a query."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator
from typing import Any

import torch
from hullkit.finetune import adaptation
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
)

VOCABULARY = 31
COUNTS = [5, 0, 2, 1]


class PlainLM(nn.Module):
    """A causal model in plain torch with all that must come back: buffers, batch norm, dropout."""

    mask: Tensor
    calls: Tensor
    repeated: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 12)
        self.norm = nn.BatchNorm1d(12)
        self.dropout = nn.Dropout(0.5)
        self.frozen = nn.Linear(12, 12).requires_grad_(False)
        self.head = nn.Linear(12, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight  # tied
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("repeated", torch.ones(1).expand(12))

    def forward(self, ids: Tensor) -> Tensor:
        self.calls += 1
        x = self.norm(self.embedding(ids).transpose(1, 2)).transpose(1, 2)
        x = torch.tanh(self.frozen(self.dropout(x))) * self.repeated
        x = x.cumsum(1) / torch.arange(1, ids.shape[1] + 1, device=ids.device)[:, None]
        out: Tensor = self.head(x)
        return out


def plain(seed: int = 0) -> PlainLM:
    torch.manual_seed(seed)
    return PlainLM()


def llama(hidden: int = 16, intermediate: int = 24) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
            attention_dropout=0.3,
        )
    )


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=16, n_layer=2, n_head=2)
    )


MODELS = [plain, llama, gpt2]  # GPT-2 ties its embeddings and has dropout 0.1


def rwkv(rescale_every: int = 1) -> RwkvForCausalLM:
    """Its first pass in eval mode divides weights by powers of two; with 0 none does."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "attention_hidden_size": 16, "intermediate_size": 24}
    sizes |= {"vocab_size": VOCABULARY, "num_hidden_layers": 3}
    config = RwkvConfig(rescale_every=rescale_every, **sizes)
    return RwkvForCausalLM(config).eval()


def texts(count: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(VOCABULARY, (n,), generator=generator) for n in (17, 9, 2, 25)][:count]


class FailingCall:
    """In the place of `owner.name`: raises `error` at its call number `at`, after it if `late`."""

    def __init__(
        self, owner: Any, name: str, error: type[BaseException], at: int, late: bool = False
    ) -> None:
        self.calls = 0
        original = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.calls == at and not late:
                raise error("injected")
            result = original(*args, **kwargs)
            if self.calls == at:
                raise error("injected")
            return result

        self.place = (owner, name, call)  # arguments of monkeypatch.setattr


def injected(block: Any, error: type[BaseException]) -> bool:
    """Whether entering or leaving the block fails with the injected error."""
    try:
        with block:
            pass
    except error as raised:
        return str(raised) == "injected"
    return False


def distance(state: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Relative, of all weights together (one alone may be noise: GPT-2's key biases are)."""
    pairs = [(state[n].double(), other[n].double()) for n in state if n != "calls"]
    apart = math.sqrt(sum(float((a - b).square().sum()) for a, b in pairs))
    size = math.sqrt(sum(float(b.square().sum()) for _, b in pairs))
    return apart / size if apart > 0.0 else apart  # a model of zeros has no size


def same_bits(tensor: Tensor, other: Tensor) -> bool:
    # As bytes: NumPy has no bfloat16.
    pair = (t.detach().cpu().contiguous().flatten().view(torch.uint8) for t in (tensor, other))
    return torch.equal(next(pair), next(pair))


class Before:
    """A model made untidy on purpose, and everything about it that must be so again."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        model.train()
        list(model.modules())[1].eval()
        for parameter in list(model.parameters())[::2]:
            parameter.grad = torch.full_like(parameter, 0.25)
        self.bits = {name: self.copy(t) for name, t in self.tensors()}
        self.facts = self.look()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.model.named_parameters(remove_duplicate=False)
        yield from self.model.named_buffers(remove_duplicate=False)

    @staticmethod
    def copy(tensor: Tensor) -> tuple[Any, ...]:
        return tensor.dtype, tensor.stride(), tensor.detach().clone()

    def look(self) -> list[Any]:
        return [
            [(name, id(t), t.data_ptr()) for name, t in self.tensors()],
            [(p.requires_grad, id(p.grad)) for p in self.model.parameters()],
            [len(p._post_accumulate_grad_hooks or ()) for p in self.model.parameters()],
            [module.training for module in self.model.modules()],
            signal.getsignal(signal.SIGINT),
            [module for module in self.model.modules() if adaptation.is_adapted(module)],
            torch.get_float32_matmul_precision(),
            [torch.is_autocast_enabled(device) for device in ("cpu", "cuda")],
            (torch.autocast_increment_nesting(), torch.autocast_decrement_nesting()),
            [
                [(name, id(value)) for name, value in vars(m).items() if name != "training"]
                for m in self.model.modules()
            ],
        ]

    def check(self) -> None:
        for now, then in zip(self.look(), self.facts, strict=True):
            assert now == then
        self.check_bits()
        for parameter in self.model.parameters():
            assert parameter.grad is None or bool((parameter.grad == 0.25).all())

    def check_bits(self) -> None:
        for name, tensor in self.tensors():
            dtype, stride, bits = self.bits[name]
            assert (tensor.dtype, tensor.stride()) == (dtype, stride), name
            assert same_bits(tensor, bits), name


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}
