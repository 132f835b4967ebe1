# SPDX-License-Identifier: Apache-2.0
"""What users do to a batch and its queries that cannot work says so, and loses no answer."""

from __future__ import annotations

import gc
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from copy import deepcopy
from fractions import Fraction
from typing import Any

import hullkit
import numpy as np
import pytest
import torch
from _models import VOCABULARY, gpt2, llama
from _prompts import DEVICE, PRECISIONS, TOGETHER, batch_of, is_fresh, text
from hullkit.prompt_batch import Generate
from torch import nn
from transformers import BertConfig, BertForMaskedLM, GenerationConfig

pytestmark = [pytest.mark.usefixtures("one_thread")]
if DEVICE.type == "cuda":
    pytestmark += [pytest.mark.gpu]

QUERY = hullkit.Query([text(9, 0)], [2])


def test_a_query_is_no_iterable_of_queries() -> None:
    batch = batch_of(llama().to(DEVICE), 8)
    with pytest.raises(TypeError, match="queries: expected an iterable of queries, got Query"):
        next(batch.map(QUERY))
    with pytest.raises(TypeError, match="queries: expected an iterable of queries, got int"):
        next(batch.map(5))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="queries: expected a sequence, got Query"):
        batch.adapt_(QUERY)
    assert [a.error for a in batch.map([QUERY])] == [None]  # it is free


def test_no_more_queries_are_read_ahead_than_is_said() -> None:
    """The first one learns for long, and others take the other slot in turn."""
    batch, read = batch_of(llama().to(DEVICE), 2), []

    def queries() -> Iterator[hullkit.Query]:
        for i in range(20):
            read.append(i)
            yield QUERY._replace(counts=[1 if i else 40])

    answers = batch.map(queries())
    for due in range(3):
        assert next(answers).place == due
        assert len(read) <= due + 4 * 2
    assert len(read) >= 4 * 2
    answers.close()  # type: ignore[attr-defined]


def test_numbers_of_numpy_are_numbers() -> None:
    batch = batch_of(llama().to(DEVICE), 2, seed=np.int64(2), alpha=Fraction(1, 3))
    plain = batch_of(llama().to(DEVICE), 2, seed=2, alpha=1 / 3)
    seeds: tuple[Any, ...] = (None, 3, np.int64(3), None)
    ours, theirs = (
        [*made.map([QUERY._replace(seed=kind(seed)) for seed in seeds])]
        for made, kind in ((batch, lambda s: s), (plain, lambda s: None if s is None else int(s)))
    )
    assert [a.error for a in ours] == [None] * 4
    assert [a.losses for a in ours] == [a.losses for a in theirs]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_layers_of_several_dtypes_are_refused(dtype: torch.dtype) -> None:
    """And of one that products do not have."""
    message = "expected layers on one device in float32, bfloat16 or float16, got"
    model: Any = llama().to(DEVICE)
    model.model.layers[1].mlp.to(dtype)
    with pytest.raises(ValueError, match=message):
        batch_of(model, 2)
    if dtype is torch.float64:
        with pytest.raises(ValueError, match=message):
            batch_of(model.to(dtype), 2)


def test_more_tokens_than_positions() -> None:
    """On a GPU an index outside of the table would end the process."""
    model = gpt2().to(DEVICE)
    positions = model.config.n_positions
    batch = batch_of(model, 2)
    options = {"do_sample": False, "pad_token_id": 0, "min_new_tokens": 6}
    prompt = text(positions - 5, 0)
    right, wrong = (Generate(prompt, max_new_tokens=new, **options) for new in (6, 7))
    answers = [*batch.map([([text(9, 0)], [1], then) for then in (wrong, right)])]
    message = f"max_new_tokens: expected at most 6 after {positions - 5} tokens"
    assert str(answers[0].error).startswith(message)
    assert answers[1].error is None
    assert len(answers[1].value) == 6
    ids = torch.stack([prompt, prompt]).to(DEVICE)
    with pytest.raises(ValueError, match=message):
        batch.generate(ids, max_new_tokens=7, **options)
    assert batch.generate(ids, max_new_tokens=6, **options).shape == (2, positions + 1)


@pytest.mark.parametrize("of_model", [False, True])
@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"max_new_tokens": np.int64(70)}, "max_new_tokens: expected at most 61 after 4 tokens"),
        ({"max_new_tokens": torch.tensor(70)}, "max_new_tokens: expected at most 61 after 4"),
        ({"max_length": 70}, "max_length: expected at most 65, since the model has 64 positions"),
        ({"max_length": 70, "max_new_tokens": 61}, ""),
        ({"max_new_tokens": 61}, ""),
        ({"max_length": 65}, ""),
        ({"max_length": 9}, ""),
    ],
)
def test_every_form_of_a_length(given: dict[str, Any], words: str, of_model: bool) -> None:
    """On a GPU an index outside of the table would end the process."""
    model = gpt2().to(DEVICE)
    prompt = text(4, 0)
    forms = [given, {"generation_config": GenerationConfig(**given)}]
    if of_model:
        model.generation_config.update(**given)
        forms = [{}]
    model.generation_config.eos_token_id = None
    for options in forms:
        then = Generate(prompt, do_sample=False, pad_token_id=0, **options)
        [answer] = batch_of(model, 1).map([QUERY._replace(then=then)])
        if words:
            assert str(answer.error).startswith(words)
        else:
            assert answer.error is None
            assert len(answer.value) == given.get("max_new_tokens", given.get("max_length", 0) - 4)


