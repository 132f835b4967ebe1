# SPDX-License-Identifier: Apache-2.0
"""What passes replace in a model: reported by name, and left alone with fuse=False."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from _models import COUNTS, Before, distance, gpt2, llama, plain, state, texts
from hullkit.finetune import AdaptReport, TestTimeFinetuner
from torch import Tensor, nn

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = [pytest.mark.plain_memory, pytest.mark.usefixtures("one_thread", "replaced_on_a_cpu")]
if DEVICE.type == "cuda":
    pytestmark.append(pytest.mark.gpu)

LOSS = "transformers.loss.loss_utils.ForCausalLMLoss"
CHECKPOINT = "transformers.modeling_layers.GradientCheckpointingLayer._gradient_checkpointing_func"
LINEAR = "torch.nn.modules.linear.Linear.forward"
EMBEDDING = "torch.nn.modules.sparse.Embedding.forward"
GELU = "transformers.activations.NewGELUActivation.forward"
SILU = "transformers.activations.SiLUActivation.forward"
GATED = "transformers.models.llama.modeling_llama.LlamaMLP.forward"
NORM = "transformers.models.llama.modeling_llama.LlamaRMSNorm.forward"
ROTARY = "transformers.models.llama.modeling_llama.apply_rotary_pos_emb"
# On a GPU the last layer, too, the embedding where it has the same weight, and functions of torch.
ON_GPU = DEVICE.type == "cuda"
TORCH = ("torch.add", "torch.addmm", "torch.nn.functional.gelu", "torch.nn.functional.layer_norm")
HEAD = (LINEAR, ROTARY, "torch.add", "torch.nn.functional.linear")
MODELS = [
    (gpt2, (*((EMBEDDING, LINEAR, *TORCH) if ON_GPU else ()), GELU, LOSS)),
    (llama, (*(HEAD if ON_GPU else ()), SILU, LOSS, GATED, NORM)),
    (plain, ("torch.nn.functional.linear",) if ON_GPU else ()),
]
CAPTURE = [True, False] if DEVICE.type == "cuda" else [False]


def query(model: nn.Module, **options: Any) -> tuple[AdaptReport, dict[str, Tensor]]:
    # An eps above the noise of gradients that are zero, as GPT-2's key biases have them.
    tuner = TestTimeFinetuner(model, lr=1e-3, eps=1e-5, **options)
    with tuner.adapted(texts(), COUNTS):
        weights = state(model)
    assert tuner.last_report is not None
    return tuner.last_report, weights


def replaced(model: nn.Module) -> list[str]:
    names = ("forward", "_loss_function")
    return [name for module in model.modules() for name in names if name in vars(module)]


class Watching:
    """Looks at the whole model as one of its parts runs; the part itself is never replaced."""

    def __init__(self, model: nn.Module) -> None:
        self.seen: list[list[str]] = []
        part = next(m for m in model.modules() if isinstance(m, (nn.Dropout, nn.ModuleList)))
        part = part[0] if isinstance(part, nn.ModuleList) else part
        part.register_forward_pre_hook(lambda *_: self.seen.append(replaced(model)))


@pytest.mark.parametrize("capture", CAPTURE)
@pytest.mark.parametrize("mode", ["reuse", "accumulate"])
@pytest.mark.parametrize(("build", "fused"), MODELS)
def test_what_was_replaced_is_reported(
    build: Callable[[], nn.Module], fused: tuple[str, ...], mode: str, capture: bool
) -> None:
    if capture and mode == "accumulate":
        return  # such passes are never captured
    model = build().to(DEVICE)
    watching = Watching(model)
    options: dict[str, Any] = {"capture": capture, "mode": mode}
    report, weights = query(model, **options)
    assert report.path == ("captured" if capture else "eager")
    assert report.fused == tuple(sorted(fused))
    # Modules, other than functions of torch, can be seen to be replaced.
    assert any(watching.seen) is (
        build is not plain
    )  # not all: the check of padding runs the plain model
    watching.seen.clear()
    report, plain_weights = query(model, fuse=False, **options)
    assert report.fused == ()
    assert watching.seen
    assert not any(watching.seen)
    assert distance(weights, plain_weights) <= 1e-5
    losses = query(model, **options)[0].losses
    assert report.losses == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize("build", [gpt2, llama, plain])
def test_each_query_reports_its_own(build: Callable[[], nn.Module]) -> None:
    """Also one that fails, and the next one after it; graphs of an earlier query count as well."""
    model = build().to(DEVICE)
    tuner = TestTimeFinetuner(model)
    names = []
    for counts in ([1, 0, 0, 0], [1, 1, 0, 2], [1, 0, 0, 0]):
        with tuner.adapted(texts(), counts):
            assert tuner.last_report is not None
            names.append(tuner.last_report.fused)
        assert tuner.last_report.fused == names[-1]
    assert names[1:] == names[:-1]


def test_what_somebody_else_replaced_is_not_reported() -> None:
    model = gpt2().to(DEVICE)
    model.loss_function = lambda logits, labels, **_: logits.float().square().mean()
    report, _ = query(model)
    assert report.fused == (
        *(sorted((*TORCH, "torch.nn.functional.linear")) if ON_GPU else ()),
        GELU,
    )


# transformers renames what turns it on.
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")
def test_gradient_checkpointing_is_reported_and_stays_on() -> None:
    """Eval mode would turn it off: its user asked for it, whatever `fuse` says."""
    model = llama().to(DEVICE)
    model.gradient_checkpointing_enable()
    before = Before(model)
    fused, weights = query(model)
    plain_report, plain_weights = query(model, fuse=False)
    before.check()
    assert plain_report.fused == (CHECKPOINT,)
    assert fused.fused == tuple(sorted((*((LINEAR,) if ON_GPU else ()), LOSS, NORM, CHECKPOINT)))
    assert distance(weights, plain_weights) <= 1e-5


def test_refuses_what_is_no_flag() -> None:
    with pytest.raises(ValueError, match="fuse: expected one of True, False"):
        TestTimeFinetuner(plain(), fuse="no")  # type: ignore[arg-type]
