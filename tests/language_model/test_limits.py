# SPDX-License-Identifier: Apache-2.0
"""How long a sequence may be, and which ids it may have: refused by name before anything runs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from _models import VOCABULARY, gpt2, llama
from hullkit import bits_per_byte
from hullkit.finetune import TestTimeFinetuner
from hullkit.language_model.interface import longest_padded, token_limits
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("one_thread")

POSITIONS = 24
BART = {
    "d_model": 16,
    "decoder_layers": 1,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 16,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "max_position_embeddings": POSITIONS,
    "is_decoder": True,
}
BERT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": POSITIONS,
    "is_decoder": True,
}
GPT = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": POSITIONS}
XLM = {"emb_dim": 16, "n_layers": 1, "n_heads": 2, "max_position_embeddings": POSITIONS}
XLM["causal"] = True  # else it sees later tokens
# The class's name without "Config", its options, the longest sequence (None: there is none).
ARCHITECTURES: list[tuple[str, dict[str, Any], int | None]] = [
    ("OPT", {**BERT, "ffn_dim": 16, "word_embed_proj_dim": 16}, POSITIONS),
    ("BioGpt", BERT, POSITIONS),
    ("Bart", BART, POSITIONS),
    ("MBart", BART, POSITIONS),
    ("Mvp", BART, POSITIONS),
    ("PLBart", BART, POSITIONS),
    ("Blenderbot", BART, POSITIONS),
    ("BlenderbotSmall", BART, POSITIONS),
    ("Pegasus", BART, POSITIONS),
    ("Marian", {**BART, "pad_token_id": 0}, POSITIONS),
    ("TrOCR", BART, POSITIONS),
    ("Whisper", {**BART, "max_target_positions": POSITIONS}, POSITIONS),
    ("XGLM", {**BART, "num_layers": 1, "attention_heads": 2, "ffn_dim": 16}, None),  # grows
    ("Bert", BERT, POSITIONS),
    ("BertGeneration", BERT, POSITIONS),
    ("Electra", {**BERT, "embedding_size": 16}, POSITIONS),
    ("RemBert", {**BERT, "input_embedding_size": 16, "output_embedding_size": 16}, POSITIONS),
    ("RoFormer", {**BERT, "embedding_size": 16}, POSITIONS),
    ("Roberta", {**BERT, "pad_token_id": 1}, POSITIONS - 2),  # begin after the padding's
    ("XLMRoberta", {**BERT, "pad_token_id": 0}, POSITIONS - 1),
    ("XLM", XLM, POSITIONS),
    ("GPT2", GPT, POSITIONS),
    ("GPTBigCode", GPT, POSITIONS),
    ("OpenAIGPT", GPT, POSITIONS),
    ("GPTJ", {**GPT, "rotary_dim": 4}, POSITIONS),
    ("CodeGen", {**GPT, "n_head": 4, "n_embd": 32, "rotary_dim": 4}, POSITIONS),
    ("CTRL", {**GPT, "dff": 16}, POSITIONS),
    (
        "GPTNeo",
        {**BERT, "num_heads": 2, "num_layers": 1, "attention_types": [[["global"], 1]]},
        POSITIONS,
    ),
    ("Mpt", {"d_model": 16, "n_layers": 1, "n_heads": 2, "max_seq_len": POSITIONS}, POSITIONS),
    ("Bloom", {"hidden_size": 16, "n_layer": 1, "n_head": 2}, None),
    ("GPTNeoX", BERT, None),
    ("Llama", BERT, None),
]


def build(name: str, options: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    tokens = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    config = getattr(transformers, f"{name}Config")(**{"vocab_size": 97, **tokens, **options})
    return transformers.AutoModelForCausalLM.from_config(config)


def sequence(length: int) -> Tensor:
    return torch.arange(length) % 50 + 5


def check_longest(model: Any, longest: int) -> None:
    tuner = TestTimeFinetuner(model)
    message = f"expected at most {longest} tokens, the model's positions, got {longest + 1}"
    with pytest.raises(ValueError, match=f"input_ids: {message}"):
        bits_per_byte(model, sequence(longest + 1), 9)
    with pytest.raises(ValueError, match=rf"examples\[0\]: {message}"):
        tuner.adapted([sequence(longest + 1)], [1])
    assert bits_per_byte(model, sequence(longest), 9) > 0
    with tuner.adapted([sequence(longest)], [1]):
        pass
    assert longest_padded(model) == longest


@pytest.mark.parametrize(("name", "options", "longest"), ARCHITECTURES, ids=lambda x: str(x)[:15])
def test_longest_sequence(name: str, options: dict[str, Any], longest: int | None) -> None:
    model = build(name, options)
    if longest is not None:
        check_longest(model, longest)
        with pytest.raises((IndexError, RuntimeError)), torch.no_grad():  # rightly so
            model(sequence(longest + 1)[None], use_cache=False)
    else:
        assert bits_per_byte(model, sequence(3 * POSITIONS), 9) > 0
        with TestTimeFinetuner(model).adapted([sequence(3 * POSITIONS)], [1]):
            pass


class Plain(nn.Module):
    def __init__(self, rows: int = POSITIONS, name: str = "pos_emb") -> None:
        super().__init__()
        self.tokens = nn.Embedding(97, 8)
        self.name = name
        setattr(self, name, nn.Embedding(rows, 8))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        table = getattr(self, self.name)
        at = torch.arange(ids.shape[1]).remainder(table.num_embeddings)
        x = x + table(at if self.name != "pos_emb" else torch.arange(ids.shape[1]))
        return x @ self.tokens.weight.T


def test_plain_modules() -> None:
    check_longest(Plain(), POSITIONS)
    # Tables that are not of absolute positions do not limit the length.
    for name in ("rel_pos_emb", "token_type_embeddings", "image_pos_embed", "composed"):
        model = Plain(4, name)
        assert token_limits(model).positions is None
        assert bits_per_byte(model, sequence(9), 9) > 0
        assert longest_padded(model) == 4  # padding is no matter of certainty


# torch's own, as the compiler is imported.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_wrapped_models() -> None:
    check_longest(torch.nn.Sequential(Plain()), POSITIONS)
    assert token_limits(torch.compile(gpt2())).positions == 64  # type: ignore[arg-type]
    assert token_limits(torch.compile(llama())).positions is None  # type: ignore[arg-type]


def test_padding_without_a_table() -> None:
    """As far as the configuration goes; a model without one is not padded beyond any embedding."""
    assert longest_padded(llama()) == 64
    assert longest_padded(nn.Sequential(nn.Embedding(31, 8), nn.Embedding(17, 8))) == 17
    assert longest_padded(nn.Linear(2, 2)) == 0  # not at all


def test_positions_of_something_else() -> None:
    """A table of such a name that the configuration does not speak of: of an image's patches."""
    model = llama()
    model.tower = nn.Module()
    model.tower.position_embedding = nn.Embedding(17, 4)
    assert token_limits(model).positions is None
    with TestTimeFinetuner(model).adapted([torch.arange(20)], [1]):
        pass


