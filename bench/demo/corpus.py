# SPDX-License-Identifier: Apache-2.0
"""The demo's text: chunks of source files, split by whole file into a pool and held-out queries.

By default the standard library of the interpreter that runs the demo: real text that every machine
has, and that the demo's language model never saw in training.
"""

from __future__ import annotations

import os
import random
import re
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

CHUNK_BYTES = 512
SHINGLE = 13  # words; the length customary for finding near-copies of evaluation text
MAX_OVERLAP = 0.3  # share of a query's shingles that the pool may contain
HELD_OUT_SHARE = 0.1  # of the files
TEXT_SUFFIXES = {".py", ".pyi", ".txt", ".md", ".rst", ".tex", ".c", ".h", ".cc", ".cpp", ".cu"}
TEXT_SUFFIXES |= {".rs", ".go", ".js", ".ts", ".java", ".html", ".json", ".toml", ".yaml"}
# Tests and an editor are another kind of text; codec tables and packed topics are hardly text.
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "turtledemo", "encodings"}
SKIPPED |= {"pydoc_data", "ensurepip", "__pycache__"}


class Chunk(NamedTuple):
    """Consecutive whole lines of one file, at most CHUNK_BYTES of UTF-8."""

    file: str
    text: str


class Split(NamedTuple):
    """Pool and queries; no file has chunks in both."""

    pool: list[Chunk]
    queries: list[Chunk]
    near_copies: int  # chunks of held-out files that were passed over


def stdlib_folder() -> Path:
    """Where the running interpreter keeps its standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def read_chunks(folder: Path) -> dict[str, list[Chunk]]:
    """Chunks of every text file under `folder`, by file."""
    files: dict[str, list[Chunk]] = {}
    for path in tqdm(sorted(text_files(folder)), desc="reading text", unit="file", leave=False):
        name = path.relative_to(folder).as_posix()
        try:
            chunks = split_text(name, path.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            continue
        if chunks:
            files[name] = chunks
    return files


def text_files(folder: Path) -> Iterator[Path]:
    """Text files under `folder`; folders named in SKIPPED are not entered."""
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in SKIPPED]
        for name in names:
            if Path(name).suffix in TEXT_SUFFIXES and not name.startswith("_sysconfigdata"):
                yield Path(root, name)


def split_text(file: str, text: str) -> list[Chunk]:
    """Fill chunks line by line. Left out: pieces under a quarter of a chunk, overlong lines."""
    chunks, lines, size = [], [], 0
    for line in [*text.splitlines(keepends=True), None]:
        length = CHUNK_BYTES if line is None else len(line.encode())
        if size + length > CHUNK_BYTES:
            if size >= CHUNK_BYTES // 4:
                chunks.append(Chunk(file, "".join(lines)))
            lines, size = [], 0
        if line is not None and length <= CHUNK_BYTES:
            lines.append(line)
            size += length
    return chunks


def shingles(text: str) -> set[int]:
    """Hashes of every SHINGLE consecutive words and signs."""
    words = re.findall(r"\w+|[^\w\s]", text)
    joined = ("\0".join(words[i : i + SHINGLE]) for i in range(len(words) - SHINGLE + 1))
    return {zlib.crc32(shingle.encode()) for shingle in joined}


def split(files: dict[str, list[Chunk]], num_queries: int) -> Split:
    """Hold out a tenth of the files; take one chunk from each until there are `num_queries`.

    Deterministic in the file names and texts. A chunk is passed over if more than MAX_OVERLAP of
    its shingles occur in the pool, or if it is under three quarters full.

    Raises:
        ValueError: the text cannot give that many queries.
    """
    order = sorted(files, key=lambda name: zlib.crc32(name.encode()))
    num_held_out = max(1, round(HELD_OUT_SHARE * len(files)))
    held_out, pool_files = order[:num_held_out], order[num_held_out:]
    pool = [chunk for name in sorted(pool_files) for chunk in files[name]]
    known: set[int] = set()
    for chunk in tqdm(pool, desc="shingling the pool", unit="chunk", leave=False):
        known |= shingles(chunk.text)

    queries: list[Chunk] = []
    near_copies = 0
    for name in held_out:
        if len(queries) == num_queries:
            break
        chunks = [c for c in files[name] if len(c.text.encode()) >= 0.75 * CHUNK_BYTES]
        for chunk in random.Random(name).sample(chunks, len(chunks)):
            own = shingles(chunk.text)
            if not own or len(own & known) > MAX_OVERLAP * len(own):
                near_copies += 1
                continue
            queries.append(chunk)
            break
    if len(queries) < num_queries:
        raise ValueError(
            f"--queries: expected at most {len(queries)} for this text ({len(files)} files, "
            f"{len(held_out)} of them held out, one query a file), got {num_queries}"
        )
    return Split(pool, queries, near_copies)
