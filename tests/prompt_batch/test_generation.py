# SPDX-License-Identifier: Apache-2.0
"""`Generate` of slots that have learned: greedily in one call, else alone, with the same tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hullkit
import pytest
import torch
from _models import VOCABULARY, gpt2, llama
from _prompts import DEVICE, TOGETHER, batch_of, text
from hullkit.prompt_batch import Generate
from hullkit.prompt_batch.generation import neighbouring
from torch import Tensor, nn

pytestmark = [pytest.mark.usefixtures("one_thread")]
if DEVICE.type == "cuda":
    pytestmark += [pytest.mark.gpu]

END = 5
PLAIN: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}


class Calls(list[int]):
    """The rows of each call of a model's `generate`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        generate: Any = model.generate

        def noted(ids: Tensor, **options: Any) -> Any:
            if not options.get("return_dict_in_generate"):  # no trial
                self.append(len(ids))
            return generate(ids, **options)

        model.generate = noted


def query(seed: int, count: int = 3, prompt: int = 4, **options: Any) -> hullkit.Query:
    then = Generate(text(prompt, 1000 + seed), **PLAIN | options)
    return hullkit.Query([text(12, seed)], [count], then)


def values(answers: list[hullkit.Answer]) -> list[list[int]]:
    for answer in answers:
        if answer.error is not None:
            raise answer.error
    return [answer.value.tolist() for answer in answers]


def alone(queries: list[hullkit.Query], make: Callable[[], nn.Module] = llama) -> list[list[int]]:
    return values([*batch_of(make().to(DEVICE), 1, **TOGETHER).map(queries)])


def rows_of_calls(
    queries: list[hullkit.Query], slots: int, make: Callable[[], nn.Module] = llama
) -> list[int]:
    """Of each call of `generate` that gives the tokens which queries have alone."""
    wanted = alone(queries, make)
    model = make().to(DEVICE)
    batch = batch_of(model, slots, **TOGETHER)
    calls = Calls(model)
    assert values([*batch.map(queries)]) == wanted
    return calls


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("lengths", [(4, 4, 4, 4), (3, 9, 1, 5)])
def test_slots_that_end_together_are_continued_in_one_call(make: Any, lengths: Any) -> None:
    queries = [query(seed, prompt=length) for seed, length in enumerate(lengths)]
    wanted = alone(queries, make)
    assert len({tuple(tokens) for tokens in wanted}) > 1
    model = make().to(DEVICE)
    batch = batch_of(model, 4, **TOGETHER)
    calls = Calls(model)
    assert values([*batch.map(queries)]) == wanted
    assert calls == [4]
    assert values(batch.adapt_(queries)) == wanted
    assert calls == [4, 4]


def test_slots_wait_for_others_until_enough_do_or_nobody_learns() -> None:
    queries = [query(seed, count=1 if seed in (0, 3) else 5) for seed in range(8)]
    queries[6] = queries[6]._replace(counts=[9])
    # 0 and 3 wait for the others. Then all from 0 to 7 but 6, whose row is idle, and 6 alone.
    assert rows_of_calls(queries, 8) == [8, 1]


def test_answers_end_with_their_own_end() -> None:
    """Rows that end early get padding, which is nobody's."""
    queries = [query(seed, max_new_tokens=20) for seed in range(6)]
    unended = alone(queries)
    end = unended[0][3]  # at least one ends early
    queries = [
        query(seed, max_new_tokens=20, eos_token_id=[end, VOCABULARY - 1]) for seed in range(6)
    ]
    wanted = alone(queries)
    assert len({len(tokens) for tokens in wanted}) > 1
    model = llama().to(DEVICE)
    batch = batch_of(model, 6, **TOGETHER)
    calls = Calls(model)
    assert values([*batch.map(queries)]) == wanted
    assert calls == [6]


