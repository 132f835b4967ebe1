# SPDX-License-Identifier: Apache-2.0
"""Rows adapted to by Ray's actors: as alone, each once, whoever dies."""

from __future__ import annotations

import inspect
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hullkit
import numpy as np
import pytest
import torch

ray = pytest.importorskip("ray", reason="an extra is not installed")
pytest.importorskip("ray.data", reason="an extra is not installed")

import _ray_setups  # noqa: E402
import hullkit.interop.ray as ray_adapter  # noqa: E402
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
from _ray_setups import block, choose, low_rank, model, setup, use  # noqa: E402
from hullkit.interop.ray import AdaptRows, Setup, unfinished  # noqa: E402

# Ray leaves files and sockets to the end of its processes, and warns about itself.
pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"
)

ROWS = 24


def alone(numbers: range) -> dict[int, float]:
    rows = AdaptRows(setup, keep=["n"])(block(*numbers)).to_pylist()
    return {row["n"]: row["score"] for row in rows}


def test_a_block_is_its_rows(one_thread: None) -> None:
    rows = AdaptRows(setup, keep=["text", "n"])(block(3, 1, 2)).to_pylist()
    assert [row["n"] for row in rows] == [3, 1, 2]
    tuner = hullkit.TestTimeFinetuner(model(), lr=0.1)
    for row in rows:
        with tuner.adapted(*choose(block(row["n"]))[0]) as adapted:
            assert row["score"] == use(adapted, row)["score"]
        assert (row["num_updates"], row["num_passes"], row["error"]) == (3, 2, None)
        assert row["text"] == str(row["n"])


def test_a_row_that_fails_is_its_own_error() -> None:
    wanted = alone(range(4))

    def picky(given: Any) -> Any:
        if 2 in given["n"]:
            raise KeyError("two")
        return choose(given)

    def odd(adapted: torch.nn.Module, row: Any) -> dict[str, Any]:
        if row["n"] == 3:
            raise ZeroDivisionError("three")
        return use(adapted, row)

    actor = AdaptRows(lambda: setup()._replace(choose=picky, use=odd), keep=["n"])
    rows = {row["n"]: row for row in actor(block(0, 99, 2, 3, 1)).to_pylist()}
    assert rows[0]["score"] == wanted[0]
    assert rows[1]["score"] == wanted[1]
    errors = {n: rows[n]["error"] for n in (2, 3, 99)}
    assert errors[2] == "KeyError: 'two'"
    assert errors[3] == "ZeroDivisionError: three"
    assert errors[99].startswith("ValueError: examples[0]: expected ids in")
    assert all(rows[n]["score"] is None for n in errors)


