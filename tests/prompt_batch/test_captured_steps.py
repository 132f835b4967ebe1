# SPDX-License-Identifier: Apache-2.0
"""Steps of `generate` that are recorded: the same tokens, and few calls of the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hullkit
import pytest
import torch
from _models import VOCABULARY, gpt2, llama
from _prompts import DEVICE, TOGETHER, batch_of, text
from hullkit.prompt_batch import Generate
from hullkit.prompt_batch.captured_steps import CapturedSteps
from torch import Tensor, nn

pytestmark = [pytest.mark.usefixtures("one_thread")]
gpu = pytest.mark.skipif(DEVICE.type != "cuda", reason="graphs are CUDA's")
if DEVICE.type == "cuda":
    pytestmark += [pytest.mark.gpu]

MOST = 20
GREEDY: dict[str, Any] = {"max_new_tokens": MOST, "min_new_tokens": MOST, "do_sample": False}


def ids(rows: int) -> Tensor:
    return torch.stack([text(8, 500 + row) for row in range(rows)]).to(DEVICE)


def adapted(model: nn.Module, rows: int, **options: Any) -> hullkit.PromptBatch:
    batch = batch_of(model.to(DEVICE), rows, **options)
    queries = [([text(12, seed)], [3]) for seed in range(rows)]
    assert all(answer.error is None for answer in batch.adapt_(queries))
    return batch


def eager(batch: hullkit.PromptBatch, make: Callable[[], Tensor]) -> Tensor:
    steps = batch._steps
    before, steps.refused = steps.refused, True
    found = make()
    steps.refused = before
    return found


class PythonCalls:
    """How often the Python code of a layer ran. A hook would keep steps from being captured."""

    def __init__(self, layer: nn.Module) -> None:
        self.number = 0
        kind = type(layer)

        def counted(module: Any, *args: Any, **kwargs: Any) -> Any:
            self.number += 1
            return kind.forward(module, *args, **kwargs)

        layer.__class__ = type(kind.__name__, (kind,), {"forward": counted})


def takes_static_caches(model: Any, precision: str) -> bool:
    """Whether transformers' own steps do. Under autocast keys and values have two dtypes, which
    caches of some versions refuse."""
    bf16 = torch.autocast(DEVICE.type, torch.bfloat16, enabled=precision == "bf16")
    static = {"cache_implementation": "static", "disable_compile": True}
    try:
        with bf16:
            model.generate(ids(1), **GREEDY | static)
    except RuntimeError:
        return False
    return True


@gpu
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("precision", ["float32", "tf32", "bf16"])
@pytest.mark.parametrize("options", [{}, {"do_sample": True, "top_k": 9, "temperature": 2.0}])
def test_tokens_are_the_same(rows: int, precision: str, options: dict[str, Any]) -> None:
    model = llama()
    captured = takes_static_caches(llama().to(DEVICE), precision)
    assert captured or precision == "bf16"
    batch = adapted(model, rows, precision=precision)
    calls = PythonCalls(model.model.layers[0])

    def run() -> Tensor:
        torch.manual_seed(7)
        return batch.generate(ids(rows), **GREEDY | options)

    eager(batch, run)  # the first looks at the model, too
    calls.number = 0
    wanted = eager(batch, run)
    assert wanted.shape == (rows, 8 + MOST)
    assert calls.number == MOST
    for _ in range(2):
        calls.number = 0
        assert torch.equal(run(), wanted)
        # Of captured steps: the prompt, three steps, and one of these recorded.
        assert calls.number == 5 or not captured
    assert batch._steps.refused == (not captured)
    left = vars(model)
    assert "forward" not in left
    assert "_previous_max_cache_length" not in left


@gpu
def test_what_transformers_keeps_on_a_model_stays() -> None:
    batch = adapted(llama(), 2)
    model: Any = batch.model
    model._previous_max_cache_length = 44
    batch.generate(ids(2), **GREEDY)
    assert model._previous_max_cache_length == 44


@gpu
def test_queries_of_a_stream() -> None:
    """Alone and together; passes before and after share the graphs' memory."""
    for settings in (TOGETHER, {}):
        for make in (llama, gpt2):
            model: Any = make()
            batch = batch_of(model.to(DEVICE), 4, **settings)
            queries = [
                ([text(12, seed)], [3], Generate(text(4 + seed, 90 + seed), **GREEDY))
                for seed in range(8)
            ]

            def run(batch: Any = batch, queries: Any = queries) -> Tensor:
                answers = [*batch.map(queries)]
                assert all(answer.error is None for answer in answers)
                return torch.stack([answer.value for answer in answers])

            calls = PythonCalls(model.transformer.h[0] if make is gpt2 else model.model.layers[0])
            wanted = eager(batch, run)
            before, calls.number = calls.number, 0
            assert torch.equal(run(), wanted)
            assert torch.equal(run(), wanted)
            assert not batch._steps.refused
            # Two calls of four rows each, or eight of one.
            assert before - calls.number // 2 >= (2 if settings else 8) * (MOST - 6)