def test_a_row_between_two_that_end_does_not_go_on() -> None:
    """That of a slot that still learns."""
    free = {"max_new_tokens": 20}
    ends = [tokens[1] for tokens in alone([query(0, count=1, **free), query(2, count=1, **free)])]
    own = {"eos_token_id": ends} | free
    queries = [query(0, count=1, **own), query(4, count=9, **free), query(2, count=1, **own)]
    wanted = alone(queries)
    assert len(wanted[1]) == 20
    model = llama().to(DEVICE)
    batch = batch_of(model, 3, **TOGETHER)
    calls = Calls(model)
    rows: list[int] = []

    def note(module: nn.Module, ids: Any, options: Any) -> None:
        rows.extend([len(options["input_ids"])] if "input_ids" in options else [])

    model.register_forward_pre_hook(note, with_kwargs=True)
    assert values([*batch.map(queries)]) == wanted
    assert calls == [3, 1]
    assert rows.count(3) <= 4


@pytest.mark.parametrize(
    "options",
    [{"do_sample": True}, {"num_beams": 2}, {"repetition_penalty": 1.5},
     {"max_new_tokens": None, "max_length": 9}, {"logits_processor": []}, {"eos_token_id": None},
     {"eos_token_id": torch.tensor(3)}, {"do_sample": None}],
)  # fmt: skip
def test_other_options_are_called_alone(options: dict[str, Any]) -> None:
    queries = [query(seed, **options) for seed in range(3)]
    for of in queries:
        assert isinstance(of.then, Generate)
        if of.then.options["max_new_tokens"] is None:
            del of.then.options["max_new_tokens"]
    wanted = alone(queries)
    model = llama().to(DEVICE)
    batch = batch_of(model, 3, **TOGETHER)
    calls = Calls(model)
    found = values([*batch.map(queries)])
    assert found == wanted or options.get("do_sample")
    assert calls == [1, 1, 1]


def test_what_shares_no_passes_and_settings_of_the_model_are_alone() -> None:
    queries = [query(seed) for seed in range(2)]
    off = {"repetition_penalty": 1.0, "num_beams": 1}
    for settings, precision, wanted in (
        ({}, "float32", [1, 1]),
        ({"repetition_penalty": 1.5}, "tf32", [1, 1]),
        (off, "tf32", [2]),
    ):
        model = llama().to(DEVICE)
        model.generation_config.update(**settings)
        batch = batch_of(model, 2, precision=precision)
        calls = Calls(model)
        values([*batch.map(queries)])
        assert calls == wanted


def test_an_option_switches_a_setting_of_the_model_off() -> None:
    queries = [query(seed, repetition_penalty=1.0) for seed in range(2)]

    def penalising() -> Any:
        model = llama()
        model.generation_config.update(repetition_penalty=1.5, do_sample=True, temperature=0.6)
        return model

    wanted = alone(queries, penalising)
    assert wanted == alone([query(seed) for seed in range(2)])
    model = penalising().to(DEVICE)
    batch = batch_of(model, 2, **TOGETHER)
    calls = Calls(model)
    assert values([*batch.map(queries)]) == wanted
    assert calls == [2]


def test_settings_of_the_model_hold_together_too() -> None:
    def with_fewest() -> Any:
        model = llama()
        model.generation_config.update(min_new_tokens=8)
        return model

    end = [tokens[1] for tokens in alone([query(seed, max_new_tokens=12) for seed in range(4)])]
    queries = [query(seed, max_new_tokens=12, eos_token_id=end) for seed in range(4)]
    assert rows_of_calls(queries, 4, with_fewest) == [4]
    assert min(map(len, alone(queries))) < 8 <= min(map(len, alone(queries, with_fewest)))


def test_the_token_0_is_not_a_setting_that_is_off() -> None:
    def forced() -> Any:
        model = llama()
        model.generation_config.update(forced_bos_token_id=0)
        return model

    queries = [query(seed, prompt=length) for seed, length in enumerate((1, 4))]
    assert rows_of_calls(queries, 2, forced) == [1, 1]


def test_an_output_that_is_no_tensor() -> None:
    queries = [query(seed, return_dict_in_generate=True) for seed in range(2)]
    assert alone(queries) == alone([query(seed) for seed in range(2)])


def test_an_option_that_cannot_be_compared_is_its_queries() -> None:
    queries = [query(seed) for seed in range(3)]
    queries[1] = query(1, num_beams=[])
    answers = [*batch_of(llama().to(DEVICE), 3, **TOGETHER).map(queries)]
    assert answers[1].error is not None
    assert values([answers[0], answers[2]]) == alone([queries[0], queries[2]])


