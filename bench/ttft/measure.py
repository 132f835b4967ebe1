# SPDX-License-Identifier: Apache-2.0
"""Queries under one cell: chosen, adapted, scored, restored, with the time and energy of each."""

from __future__ import annotations

import math
import statistics
import time
from functools import cache, partial
from typing import Any

import hullkit
import torch
from hullkit.finetune.report import peak_memory
from torch import Tensor

from bench.harness import texts
from bench.harness.rows import commit, processor
from bench.ttft import energy
from bench.ttft.choices import Choice, choose, totals
from bench.ttft.corpora import NUM_CANDIDATES, Corpus
from bench.ttft.paths import Hullkit, Published, Together, Way
from bench.ttft.rules import EVERY, Cell, Rule

ROUNDS = 4  # of full slots in a stream, at least


class Bench:
    """A corpus ready to be measured: tokens, base scores and totals are found once."""

    def __init__(
        self, corpus: Corpus, tokens: texts.Tokens, device: torch.device, command: str
    ) -> None:
        self.corpus, self._tokens, self._device = corpus, tokens, device
        data = corpus.data
        self._data = texts.Embeddings(*(tensor.to(device) for tensor in data))
        self._meter = energy.meter(device)
        cuda = device.type == "cuda"
        self._common = {
            "device": torch.cuda.get_device_name(device) if cuda else processor(),
            "threads": "" if cuda else torch.get_num_threads(),
            "torch": torch.__version__,
            "commit": commit(),
            "command": command,
        }
        self.document = cache(lambda row: tokens(corpus.documents[row]))
        self.query = cache(lambda i: tokens(corpus.queries[i]))
        self.totals = cache(lambda rule, budget: totals(rule, budget, self._data))
        self.retrieve_ms = cache(self._retrieve_ms)
        self._base: dict[int, float] = {}

    def score_base(self, model: torch.nn.Module, query: int) -> None:
        """With the model as it comes, in float32."""
        self._base[query] = self._bits(model, query)

    def _bits(self, model: torch.nn.Module, i: int) -> float:
        ids = self.query(i)
        return hullkit.bits_per_byte(model, ids, self._tokens.scored_bytes(ids))

    def _retrieve_ms(self, i: int) -> float:
        pool, query, _ = self._data

        def once() -> float:
            began = self._now()
            hullkit.knn(pool, query[i], min(NUM_CANDIDATES, len(pool)))
            return 1e3 * (self._now() - began)

        once()
        return statistics.median(once() for _ in range(3))

    def _now(self) -> float:
        """After the device has done everything that it was asked."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def _joules(self) -> float:
        return 0.0 if self._meter is None else self._meter()

    def run(self, way: Hullkit | Published, i: int, cell: Cell) -> dict[str, Any]:
        """The row of query i, without the names of phase, model and path."""
        rule = EVERY[cell.rule]
        chosen, select_ms = self._chosen(way, i, rule, cell.budget)
        examples = self._examples(chosen)
        used = self._joules()
        entered = self._now()
        with way.adapted(examples, chosen.counts, rule, cell) as model:
            adapted = self._now()
            used -= self._joules()
            bits = self._bits(model, i)
            used += self._joules()
            scored = self._now()
        restored = self._now()
        used -= self._joules()
        return self._row(rule, cell, i, chosen, select_ms, bits) | {
            "adapt_ms": f"{1e3 * (adapted - entered):.3f}",
            "restore_ms": f"{1e3 * (restored - scored):.3f}",
            **self._used(way, -used),
        }

    def run_together(self, way: Together, queries: list[int], cell: Cell) -> list[dict[str, Any]]:
        """The rows of queries that share one stream, and its time and energy in equal parts.

        The stream repeats the queries until its slots were filled ROUNDS times. It runs once with
        scores, and once more without: that one is measured.
        """
        rule = EVERY[cell.rule]
        chosen, select_ms = zip(
            *(self._chosen(way, i, rule, cell.budget) for i in queries), strict=True
        )
        plain = [
            hullkit.Query(self._examples(choice), choice.counts, lr=cell.lr) for choice in chosen
        ]
        again = plain * (math.ceil(ROUNDS * way.slots / len(queries)) - 1)
        scored = [
            query._replace(then=partial(self._float32_bits, i=i))
            for query, i in zip(plain, queries, strict=True)
        ]
        bits = way.stream([*scored, *again], rule)[: len(queries)]
        used, begun = self._joules(), self._now()
        way.stream([*plain, *again], rule)
        ended = self._now()
        used = self._joules() - used
        share = 1.0 / len([*plain, *again])
        costs = {
            "adapt_ms": f"{1e3 * (ended - begun) * share:.3f}",
            "restore_ms": "0",  # a slot's next query begins with fresh factors
            **self._used(way, used * share),
        }
        return [
            self._row(rule, cell, *of_query) | costs
            for of_query in zip(queries, chosen, select_ms, bits, strict=True)
        ]

    def _chosen(self, way: Way, i: int, rule: Rule, budget: int) -> tuple[Choice, float]:
        """What query i is trained on, and the milliseconds of choosing it."""
        total = self.totals(rule, budget)[i]
        data = self._data._replace(query=self._data.query[i], candidates=self._data.candidates[i])

        def count(row: int) -> int:
            return len(self.document(row))

        begun = self._now()
        chosen = choose(rule, data, total, budget, count, way.backend)
        return chosen, 1e3 * (self._now() - begun)

    def _examples(self, chosen: Choice) -> list[Tensor]:
        return [torch.cat([self.document(row) for row in rows]) for rows in chosen.groups]

    def _float32_bits(self, model: torch.nn.Module, i: int) -> float:
        """In the block of a slot products are in the precision of its passes."""
        with torch.autocast(self._device.type, enabled=False):
            return self._bits(model, i)

    def _used(self, way: Way, joules: float) -> dict[str, Any]:
        return {
            "slots": way.slots if isinstance(way, Together) else 1,
            "peak_mb": round(peak_memory(self._device) / 2**20),
            "joules": "not available" if self._meter is None else f"{joules:.3f}",
        }

    def _row(
        self,
        rule: Rule,
        cell: Cell,
        i: int,
        chosen: Choice,
        select_ms: float,
        bits: float,
    ) -> dict[str, Any]:
        bursts = hullkit.reuse_schedule(chosen.counts, rule.refresh_interval)
        lengths = [sum(len(self.document(row)) for row in rows) for rows in chosen.groups]
        beta1, beta2 = cell.betas
        base = self._base[i]
        return {
            **self._common,
            "subset": self.corpus.name,
            "query": i,
            "rule": cell.rule,
            "budget": cell.budget,
            "lr": cell.lr,
            "beta1": beta1,
            "beta2": beta2,
            **rule._asdict(),
            "cap": rule.cap or "",
            "noise": rule.noise or "",
            "base_bpb": f"{base:.6f}",
            "bpb": f"{bits:.6f}",
            "percent": f"{100 * bits / base:.4f}",
            "passes": len(bursts),
            "updates": sum(chosen.counts),
            "distinct": len({row for rows in chosen.groups for row in rows}),
            "tokens": sum(lengths[burst.example] for burst in bursts),
            "retrieve_ms": f"{self.retrieve_ms(i):.4f}",
            "select_ms": f"{select_ms:.4f}",
        }
