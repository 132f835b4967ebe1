# SPDX-License-Identifier: Apache-2.0
"""Many prompts at once: against PEFT trained alone, beside neighbours, and with bad queries."""

from __future__ import annotations

import math
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import _architectures
import hullkit
import pytest
import torch
from _models import VOCABULARY, gpt2, llama
from _prompts import DEVICE, LR, PRECISIONS, RANK, ROUNDING, batch_of, is_fresh, query, text
from hullkit.language_model.cross_entropy import next_token_losses
from hullkit.prompt_batch import Generate, Score
from torch import Tensor, nn

peft = pytest.importorskip("peft", reason="an extra is not installed")

pytestmark = [pytest.mark.usefixtures("one_thread")]
if DEVICE.type == "cuda":  # there they run on it
    pytestmark += [pytest.mark.gpu]


def by_peft(model: nn.Module, of: hullkit.Query, precision: str) -> tuple[float, nn.Module]:
    """The score by an adapter of PEFT that begins with the same factors; the adapted model."""
    fresh = batch_of(model, 1)
    config = peft.LoraConfig(
        r=RANK, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM",
        fan_in_fan_out=model.config.model_type == "gpt2",
    )  # fmt: skip
    adapted = peft.get_peft_model(model, config)
    factors = fresh._factors.of_slot(0)
    for name, module in adapted.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
            a, b = factors[name.removeprefix("base_model.model.")]
            module.lora_A["default"].weight.data.copy_(a)
            module.lora_B["default"].weight.data.copy_(b)
    precision = precision if DEVICE.type == "cuda" else "float32"
    tuner = hullkit.TestTimeFinetuner(adapted, lr=LR, precision=precision, capture=False)
    tuner.adapt_(of.examples, of.counts)
    assert of.then is not None
    return of.then(adapted.eval()), adapted


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)  # by peft
@pytest.mark.parametrize("make", [llama, gpt2, partial(_architectures.build, "falcon")])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_slot_learns_what_an_adapter_of_peft_learns(
    precision: str, make: Any, tmp_path: Path
) -> None:
    # Of a score, and of logits.
    rough = precision == "tf32" and DEVICE.type == "cuda"
    of_score, of_logits = (2e-2, 5e-2) if rough else (1e-4, 1e-4)
    queries = [query(seed) for seed in range(2)]
    batch = batch_of(make().to(DEVICE), 2, precision=precision)
    answers = batch.adapt_(queries)
    ids = torch.stack([text(12, seed) for seed in range(2)]).to(DEVICE)
    together = batch(ids)
    for k, (of, answer) in enumerate(zip(queries, answers, strict=True)):
        assert answer.error is None
        wanted, adapted = by_peft(make().to(DEVICE), of, precision)
        assert answer.value == pytest.approx(wanted, rel=of_score)
        with torch.no_grad():
            torch.testing.assert_close(
                together[k], adapted(ids[k : k + 1]).logits[0], rtol=of_logits, atol=of_logits
            )
            with batch.slot(k) as model:
                alone = model(ids[k : k + 1]).logits[0]
    bound = of_logits if rough else 1e-5
    torch.testing.assert_close(together[1], alone, rtol=bound, atol=bound)
    batch.export(1, tmp_path)
    loaded = peft.PeftModel.from_pretrained(make().to(DEVICE), str(tmp_path)).eval()
    assert isinstance(loaded, peft.PeftModelForCausalLM)
    with torch.no_grad():
        torch.testing.assert_close(together[1], loaded(ids[1:]).logits[0], rtol=bound, atol=bound)