def test_options_that_differ_are_continued_apart() -> None:
    queries = [query(seed, max_new_tokens=6 + seed % 2) for seed in range(4)]
    assert rows_of_calls(queries, 4) == [3, 3]


def blind() -> nn.Module:
    model = llama()
    forward = type(model).forward

    def without_mask(self: Any, input_ids: Tensor, **options: Any) -> Any:
        options.pop("attention_mask", None)
        options.pop("position_ids", None)
        return forward(self, input_ids, **options)

    model.__class__ = type("Blind", (type(model),), {"forward": without_mask})
    return model


def test_a_model_that_sees_padding_continues_prompts_of_one_length_together() -> None:
    for lengths, wanted_calls in (((3, 9), [1, 1]), ((4, 4), [2])):
        queries = [query(seed, prompt=length) for seed, length in enumerate(lengths)]
        assert rows_of_calls(queries, 2, blind) == wanted_calls


def test_what_one_padding_showed_does_not_hold_for_more() -> None:
    """Beyond 20 tokens the model sees padding. The trial is of the call's own padding."""

    def far() -> nn.Module:
        model = llama()
        forward = type(model).forward

        def cut(self: Any, input_ids: Tensor, **options: Any) -> Any:
            if input_ids.shape[1] > 20:
                options = {
                    k: v for k, v in options.items() if k not in ("attention_mask", "position_ids")
                }
            return forward(self, input_ids, **options)

        model.__class__ = type("Far", (type(model),), {"forward": cut})
        return model

    for lengths, wanted_calls in (((3, 9), [2]), ((3, 30), [1, 1]), ((3, 9, 25, 30), [2, 1, 1])):
        queries = [query(seed, prompt=length) for seed, length in enumerate(lengths)]
        assert rows_of_calls(queries, 2, far) == wanted_calls


def test_a_constant_in_all_logits_hides_no_padding() -> None:
    def shifted() -> nn.Module:
        model: Any = blind()
        model.lm_head = nn.Linear(model.config.hidden_size, VOCABULARY)
        with torch.no_grad():
            model.lm_head.bias.fill_(100.0)
        return model

    queries = [query(seed, prompt=length) for seed, length in enumerate((3, 9))]
    assert rows_of_calls(queries, 2, shifted) == [1, 1]


def test_one_length_is_together_where_others_are_not() -> None:
    lengths = (4, 9, 4, 9)
    queries = [query(seed, prompt=length) for seed, length in enumerate(lengths)] * 2
    assert rows_of_calls(queries, 4, blind) == [1, 1, 1, 1, 3, 3]  # once it is known


def test_rows_that_have_ended_do_not_pass_the_positions() -> None:
    """The model has 64. The long prompt ends at once, and the short one goes on."""
    make = gpt2
    long, short = query(0, prompt=58, max_new_tokens=20), query(1, prompt=4, max_new_tokens=20)
    [[end, *_]] = alone([query(0, prompt=58, max_new_tokens=2)], make)
    queries = [q._replace(then=Generate(q.then.ids, **q.then.options, eos_token_id=end))  # type: ignore[union-attr]
               for q in (long, short)]  # fmt: skip
    wanted = alone(queries, make)
    assert wanted[0] == [end]
    model = make().to(DEVICE)
    batch = batch_of(model, 2, **TOGETHER)
    calls = Calls(model)
    assert values([*batch.map(queries)]) == wanted
    assert calls == [1, 1]  # on a GPU one of both would end the process


def test_a_first_query_that_diverged_tells_nothing_of_padding() -> None:
    queries = [query(seed, prompt=3 + seed) for seed in range(8)]
    queries[0] = queries[0]._replace(lr=1e38)
    wanted = alone(queries[1:])
    model = llama().to(DEVICE)
    batch = batch_of(model, 4, **TOGETHER)
    calls = Calls(model)
    answers = [*batch.map(queries)]
    assert type(answers[0].error) is FloatingPointError
    assert values(answers[1:]) == wanted
    assert calls[-1] == 4


