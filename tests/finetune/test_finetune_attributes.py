# SPDX-License-Identifier: Apache-2.0
"""TestTimeFinetuner: what models keep beside parameters and buffers comes back, too."""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from typing import Any, NamedTuple

import pytest
import torch
from _models import VOCABULARY, Before, texts
from hullkit.finetune import TestTimeFinetuner
from hullkit.finetune.snapshot import Attributes
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("one_thread")


class Memory(nn.Module):
    """Its output depends on all that earlier calls have left behind."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.mean = 0.5
        self.name = "fresh"
        self.longest: Tensor | None = None  # grows with the length, in the inputs' dtype
        self.written = torch.zeros(3)
        self.expanded = torch.ones(1).expand(3)
        self.lists = [torch.zeros(2), [torch.zeros(2)], (torch.ones(2), 1)]
        self.numbers: dict[str, Any] = {"sum": 0.0, "seen": set(), "last": deque([1.0], maxlen=2)}
        self.ordered = OrderedDict(first=1.0, second=2.0)
        self.leaf = torch.ones(1, requires_grad=True)
        self.itself = [self.numbers]
        self.numbers["itself"] = self.itself

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.mean = 0.9 * self.mean + 0.1 * float(x.detach().mean())
        self.name += "."
        if self.longest is None or len(self.longest) < x.shape[1]:
            self.longest = torch.arange(x.shape[1]).to(x.dtype) / 100
        self.written += 1
        self.lists[0] = self.lists[0] + 1
        self.lists[1][0].add_(2)
        self.lists[1].append(torch.ones(2))
        self.lists[2][0].mul_(1.1)
        self.numbers["sum"] += self.mean
        self.numbers["seen"].add(self.calls)
        self.numbers["last"].append(self.mean)
        self.numbers[self.name] = 1
        self.ordered.move_to_end("first")
        self.ordered["second"] += 1
        state = self.calls + self.mean + len(self.name) + float(self.written.sum())
        state += float(self.lists[0].sum()) + sum(float(t.sum()) for t in self.lists[1])
        state += float(self.lists[2][0].sum()) + self.numbers["sum"] + len(self.numbers)
        state += len(self.numbers["seen"]) + sum(self.numbers["last"])
        state += next(iter(self.ordered.values())) + len(getattr(self, "lazy", ()))
        self.lazy = [self.calls]
        weights = 1 + self.longest[: x.shape[1]].to(x.dtype) / len(self.longest)
        return x * (1 + state / 100) * weights[:, None] * self.leaf


class WithMemory(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.memory = Memory()
        self.head = nn.Linear(8, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.head(self.memory(self.embedding(ids)))
        return out


def with_memory() -> WithMemory:
    torch.manual_seed(0)
    return WithMemory()


@pytest.mark.parametrize("error", [None, ValueError])
@pytest.mark.parametrize("make_ready", [False, True], ids=["fresh", "used"])
def test_base_behaviour_is_back(error: type[Exception] | None, make_ready: bool) -> None:
    model, same = with_memory(), with_memory()
    ids = texts()[0][None]
    if make_ready:
        model(ids[:, :3]), same(ids[:, :3])
    memory = model.memory
    grad = memory.leaf.grad = torch.full((1,), 0.25)
    inner, head = memory.lists[1], model.head

    def block() -> None:
        with TestTimeFinetuner(model, lr=1e-2).adapted(texts(), [3, 0, 1, 2]):
            model(texts()[3][None])
            memory.written.resize_(7)
            memory.longest = torch.zeros(100, dtype=torch.float64)
            memory.lists = memory.numbers = None  # type: ignore[assignment]
            del memory.mean
            model.head = nn.Linear(8, VOCABULARY)
            model.register_buffer("extra", torch.zeros(1), persistent=False)
            if error is not None:
                raise error

    if error is None:
        block()
    else:
        with pytest.raises(error):
            block()
    assert memory.lists[1] is inner
    assert model.head is head
    assert memory.leaf.grad is grad
    assert grad.item() == 0.25
    assert not hasattr(memory, "extra")
    assert model.state_dict().keys() == same.state_dict().keys()
    for _ in range(2):
        assert torch.equal(model(ids), same(ids))
    assert model.memory.numbers["last"] == same.memory.numbers["last"]
    assert model.memory.numbers["last"].maxlen == 2


def test_each_query_begins_at_the_same_state() -> None:
    model = with_memory()
    tuner = TestTimeFinetuner(model, lr=1e-2)
    scores = []
    for _ in range(3):
        with tuner.adapted(texts(), [2, 1, 1, 2]) as adapted:
            scores.append((tuner.last_report.losses, adapted(texts()[0][None])))  # type: ignore[union-attr]
    for losses, logits in scores[1:]:
        assert losses == scores[0][0]
        assert torch.equal(logits, scores[0][1])


def test_adapt_in_place_keeps_it() -> None:
    model = with_memory()
    TestTimeFinetuner(model, lr=1e-2).adapt_(texts(), [1, 0, 0, 1])
    assert model.memory.calls == 2


def test_what_is_not_the_models_own_stays() -> None:
    """Hooks have handles, `compile` is the user's; other objects are kept, not looked into."""

    class Log:
        lines = 0

    model = with_memory()
    model.memory.log = log = Log()
    model.unused = nn.Identity()
    outputs: list[Tensor] = []
    with TestTimeFinetuner(model, lr=1e-2).adapted(texts(), [1, 0, 0, 1]):
        log.lines += 1
        handle = model.head.register_forward_hook(lambda _, __, out: outputs.append(out))
        model.memory.register_forward_pre_hook(lambda _, inputs: inputs)
        model.unused.compile(backend="eager")
    assert model.memory.log.lines == 1
    assert model.unused._compiled_call_impl is not None
    model(texts()[0][None])
    assert len(outputs) == 1
    handle.remove()
    model(texts()[0][None])
    assert len(outputs) == 1