def test_a_length_that_is_no_int_and_a_default_beyond_the_table() -> None:
    model = gpt2().to(DEVICE)
    model.generation_config.eos_token_id = None
    thens = [Generate(text(4, 0), max_new_tokens=2.5), Generate(text(60, 0), pad_token_id=0)]
    wrong, short = batch_of(model, 1).map([QUERY._replace(then=then) for then in thens])
    assert str(wrong.error) == "max_new_tokens: expected an int, got float (2.5)"
    assert short.error is None
    assert len(short.value) == 5


def test_another_thread_in_a_pass_is_told() -> None:
    """Its numbers would be those of slots: layers are replaced for all threads."""
    model = llama().to(DEVICE)
    batch = batch_of(model, 2)
    found: list[BaseException] = []

    def other() -> None:
        try:
            with torch.no_grad():
                model(text(5, 0)[None].to(DEVICE))
        except RuntimeError as error:
            found.append(error)

    def then(adapted: torch.nn.Module) -> str:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        return "done"

    [answer] = batch.map([QUERY._replace(then=then)])
    assert answer.value == "done"
    assert "expected calls of the thread that runs the batch" in str(found[0])
    other()  # between passes any thread may
    assert len(found) == 1


def test_kept_errors_hold_no_examples() -> None:
    def fails(model: torch.nn.Module) -> None:
        raise ArithmeticError("of then")

    batch = batch_of(llama().to(DEVICE), 1)
    for token, error in ((VOCABULARY + 5, ValueError), (1, ArithmeticError)):
        examples = [torch.full((9,), token) for _ in range(20)]
        alive = [weakref.ref(example) for example in examples]
        answers = [*batch.map([([example], [1], fails) for example in examples])]
        del examples
        gc.collect()
        assert all(isinstance(answer.error, error) for answer in answers)
        assert sum(reference() is not None for reference in alive) <= 1  # of the last query read


def test_a_layer_that_runs_twice_in_a_pass() -> None:
    inner, head = nn.Linear(8, 8), nn.Linear(8, VOCABULARY)
    model = nn.Sequential(nn.Embedding(VOCABULARY, 8), inner, inner, head)
    with pytest.raises(RuntimeError, match=r"1: expected one call .*`target` can leave the layer"):
        list(batch_of(model.to(DEVICE), 1, capture=False).map([QUERY]))
    assert [a.error for a in batch_of(model, 1, target=["3"]).map([QUERY])] == [None]


def test_an_input_by_its_name() -> None:
    class Named(torch.nn.Module):
        def __init__(self, named: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embedding = torch.nn.Embedding(VOCABULARY, 8)
            self.inner, self.head = torch.nn.Linear(8, 8), torch.nn.Linear(8, VOCABULARY)
            self.named = named

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.embedding(ids)
            x = self.inner(input=x) if self.named else self.inner(x)
            out: torch.Tensor = self.head(x)
            return out

    found = [
        batch_of(Named(named).to(DEVICE), 1, target=["inner"], capture=False).adapt_([QUERY])[0]
        for named in (False, True)
    ]
    assert found[1].error is None
    assert found[0].losses == found[1].losses


@pytest.mark.parametrize("interval", [2, 1 << 40])
def test_a_long_refresh_interval_costs_nothing(interval: int) -> None:
    """One pass an example is naturally written as a huge interval."""
    batch = batch_of(llama().to(DEVICE), 2, refresh_interval=interval)
    [answer] = batch.map([QUERY._replace(counts=[3])])
    assert answer.error is None
    assert len(answer.losses) == (2 if interval == 2 else 1)


def test_a_tuple_that_is_too_short_is_told_its_length() -> None:
    [answer] = batch_of(llama().to(DEVICE), 1).map([([text(9, 0)],)])
    assert str(answer.error).endswith("(examples, counts, then), got tuple of 1")


@pytest.mark.parametrize("number", [0, 1, 5])
def test_an_error_of_the_iterable_comes_after_the_answers_before_it(number: int) -> None:
    def failing() -> Iterator[hullkit.Query]:
        yield from [QUERY] * number
        raise OSError("disk")

    batch = batch_of(llama().to(DEVICE), 3, **TOGETHER)
    answers: list[hullkit.Answer] = []
    with pytest.raises(OSError, match="disk"):
        answers.extend(batch.map(failing()))
    assert [(a.place, a.error) for a in answers] == [(i, None) for i in range(number)]
    assert [a.error for a in batch.map([QUERY])] == [None]


def test_slots_are_fresh_after_a_sequence_that_raises() -> None:
    class Failing(list[hullkit.Query]):
        def __iter__(self) -> Iterator[hullkit.Query]:
            yield QUERY
            raise OSError("disk")

    batch = batch_of(llama().to(DEVICE), 2, **TOGETHER)
    with pytest.raises(OSError, match="disk"):
        batch.adapt_(Failing([QUERY, QUERY]))
    assert all(is_fresh(batch, slot) for slot in range(2))


def test_answers_that_are_ready_do_not_wait_for_the_next_query() -> None:
    answers: list[hullkit.Answer] = []

    def live() -> Iterator[hullkit.Query]:
        yield QUERY
        yield QUERY
        assert [a.place for a in answers] == [0, 1]
        yield QUERY

    for answer in batch_of(llama().to(DEVICE), 2, **TOGETHER).map(live()):
        answers.append(answer)
    assert [a.error for a in answers] == [None] * 3


def replaced(model: Any) -> None:
    model.model.layers[0].mlp = deepcopy(model.model.layers[0].mlp)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (replaced, r"mlp\.gate_proj: expected the layer of which the batch was made, got another"),
        (lambda model: model.half(), "expected a weight as when the batch was made, torch.float32"),
        (lambda model: model.to("meta"), "got torch.float32 on meta"),
    ],
)
def test_a_model_that_is_another_by_now_is_refused(
    change: Callable[[Any], Any], words: str
) -> None:
    model = llama().to(DEVICE)
    batch = batch_of(model, 1)
    batch.adapt_([QUERY])
    ids = text(5, 0)[None].to(DEVICE)
    batch(ids)
    change(model)
    uses: list[Callable[[], Any]] = [
        lambda: batch(ids),
        lambda: batch.generate(ids, max_new_tokens=1),
        lambda: batch.adapt_([QUERY]),
        lambda: batch.slot(0).__enter__(),
    ]
    for use in uses:
        with pytest.raises(RuntimeError, match=words):
            use()