@pytest.mark.parametrize("error", [TimeoutError, AssertionError])
def test_another_error_of_a_call_is_that_of_its_queries(error: type[Exception]) -> None:
    queries = [query(seed) for seed in range(4)]
    model = llama().to(DEVICE)
    generate: Any = model.generate
    raised: list[int] = []

    def failing(ids: Tensor, **options: Any) -> Any:
        if len(ids) == 2 and not raised:
            raised.append(1)
            raise error("from a handler")
        return generate(ids, **options)

    model.generate = failing
    answers = [*batch_of(model, 2, **TOGETHER).map(queries)]
    assert [type(a.error) for a in answers[:2]] == [error, error]
    assert values(answers[2:]) == alone(queries[2:])


def test_calls_have_fewer_rows_once_memory_ran_out() -> None:
    queries = [query(seed) for seed in range(16)]
    wanted = alone(queries)
    model = llama().to(DEVICE)
    generate: Any = model.generate
    rows: list[int] = []

    def lacking(ids: Tensor, **options: Any) -> Any:
        rows.extend([] if options.get("return_dict_in_generate") else [len(ids)])
        if len(ids) > 2:
            raise torch.OutOfMemoryError("no more")
        return generate(ids, **options)

    model.generate = lacking
    assert values([*batch_of(model, 8, **TOGETHER).map(queries)]) == wanted
    assert rows == [8, 4, 2, 2, 2, 2, 2, 2, 2, 2]


def test_neighbouring_slots() -> None:
    prompts = {slot: text(4, slot) for slot in (0, 1, 3, 9, 10, 30)}
    assert [sorted(part) for part in neighbouring(prompts)] == [[0, 1, 3], [9, 10], [30]]


def test_a_call_that_fails_is_repeated_for_each_alone() -> None:
    """The error is that of the query which causes it."""
    queries = [query(0), query(1, prompt=40, max_new_tokens=6), query(2)]
    wanted = alone([queries[0], queries[2]])
    model = llama().to(DEVICE)
    generate: Any = model.generate

    def failing(ids: Tensor, **options: Any) -> Any:
        if ids.shape[1] >= 40:
            raise torch.OutOfMemoryError("no more")
        return generate(ids, **options)

    model.generate = failing
    answers = [*batch_of(model, 3, **TOGETHER).map(queries)]
    assert type(answers[1].error) is torch.OutOfMemoryError
    assert values([answers[0], answers[2]]) == wanted


@pytest.mark.parametrize("ids", [text(4, 0) + VOCABULARY, text(4, 0).float(), [1, 2]])
def test_bad_prompts_are_their_queries_errors(ids: Any) -> None:
    queries = [query(0), query(1)._replace(then=Generate(ids, **PLAIN)), query(2)]
    wanted = alone([queries[0], queries[2]])
    answers = [*batch_of(llama().to(DEVICE), 3, **TOGETHER).map(queries)]
    assert "ids: expected" in str(answers[1].error)
    assert values([answers[0], answers[2]]) == wanted


def test_a_query_that_has_not_learned_is_an_error_beside_others() -> None:
    queries = [query(0), query(1)._replace(lr=1e38), query(2)]
    wanted = alone([queries[0], queries[2]])
    answers = [*batch_of(llama().to(DEVICE), 3, **TOGETHER).map(queries)]
    assert type(answers[1].error) is FloatingPointError
    assert values([answers[0], answers[2]]) == wanted


def test_a_prompt_that_holds_padding_is_called_alone() -> None:
    """transformers takes its padding out."""
    padding = int(text(4, 1001)[1])
    queries = [query(seed, pad_token_id=padding, eos_token_id=END) for seed in range(5)]
    wanted = alone(queries)
    model = llama().to(DEVICE)
    batch = batch_of(model, 5, **TOGETHER)
    calls = Calls(model)
    assert values([*batch.map(queries)]) == wanted
    held = [bool((text(4, 1000 + seed) == padding).any()) for seed in range(5)]
    assert 1 <= sum(held) <= 3
    assert (calls.count(1), len(calls)) == (sum(held), sum(held) + 1)