class Untouchable(Tensor):
    """Whoever asks for its values is told that it has none."""

    @classmethod
    def __torch_dispatch__(cls, function: Any, *_: Any, **__: Any) -> Any:
        raise NotImplementedError(f"no {function}")


def test_tensors_of_all_kinds() -> None:
    """All are attached as before; values come back where a tensor has memory of its own."""
    model = with_memory()
    sparse = torch.eye(2).to_sparse()
    computed = model.head.weight * 2
    with torch.inference_mode():
        inferred = torch.zeros(3)
    freed = torch.zeros(1 << 20)
    freed.untyped_storage().resize_(0)
    wrapper = Untouchable._make_wrapper_subclass(Untouchable, (2,))  # type: ignore[attr-defined]
    model.memory.others = [
        sparse, computed, torch.zeros(2, device="meta"), inferred, freed, wrapper,
    ]  # fmt: skip
    before = list(model.memory.others)
    with TestTimeFinetuner(model, lr=1e-2).adapted(texts(), [1, 0, 0, 1]):
        model.memory.others[:] = []
        with torch.inference_mode():
            inferred += 1
    assert all(map(lambda a, b: a is b, model.memory.others, before))
    assert computed._version == 0
    assert inferred.sum() == 0


def test_a_large_container_of_plain_values_is_one_copy() -> None:
    model = with_memory()
    model.memory.words = {str(i): i for i in range(1000)}
    model.memory.row = list(range(1000))
    attributes = Attributes(list(model.modules()))
    assert len(attributes._containers) + len(attributes._empty) < 20
    model.memory.words["0"] = model.memory.row[0] = -1
    attributes.restore()
    assert model.memory.words["0"] == model.memory.row[0] == 0


@pytest.mark.parametrize("kind", [list, dict, set, deque, OrderedDict, Counter])
def test_an_empty_container_is_emptied(kind: type) -> None:
    model = with_memory()
    model.memory.own, model.memory.inner = container, [inner] = kind(), [kind()]
    attributes = Attributes(list(model.modules()))
    for one in (container, inner):
        _put(one)
    attributes.restore()
    assert model.memory.own is container
    assert len(container) == len(inner) == 0


def _put(container: Any) -> None:
    if isinstance(container, dict):
        container["a"] = 1
    else:
        getattr(container, "add", getattr(container, "append", None))(1)


@pytest.mark.parametrize("names", [("third", "second"), ("second", "first")])
def test_an_ordered_dict_gets_its_names_back(names: tuple[str, str]) -> None:
    """Its values are the same objects in the same order."""
    model = with_memory()
    ordered = model.memory.ordered = OrderedDict(first=1.0, second=1.0)
    attributes = Attributes(list(model.modules()))
    values = [*ordered.values()]
    ordered.clear()
    ordered.update(zip(names, values, strict=True))
    attributes.restore()
    assert [*ordered] == ["first", "second"]


class Pair(NamedTuple):
    numbers: list[int]
    tensor: Tensor


def test_what_a_named_tuple_holds() -> None:
    model = with_memory()
    pair = model.memory.pair = Pair([1], torch.zeros(2))
    with TestTimeFinetuner(model, lr=1e-2).adapted(texts(), [1, 0, 0, 1]):
        pair.numbers.append(2)
        pair.tensor.add_(1)
    assert pair.numbers == [1]
    assert not pair.tensor.any()


def test_counters_and_bytes() -> None:
    model = with_memory()
    memory = model.memory
    memory.counts, memory.bytes = Counter("aab"), bytearray(b"abc")
    memory.inner = [{"counts": Counter(b=1), "bytes": bytearray(4)}]
    kept = memory.counts, memory.bytes, *memory.inner[0].values()
    wanted = [copied.copy() for copied in kept]
    seen = memory.inner[0]["bytes"]
    with TestTimeFinetuner(model, lr=1e-2).adapted(texts(), [1, 0, 0, 1]), memoryview(seen):
        memory.counts.update("bcd")
        memory.bytes.extend(b"more")
        kept[2].clear()
        seen[:] = b"1234"
    assert [*kept] == wanted
    assert list(memory.counts) == ["a", "b"]
    assert memory.counts is kept[0]
    assert memory.bytes is kept[1]


def test_bytes_that_cannot_come_back_are_told_once_all_else_is_back() -> None:
    """A view fixes the length of a bytearray."""
    model = with_memory()
    before = Before(model)
    model.memory.bytes = bytearray(b"abc")
    before.facts = before.look()
    views = []
    with pytest.raises(BufferError), TestTimeFinetuner(model).adapted(texts(), [1, 0, 0, 1]):  # noqa: PT012
        model.memory.bytes.extend(b"more")
        model.memory.lists.clear()
        views.append(memoryview(model.memory.bytes))
    before.check()
    assert len(model.memory.lists) == 3
    views[0].release()
    with TestTimeFinetuner(model).adapted(texts(), [1, 0, 0, 1]):
        pass