LORA = {"r": 2, "fan_in_fan_out": True}


# PEFT speaks to transformers by names that transformers has since deprecated.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("kind", "options", "longest"),
    [
        ("LoraConfig", {**LORA, "target_modules": ["c_attn"], "modules_to_save": ["wpe"]}, 64),
        ("LoraConfig", {**LORA, "target_modules": ["c_attn", "wte", "wpe"]}, 64),
        ("PromptTuningConfig", {"num_virtual_tokens": 5}, 59),
        ("PrefixTuningConfig", {"num_virtual_tokens": 5}, 59),
        ("PromptEncoderConfig", {"num_virtual_tokens": 5, "encoder_hidden_size": 8}, 59),
    ],
)
def test_peft(kind: str, options: dict[str, Any], longest: int) -> None:
    peft = pytest.importorskip("peft", reason="the test extra is not installed")
    config = getattr(peft, kind)(task_type="CAUSAL_LM", **options)
    model = peft.get_peft_model(gpt2(), config)
    ids = torch.arange(longest + 1) % VOCABULARY
    for refused in (
        lambda: bits_per_byte(model, ids, 9),
        lambda: TestTimeFinetuner(model).adapted([ids], [1]),
    ):
        with pytest.raises(ValueError, match=f"expected at most {longest} tokens"):
            refused()
    with TestTimeFinetuner(model, lr=1e-2).adapted([ids[:longest]], [2]) as adapted:
        inside = bits_per_byte(adapted, ids[:longest], 9)
    assert bits_per_byte(model, ids[:longest], 9) != inside
    with pytest.raises(ValueError, match=r"expected ids in \[0, 31\), got 31"):
        bits_per_byte(model, ids[:longest] + 1, 9)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_prompt_tuned_score() -> None:
    """The score equals the base model's for the same tokens after the learned prompt."""
    peft = pytest.importorskip("peft", reason="the test extra is not installed")
    base = gpt2().eval()
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    model = peft.get_peft_model(copy.deepcopy(base), config).eval()
    ids = torch.arange(17) % VOCABULARY
    embedded = base.get_input_embeddings()(ids[None])
    with torch.no_grad():
        prompt = model.get_prompt(batch_size=1)
        logits = base(inputs_embeds=torch.cat([prompt, embedded], 1)).logits[0, 5:-1]
        nats = nn.functional.cross_entropy(logits.double(), ids[1:], reduction="sum")
    wanted = nats.item() / torch.log(torch.tensor(2.0)).item() / 9
    assert bits_per_byte(model, ids, 9) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("resize", ["both", "input", "output"])
