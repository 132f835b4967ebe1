# SPDX-License-Identifier: Apache-2.0
"""Many prompts at once on one frozen model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import check_int, check_tensor
from ..finetune.capture_memory import CaptureMemory
from ..language_model.interface import (
    check_module,
    check_one_process,
    check_token_ids,
    check_trainable,
    knows_longest,
    logits_of,
    longest_padded,
    token_limits,
    without_cache,
)
from ..language_model.lookups import checked_lookups
from ..native.kernels import uninterrupted
from .arguments import BatchArguments, check_slot
from .borrowed import Borrowed
from .captured_steps import CapturedSteps
from .export import write_adapter
from .factors import SlotFactors
from .layers import chosen_layers, device_and_dtype
from .memory import PLANNED, Room, budget, slots_within
from .neighbours import Neighbours
from .passes import SlotPasses
from .queries import Answer, Query, before_a_step, continued
from .runs import Results, Run
from .slot_forwards import SlotForwards
from .stream import Stream
from .untouched import Base

_SCALE = 1024.0  # of a float16 model's loss: its gradients would vanish


class PromptBatch(BatchArguments):
    """K slots, each with its own low-rank adapters, trained on one frozen model.

    A chosen linear layer with weight W computes, for the text of slot k,

        y = x W^T + bias + s (x A_k^T) B_k^T,    s = alpha / rank, or alpha / sqrt(rank) (rslora)

    with A_k (rank, D_in) and B_k (D_out, rank) in float32. A query is trained as
    :class:`TestTimeFinetuner` trains an adapter of PEFT: bursts of `reuse_schedule`, Adam, fresh
    factors (A as PEFT's, B = 0) and moments.

    In half precision and "tf32" a pass has one text of every busy slot, padded to one length, and
    its loss is the sum of the slots' mean next-token cross entropies. A query's results depend on
    its neighbours by rounding alone; with the same neighbours they have the same bits on one
    device. In full float32 every text has a pass of its own, and a query's results have the same
    bits whatever its neighbours are.

    The arguments are attributes. `lr` and `seed` may be set between two queries, for those of their
    own without; the others are what the slots were made for.

    Args:
        model: a causal language model in memory, float32, bfloat16 or float16, on one device. Its
            weights are neither trained nor written. The next `map`, `adapt_`, call or `slot` block
            sees what you write to them. Layers may be bitsandbytes' of 8 or 4 bits.
        slots: K >= 1, prompts at once. "auto": 64 or the largest power of 2 for which `memory` has
            room, with texts of 512 tokens.
        memory: for slots and passes, bytes (int) or a fraction (float) of what is free now. A pass
            that would take more has fewer slots at a time; a text that does not fit alone is an
            error of its query. None: for "auto" all that is free, less 1/16 of a CUDA device; else
            no bound, and fewer slots after a pass ran out of memory.
        rank, alpha, rslora: of the adapters.
        target: "all-linear", every `torch.nn.Linear` or subclass that computes the same, `Conv1D`
            and quantised layer but a transformers model's head; or layers' names, or their ends.
        lr, betas, eps, refresh_interval, seed: as TestTimeFinetuner's; seed is of fresh factors.
        precision: of the passes, as TestTimeFinetuner's: "float32", "tf32" or "bf16". On a CPU
            "tf32" computes in float32, and slots share passes.
        capture: whether passes are CUDA graphs, one for each padded length.
            None: where possible, else eager with a warning. True: an error. False: never.
        backend: "triton" runs the kernels on CPU tensors too, in Triton's interpreter.

    Raises:
        TypeError, ValueError: a bad argument; no such layers; layers of other classes (adapters,
            other quantised ones); learned prompts; parameters on the meta device; no memory.
        RuntimeError: from a pass: a chosen layer ran twice in it.

    >>> import hullkit, torch
    >>> embedding = torch.nn.Embedding(8, 4)
    >>> model = torch.nn.Sequential(embedding, torch.nn.Linear(4, 4), torch.nn.Linear(4, 8))
    >>> batch = hullkit.PromptBatch(model, slots=2, rank=2)
    >>> ids = torch.tensor([1, 2, 3])
    >>> query = hullkit.Query([ids], [5], hullkit.prompt_batch.Score(ids))
    >>> all(answer.error is None for answer in batch.map([query] * 3))
    True

    Cost: for K slots with the sum N of rank (D_in + D_out): 16 N K bytes of factors, gradients and
    moments, 2 N K more for copies where products are in half precision, 8 N more where passes in
    full float32 are captured, and the pass's activations.

    Source: LoRA, arXiv 2106.09685; rsLoRA, arXiv 2312.03732; HullFT's loop, arXiv 2605.30337.
    """

    @torch.inference_mode(False)  # tensors of that mode could not be written to outside of it
    def __init__(
        self,
        model: nn.Module,
        *,
        slots: int | str = 8,
        memory: int | float | None = None,
        rank: int = 16,
        alpha: float = 16.0,
        rslora: bool = False,
        target: str | Sequence[str] = "all-linear",
        lr: float = 1e-3,
        refresh_interval: int = 2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        precision: str = "float32",
        capture: bool | None = None,
        seed: int = 0,
        backend: str | None = None,
    ) -> None:
        check_module(model)
        check_one_process(model)
        check_trainable(model)
        if not isinstance(slots, str):
            check_int("slots", slots, 1)
        elif slots != "auto":
            raise ValueError(f"slots: expected an int or 'auto', got {slots!r}")
        self.model, self.memory, self.target, self.backend = model, memory, target, backend
        self.rank, self.alpha, self.rslora = rank, alpha, rslora
        self.lr, self.refresh_interval, self.betas, self.eps = lr, refresh_interval, betas, eps
        self.precision, self.capture, self.seed = precision, capture, seed
        self._layers = chosen_layers(model, target)
        device, dtype = device_and_dtype(model, self._layers)
        half = torch.bfloat16 if precision == "bf16" else dtype
        apart = half is torch.float32 and precision == "float32"
        captures = capture is not False and device.type == "cuda"
        scale = _SCALE if dtype is torch.float16 else 1.0
        share = self.alpha / (math.sqrt(self.rank) if rslora else self.rank)
        self._forwards = SlotForwards(self._layers, share, backend)
        self._longest = longest_padded(model)  # the length up to which texts are padded
        self._base = Base()
        self._busy = False
        self._runs = False  # a map or adapt_, which has not handed its caller an answer
        self._loads = False  # whether PEFT was seen to load an adapter of these layers

        def make(number: int) -> None:
            self.slots = number
            self._factors = SlotFactors(
                self._layers, number, self.rank, device, None if half is torch.float32 else half,
                self.betas, self.eps, 1.0 / scale, apart and captures and number > 1, backend,
            )  # fmt: skip
            self._passes = SlotPasses(
                model, self._factors, self._forwards, precision=precision, apart=apart,
                capture=capture, scale=scale,
            )  # fmt: skip

        limit = None if memory is None and slots != "auto" else budget(memory, device)
        if isinstance(slots, str):
            assert limit is not None
            make(1)
            text = self._passes.held(min(PLANNED, self._longest or PLANNED)) * self._passes.shares
            own = self._factors.num_bytes
            if apart:  # one text at a time; where passes are captured, half as much as a slot more
                slots = slots_within(limit - text - own // 2 * captures, own)
            else:
                slots = slots_within(limit, own + text)
        make(slots)
        if limit is not None:
            own = self._factors.num_bytes
            if limit <= own:
                raise ValueError(f"memory: expected more than the {own} bytes of {slots} slots")
            limit = (limit - own) // self._passes.shares
        self._room = Room(slots, limit, self._passes.held)
        modules = (layer.module for layer in self._layers)
        self._steps = CapturedSteps(model, modules, CaptureMemory(device) if captures else None)
        passes = self._passes
        self._neighbours = Neighbours(
            passes.logits, passes.logits_of_tried_slots, passes.steps_of_tried_slots, half, slots,
            apart, captures, knows_longest(model),
        )  # fmt: skip
        self._factors.reset_(range(slots), self.seed)
        self._made = True

    @property
    def path(self) -> str:
        """How the latest pass ran: "eager" or "captured"."""
        return self._passes.path

    def map(self, queries: Iterable[Any], *, progress: bool = False) -> Iterator[Answer]:
        """The answers of queries, in order, while later queries are under way.

        A slot that has finished takes the next query. At most 4 K queries are read ahead of the
        answer that is due. A query that fails (a bad id, an empty or too long example, examples
        that raise, a loss or gradient that is not finite, a chosen layer in some of its passes
        alone, an exception of its `then`) has the exception in its answer, and touches no other.

        Args:
            queries: :class:`Query`, or tuples `(examples, counts, then)`.
            progress: whether tqdm, which must be installed, shows a bar.

        Returns:
            An iterator of :class:`Answer`. Slots are fresh when it ends or is closed.

        Raises:
            RuntimeError: another `map` or `adapt_` of this batch is under way, or a `slot` block. A
                `then` has written to a parameter: all later queries would have another base.
            ValueError: a model that is not causal; rows that change each other in shared passes.
            What `queries` or a pass raises, but for lack of memory before a pass's updates.
        """
        answers = self._answers(queries, keep=False)
        if not progress:
            return answers
        from tqdm import tqdm

        return iter(tqdm(answers, total=len(queries) if isinstance(queries, Sequence) else None))

    def adapt_(self, queries: Sequence[Any]) -> list[Answer]:
        """Adapts slot k to query k, and keeps it: for calls, :meth:`slot` and :meth:`export`.

        Args:
            queries: at most K. Slots without a query, and those of failed ones, are fresh.

        Raises:
            TypeError: queries without a length. ValueError: more than there are slots.
            RuntimeError: as `map`.
        """
        if isinstance(queries, Query) or not isinstance(queries, Sequence):
            raise TypeError(f"queries: expected a sequence, got {type(queries).__name__}")
        if len(queries) > self.slots:
            raise ValueError(f"queries: expected at most {self.slots}, got {len(queries)}")
        return list(self._answers(queries, keep=True))

    def _answers(self, queries: Iterable[Any], keep: bool) -> Iterator[Answer]:
        if self._busy:
            raise RuntimeError("expected no other map or adapt_ of this batch under way")
        self._forwards.check_free()  # before slots are fresh again
        stream = Stream(self, queries, keep)  # first: its errors leave the batch free
        del queries  # from Python 3.12 on this frame lives as long as a kept error
        try:
            self._busy = self._runs = True
            for answer in stream:
                self._runs = False
                yield answer
                del answer
                self._runs = True
        finally:
            self._busy = self._runs = False
            uninterrupted(stream.close)

    def _begin(self) -> None:
        """Follows the model."""
        self._passes.follow()

    def _start(self, slot: int, run: Run) -> None:
        """Gives a slot that is fresh the query's seed, if it became so with another one."""
        seed = self.seed if run.query.seed is None else run.query.seed
        if self._factors.seeds[slot] != seed:
            self._factors.reset_([slot], seed)

    def _reset(self, slots: Iterable[int]) -> None:
        self._factors.reset_(slots, self.seed)

    @property
    def _apart(self) -> bool:
        """Whether every text has a pass of its own."""
        return self._passes.apart

    def _pads(self, text: Tensor) -> bool:
        """Whether texts are padded. The first text shows whether they may be."""
        self._passes.compare_losses(text)
        return self._neighbours.pads(text)

    def _takes(self, length: int) -> bool:
        """Whether the model takes texts that are padded to this length."""
        return self._neighbours.takes(length)

    def _num_logits(self, text: Tensor) -> int:
        """How many logits a token has, of a model that does not tell. It runs on two tokens."""
        return self._passes.logits(text[None, :2]).shape[2]

    def _scores(self, length: int) -> bool:
        """Whether a text to score, padded to this length, may be one more of a pass."""
        return self._passes.scores and (self._rows(length) > 1 or self.slots == 1)

    def _rows(self, length: int) -> int:  # slots of a pass of texts that are padded to this length
        return 1 if self._apart else self._room.rows(length)

    def _step(self, tokens: Tensor, first: int, group: list[Run | None]) -> Results:
        """One pass and its updates.

        group: what the slots from `first` on have to do. tokens (2, R, T): their texts and labels.
        """
        self._room.check(tokens.shape[2])
        others = self.slots - first - len(group)
        runs = [*[None] * first, *group, *[None] * others]
        steps = [0 if run is None else run.num_steps for run in runs]
        done = [0 if run is None else run.updates for run in runs]
        lr = [0.0 if run is None else run.lr for run in runs]
        for slot, num_steps in enumerate(steps):
            if num_steps:
                self._factors.seeds[slot] = None
        control = self._factors.control(steps, done, lr, max(1, *steps))
        return Results(*self._passes.run(tokens, first, control), self._passes.left_out)

    # The adapted models.

    def slot(self, k: int) -> AbstractContextManager[nn.Module]:
        """A block in which the model behaves as adapted with slot k, in eval mode. It yields it.

        Parameters need no gradients in it. What saves the model finds the base: see `export`.
        Modules and parameters are the base's, to be read. What is replaced, added, removed, cast or
        moved is put back. Of values there is no copy; a write to `.data` is not seen.

        Raises:
            TypeError: k is no int. IndexError: no such slot.
            RuntimeError: after the block: it changed something, or wrote to a parameter.
        """
        check_slot(k, self.slots)
        block = self._using(k, 1)
        return block.with_inner(self._base.untouched(block))

    def _using(self, first: int, slots: int) -> Borrowed:
        """As `slot`, of batches whose row i runs with slot first + i."""
        # A stream has refreshed the copies as it began. Between two answers the caller may write.
        fresh = nullcontext() if self._runs else self._forwards.refreshed(self.model)
        passes, steps = self._passes, self._steps.block()
        own = (passes.products(), passes.autocast(), fresh, self._forwards.some(first, slots))
        return Borrowed(self.model, passes.stretched, *own, steps)

    def __call__(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        """Logits (K, T, V) of input_ids (K, T): row k by the model as adapted with slot k.

        Raises:
            TypeError, ValueError: bad ids; an input that leads outside a table; rows of a batch
                change each other in this model.
        """
        self._check_rows(input_ids)
        with self._using(0, self.slots), torch.no_grad(), checked_lookups(inputs):
            options = without_cache(self.model) | inputs
            return logits_of(self.model(input_ids, **options), input_ids)

    def generate(self, input_ids: Tensor, **options: Any) -> Tensor:
        """`model.generate(input_ids, **options)`, where row k (K, T) is continued by slot k.

        Raises: as a call; TypeError for a length that is no int; ValueError where a table of
        positions ends before a text does, or a cache mixes rows.
        """
        self._check_rows(input_ids)
        text = before_a_step(self.model, input_ids[0], options)
        if text is not None:
            self._neighbours.check_steps(text)
        with self._using(0, self.slots):
            out: Tensor = continued(self.model, input_ids, options)
            return out

    def _check_rows(self, input_ids: Tensor) -> None:
        """An index outside a table would end the process."""
        check_tensor("input_ids", input_ids)
        if input_ids.ndim != 2 or len(input_ids) != self.slots:
            got = tuple(input_ids.shape)
            raise ValueError(f"input_ids: expected shape ({self.slots}, T), got {got}")
        limits = token_limits(self.model)
        for k, ids in enumerate(input_ids if input_ids.is_meta else input_ids.cpu()):
            check_token_ids(f"input_ids[{k}]", ids, limits, fewest=1)
        self._neighbours.check_rows(input_ids[0])

    def export(self, k: int, directory: str | Path) -> None:
        """Writes slot k as an adapter that `peft.PeftModel.from_pretrained` loads.

        It takes the extra packages peft and safetensors. The logits are the same but for rounding,
        if no hook of a layer changes its input or output: PEFT's adapter is around it. The batch's
        first export is loaded once to see whether PEFT adapts these layers.

        Raises:
            TypeError: k is no int; directory is no path. IndexError: no such slot. ImportError: a
                package is missing.
            ValueError: layers that PEFT does not adapt as they are, as in some models with experts
                or Mamba's; a layer with two names.
        """
        check_slot(k, self.slots)
        write_adapter(
            self.model, self._factors.of_slot(k), self._layers, directory, self.rank,
            self.alpha, self.rslora, check=not self._loads,
        )  # fmt: skip
        self._loads = True

    def release(self) -> None:
        """Frees captured passes and their memory. Slots stay as they are."""
        self._passes.release()