def test_an_exported_adapter_is_of_its_own_layers(tmp_path: Path) -> None:
    """Where another module's name ends with a layer's."""

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embedding, self.proj = nn.Embedding(VOCABULARY, 12), nn.Linear(12, 12)
            self.block = nn.ModuleDict({"proj": nn.LayerNorm(12)})
            self.head = nn.Linear(12, VOCABULARY)

        def forward(self, ids: Tensor) -> Tensor:
            out: Tensor = self.head(self.block["proj"](self.proj(self.embedding(ids))))
            return out

    batch = batch_of(Named(), 1, target=["proj"], capture=False)
    batch.adapt_([query(0)])
    batch.export(0, tmp_path)
    ids = text(9, 0)[None]
    wanted = batch(ids)
    loaded = peft.PeftModel.from_pretrained(Named(), str(tmp_path))
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_neighbours_change_a_result_by_rounding_alone(precision: str) -> None:
    """In full float32 not even by that."""
    queries = [query(seed) for seed in range(5)]
    one = batch_of(llama().to(DEVICE), 1, precision=precision)
    alone = [a.value for a in one.map(queries)]
    model = llama().to(DEVICE)
    batch = batch_of(model, 3, precision=precision)
    before = {name: p.clone() for name, p in model.named_parameters()}
    together = [*batch.map(queries)]
    assert [a.place for a in together] == list(range(5))
    if precision == "float32":
        assert [a.value for a in together] == alone
        assert [a.losses for a in together] == [a.losses for a in one.map(queries)]
    assert [a.value for a in together] == pytest.approx(alone, rel=ROUNDING)
    assert [a.value for a in batch.map(queries)] == [a.value for a in together]  # the same bits
    assert len({a.value for a in together}) == 5
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.requires_grad
        assert parameter.grad is None
    assert model.training
    assert not any("forward" in m.__dict__ for m in model.modules())


class Unreadable(list[torch.Tensor]):
    def __iter__(self) -> Any:
        raise OSError("disk")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_bad_queries_become_their_own_errors(precision: str) -> None:
    def raises(model: nn.Module) -> float:
        raise KeyError("mine")

    good = [query(seed) for seed in range(3)]
    ids = text(8, 0)
    bad: dict[int, tuple[Any, type[Exception], str]] = {
        1: (good[0]._replace(examples=[ids + VOCABULARY], counts=[1]), ValueError, "ids in"),
        2: (([ids[:0]], [2]), ValueError, "at least 2 tokens"),
        4: (([ids], [0]), ValueError, "counts"),
        5: (([ids, ids], [1]), ValueError, "as counts"),
        7: (hullkit.Query([ids], [4], Score(ids), lr=1e38), FloatingPointError, "finite"),
        8: (([ids], [1], raises), KeyError, "mine"),
        10: (([ids], [1], Score(ids + VOCABULARY)), ValueError, "ids: expected ids in"),
        11: (([ids], [1], Generate(-ids)), ValueError, "ids: expected ids in"),
        9: ("text", TypeError, "Query"),
        12: ((Unreadable([ids]), [1]), OSError, "disk"),
    }
    rest = iter(good)
    mixed = [bad[i][0] if i in bad else next(rest) for i in range(13)]
    batch = batch_of(llama().to(DEVICE), 3, precision=precision)
    wanted = iter([a.value for a in batch.map(good)])
    for answer in batch.map(mixed):
        if answer.place in bad:
            _, kind, words = bad[answer.place]
            assert type(answer.error) is kind
            assert words in str(answer.error)
            assert answer.value is None
        else:
            assert answer.error is None
            assert answer.value == pytest.approx(next(wanted), rel=ROUNDING)


def test_a_closed_stream_leaves_fresh_slots() -> None:
    model = llama().to(DEVICE).eval()
    batch = batch_of(model, 2)
    stream = batch.map(query(seed) for seed in range(5))
    next(stream)
    with pytest.raises(RuntimeError, match="no other map"):
        next(batch.map([query(0)]))
    stream.close()  # type: ignore[attr-defined]
    ids = torch.stack([text(9, 0), text(9, 1)]).to(DEVICE)
    with torch.no_grad():
        torch.testing.assert_close(batch(ids), model(ids).logits, rtol=1e-5, atol=1e-5)


def test_slot_k_is_of_query_k_beside_bad_ones() -> None:
    bad: Any = ([text(5, 0) + VOCABULARY], [1])
    batch = batch_of(llama().to(DEVICE), 3)
    answers = batch.adapt_([bad, query(0), bad])
    assert [a.error is None for a in answers] == [False, True, False]
    assert [is_fresh(batch, k) for k in range(3)] == [True, False, True]