@pytest.mark.parametrize("what", ["model", "layer", "forward"])
def test_compiled_models_are_refused(what: str) -> None:
    model: Any = llama()
    if what == "model":
        model = torch.compile(model, backend="eager")
    elif what == "layer":
        model.model.layers[0].compile(backend="eager")
    else:
        model.forward = torch.compile(model.forward, backend="eager")
    with pytest.raises(ValueError, match=r"model: expected one that torch\.compile has not"):
        batch_of(model, 1)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"target": ["lm_head"]}, "layers within the model, got the output head, 'lm_head'"),
     ({"target": "q_proj"}, "'all-linear' or a list of names, got the str 'q_proj'"),
     ({"alpha": -3}, "alpha: expected a finite number > 0, got -3")],
)  # fmt: skip
def test_construction_says_what_it_wants(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        batch_of(llama(), 1, **options)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("kind", "told"), [("PromptTuningConfig", "PROMPT_TUNING"), ("PromptEncoderConfig", "P_TUNING")]
)
def test_a_learned_prompt_before_the_tokens(kind: str, told: str) -> None:
    peft = pytest.importorskip("peft", reason="an extra is not installed")
    config = getattr(peft, kind)(num_virtual_tokens=3, task_type="CAUSAL_LM")
    model = peft.get_peft_model(llama(), config)
    with pytest.raises(ValueError, match=rf"model: expected one without .*got PEFT's {told}"):
        batch_of(model, 1)
    config = peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    model = peft.get_peft_model(llama(), config).to(DEVICE)
    assert [a.error for a in batch_of(model, 2).map([QUERY] * 2)] == [None, None]


def test_a_slot_whose_block_is_open_stays() -> None:
    batch = batch_of(llama().to(DEVICE), 1)
    batch.adapt_([QUERY])
    ids = text(5, 0).to(DEVICE)[None]
    with batch.slot(0) as model:
        before = model(ids).logits
        for call in (lambda: batch.adapt_([QUERY]), lambda: list(batch.map([QUERY]))):
            with pytest.raises(RuntimeError, match="a `slot` block of a batch is open"):
                call()
        assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_loss_of_the_models_own_is_told(dtype: torch.dtype) -> None:
    """Slots learn by another one. It is told once, and draws no random numbers of the caller's."""
    model: Any = llama().to(DEVICE, dtype)
    own = model.loss_function

    def with_more(*args: Any, **options: Any) -> Any:  # an auxiliary loss is no larger
        return own(*args, **options) + 2e-3

    for loss, told in ((own, 0), (with_more, 1)):
        model.loss_function = loss
        batch = batch_of(model, 1)
        state = torch.get_rng_state()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            answers = [*batch.map([QUERY]), *batch.map([QUERY])]
        assert [answer.error for answer in answers] == [None, None]
        assert sum("slots learn by the mean next-token" in str(w.message) for w in caught) == told
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_model_that_sees_later_tokens(precision: str) -> None:
    """Its own loss tells, as it tells a tuner: such a model would learn to copy."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    config = BertConfig(vocab_size=VOCABULARY, num_hidden_layers=2, **sizes)
    batch = batch_of(BertForMaskedLM(config).to(DEVICE), 2, precision=precision)
    for _ in range(2):
        with pytest.raises(ValueError, match="a causal language model, got BertForMaskedLM"):
            list(batch.map([QUERY]))
