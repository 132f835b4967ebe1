# SPDX-License-Identifier: Apache-2.0
"""hullkit inside Hugging Face code: Trainer, accelerate, PEFT, generate()."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import _models
import hullkit
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

pytest.importorskip("accelerate", reason="the test extra is not installed")

ROWS = [{"input_ids": ids[:9], "labels": ids[:9]} for ids in _models.texts() if len(ids) >= 9]


def trained(folder: Path, optimizer_class: Any, options: dict[str, Any]) -> Any:
    """A tiny Llama after six steps of Trainer: warm-up, decay, clipping, accumulation."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=6,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        warmup_steps=2,
        max_grad_norm=0.5,
        save_strategy="no",
        logging_steps=2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=1,
    )
    model = _models.llama().double()
    model.config.attention_dropout = 0.0
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    trainer = Trainer(
        model,
        arguments,
        train_dataset=ROWS,
        optimizer_cls_and_kwargs=(optimizer_class, options),
    )
    trainer.train()
    return trainer


def test_trainer(tmp_path: Path, one_thread: None) -> None:
    options = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1}
    ours = trained(tmp_path, hullkit.optim.AdamW, options)
    wanted = trained(tmp_path, torch.optim.AdamW, options)
    assert isinstance(ours.optimizer.optimizer, hullkit.optim.AdamW)
    for (name, p), q in zip(ours.model.named_parameters(), wanted.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-9, msg=name)
    for key in ("loss", "learning_rate", "grad_norm"):
        logged = [[e[key] for e in t.state.log_history if key in e] for t in (ours, wanted)]
        assert logged[0] == pytest.approx(logged[1], abs=1e-5), key
        assert logged[0]


def accelerated(optimizer_class: Any) -> tuple[Any, dict[str, Any]]:
    """A plain loop under accelerate, an update for every two batches."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1)).double()
    optimizer = optimizer_class(model.parameters(), lr=1e-2)
    rows = list(torch.randn(8, 5, dtype=torch.float64).unbind())
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=4)
    # Annotated as what they are to the loop: accelerate wraps each.
    prepared: Any = accelerator.prepare(model, optimizer, DataLoader(rows), schedule)
    model, optimizer, batches, schedule = prepared
    for batch in batches:
        with accelerator.accumulate(model):
            accelerator.backward(model(batch).square().mean())
            accelerator.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return optimizer, accelerator.unwrap_model(model).state_dict()


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD"])
def test_accelerate(name: str) -> None:
    optimizer, ours = accelerated(getattr(hullkit.optim, name))
    wanted_optimizer, wanted = accelerated(getattr(torch.optim, name))
    for key, tensor in wanted.items():
        torch.testing.assert_close(ours[key], tensor, rtol=0, atol=1e-12)
    assert optimizer.state_dict().keys() == wanted_optimizer.state_dict().keys()
    # What accelerate wraps is still ours: several updates with one gradient.
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    optimizer.optimizer.step(num_steps=3)
    if name != "SGD":
        steps = [int(state["step"]) for state in optimizer.state.values()]
        assert steps == [4 + 3] * 4


def continued(model: Any, prompt: Tensor) -> list[int]:
    with torch.no_grad():
        out = model.generate(
            input_ids=prompt[None],
            attention_mask=torch.ones_like(prompt)[None],
            max_new_tokens=6,
            do_sample=False,
            pad_token_id=0,
        )
    return list(out[0, len(prompt) :].tolist())


@pytest.mark.parametrize("make", [_models.llama, _models.gpt2])
def test_generate(make: Any) -> None:
    model = make().eval()
    examples, counts, prompt = _models.texts(2), [9, 4], _models.texts()[3][:5]
    base = continued(model, prompt)
    naive = copy.deepcopy(model)
    hullkit.reference.finetune(naive, examples, counts, lr=1e-2)
    tuner = hullkit.TestTimeFinetuner(model, lr=1e-2)
    with tuner.adapted(examples, counts) as adapted:
        ours = continued(adapted, prompt)
    assert ours == continued(naive, prompt)
    assert ours != base
    assert continued(model, prompt) == base


# PEFT asks transformers by a name that transformers has since deprecated.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_lora() -> None:
    peft = pytest.importorskip("peft", reason="the test extra is not installed")
    model = _models.llama()
    bare = _models.state(model)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.5)
    model = peft.get_peft_model(model, config)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    before = _models.Before(model)
    examples, counts, prompt = _models.texts(2), [5, 3], _models.texts()[3]
    naive = copy.deepcopy(model)
    hullkit.reference.finetune(naive, examples, counts, lr=2e-2)

    tuner = hullkit.TestTimeFinetuner(model, lr=2e-2)
    with tuner.adapted(examples, counts) as adapted:
        score = hullkit.bits_per_byte(adapted, prompt, 24)
        assert score == pytest.approx(hullkit.bits_per_byte(naive, prompt, 24), abs=1e-5)
        assert continued(adapted, prompt) == continued(naive, prompt)
        moved = {
            name
            for name, p in adapted.named_parameters()
            if not torch.equal(p, before.bits[name][2])
        }
    assert moved == trained
    assert len(trained) == 8
    before.check()
    assert hullkit.bits_per_byte(model, prompt, 24) != score
    for name, tensor in model.unload().state_dict().items():
        assert torch.equal(tensor, bare[name]), name