def test_vocabulary_after_resizing(resize: str) -> None:
    model = llama()
    if resize == "both":
        model.resize_token_embeddings(40, mean_resizing=False)
    elif resize == "input":
        model.set_input_embeddings(nn.Embedding(40, 16))
    else:
        model.set_output_embeddings(nn.Linear(16, 20, bias=False))
    known, predicted = {"both": (40, 40), "input": (40, 31), "output": (31, 20)}[resize]
    tuner = TestTimeFinetuner(model)

    def ids(first: int, other: int) -> Tensor:
        return torch.tensor([first, other, 1])

    calls: list[Callable[[Tensor], Any]] = [
        lambda x: bits_per_byte(model, x, 9),
        lambda x: tuner.adapted([x], [1]),
    ]
    for call in calls:
        call(ids(predicted - 1, predicted - 1))
        call(ids(known - 1, predicted - 1))  # the first token is not predicted
        with pytest.raises(ValueError, match=rf"expected ids in \[0, {known}\), got {known}"):
            call(ids(known, 1))
        with pytest.raises(ValueError, match=rf"\[0, {predicted}\), got {predicted}"):
            call(ids(1, predicted))


class TokensInAParameter(nn.Module):
    """Its only embedding is that of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(VOCABULARY, 8))
        self.wpe = nn.Embedding(16, 8)
        self.head = nn.Linear(8, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        positions = self.wpe(torch.arange(ids.shape[1]))
        out: Tensor = self.head(nn.functional.embedding(ids, self.tokens) + positions)
        return out


def test_positions_do_not_bound_the_ids() -> None:
    model = TokensInAParameter()
    ids = torch.tensor([1, VOCABULARY - 1, 2])
    assert token_limits(model) == (None, None, 16)
    assert bits_per_byte(model, ids, 3) > 0.0
    TestTimeFinetuner(model).adapt_([ids], [1])
    model.extra = nn.Embedding(20, 8)  # any other may be of tokens
    assert token_limits(model).vocabulary == 20