def test_slots_without_a_query_are_fresh() -> None:
    batch = batch_of(llama().to(DEVICE), 2)
    batch.adapt_([query(0), query(1)])
    batch.adapt_([query(0)])
    assert [is_fresh(batch, k) for k in range(2)] == [False, True]
    batch.adapt_([query(0), query(1)])
    next(batch.map([query(0)]))
    assert [is_fresh(batch, k) for k in range(2)] == [True, True]
    batch.adapt_([query(0), query(1)])
    batch.adapt_([])
    assert [is_fresh(batch, k) for k in range(2)] == [True, True]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_learn_too(dtype: torch.dtype) -> None:
    wanted = [a.losses for a in batch_of(llama().to(DEVICE), 2).map([query(0), query(1)])]
    got = [a.losses for a in batch_of(llama().to(DEVICE, dtype), 2).map([query(0), query(1)])]
    for one, other in zip(wanted, got, strict=True):
        assert one == pytest.approx(other, rel=0.02)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64, "meta"])
def test_torchs_defaults_change_nothing(default: Any) -> None:
    layers = nn.Embedding(VOCABULARY, 8), nn.Linear(8, 8), nn.Linear(8, VOCABULARY)
    model, queries = nn.Sequential(*layers).to(DEVICE), [query(0), query(1)]
    wanted = [a.losses for a in batch_of(model, 2).map(queries)]
    dtype = torch.get_default_dtype()
    try:
        with torch.device(default) if default == "meta" else nullcontext():
            if default != "meta":
                torch.set_default_dtype(default)
            batch = batch_of(model, 2)
            answers = [*batch.map(queries)]
    finally:
        torch.set_default_dtype(dtype)
    assert [a.error for a in answers] == [None, None]
    assert [a.losses for a in answers] == wanted


def test_generate_continues_each_row_with_its_slot() -> None:
    batch = batch_of(gpt2().to(DEVICE), 2, lr=0.1)
    batch.adapt_([query(seed)._replace(then=None) for seed in range(2)])
    ids = torch.stack([text(6, 5)] * 2).to(DEVICE)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    out = batch.generate(ids, **options)
    for k in range(2):
        with batch.slot(k) as model:
            assert torch.equal(model.generate(ids[k : k + 1], **options)[0], out[k])
    assert not torch.equal(*out.unbind())


def test_losses_of_several_sequences_are_those_of_each() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 7, generator=generator).to(DEVICE)
    labels = torch.randint(7, (3, 5), generator=generator).to(DEVICE)
    labels[1, 2:], labels[2] = -100, -100
    for backend in (None, "triton"):
        leaf = logits.clone().requires_grad_()
        total, each = next_token_losses(leaf * 1.0, labels, backend=backend)
        total.backward()
        for k in range(2):
            alone = logits[k : k + 1].clone().requires_grad_()
            loss, _ = next_token_losses(alone * 1.0, labels[k : k + 1])
            loss.backward()
            assert float(each[k]) == pytest.approx(float(loss.detach()), rel=1e-6)
            assert leaf.grad is not None
            assert alone.grad is not None
            torch.testing.assert_close(leaf.grad[k], alone.grad[0])
        assert each[2] == 0
        assert not leaf.grad[2].any()


@pytest.mark.parametrize(
    ("options", "words"),
    [({"slots": 0}, "slots"), ({"rank": 0}, "rank"), ({"target": ["nothing"]}, "target"),
     ({"target": "all"}, "target"), ({"betas": (0.9, 1.0)}, "betas"), ({"lr": -1.0}, "lr"),
     ({"lr": math.inf}, "lr: expected a number below inf"),
     ({"eps": math.inf}, "eps: expected a number below inf"),
     ({"slots": "many"}, "slots: expected an int or 'auto', got 'many'"),
     ({"target": []}, "target"),
     ({"target": ["q_proj", "up_prj"]}, "target: expected .*, got none for 'up_prj'")],
)  # fmt: skip
def test_bad_options_are_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        hullkit.PromptBatch(llama(), **options)


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)  # by peft
def test_layers_of_an_adapter_are_refused() -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(llama(), config)
    for target in ("all-linear", ["lora_A.default"], ["base_layer"]):
        with pytest.raises(ValueError, match="expected a model without adapters, got 'base_model"):
            batch_of(adapted, 1, target=target)
    assert batch_of(adapted, 1, target=["up_proj"]).slots == 1  # others may have one


