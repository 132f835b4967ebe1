# SPDX-License-Identifier: Apache-2.0
"""Slots from a memory budget, and passes that are out of memory."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hullkit
import pytest
import torch
from _models import FailingCall, llama
from _prompts import DEVICE, PRECISIONS, ROUNDING, TOGETHER, batch_of, is_fresh, query, text
from hullkit.prompt_batch import Score
from hullkit.prompt_batch.factors import SlotFactors
from hullkit.prompt_batch.memory import PLANNED, budget
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

pytestmark = [pytest.mark.usefixtures("one_thread")]
if DEVICE.type == "cuda":
    pytestmark += [pytest.mark.gpu]


def rows_of_passes(model: nn.Module) -> list[tuple[int, int]]:
    """A list that gets the shape of every pass's ids."""
    shapes: list[tuple[int, int]] = []

    def note(module: nn.Module, ids: Any, options: Any) -> None:
        [tensor] = ids
        shapes.append(tuple(tensor.shape))

    model.register_forward_pre_hook(note, with_kwargs=True)
    return shapes


def bytes_of(slots: int) -> tuple[int, int, int]:
    """Of the factors, and of a pass of one text of 32 tokens, and of 48."""
    batch = batch_of(llama().to(DEVICE), slots, **TOGETHER)
    return batch._factors.num_bytes, batch._passes.held(32), batch._passes.held(48)


def test_a_pass_has_the_slots_that_its_budget_has_room_for() -> None:
    queries = [query(seed) for seed in range(6)]
    wanted = [a.value for a in batch_of(llama().to(DEVICE), 4, **TOGETHER).map(queries)]
    factors, short, long = bytes_of(4)
    assert 1.4 * short < long < 2.3 * short  # attention's scores grow faster than texts
    model = llama().to(DEVICE)
    memory = factors + 5 * long // 2
    batch = batch_of(model, 4, memory=memory, capture=False, **TOGETHER)
    shapes = rows_of_passes(model)
    answers = [*batch.map(queries)]
    assert [a.value for a in answers] == pytest.approx(wanted, rel=ROUNDING)
    passes = [shape for shape in shapes if shape[1] in (32, 48)]
    assert {rows for rows, length in passes if length == 48} == {1, 2}  # 1: what it holds
    assert all(rows * length <= 4 * 32 for rows, length in passes)


def test_a_text_beyond_the_budget_is_an_error_of_its_query() -> None:
    factors, short, _ = bytes_of(2)
    batch = batch_of(llama().to(DEVICE), 2, memory=factors + short, capture=False, **TOGETHER)
    ids = text(20, 0)
    queries = [hullkit.Query([text(n, n)], [2], Score(ids)) for n in (20, 60, 30)]
    first, long, last = batch.map(queries)
    assert isinstance(long.error, MemoryError)
    assert "for a text of 64 tokens" in str(long.error)
    alone = batch_of(llama().to(DEVICE), 1, **TOGETHER).map([queries[0], queries[2]])
    assert [first.value, last.value] == pytest.approx([a.value for a in alone], rel=ROUNDING)