def test_a_block_by_a_batch_is_its_rows(one_thread: None) -> None:
    def scored(adapted: torch.nn.Module, row: Any) -> dict[str, Any]:
        if row["n"] == 3:
            raise ZeroDivisionError("three")
        with torch.no_grad():
            return {"score": float(adapted(torch.tensor([row["n"]])).sum())}

    def picky(given: Any) -> Any:
        if 2 in given["n"]:
            raise KeyError("two")
        pairs = zip(given["n"], choose(given), strict=True)
        return [None if n == 7 else choice for n, choice in pairs]

    made = low_rank()._replace(choose=picky, use=scored)
    rows = AdaptRows(lambda: made, keep=["n"])(block(0, 99, 2, 3, 7, 1)).to_pylist()
    assert [row["n"] for row in rows] == [0, 99, 2, 3, 7, 1]
    assert rows[1]["error"].startswith("ValueError: examples[0]: expected ids in")
    assert rows[2]["error"] == "KeyError: 'two'"
    assert rows[3]["error"] == "ZeroDivisionError: three"
    assert (
        rows[4]["error"]
        == "TypeError: choose: expected a pair of examples and counts, got NoneType"
    )
    assert [row["score"] is None for row in rows] == [False, True, True, True, True, False]
    for place in (0, 5):
        row = rows[place]
        assert (row["num_updates"], row["num_passes"], row["error"]) == (3, 2, None)
        [answer] = low_rank(1).tuner.map(
            [(*choose(block(row["n"]))[0], lambda m, r=row: scored(m, r))]
        )
        assert row["score"] == answer.value["score"]


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (None, "setup: expected it to return a Setup, got NoneType"),
        (
            Setup(model(), choose, use),
            "tuner: expected a TestTimeFinetuner or PromptBatch, got Seq",
        ),  # type: ignore[arg-type]
        (setup()._replace(choose=3), "choose: expected a callable, got int"),
        (setup()._replace(use=None), "use: expected a callable, got NoneType"),
    ],
)
def test_a_wrong_setup_is_no_error_of_a_row(made: Any, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        AdaptRows(lambda: made, keep=["n"])


@pytest.mark.parametrize("made", [setup, low_rank])
def test_what_is_no_pair_is_its_rows_error(made: Any) -> None:
    def odd(given: Any) -> Any:
        pair, *others = choose(given)
        return [(*pair, use), *others[:-1], hullkit.Query(*pair)]

    rows = AdaptRows(lambda: made()._replace(choose=odd), keep=["n"])(block(0, 1, 2)).to_pylist()
    wanted = "TypeError: choose: expected a pair of examples and counts, got "
    assert [row["error"] for row in rows] == [f"{wanted}3 of them", None, f"{wanted}Query"]


def test_keep_is_a_list_of_names() -> None:
    columns = AdaptRows(setup, keep=(name for name in ["n"]))(block(1)).column_names
    assert columns[0] == "n"
    for keep in ("n", [1], 5):
        with pytest.raises(TypeError, match="keep: expected a list of names, got"):
            AdaptRows(setup, keep=keep)  # type: ignore[arg-type]
    for name in ("error", "num_updates", "num_passes"):
        with pytest.raises(ValueError, match=f"keep: expected other names .* got '{name}'"):
            AdaptRows(setup, keep=["n", name])


@pytest.mark.parametrize(
    ("used", "words"),
    [
        (0.5, "TypeError: use: expected a dict of new columns, got float"),
        ({"score": torch.tensor(1.0)}, "or strings, got a value of Tensor in 'score'"),
        ({"n": 1}, "ValueError: use: expected names of new columns, got ['n']"),
        ({"error": "mine"}, "ValueError: use: expected names of new columns, got ['error']"),
        ({5: 1.0}, "TypeError: use: expected names of columns, got 5"),
        (
            {"score": 1 << 70},
            "use: expected numbers that 64 bits hold, or strings, got a value of int",
        ),
        (
            {"score": "high"},
            "use: expected double in the column 'score', as in earlier rows, got str",
        ),
    ],
)
@pytest.mark.parametrize("made", [setup, low_rank])
def test_what_cannot_be_columns_is_its_rows_error(made: Any, used: Any, words: str) -> None:
    def own(adapted: torch.nn.Module, row: Any) -> Any:
        return used if row["n"] == 1 else {"score": 2.0}

    rows = AdaptRows(lambda: made()._replace(use=own), keep=["n"])(block(0, 1, 2)).to_pylist()
    assert [row["score"] for row in rows] == [2.0, None, 2.0]
    assert [row["error"] is None for row in rows] == [True, False, True]
    assert words in rows[1]["error"]


def test_integers_are_numbers_of_a_column_of_floats() -> None:
    def own(adapted: torch.nn.Module, row: Any) -> Any:
        return {"score": 0.5 if row["n"] == 0 else row["n"]}

    actor = AdaptRows(lambda: setup()._replace(use=own), keep=["n"])
    first, second = actor(block(0, 2)), actor(block(3))
    assert first.schema == second.schema
    assert [row["score"] for row in second.to_pylist()] == [3.0]


def test_blocks_have_the_same_columns_whatever_fails() -> None:
    actor = AdaptRows(setup, keep=["n"])
    first = actor(block(99))
    good, bad, mixed = actor(block(1)), actor(block(99, 98)), actor(block(99, 2))
    assert good.schema == bad.schema == mixed.schema
    assert {*first.schema} == {field for field in good.schema if field.name != "score"}


def test_refusals() -> None:
    with pytest.raises(
        ValueError, match=r"keep: expected columns of \['n', 'text'\], got \['id'\]"
    ):
        AdaptRows(setup, keep=["id"])(block(1))
    short = AdaptRows(lambda: setup()._replace(choose=lambda given: []), keep=["n"])
    with pytest.raises(ValueError, match="choose: expected 2 pairs, one a row, got 0"):
        short(block(1, 2))


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError])
@pytest.mark.parametrize("where", ["choose", "use"])
def test_memory_that_runs_out_is_no_error_of_a_row(where: str, error: type[Exception]) -> None:
    def exhausted(*given: Any) -> Any:
        raise error("none is left")

    actor = AdaptRows(lambda: setup()._replace(**{where: exhausted}), keep=["n"])
    with pytest.raises(error, match="none is left"):
        actor(block(1, 2))


