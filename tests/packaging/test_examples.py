# SPDX-License-Identifier: Apache-2.0
"""The examples run as they stand, each on its own small data."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "examples"
EXAMPLES = sorted(path.name for path in FOLDER.glob("[0-9]*.py"))
NEEDS = {"04": "faiss", "05": "faiss", "06": "peft", "07": "ray"}


def test_numbering() -> None:
    numbers = [int(name[:2]) for name in EXAMPLES]
    assert numbers == sorted(set(numbers))
    assert len(numbers) >= 5


# PEFT asks transformers by a name that transformers has since deprecated.
# Ray warns about itself, and leaves files and sockets to the end of its processes.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore:.*(deprecated|RAY_).*::ray")
# activeft turns tensors into arrays by a way that NumPy has since deprecated.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", EXAMPLES)
def test_example(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], one_thread: None
) -> None:
    if name[:2] in NEEDS:
        pytest.importorskip(NEEDS[name[:2]], reason="an extra is not installed")
    monkeypatch.syspath_prepend(str(FOLDER))  # as python examples/... does
    monkeypatch.setattr(sys, "argv", [name])
    runpy.run_path(str(FOLDER / name), run_name="__main__")
    sys.modules.pop("passages", None)
    printed = capsys.readouterr().out
    assert printed.strip()
    scores = re.findall(
        r"(?:bits per byte:|base) +([\d.]+).*?adapted +([\d.]+)", printed, re.DOTALL
    )
    assert all(float(adapted) < float(base) for base, adapted in scores)
    assert bool(scores) == (name[:2] in ("02", "03", "06"))
