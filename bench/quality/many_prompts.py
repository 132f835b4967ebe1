# SPDX-License-Identifier: Apache-2.0
"""Whether a batch's answers are right: in a long stream with bad queries, and on real text.

    python -m bench.quality.many_prompts stream [--queries 1000] [--bad 20]
    python -m bench.quality.many_prompts texts --texts DIR --model DIR [--subsets A B C]

`stream`: a model of a published shape with random weights; queries of mixed lengths and counts.
Bad ones lie among them. A sample of the others is compared with the same queries alone, in one
slot, and the memory of the second half of the stream with that of the first.

`texts`: each query's examples are the hull's, in float32. Its bits per byte come from slots among
neighbours, from one slot alone, and from PEFT's adapter with the same initial factors, trained
alone by torch.optim. PEFT's trains twice: the second time each initial factor is the next larger
number, which shows how far training carries a difference of rounding. Without --texts it takes the
standard library's source, and without --model the byte-level model in bench/assets.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import compress
from pathlib import Path
from typing import Any, NamedTuple

import hullkit
import torch
from hullkit.prompt_batch import Score
from torch import Tensor, nn

from bench.harness import texts
from bench.harness.rows import append, commit, processor
from bench.ops.model_sizes import CASES, SHAPES, build
from bench.quality.load import resident_bytes
from bench.ttft import corpora

FIELDS = ["check", "model", "dtype", "shape", "figure", "value", "unit", "count"]
FIELDS += ["device", "torch", "commit", "command"]
SHORTEST, LONGEST = 32, 256  # tokens of a text
BOUNDS = {"float32": 1e-5, "bfloat16": 2e-2}  # relative, of a loss, against the query alone
TOO_LONG = 1 << 22
MEMORY = {"cuda": 0.8, "cpu": 1 << 28}  # of the device's free memory; bytes
PEFT_BOUND = 1e-4  # relative, of a subset's mean bits per byte


class Bad(NamedTuple):
    """One way in which a query is wrong, and the error that must name it."""

    spoil: Callable[[hullkit.Query], Any]
    kind: type[Exception]
    words: str


def _raises(model: nn.Module) -> float:
    raise KeyError("its own")


def _score_of_bad_ids(model: nn.Module) -> float:
    return Score(torch.tensor([1, 1 << 40]))(model)


def _first(query: hullkit.Query, example: Any) -> hullkit.Query:
    _, *rest = query.examples
    return query._replace(examples=[example, *rest])


BAD = (
    Bad(lambda q: _first(q, torch.tensor([1, 1 << 40])), ValueError, "ids in"),
    Bad(lambda q: _first(q, torch.tensor([1, -1])), ValueError, "ids in"),
    Bad(lambda q: _first(q, torch.tensor([], dtype=torch.int64)), ValueError, "at least 2 tokens"),
    Bad(lambda q: _first(q, torch.tensor([1])), ValueError, "at least 2 tokens"),
    Bad(lambda q: _first(q, torch.ones(TOO_LONG).long()), MemoryError, "at most"),
    Bad(lambda q: _first(q, torch.tensor([1.0, 2.0])), TypeError, "int64"),
    Bad(lambda q: _first(q, "text"), TypeError, "examples[0]"),
    Bad(lambda q: q._replace(counts=[*q.counts, 1]), ValueError, "as counts"),
    Bad(lambda q: q._replace(counts=[-1] * len(q.counts)), ValueError, "counts"),
    Bad(lambda q: q._replace(counts=[0] * len(q.counts)), ValueError, "counts"),
    Bad(lambda q: q._replace(lr=1e38), FloatingPointError, "expected a finite loss"),
    Bad(lambda q: q._replace(lr=-1.0), ValueError, "lr"),
    Bad(lambda q: q._replace(then=_raises), KeyError, "its own"),
    Bad(lambda q: q._replace(then=_score_of_bad_ids), ValueError, "ids in"),
    Bad(lambda q: q._replace(then=7), TypeError, "then"),
    Bad(lambda q: "a query", TypeError, "Query"),
)


def mixed_queries(number: int, vocabulary: int, longest: int) -> list[hullkit.Query]:
    """Two or three texts each, of mixed lengths and counts, and one more to score."""
    random = torch.Generator().manual_seed(0)

    def between(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=random))

    def text() -> Tensor:
        length = between(min(SHORTEST, longest), longest)
        return torch.randint(vocabulary, (length,), generator=random)

    queries = []
    for _ in range(number):
        examples = [text() for _ in range(between(2, 3))]
        counts = [between(1, 3) for _ in examples]
        queries.append(hullkit.Query(examples, counts, Score(text())))
    return queries


def stream(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    device = torch.device(arguments.device)
    shape = SHAPES[arguments.shape]
    shape = shape.shrunk(arguments.shrink) if arguments.shrink > 1 else shape
    model, _ = build(shape, CASES[arguments.dtype], device)
    queries = mixed_queries(arguments.queries, shape.vocabulary, arguments.longest)
    every = max(1, arguments.queries // max(1, arguments.bad))
    bad = {every // 2 + every * i: BAD[i % len(BAD)] for i in range(arguments.bad)}
    asked = (bad[i].spoil(q) if i in bad else q for i, q in enumerate(queries))

    budget = MEMORY[device.type]
    batch = hullkit.PromptBatch(model, slots=arguments.slots, memory=budget)
    right: dict[int, float] = {}
    named = 0
    memory: list[tuple[int, int]] = []  # of the device, of the process
    began = time.perf_counter()
    for answer in batch.map(asked):
        wrong = bad.get(answer.place)
        if answer.error is None and wrong is None:
            right[answer.place] = answer.value
        elif wrong is not None and type(answer.error) is wrong.kind:
            named += wrong.words in str(answer.error)
        else:
            print(f"query {answer.place}: {answer.error!r}", flush=True)
        memory.append((_reserved(device), resident_bytes()))
    seconds = time.perf_counter() - began
    path = batch.path

    places = sorted(right)[:: max(1, len(right) // arguments.sample)][: arguments.sample]
    alone = hullkit.PromptBatch(model, slots=1)
    apart = []
    for place, answer in zip(places, alone.map([queries[i] for i in places]), strict=True):
        if answer.error is not None:
            raise answer.error
        apart.append(abs(right[place] / answer.value - 1.0))
    print(f"{arguments.queries} queries in {seconds:.1f} s, {path}")
    grown = [max(later) - max(earlier) for earlier, later in _halves(memory)]
    figures: list[tuple[str, Any, str, int]] = [
        ("right answers", len(right), "queries", arguments.queries - len(bad)),
        ("errors that name theirs", named, "queries", len(bad)),
        ("largest difference from alone", f"{max(apart):.2e}", "relative", len(apart)),
        ("device memory grown", grown[0], "bytes", len(memory)),
        ("host memory grown", grown[1], "bytes", len(memory)),
        ("queries a second", round(arguments.queries / seconds, 2), "queries/s", 1),
    ]
    bound = BOUNDS[arguments.dtype]
    fine = len(right) == arguments.queries - len(bad) and named == len(bad) and max(apart) <= bound
    print("met" if fine else "MISSED", f"(largest difference {max(apart):.2e}, bound {bound})")
    shared = {
        "check": "stream", "model": shape.name, "dtype": arguments.dtype,
        "shape": f"slots={arguments.slots} tokens={SHORTEST}..{arguments.longest} {path}",
    }  # fmt: skip
    return [shared | dict(zip(FIELDS[4:8], values, strict=True)) for values in figures]


def _halves(memory: list[tuple[int, int]]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    half = len(memory) // 2
    for amounts in zip(*memory, strict=True):
        yield amounts[:half], amounts[half:]


def _reserved(device: torch.device) -> int:
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else 0


class Task(NamedTuple):
    """A query of a subset: what is trained on, and what is scored."""

    subset: str
    examples: list[Tensor]
    counts: list[int]
    score: Callable[[nn.Module], float]

    def query(self) -> hullkit.Query:
        return hullkit.Query(self.examples, self.counts, self.score)


def tasks(arguments: argparse.Namespace) -> list[Task]:
    model = arguments.model or texts.OWN_MODEL
    tokens = texts.Tokens(model, arguments.start, arguments.max_length)
    found = []
    for corpus in corpora.load(arguments.texts, arguments.subsets, arguments.queries):
        data = corpus.data
        chosen = hullkit.select(data.pool, data.query, arguments.total, candidates=data.candidates)
        for text, rows, counts in zip(corpus.queries, chosen.rows, chosen.counts, strict=True):
            ids = tokens(text)
            scored = tokens.scored_bytes(ids)

            def score(model: nn.Module, ids: Tensor = ids, scored: int = scored) -> float:
                return hullkit.bits_per_byte(model, ids, scored)

            kept = [(int(r), int(c)) for r, c in zip(rows, counts, strict=True) if c > 0]
            examples = [tokens(corpus.documents[row]) for row, _ in kept]
            found.append(Task(corpus.name, examples, [count for _, count in kept], score))
    return found


def by_peft(
    model: nn.Module, fresh: Path, asked: list[Task], lr: float, nudged: bool = False
) -> list[float]:
    """Each task by PEFT's adapter in `fresh`, a gradient reused for two updates of Adam.

    nudged: the adapter begins with the next larger numbers.
    """
    import peft

    device = next(model.parameters()).device
    adapted = peft.PeftModel.from_pretrained(model, str(fresh), is_trainable=True).eval()
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}
    if nudged:
        before = {name: p.nextafter(torch.full_like(p, torch.inf)) for name, p in before.items()}
    found = []
    for task in asked:
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(before[name])
        adam = torch.optim.Adam(trained.values(), lr=lr)
        for burst in hullkit.reuse_schedule(task.counts):
            ids = task.examples[burst.example].to(device)[None]
            adam.zero_grad()
            adapted(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            for _ in range(burst.num_steps):
                adam.step()
        found.append(task.score(adapted))
    adapted.unload()
    return found


def by_slots(model: nn.Module, asked: list[Task], slots: int) -> list[float]:
    """Each task in a slot; the first tasks again, so that all slots have work."""
    batch = hullkit.PromptBatch(model, slots=slots)
    queries = [task.query() for task in [*asked, *asked[: -len(asked) % slots]]]
    found = []
    for answer in batch.map(queries):
        if answer.error is not None:
            raise answer.error
        found.append(answer.value)
    batch.release()
    return found[: len(asked)]


@contextmanager
def initial_adapter(model: nn.Module) -> Iterator[tuple[Path, float]]:
    """The folder of the adapter with which a slot begins, and its learning rate."""
    one = hullkit.PromptBatch(model, slots=1)
    with tempfile.TemporaryDirectory() as fresh:
        one.export(0, fresh)
        yield Path(fresh), one.lr


def opened(arguments: argparse.Namespace) -> tuple[Path, nn.Module, list[Task]]:
    folder = arguments.model or texts.OWN_MODEL
    model = texts.language_model(folder, torch.device(arguments.device)).eval()
    return folder, model, tasks(arguments)


class Scores(NamedTuple):
    """Bits per byte of queries by each way. again: PEFT's, after a change of the last bit."""

    unadapted: list[float]
    peft: list[float]
    again: list[float]
    alone: list[float]
    among: list[float]


