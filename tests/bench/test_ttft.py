# SPDX-License-Identifier: Apache-2.0
"""bench/ttft on a few small texts: every phase, going on after a stop, and the statistics."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _texts import write_texts

pytest.importorskip("rich", reason="the demo's extra is not installed")

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    sys.path.insert(0, str(ROOT))
    from bench import ttft
    from bench.ttft import __main__, analysis, choices, report, rules, store

    assert all((__main__, analysis, choices, report, rules, store))
    yield ttft
    sys.path.remove(str(ROOT))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    write_texts(folder)
    return folder


def run(bench: Any, folder: Path, texts: Path, *options: str) -> list[dict[str, str]]:
    common = ["--out", str(folder), "--texts", str(texts), "--device", "cpu"]
    common += ["--max-length", "24", "--calibration", "1", "--judged", "1"]
    bench.__main__.main([*common, *options])
    return list(bench.store.read(folder))


def test_every_phase_and_a_second_call_measures_nothing_again(
    bench: Any, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.set_num_threads(1)
    options = ["--paths", "float32", "--budgets", "2", "--steps", "1e-4", "2e-4"]
    options += ["--rules", "kNN", "hull"]
    first = run(bench, tmp_path, texts, "calibrate", *options)
    assert len(first) == 2 * 2 * 2
    rows = run(bench, tmp_path, texts, "calibrate", "judge", *options)
    assert rows[: len(first)] == first
    judged = [row for row in rows if row["phase"] == "judge"]
    assert_lowest(bench, rows)
    best = {rule: bench.analysis.best_rate(rows, "float32", rule, 2) for rule in ("kNN", "hull")}
    for row in judged:
        rates = {best[row["rule"]]}
        assert float(row["lr"]) in (rates | {5e-5} if row["rule"] == "hull" else rates)
        assert int(row["passes"]) == 2
        assert float(row["percent"]) == pytest.approx(
            100 * float(row["bpb"]) / float(row["base_bpb"]), abs=1e-3
        )
    published = run(bench, tmp_path, texts, "judge", "--paths", "published", "--budgets", "2")
    theirs = {(row["subset"], row["query"]): row for row in published if row["path"] == "published"}
    ours = {
        (row["subset"], row["query"]): row
        for row in judged
        if (row["rule"], row["budget"], float(row["lr"])) == ("hull", "2", 5e-5)
    }
    assert theirs.keys() == ours.keys()
    assert len(theirs) == 2
    for query, row in theirs.items():  # one procedure, two implementations
        assert float(row["bpb"]) == pytest.approx(float(ours[query]["bpb"]), rel=1e-4)

    bench.__main__.main(
        ["report", "--out", str(tmp_path), "--summary", str(tmp_path / "summary.csv_")]
    )
    assert "judged" in capsys.readouterr().out
    with (tmp_path / "summary.csv_").open() as file:
        lines = list(csv.DictReader(file))
    knn = next(line for line in lines if (line["phase"], line["rule"]) == ("judge", "kNN"))
    assert {line["subset"] for line in lines} == {"one", "two", "mean of subsets"}
    assert float(knn["percent_low"]) <= float(knn["percent"]) <= float(knn["percent_high"])
    assert knn["from_knn"] == ""

    def apart(row: dict[str, str]) -> dict[str, str]:
        """Judged in float32: a thousandth above the published loop."""
        if (row["phase"], row["path"]) != ("judge", "float32"):
            return row
        return row | {"bpb": str(1.001 * float(theirs[row["subset"], row["query"]]["bpb"]))}

    for line in bench.report.summary([apart(row) for row in published]):
        cell = (line["phase"], line["path"], line["rule"], line["lr"])
        same = cell == ("judge", "float32", "hull", 5e-5)
        compared = line["bpb_from_published"]
        assert (compared == pytest.approx(1e-3, rel=1e-6)) if same else (compared == "")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_many_prompts_share_a_stream_and_the_rates_of_one(
    bench: Any, texts: Path, tmp_path: Path
) -> None:
    torch.set_num_threads(1)
    pytest.importorskip("peft")
    options = ["--paths", "lora", "many", "--rules", "kNN", "--budgets", "2", "--slots", "2"]
    options += ["--steps", "1e-3", "--judged", "2"]
    rows = run(bench, tmp_path, texts, "calibrate", "judge", *options)
    assert [row["path"] for row in rows if row["phase"] == "calibrate"] == ["lora"] * 2
    alone, many = (
        {(row["subset"], row["query"]): row for row in rows if row["path"] == path}
        for path in ("lora", "many")
    )
    judged = {(subset, query) for subset in ("one", "two") for query in ("1", "2")}
    assert judged == many.keys()
    for query, row in many.items():
        assert (row["lr"], row["passes"], row["slots"]) == ("0.001", "2", "2")
        assert float(row["percent"]) < 100
        # Fresh factors are random and differ, so the bits do.
        assert float(row["bpb"]) == pytest.approx(float(alone[query]["bpb"]), rel=0.05)
        assert float(row["adapt_ms"]) == float(many[query[0], "1"]["adapt_ms"]) > 0
    assert {row["slots"] for row in alone.values()} == {"1"}


def assert_lowest(bench: Any, rows: list[dict[str, str]]) -> None:
    """The best rate of kNN has the lowest mean of the two subsets' single queries."""
    sums: dict[float, float] = {}
    for row in rows:
        if (row["phase"], row["rule"]) == ("calibrate", "kNN"):
            rate = float(row["lr"])
            sums[rate] = sums.get(rate, 0.0) + float(row["percent"])
    assert len(sums) == 2
    assert bench.analysis.best_rate(rows, "float32", "kNN", 2) == min(sums, key=lambda r: sums[r])


