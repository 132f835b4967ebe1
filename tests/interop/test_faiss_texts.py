# SPDX-License-Identifier: Apache-2.0
"""Texts of a corpus that stays on disk."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("faiss", reason="an extra is not installed")

from hullkit.interop.faiss import Texts


def test_texts_by_their_places(tmp_path: Path) -> None:
    parts = ["one", "", "zwölf", "three"]
    data = [part.encode() for part in parts]
    path = tmp_path / "texts"
    path.write_bytes(b"".join(data))
    offsets = np.cumsum([0, *map(len, data)])
    np.save(tmp_path / "offsets.npy", offsets)
    texts = Texts(path, np.load(tmp_path / "offsets.npy", mmap_mode="r"))
    assert list(texts) == parts
    assert (texts[-1], texts[1:3], len(texts)) == ("three", parts[1:3], 4)
    with pytest.raises(IndexError):
        texts[4]
    (tmp_path / "nothing").touch()
    assert list(Texts(tmp_path / "nothing", [0, 0])) == [""]
    with pytest.raises(ValueError, match="offsets: expected places in 14 bytes, got 0 to 99"):
        Texts(path, [0, 99])
    with pytest.raises(ValueError, match=r"offsets\[0\]: expected not to fall, got 5, then 3"):
        Texts(path, [5, 3, 9])[0]
    with pytest.raises(TypeError, match="offsets: expected integers"):
        Texts(path, [0.5, 2.0])
    with pytest.raises(FileNotFoundError):
        Texts(tmp_path / "missing", [0, 1])


def test_texts_that_are_cut_or_counted_in_characters(tmp_path: Path) -> None:
    path = tmp_path / "texts"
    path.write_text("äbcd")
    with pytest.raises(
        ValueError, match=r"offsets\[0\]: expected a text in UTF-8, counted in bytes"
    ):
        Texts(path, [0, 1, 5])[0]
    texts = Texts(path, [0, 2, 5])
    again = pickle.loads(pickle.dumps(texts))
    assert [*again] == [*texts] == ["ä", "bcd"]
    path.write_text("a")
    with pytest.raises(ValueError, match=r"offsets\[1\]: expected bytes 2 to 5, got 1 in all"):
        texts[1]


def test_offsets_that_are_mapped_are_pickled_by_their_file(tmp_path: Path) -> None:
    """A part of them by its values: a file's beginning would be other texts."""
    path, file = tmp_path / "texts", tmp_path / "offsets.npy"
    count = 5000
    path.write_text("".join(f"{i:04}" for i in range(count)))
    np.save(file, 4 * np.arange(count + 1))
    mapped = np.load(file, mmap_mode="r")
    whole, part = Texts(path, mapped), Texts(path, mapped[10:21])
    pickled = pickle.dumps(whole)
    assert len(pickled) < 1000
    for texts in (whole, part):
        again = pickle.loads(pickle.dumps(texts))
        assert [*again] == [*texts]
        assert len(again) in (count, 10)


def test_offsets_beyond_any_file(tmp_path: Path) -> None:
    path = tmp_path / "texts"
    path.write_text("abc")
    for beyond in (2**40, 2**62, 2**64 - 1):
        texts = Texts(path, np.array([0, beyond, 3], np.uint64))
        with pytest.raises(ValueError, match=rf"offsets\[0\]: .* 0 to {beyond}, got 3 in all"):
            texts[0]


def test_offsets_with_a_mask_are_refused(tmp_path: Path) -> None:
    (tmp_path / "texts").write_text("abc")
    with pytest.raises(TypeError, match="offsets: expected an array without a mask"):
        Texts(tmp_path / "texts", np.ma.masked_array([0, 1, 3], mask=[0, 1, 0]))


def test_a_mapping_that_is_not_its_file_is_pickled_by_its_values(tmp_path: Path) -> None:
    """Copy-on-write: what is written in memory never reaches the file."""
    path, file = tmp_path / "texts", tmp_path / "offsets"
    path.write_text("abc")
    file.write_bytes(np.zeros(3, np.int64).tobytes())
    mapped = np.memmap(file, np.int64, "c")
    mapped[:] = [0, 1, 3]
    assert [*pickle.loads(pickle.dumps(Texts(path, mapped)))] == ["a", "bc"]
    shared = np.memmap(file, np.int64, "r+")
    shared[:] = [0, 2, 3]
    assert [*pickle.loads(pickle.dumps(Texts(path, shared)))] == ["ab", "c"]
