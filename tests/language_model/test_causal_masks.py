# SPDX-License-Identifier: Apache-2.0
"""Causal masks that a captured pass does without."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from hullkit.language_model import causal_masks
from hullkit.language_model.replaced_globals import Replacement, replaced_globals
from transformers import masking_utils


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers sees it."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)


def mask(attention_mask: Any = None) -> Any:
    from transformers import LlamaConfig

    config = LlamaConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=1)
    config._attn_implementation = "sdpa"
    embeds = torch.zeros(1, 6, 8)
    return masking_utils.create_causal_mask(
        config, embeds, attention_mask, None, position_ids=torch.arange(6)[None]
    )


@pytest.mark.usefixtures("capturing")
def test_no_mask_is_made_for_one_whole_text() -> None:
    positions = torch.arange(6)[None]
    assert masking_utils.find_packed_sequence_indices(positions) is not None
    with replaced_globals(causal_masks.replacements()):
        assert masking_utils.find_packed_sequence_indices(positions) is None
        assert mask() is None


@pytest.mark.usefixtures("capturing")
def test_a_padded_text_keeps_its_mask() -> None:
    padding = torch.tensor([[0, 1, 1, 1, 1, 1]])
    wanted = mask(padding)
    with replaced_globals(causal_masks.replacements()):
        assert torch.equal(mask(padding), wanted)


def test_other_threads_keep_their_functions_and_all_is_put_back() -> None:
    space: dict[str, Any] = {"f": lambda x: x}
    own = space["f"]
    seen = []
    with replaced_globals([Replacement(space, "f", lambda own, x: own(x) + 1)]):
        assert space["f"](1) == 2
        thread = threading.Thread(target=lambda: seen.append(space["f"](1)))
        thread.start()
        thread.join()
        with replaced_globals([Replacement(space, "f", lambda own, x: own(x) + 2)]):
            assert space["f"](1) == 3
        assert space["f"](1) == 2
    assert seen == [1]
    assert space["f"] is own
    with pytest.raises(KeyboardInterrupt), replaced_globals([Replacement(space, "f", print)]):
        raise KeyboardInterrupt
    assert space["f"] is own
