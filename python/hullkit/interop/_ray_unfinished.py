# SPDX-License-Identifier: Apache-2.0
"""What an earlier run of Ray has not written, see hullkit.interop.ray."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq


def unfinished(
    dataset: Any, directory: str | os.PathLike[str], key: str, *, retry: bool = False
) -> Any:
    """The rows of a `ray.data.Dataset` that an earlier run has not written to `directory`.

    Files that cannot be read get hidden names that end in ".broken", with a warning: a run that was
    killed while it wrote left them, and their rows are not finished. Hidden files that end in
    ".parquet.part", which a killed call of this function left, are deleted. Files and folders whose
    names begin with "." or "_" do not count, as readers skip them. Call it before a run starts, not
    beside one.

    Args:
        dataset: the rows.
        directory: where `write_parquet` writes, a folder that this process sees; it need not exist
            yet.
        key: the column that names a row, in both. Rows of one name count as one.
        retry: whether rows with an `error` are to be done again. They are taken out of their files.

    Returns:
        A dataset of the rows whose key no file has; `dataset` itself if none is finished.

    Raises:
        TypeError: a key of lists, structs or maps. ValueError: a file or a dataset without that
            column; a `directory` that is an address of another storage.
        OSError: a `directory` that cannot be read.

    Cost: reads the key's column of every file, with retry all columns; finished keys are in memory.

    >>> import ray
    >>> from hullkit.interop.ray import unfinished
    >>> rows = unfinished(ray.data.read_parquet("prompts"), "out", key="id")  # doctest: +SKIP
    """
    folder = os.fspath(directory)
    if "://" in folder:
        raise ValueError(f"directory: expected a folder that this process sees, got {folder!r}")
    finished: set[Any] = set()
    if os.path.lexists(folder):
        os.listdir(folder)  # a pattern finds nothing in a folder that cannot be read
    schema = dataset.schema(fetch_if_missing=False)
    if schema is not None:
        _check_key(key, "the dataset", schema.names, schema.types)
    for path in Path(folder).rglob(".*.parquet.part"):  # of a call that was killed
        path.unlink()
    broken, whole = [], []
    for path in sorted(Path(folder).rglob("*.parquet")):
        hidden = any(part.startswith((".", "_")) for part in path.relative_to(folder).parts)
        if hidden or path.is_dir():
            continue
        try:
            written = pq.read_schema(path)
        except pa.ArrowInvalid:  # parquet's end is written last
            broken.append(path)
            continue
        _check_key(key, str(path), written.names, written.types)
        whole.append((path, written.names))
    for path in broken:
        aside = path.replace(path.with_name(f".{path.name}.broken"))  # readers skip such names
        warnings.warn(f"a file cannot be read, and is {aside} now", stacklevel=2)
    for path, names in whole:
        with pq.ParquetFile(path) as file:
            failed = retry and "error" in names
            kept = file.read() if failed else file.read([key])
        if failed and kept.column("error").null_count < len(kept):
            kept = kept.filter(pc.is_null(kept.column("error")))
            part = path.with_name(f".{path.name}.part")
            pq.write_table(kept, part)
            part.replace(path)
        finished.update(kept.column(key).to_pylist())
    if not finished:
        return dataset

    def missing(table: pa.Table) -> pa.Table:
        left = [name not in finished for name in table.column(key).to_pylist()]
        return table.filter(pa.array(left, pa.bool_()))

    return dataset.map_batches(missing, batch_format="pyarrow")  # columns keep their types


def _check_key(key: str, where: str, names: list[str], types: list[pa.DataType]) -> None:
    if key not in names:
        raise ValueError(f"key: expected a column of {where}, {names}, got {key!r}")
    of = types[names.index(key)]
    if isinstance(of, pa.DataType) and pa.types.is_nested(of):  # whose values have no hash
        raise TypeError(f"key: expected numbers or strings in {where}, got {of}")