def test_without_memory_a_pass_runs_again_with_fewer_slots() -> None:
    queries = [query(seed) for seed in range(6)]
    queries[4] = queries[4]._replace(examples=[text(64, 1)], counts=[3])
    others = [q for i, q in enumerate(queries) if i != 4]
    wanted = [a.value for a in batch_of(llama().to(DEVICE), 4, **TOGETHER).map(others)]
    model = llama().to(DEVICE)
    batch = batch_of(model, 4, capture=False, **TOGETHER)
    shapes = rows_of_passes(model)

    def fail(module: nn.Module, inputs: Any) -> None:
        [ids] = inputs
        if ids.numel() > 128 or bool(ids[:, 63:].any()):  # only the longest has a token there
            raise torch.OutOfMemoryError("of this test's model")

    model.register_forward_pre_hook(fail)
    answers = [*batch.map(queries)]
    lost = answers.pop(4)
    assert isinstance(lost.error, torch.OutOfMemoryError)
    assert [a.value for a in answers] == pytest.approx(wanted, rel=ROUNDING)
    assert max(rows for rows, _ in shapes) == 4  # it was tried


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
def test_updates_are_not_made_twice_after_a_lack_of_memory(
    error: type[Exception], precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Amid a pass's updates it comes too late for another pass: nobody knows which were made."""
    queries = [query(seed) for seed in range(4)]
    batch = batch_of(llama().to(DEVICE), 2, precision=precision, capture=False)
    wanted = [a.value for a in batch.map(queries)]
    with monkeypatch.context() as patch:
        patch.setattr(*FailingCall(SlotFactors, "update_", error, at=3, late=True).place)
        with pytest.raises(error, match="injected"):
            list(batch.map(queries))
    assert all(is_fresh(batch, slot) for slot in range(2))
    assert [a.value for a in batch.map(queries)] == wanted


@pytest.mark.parametrize("precision", PRECISIONS)
def test_auto_takes_the_slots_that_memory_has_room_for(precision: str) -> None:
    options: dict[str, Any] = {"rank": 4, "precision": precision, "capture": False}

    def slots(memory: float | None) -> int:
        return hullkit.PromptBatch(
            llama().to(DEVICE), slots="auto", memory=memory, **options
        ).slots  # fmt: skip

    one = hullkit.PromptBatch(llama().to(DEVICE), slots=1, **options)
    each, text = one._factors.num_bytes, one._passes.held(64)  # the model's longest
    assert slots(1 << 40) == 64
    # In full float32 one text has a pass, whatever the number of slots is.
    assert slots(9 * each + text if precision == "float32" else 9 * (each + text)) == 8
    assert slots(2 * each + text if precision == "float32" else 2 * (each + text)) == 2
    assert slots(each + text // 2) == 1  # a text may be shorter than what was planned
    assert slots(0.5) in {1 << i for i in range(7)}
    with pytest.raises(ValueError, match="memory: expected more than"):
        slots(100)
    with pytest.raises(ValueError, match="memory: expected bytes, or a fraction"):
        slots(1.5)
    with pytest.raises(ValueError, match="memory"):
        slots(0)


class Tables(nn.Module):
    """It has no embedding that would bound its texts."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner, self.head = (nn.Linear(8, 8, bias=False) for _ in range(3))

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.head(self.inner(self.table.weight[ids]))
        return out


def test_auto_plans_for_texts_of_a_model_that_tells_no_longest() -> None:
    def batch(slots: int | str, memory: float | None = None) -> hullkit.PromptBatch:
        options: dict[str, Any] = {"target": ["inner", "head"], "rank": 1}
        return hullkit.PromptBatch(Tables().to(DEVICE), slots=slots, memory=memory, **options)

    one = batch(1)
    each, text = one._factors.num_bytes, one._passes.held(PLANNED) * one._passes.shares
    assert text > 4 * each
    shared = each // 2 * (one._passes.shares - 1)
    assert batch("auto", 2 * each + text + shared).slots == 2
    assert batch("auto").slots in {1 << i for i in range(7)}


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="another system")
def test_memory_is_a_part_of_what_the_system_has_free() -> None:
    found = re.search(r"MemFree: +(\d+) kB", Path("/proc/meminfo").read_text())
    assert found is not None
    free = 1024 * int(found[1])
    cpu = torch.device("cpu")
    assert free / 16 < budget(None, cpu) < 16 * free  # others take and give
    assert budget(0.001, cpu) < budget(None, cpu) / 100


@pytest.fixture
def little_memory() -> Iterator[None]:
    """384 MiB more than are taken."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(
        (torch.cuda.memory_reserved() + (384 << 20)) / total, 0
    )
    yield
    torch.cuda.set_per_process_memory_fraction(1.0, 0)


@pytest.mark.gpu
@pytest.mark.plain_memory
@pytest.mark.parametrize("capture", [False, True])
def test_a_device_without_memory_for_all_slots(capture: bool, little_memory: None) -> None:
    config = LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=1024, num_hidden_layers=8,
        num_attention_heads=4, max_position_embeddings=4096,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).cuda()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(512, (16, 512), generator=generator)
    queries = [hullkit.Query([row, row[:40]], [2, 1], Score(row[:100])) for row in ids]
    queries[5] = hullkit.Query([ids.flatten().repeat(16)], [1])  # too long for the device
    batch = hullkit.PromptBatch(model, slots=16, rank=4, capture=capture, **TOGETHER)
    answers = [*batch.map(queries)]
    assert isinstance(answers.pop(5).error, torch.OutOfMemoryError)
    del queries[5]
    assert [answer.error for answer in answers] == [None] * len(answers)
    batch.release()
    alone = hullkit.PromptBatch(model, slots=1, rank=4, capture=False, **TOGETHER).map(queries)
    assert [a.value for a in answers] == pytest.approx([a.value for a in alone], rel=ROUNDING)