def test_a_row_counts_once_and_a_line_that_was_cut_off_not_at_all(
    bench: Any, tmp_path: Path
) -> None:
    row = dict.fromkeys(bench.store.FIELDS, "1")
    bench.store.write(tmp_path, 0, [row | {"bpb": "2"}, row | {"query": "2"}])
    bench.store.write(tmp_path, 1, [row | {"bpb": "3"}])
    with (tmp_path / "rows-1.csv").open("a") as file:
        file.write("judge,model,bf16")
    kept = [(found["query"], found["bpb"]) for found in bench.store.read(tmp_path)]
    assert kept == [("1", "2"), ("2", "1")]


def test_budgets_are_kept_by_every_rule(bench: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    pool = torch.nn.functional.normalize(torch.randn(300, 16, generator=generator), dim=1)
    query = torch.nn.functional.normalize(
        pool[:3] + 0.1 * torch.randn(3, 16, generator=generator), dim=1
    )
    from bench.harness.texts import Embeddings

    data = Embeddings(pool, query, (query @ pool.T).topk(200).indices)
    for name, rule in bench.rules.EVERY.items():
        for i, total in enumerate(bench.choices.totals(rule, 6, data)):
            own = data._replace(query=query[i], candidates=data.candidates[i])
            chosen = bench.choices.choose(rule, own, total, 6, lambda row: 100)
            spent = sum(-(-count // rule.refresh_interval) for count in chosen.counts)
            assert spent <= 6, name
            assert spent >= 5, name
            joined = max(1, rule.join // 100)
            assert {len(group) for group in chosen.groups} == {joined}, name


def test_a_stretched_query_goes_from_the_hull_to_the_nearest(bench: Any) -> None:
    from bench.harness.texts import Embeddings

    # Three rows lean to one side of the query; two others, less near, balance them.
    pool = torch.tensor([[1.0, 0.9], [1.0, 0.8], [1.0, 0.7], [0.4, -0.8], [0.4, -0.9], [-1.0, 0]])
    data = Embeddings(pool, torch.tensor([0.7, 0.1]), torch.arange(6))

    def rows(stretch: float) -> list[int]:
        rule = bench.rules.Rule("hull", 1, 1, stretch=stretch)
        groups = bench.choices.choose(rule, data, 3, 3, len).groups
        return sorted(row for group in groups for row in group)

    assert rows(1e6) == [0, 1, 2] == sorted((pool @ data.query).topk(3).indices.tolist())
    assert {3, 4} & set(rows(1.0))


def test_intervals_and_equal_costs(bench: Any) -> None:
    generator = np.random.default_rng(0)
    values = {
        (subset, i): float(mean + generator.normal())
        for subset, mean in (("a", 1.0), ("b", 3.0))
        for i in range(400)
    }
    found = bench.analysis.interval(values)
    assert found.mean == pytest.approx(2.0, abs=0.2)
    # The error of a mean of two means of 400: 1 / sqrt(800).
    assert found.high - found.low == pytest.approx(2 * 1.96 / 800**0.5, rel=0.1)
    costs = [{("a", 0): 1.0}, {("a", 0): 4.0}]
    curve = list(zip(costs, ({("a", 0): 90.0}, {("a", 0): 80.0}), strict=True))
    assert bench.analysis.at_cost(curve, 2.0) == {("a", 0): pytest.approx(85.0)}
    assert bench.analysis.at_cost(curve, 8.0) is None


def test_two_builds_differ_by_their_bits(bench: Any) -> None:
    from bench import compare

    one = (torch.arange(3), [torch.ones(2)], None)
    assert compare.digest(one) == compare.digest(one)
    assert compare.digest(one) != compare.digest((torch.arange(3), [torch.zeros(2)], None))
    middle, low, high = compare.ratio([2.0, 2.2, 2.1], [1.0, 1.1, 1.05])
    assert middle == pytest.approx(2.0)
    assert low <= middle <= high


def test_energy_is_the_sum_of_the_packages_counters(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bench.ttft import energy

    monkeypatch.setattr(energy, "RAPL", tmp_path)
    assert energy.meter(torch.device("cpu")) is None
    for package, microjoules in (("0", 2_500_000), ("1", 500_000), ("0:0", 9_000_000)):
        (tmp_path / f"intel-rapl:{package}").mkdir()
        (tmp_path / f"intel-rapl:{package}" / "energy_uj").write_text(f"{microjoules}\n")
    read = energy.meter(torch.device("cpu"))
    assert read is not None
    assert read() == 3.0  # 0:0 is a part of 0