@gpu
@pytest.mark.parametrize(
    "options",
    [{"max_new_tokens": 6, "min_new_tokens": 6}, {"num_beams": 2}, {"use_cache": False},
     {"cache_implementation": None}, {"return_dict_in_generate": False},
     {"output_scores": True, "return_dict_in_generate": True}],
)  # fmt: skip
def test_which_options_are_captured(options: dict[str, Any]) -> None:
    model = llama()
    batch = adapted(model, 2)
    eager(batch, lambda: batch.generate(ids(2), **GREEDY))
    calls = PythonCalls(model.model.layers[0])
    out = batch.generate(ids(2), **GREEDY | options)
    off = all(value is None or value is False for value in options.values())
    assert (calls.number == 5) == (off and "use_cache" not in options)
    if options.get("output_scores"):
        assert len(out.scores) == MOST  # type: ignore[attr-defined]


@gpu
def test_a_step_that_depends_on_more_than_tensors_is_not_replayed() -> None:
    model: Any = llama()
    forward = type(model).forward

    def moved(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = forward(self, *args, **kwargs)
        out.logits[..., self.favourite] += 100.0
        return out

    model.__class__ = type("Moved", (type(model),), {"forward": moved})
    model.favourite = 3  # past the tokens that end a row
    batch = adapted(model, 2)

    def next_one(found: Tensor, scores: Any, **_: Any) -> Tensor:
        model.favourite += 1
        return torch.zeros(len(found), dtype=torch.bool, device=found.device)

    out = batch.generate(ids(2), stopping_criteria=[next_one], **GREEDY)
    assert out[:, 8:].tolist() == [[*range(3, 3 + MOST)]] * 2
    assert batch._steps.refused


@gpu
@pytest.mark.parametrize(
    ("error", "refused"),
    [
        (torch.OutOfMemoryError, False),
        (ValueError, True),
        (TimeoutError, None),
        (KeyboardInterrupt, None),
    ],
)
def test_a_step_that_is_not_recorded(error: type[BaseException], refused: bool | None) -> None:
    batch = adapted(llama(), 2)
    wanted = eager(batch, lambda: batch.generate(ids(2), **GREEDY))
    memory: Any = batch._steps.memory
    record = memory.record

    def failing(*_: Any) -> None:
        raise error("no more")

    memory.record = failing
    if refused is None:  # a signal's
        with pytest.raises(error, match="no more"):
            batch.generate(ids(2), **GREEDY)
    else:
        assert torch.equal(batch.generate(ids(2), **GREEDY), wanted)
        assert batch._steps.refused is refused
    memory.record = record
    assert (batch._steps.too_many is not None) == (error is torch.OutOfMemoryError)
    assert "forward" not in vars(batch.model)
    assert torch.equal(batch.generate(ids(2), **GREEDY), wanted)


@gpu
@pytest.mark.parametrize("sampled", [False, True])
def test_a_step_that_asks_the_device_is_not_captured(sampled: bool) -> None:
    """Random numbers can be drawn afterwards."""

    def asking() -> Any:
        model: Any = llama()
        forward = type(model).forward

        def asked(self: Any, *args: Any, **kwargs: Any) -> Any:
            out = forward(self, *args, **kwargs)
            out.logits[..., 5] += float(out.logits.detach()[0, -1, 3].item() > 1e9)
            return out

        model.__class__ = type("Asking", (type(model),), {"forward": asked})
        return model

    # Its passes cannot be captured either.
    with pytest.warns(UserWarning, match="passes run eagerly"):
        batch = adapted(asking(), 2)

    def run() -> Tensor:
        torch.manual_seed(7)
        return batch.generate(ids(2), **GREEDY | {"do_sample": sampled})

    wanted = eager(batch, run)
    for _ in range(2):
        assert torch.equal(run(), wanted)
    assert batch._steps.refused
    assert torch.rand(3, device=DEVICE).shape == (3,)


@gpu
def test_an_output_that_somebody_keeps() -> None:
    """As the traceback of an error does."""
    batch = adapted(llama(), 2, capture=None)
    batch.release()
    kept: list[Any] = []
    record = batch._steps.memory.record  # type: ignore[union-attr]

    def keeping(held: int, body: Callable[[], None]) -> Any:
        graph = record(held, body)
        kept.append(body.__closure__)
        return graph

    batch._steps.memory.record = keeping  # type: ignore[union-attr]
    wanted = eager(batch, lambda: batch.generate(ids(2), **GREEDY))
    for _ in range(3):
        assert torch.equal(batch.generate(ids(2), **GREEDY), wanted)
    assert len(kept) == 3
    assert not batch._steps.refused


@gpu
def test_a_model_that_takes_no_static_cache_goes_on_without() -> None:
    model: Any = llama()
    forward = type(model).forward

    def picky(self: Any, *args: Any, **kwargs: Any) -> Any:
        if any(type(value).__name__ == "StaticCache" for value in kwargs.values()):
            raise NotImplementedError("no such cache")
        return forward(self, *args, **kwargs)

    wanted = adapted(llama(), 2).generate(ids(2), **GREEDY)
    model.__class__ = type("Picky", (type(model),), {"forward": picky})
    batch = adapted(model, 2)
    assert torch.equal(batch.generate(ids(2), **GREEDY), wanted)
    assert batch._steps.refused


@gpu
@pytest.mark.parametrize("where", ["model", "layer", "forward"])
def test_what_a_replay_would_not_run_is_not_captured(where: str) -> None:
    model = llama()
    batch = adapted(model, 2)
    wanted = eager(batch, lambda: batch.generate(ids(2), **GREEDY))
    seen: list[int] = []

    def note(*_: Any) -> None:
        seen.append(1)

    norm: Any = model.model.norm
    if where == "forward":
        plain = norm.forward
        norm.forward = lambda x: (note(), plain(x))[1]
    else:
        (model if where == "model" else norm).register_forward_hook(note)
    assert torch.equal(batch.generate(ids(2), **GREEDY), wanted)
    assert len(seen) == MOST


@gpu
def test_a_prompt_of_one_token() -> None:
    batch = adapted(llama(), 2)
    wanted = eager(batch, lambda: batch.generate(ids(2)[:, :1], **GREEDY))
    assert torch.equal(batch.generate(ids(2)[:, :1], **GREEDY), wanted)
    assert not batch._steps.refused


@gpu
def test_an_error_of_the_callers_comes_once() -> None:
    batch = adapted(llama(), 2)
    calls: list[int] = []

    def spent(found: Tensor, scores: Any, **_: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 9:
            raise RuntimeError("all spent")
        return torch.zeros(len(found), dtype=torch.bool, device=found.device)

    with pytest.raises(RuntimeError, match="all spent"):
        batch.generate(ids(2), stopping_criteria=[spent], **GREEDY)
    assert len(calls) == 9
    assert not batch._steps.refused


@gpu
def test_a_cache_for_which_there_is_no_memory() -> None:
    batch = adapted(llama(), 2)
    wanted = eager(batch, lambda: batch.generate(ids(2), **GREEDY))
    model: Any = batch.model
    forward, tried = type(model).forward, []

    def lacking(self: Any, *args: Any, **kwargs: Any) -> Any:
        if any(type(value).__name__ == "StaticCache" for value in kwargs.values()):
            tried.append(1)
            raise torch.OutOfMemoryError("no more")
        return forward(self, *args, **kwargs)

    model.__class__ = type("Lacking", (type(model),), {"forward": lacking})
    for _ in range(2):
        assert torch.equal(batch.generate(ids(2), **GREEDY), wanted)
    assert len(tried) == 1
    assert not batch._steps.refused
    assert batch.generate(ids(2)[:, :1], **GREEDY).shape == (2, 1 + MOST)
    assert len(tried) == 2  # fewer positions


@gpu
@pytest.mark.parametrize("call", [4, 5])
def test_memory_that_runs_out_beside_a_recorded_step(call: int) -> None:
    """The step goes on without the graph, and later calls without captures of such a size."""
    batch = adapted(llama(), 2)
    wanted = eager(batch, lambda: batch.generate(ids(2), **GREEDY))
    model: Any = batch.model
    forward, calls = type(model).forward, []

    def lacking(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = forward(self, *args, **kwargs)  # the cache has counted the token
        calls.append(torch.cuda.is_current_stream_capturing())
        if len(calls) == call:
            raise torch.OutOfMemoryError("no more")
        return out

    model.__class__ = type("Lacking", (type(model),), {"forward": lacking})
    assert torch.equal(batch.generate(ids(2), **GREEDY), wanted)
    assert calls[:call] == [False, False, True, False, False][:call]
    assert batch._steps.too_many is not None
    assert not batch._steps.refused
    assert torch.equal(batch.generate(ids(2), **GREEDY), wanted)
    assert sum(calls) == 1


@gpu
def test_windows_are_not_captured() -> None:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, sliding_window=6,
    )  # fmt: skip
    batch = adapted(MistralForCausalLM(config), 2)
    assert batch._steps.refused
    assert batch.generate(ids(2), **GREEDY).shape == (2, 8 + MOST)


def test_without_captures_there_is_no_other_cache() -> None:
    model = llama()
    batch = adapted(model, 2, capture=False)
    assert batch._steps.refused
    with batch.slot(0):
        assert "forward" not in vars(model)
    assert CapturedSteps(model, [], None).refused