def test_the_program_of_the_docstring_passes_every_argument(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It runs but for Ray, whose part is to make the actor of these arguments."""
    program = (ray_adapter.__doc__ or "").split("\n\n")[2]
    given = {"id": np.array([4])}

    class Rows:
        def schema(self, fetch_if_missing: bool) -> None:
            inspect.signature(ray.data.Dataset.schema).bind(self, fetch_if_missing)

        def map_batches(self, actor: Any, fn_constructor_args: Any, **options: Any) -> Rows:
            inspect.signature(ray.data.Dataset.map_batches).bind(self, actor, **options)
            self.done = actor(*fn_constructor_args)(given).to_pylist()
            return self

        def write_parquet(self, path: str) -> None:
            inspect.signature(ray.data.Dataset.write_parquet).bind(self, path)

    rows = Rows()
    monkeypatch.setattr(ray.data, "read_parquet", lambda path: rows)
    own = setup()._replace(choose=lambda block: choose({"n": block["id"]}))
    names = {"ray": ray, "unfinished": unfinished, "AdaptRows": AdaptRows, "prompts": "prompts"}
    exec(inspect.cleandoc(program), names | {"setup": lambda: own})
    assert [(row["id"], row["error"]) for row in rows.done] == [(4, None)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    # Workers find functions by the names of their files.
    here = ":".join(str(Path(file).parent) for file in (__file__, _ray_setups.__file__))
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        logging_level="ERROR",
        runtime_env={"env_vars": {"PYTHONPATH": here}},
    )
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield
    ray.shutdown()


def run(folder: Path, marks: Path | None = None) -> None:
    """All rows through two actors. With marks, one of them is killed half-way."""

    def fragile(adapted: torch.nn.Module, row: Any) -> dict[str, Any]:
        if marks is not None:
            (marks / f"{row['n']}-{os.getpid()}").touch()
            if row["n"] == ROWS // 2 and not (marks / "killed").exists():
                (marks / "killed").touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return use(adapted, row)

    rows = unfinished(ray.data.from_items([{"n": n} for n in range(ROWS)]), folder, "n")
    rows.map_batches(
        AdaptRows,
        fn_constructor_args=[lambda: setup()._replace(use=fragile), ["n"]],
        compute=ray.data.ActorPoolStrategy(size=2),
        batch_size=4,
        num_cpus=0.5,
    ).write_parquet(str(folder))


def check(folder: Path) -> None:
    rows = [row for path in folder.glob("*.parquet") for row in pq.read_table(path).to_pylist()]
    assert sorted(row["n"] for row in rows) == [*range(ROWS)]  # each once
    assert {row["n"]: row["score"] for row in rows} == alone(range(ROWS))


def test_a_killed_worker_costs_no_row(cluster: None, tmp_path: Path) -> None:
    marks, out = tmp_path / "marks", tmp_path / "out"
    marks.mkdir()
    run(out, marks)
    assert (marks / "killed").exists()
    check(out)


def test_a_run_goes_on_where_it_stopped(cluster: None, tmp_path: Path) -> None:
    run(tmp_path)
    check(tmp_path)
    first, second, *others = sorted(tmp_path.glob("*.parquet"))
    first.write_bytes(first.read_bytes()[:-9])  # as a killed run leaves a file
    second.unlink()
    with pytest.raises(ValueError, match="key: expected a column of"):
        unfinished(ray.data.from_items([{"id": 1}]), tmp_path, "id")
    assert first.exists()
    with pytest.warns(UserWarning, match="a file cannot be read, and is .*broken now"):
        run(tmp_path)
    check(tmp_path)
    assert not first.exists()
    assert first.with_name(f".{first.name}.broken").exists()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.parquet")}
    run(tmp_path)  # nothing is left to do
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.parquet")}
    with pytest.raises(ValueError, match="key: expected a column of"):
        unfinished(ray.data.from_items([{"id": 1}]), tmp_path, "id")
    assert len(others) >= 1


def test_rows_that_failed_are_done_again_if_asked_for(cluster: None, tmp_path: Path) -> None:
    actor = AdaptRows(setup, keep=["n"])
    for numbers in ((0, 99, 2), (98,), (3,)):
        pq.write_table(actor(block(*numbers)), tmp_path / f"{numbers[0]}.parquet")
    rows = ray.data.from_items([{"n": n} for n in (0, 99, 2, 98, 3, 4)])
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert [row["n"] for row in unfinished(rows, tmp_path, "n").take_all()] == [4]
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}
    again = unfinished(rows, tmp_path, "n", retry=True)
    assert sorted(row["n"] for row in again.take_all()) == [4, 98, 99]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in before)
    left = [row["n"] for path in tmp_path.glob("*") for row in pq.read_table(path).to_pylist()]
    assert sorted(left) == [0, 2, 3]
    assert before[tmp_path / "3.parquet"] == (tmp_path / "3.parquet").read_bytes()
    (tmp_path / ".3.parquet.part").touch()  # as a killed call leaves one
    assert sorted(pq.read_table(tmp_path).column("n").to_pylist()) == [0, 2, 3]
    unfinished(rows, tmp_path, "n")
    assert not (tmp_path / ".3.parquet.part").exists()


def test_what_is_left_has_the_types_of_the_dataset(cluster: None, tmp_path: Path) -> None:
    names = pa.array([1, 2**63 + 5, 3], pa.uint64())
    table = pa.table({"n": names, "source": pa.array([None] * 3, pa.string())})
    pq.write_table(table.slice(0, 1), tmp_path / "done.parquet")
    left = unfinished(ray.data.from_arrow(table), tmp_path, "n")
    [found] = [ray.get(ref) for ref in left.to_arrow_refs()]
    assert found.equals(table.slice(1))


def test_a_folder_that_is_not_seen_is_no_empty_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="directory: expected a folder that this process sees"):
        unfinished(None, "s3://bucket/out", "n")
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        unfinished(None, tmp_path / "file", "n")
    rows = SimpleNamespace(schema=lambda fetch_if_missing: pa.schema({"n": pa.int64()}))
    assert unfinished(rows, tmp_path / "new", "n") is rows
    with pytest.raises(ValueError, match=r"key: expected a column of the dataset, \['n'\], got"):
        unfinished(rows, tmp_path / "new", "id")
    (tmp_path / "part=1").mkdir()
    pq.write_table(AdaptRows(setup, keep=["n"])(block(1)), tmp_path / "part=1" / "a.parquet")
    rows.schema = lambda fetch_if_missing: None
    with pytest.raises(ValueError, match=r"key: expected a column of .*a\.parquet"):
        unfinished(rows, tmp_path, "id")


def test_what_readers_skip_is_not_finished(tmp_path: Path) -> None:
    """Hidden files and folders are none of the output, nor is a folder a file by its name."""
    done = pa.table({"n": [1]})
    for place in (".staging/a.parquet", "_temporary/0/a.parquet", ".h.parquet", "_h.parquet"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(done, tmp_path / place)
    (tmp_path / "_broken.parquet").touch()
    (tmp_path / "b.parquet").mkdir()
    rows = SimpleNamespace(schema=lambda fetch_if_missing: None)
    assert unfinished(rows, tmp_path, "n") is rows
    assert (tmp_path / "_broken.parquet").exists()
    pq.write_table(pa.table({"n": [2]}), tmp_path / "b.parquet" / "part=1.parquet")
    rows.map_batches = lambda function, batch_format: function(pa.table({"n": [1, 2, 3]}))
    hidden = tmp_path / "_out" / ".today"  # the folder that is asked for may have any name
    assert unfinished(rows, tmp_path, "n").column("n").to_pylist() == [1, 3]
    hidden.mkdir(parents=True)
    pq.write_table(done, hidden / "a.parquet")
    assert unfinished(rows, hidden, "n").column("n").to_pylist() == [2, 3]


@pytest.mark.parametrize("keys", [[[1], [2]], [{"a": 1}, {"a": 2}]])
def test_keys_are_numbers_or_strings(keys: list[Any], tmp_path: Path) -> None:
    table = pa.table({"n": keys})
    rows = SimpleNamespace(schema=lambda fetch_if_missing: table.schema)
    with pytest.raises(TypeError, match="key: expected numbers or strings in the dataset, got"):
        unfinished(rows, tmp_path, "n")
    pq.write_table(table, tmp_path / "a.parquet")
    rows.schema = lambda fetch_if_missing: None
    with pytest.raises(TypeError, match=r"key: expected numbers or strings in .*a\.parquet, got"):
        unfinished(rows, tmp_path, "n")