def real_texts(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    folder, model, asked = opened(arguments)
    unadapted = [task.score(model) for task in asked]
    with initial_adapter(model) as (fresh, lr):
        by_both = [by_peft(model, fresh, asked, lr, nudged) for nudged in (False, True)]
    by_ours = [by_slots(model, asked, slots) for slots in (1, arguments.slots)]
    scores = Scores(unadapted, *by_both, *by_ours)
    rows = []
    for subset in dict.fromkeys(task.subset for task in asked):
        own = [i for i, task in enumerate(asked) if task.subset == subset]
        shape = f"{subset} slots={arguments.slots} updates={arguments.total} "
        shape += f"tokens<={arguments.max_length}"
        shared = {"check": "texts", "model": folder.name, "dtype": "float32", "shape": shape}
        of_subset = Scores(*([found[i] for i in own] for found in scores))
        for values in _figures(of_subset, arguments.slots):
            rows.append(shared | dict(zip(FIELDS[4:8], values, strict=True)))
        from_peft = _mean(of_subset.among) / _mean(of_subset.peft) - 1.0
        met = "met" if abs(from_peft) <= PEFT_BOUND else "MISSED"
        print(f"{met}: {subset}: {from_peft:+.2e} from PEFT alone (bound {PEFT_BOUND})")
    return rows


def _figures(scores: Scores, slots: int) -> Iterator[tuple[str, str, str, int]]:
    """Of a subset: figure, value, unit, and how many queries it is of."""
    peft, again, among = scores.peft, scores.again, scores.among
    ways = {"unadapted": scores.unadapted, "PEFT alone": peft, "one slot": scores.alone}
    relative = ("relative", len(peft))
    for way, found in (ways | {f"{slots} slots": among}).items():
        yield f"BPB, {way}", f"{_mean(found):.6f}", "mean BPB", len(found)
    yield "mean from PEFT alone", f"{_mean(among) / _mean(peft) - 1.0:.2e}", *relative
    yield "largest difference from PEFT alone", _largest(among, peft), *relative
    yield "largest difference from one slot", _largest(among, scores.alone), *relative
    yield "PEFT's mean from itself", f"{_mean(again) / _mean(peft) - 1.0:.2e}", *relative
    yield "PEFT's largest difference from itself", _largest(again, peft), *relative
    same = [abs(b / a - 1.0) <= PEFT_BOUND for a, b in zip(peft, again, strict=True)]
    if any(same):
        largest = _largest([*compress(among, same)], [*compress(peft, same)])
        yield "largest difference where PEFT gives the same again", largest, "relative", sum(same)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _largest(values: list[float], others: list[float]) -> str:
    return f"{max(abs(a / b - 1.0) for a, b in zip(values, others, strict=True)):.2e}"


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    shared = argparse.ArgumentParser(add_help=False)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    shared.add_argument("--device", choices=("cpu", "cuda"), default=default)
    shared.add_argument("--out", type=Path, metavar="CSV", help="append the rows to this file")
    checks = parser.add_subparsers(dest="check", required=True)
    long = checks.add_parser("stream", parents=[shared])
    long.add_argument("--shape", choices=SHAPES, default="smollm2")
    long.add_argument("--shrink", type=int, default=1, help="sizes divided by about so much")
    long.add_argument("--dtype", choices=BOUNDS, default="bfloat16")
    long.add_argument("--slots", type=int, default=16)
    long.add_argument("--queries", type=int, default=1000, help="bad ones included")
    long.add_argument("--bad", type=int, default=20)
    long.add_argument("--sample", type=int, default=40, help="queries that also run alone")
    long.add_argument("--longest", type=int, default=LONGEST, help="tokens of a text")
    long.set_defaults(run=stream)
    of_texts = argparse.ArgumentParser(add_help=False)
    texts.add_arguments(of_texts, required=False)
    of_texts.add_argument("--subsets", nargs="+")
    of_texts.add_argument("--total", type=int, default=20, help="updates of a query")
    real = checks.add_parser("texts", parents=[shared, of_texts])
    real.add_argument("--slots", type=int, default=32)
    real.set_defaults(run=real_texts, queries=10, max_length=256)
    arguments = parser.parse_args(argv)
    cuda = arguments.device == "cuda"
    rows: list[dict[str, Any]] = arguments.run(arguments)
    given = sys.argv[1:] if argv is None else argv
    source = {
        "device": torch.cuda.get_device_name() if cuda else processor(),
        "torch": torch.__version__, "commit": commit(),
        "command": f"python -m bench.quality.many_prompts {shlex.join(_without_folders(given))}",
    }  # fmt: skip
    rows = [row | source for row in rows]
    if arguments.out is not None:
        append(arguments.out, rows, FIELDS)
    for row in rows:
        print(*(row[field] for field in FIELDS[:8]), sep=", ")
    return rows


def _without_folders(given: list[str]) -> list[str]:
    """A row's command names folders, and no place on a machine."""
    return [Path(word).name if "/" in word else word for word in given]


if __name__ == "__main__":
    main()