@pytest.mark.parametrize("inference", [False, True])
def test_weights_that_changed_are_read_anew(inference: bool) -> None:
    """Also by `.data`, which moves no version, and by copies that were made in inference mode."""
    model = llama().to(DEVICE)
    batch = batch_of(model, 1, precision="bf16", capture=False)
    ids = text(9, 0).to(DEVICE)[None]
    with torch.inference_mode(inference):
        batch(ids)
    for of_map in (False, True):
        for parameter in model.parameters():
            parameter.data.mul_(1.5)
        other = batch_of(model, 1, precision="bf16", capture=False)
        if of_map:
            answers, wanted = batch.adapt_([query(0)]), other.adapt_([query(0)])
            assert answers == wanted
        else:
            assert torch.equal(batch(ids), other(ids))


@pytest.mark.gpu
@pytest.mark.parametrize("assign", [False, True])
def test_captured_passes_read_weights_that_were_loaded(assign: bool) -> None:
    model = llama().to("cuda")
    batch = batch_of(model, 2, precision="bf16", capture=True)
    batch.adapt_([query(0), query(1)])
    state = {name: 1.5 * tensor for name, tensor in model.state_dict().items()}
    model.load_state_dict(state, assign=assign)
    wanted = batch_of(model, 2, precision="bf16", capture=True).adapt_([query(0), query(1)])
    assert batch.adapt_([query(0), query(1)]) == wanted


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [(lambda batch, ids: batch.slot("0"), TypeError, "k: expected an int, got str"),
     (lambda batch, ids: batch.slot(True), TypeError, "k: expected an int, got bool"),
     (lambda batch, ids: batch.slot(2), IndexError, "k: expected a slot in"),
     (lambda batch, ids: batch.export("0", "."), TypeError, "k: expected an int, got str"),
     (lambda batch, ids: batch([[1, 2], [1, 2]]), TypeError, "input_ids: expected a torch.Tensor"),
     (lambda batch, ids: batch(ids.float()), TypeError, "expected dtype torch.int64"),
     (lambda batch, ids: batch(ids[:1]), ValueError, "input_ids: expected shape"),
     (lambda batch, ids: batch(ids + VOCABULARY), ValueError, r"input_ids\[0\]: expected ids in"),
     (lambda batch, ids: batch(ids - VOCABULARY), ValueError, r"input_ids\[0\]: expected ids in"),
     (lambda batch, ids: batch.generate(ids + VOCABULARY), ValueError, "expected ids in"),
     (lambda batch, ids: batch.adapt_(5), TypeError, "queries: expected a sequence, got int")],
)  # fmt: skip
def test_bad_arguments_are_named(call: Any, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        call(batch_of(llama().to(DEVICE), 2), torch.stack([text(5, 0), text(5, 1)]).to(DEVICE))


def test_a_target_is_a_name_or_names() -> None:
    with pytest.raises(TypeError, match="target: expected 'all-linear' or names, got 5"):
        batch_of(llama(), 1, target=5)
    with pytest.raises(TypeError, match=r"target\[0\]: expected a name, got 5"):
        batch_of(llama(), 1, target=[5])


@pytest.mark.parametrize("lr", [math.inf, 10**400])
def test_a_querys_lr_is_finite(lr: Any) -> None:
    [answer] = batch_of(llama().to(DEVICE), 1).map([([text(5, 0)], [1], Score(text(5, 0)), lr)])
    assert answer.value is None
    assert "lr: expected a number" in str(answer.error)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_captured_passes_give_what_eager_ones_give(dtype: torch.dtype) -> None:
    queries = [query(seed) for seed in range(7)]
    answers = []
    for capture in (False, True):
        batch = batch_of(llama().to("cuda", dtype), 3, capture=capture)
        answers.append([a.losses for a in batch.map(queries)])
        assert batch.path == ("captured" if capture else "eager")
    for one, other in zip(*answers, strict=True):
        assert one == pytest.approx(other, rel=1e-5 if dtype is torch.float32 else 1e-2)


def test_a_forward_that_somebody_replaced_stays() -> None:
    model = llama().to(DEVICE)
    batch = batch_of(model, 1)
    layer = model.model.layers[0].mlp.up_proj
    own = layer.forward = lambda x: x
    with pytest.raises(RuntimeError, match="expected its class's forward"), batch.slot(0):
        pass
    assert layer.__dict__["forward"] is own
    del layer.forward
    with batch.slot(0), pytest.raises(RuntimeError, match="`slot` block"), batch.slot(0):
        pass
    assert "forward" not in layer.__dict__
