# SPDX-License-Identifier: Apache-2.0
"""Passes of texts, each with its slot's factors: eager, or CUDA graphs, one for each length."""

from __future__ import annotations

import gc
import math
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from traceback import clear_frames
from typing import Any

import torch
from torch import Tensor, nn

from ..finetune.capture_memory import CaptureMemory, HeldTensors, NotCapturable, with_gaps
from ..finetune.recorded_passes import RecordedPasses, Recording
from ..language_model.cross_entropy import linear_next_token_losses, next_token_losses
from ..language_model.fused_modules import fused_head_weight, stand_ins
from ..language_model.interface import MODEL_ERRORS, logits_of, trial, without_cache
from ..language_model.loss import CausalLoss, NotCausal
from ..language_model.product_settings import autocast_of_pass, matmul_precision
from ..language_model.products import SharedInputs
from .borrowed import Borrowed
from .factors import SlotFactors, to_device
from .generation_settings import keeps_longest
from .slot_forwards import SlotForwards

_BOUNDLESS = 1 << 62  # bytes
_COMPARED = 64  # tokens of the first text
_MAX_GRAPHS = 64  # texts that share a pass have twice as many lengths as those of a tuner
Block = Callable[[], AbstractContextManager[None]]


class SlotPasses:
    """Forward and backward passes of texts, each with its slot's factors, and the updates.

    apart: whether every text has a pass of its own, so that no other changes its rounding.
    capture: as TestTimeFinetuner's. scale: what the loss is multiplied with, for float16 gradients.
    """

    def __init__(
        self,
        model: nn.Module,
        factors: SlotFactors,
        forwards: SlotForwards,
        *,
        precision: str,
        apart: bool,
        capture: bool | None,
        scale: float,
    ) -> None:
        self._model = model
        self._factors = factors
        self._forwards = forwards
        self._precision = precision
        self.apart = apart
        self._scale = scale
        self._device = factors.params.device
        # Launching a pass of its own for a score takes the host longer than one more text of a pass
        # takes the device. A CPU is not launched.
        self.scores = self._device.type == "cuda" and not apart
        self._anchor = torch.zeros((), dtype=torch.float32, device=self._device, requires_grad=True)
        self._options = without_cache(model)
        self.stretched = [module for module in model.modules() if keeps_longest(module)]
        self._capture = capture
        self._read: list[Any] = []  # the model's tensors when the graphs were recorded
        self._compared = False  # whether a text has shown the model's own loss
        self.path = "eager"
        self.updating = False  # whether a pass has begun its updates: it must not run again
        self.left_out: tuple[str, ...] = ()  # layers that took no part in the latest pass
        if capture and self._device.type != "cuda":
            raise ValueError("capture: expected a model on a CUDA device for True, got a CPU")
        self._graphs: RecordedPasses[_Graph] | None = None  # None: passes run eagerly
        if self._device.type == "cuda" and capture is not False:
            self._graphs = RecordedPasses(model, CaptureMemory(self._device), _MAX_GRAPHS)

    @property
    def shares(self) -> int:
        """Into how many parts memory is split: graphs keep one, and eager passes have one."""
        return 1 if self._graphs is None else 2

    def products(self) -> AbstractContextManager[None]:
        """A block in which products have the precision that was asked for."""
        return matmul_precision("tf32" if self._precision == "tf32" else "float32")

    def autocast(self) -> torch.autocast:
        return autocast_of_pass(self._device.type, self._precision == "bf16")

    def run(self, tokens: Tensor, first: int, control: Tensor) -> tuple[Tensor, Tensor]:
        """Each slot's loss (K,), and 1 (K,) int32 where a gradient was not finite.

        tokens: (2, R, T) int64 on the host: ids, and labels. Row i is of slot first + i.
        control: as `SlotFactors.update_`.

        Raises torch.OutOfMemoryError, after which no factor has changed, unless `updating` says so.
        """
        try:
            return self._run(tokens, first, control)
        except torch.OutOfMemoryError as error:
            if self.updating:
                raise
            clear_frames(error.__traceback__)  # they hold the pass's tensors
            if not self._graphs and tokens.shape[1] > 1:
                raise  # fewer texts at a time need less
        # Graphs of other passes, or what a larger pass has left, may hold what this one needs.
        gc.collect()
        self.release()
        return self._run(tokens, first, control)

    def _training(self, *inner: AbstractContextManager[None]) -> Borrowed:
        """A block for a pass with a backward half, whatever modes of torch the caller is in."""
        modes = (torch.inference_mode(False), torch.enable_grad())
        autocast = torch.autocast(self._device.type, enabled=False)
        own = (autocast, self.products())
        return Borrowed(self._model, self.stretched, *modes, *own, *inner)

    def _run(self, tokens: Tensor, first: int, control: Tensor) -> tuple[Tensor, Tensor]:
        with self._training():
            tokens, control = (t.clone() if t.is_inference() else t for t in (tokens, control))
            # A pass of some slots is a long one, which keeps the device busy without a graph.
            fits = self.apart or tokens.shape[1] == self._factors.slots
            graph = self._graph(tokens) if fits else None
            self.path = "eager" if graph is None else "captured"
            if graph is None:
                losses = self.gradients(to_device(tokens, self._device), first)
            elif self._factors.spare:
                self._factors.to_spare(first)
                losses = graph.replay(tokens)
                self._factors.from_spare(first)
            else:
                losses = graph.replay(tokens)
            # Made before the updates: without memory nothing has happened.
            of_slots = torch.zeros(self._factors.slots, dtype=losses.dtype, device=self._device)
            of_slots[first : first + len(losses)] = losses
            broken = torch.zeros(self._factors.slots, dtype=torch.int32, device=self._device)
            self.left_out = self._forwards.left_out if graph is None else graph.left_out
            control = to_device(control, self._device)
            self.updating = True
            self._factors.update_(control, broken)
            return of_slots, broken

    def logits(self, ids: Tensor, *inner: AbstractContextManager[None]) -> Tensor:
        """Logits (R, T, V) of ids (R, T), by the model without factors.

        inner: blocks around the pass.
        """
        own = (self.products(), self.autocast(), *inner)
        with Borrowed(self._model, self.stretched, *own), torch.no_grad():
            ids = ids.to(self._device)
            return logits_of(self._model(ids, **self._options), ids)

    def compare_losses(self, text: Tensor) -> None:
        """Warns, after the first text, of a model whose own loss is another one than its slots'.

        Raises ValueError for a model that is not causal, where its own loss tells.
        """
        if self._compared or len(text) < 2:
            return
        ids = text[None, :_COMPARED].to(self._device)
        of_model = CausalLoss(self._model, "float32", compile=False, fuse=False)
        losses = None
        try:
            own_modes = Borrowed(self._model, self.stretched)
            with own_modes, torch.no_grad(), trial(self._device):
                losses = of_model.beside_next_tokens(ids)
        except NotCausal:
            raise  # of every text
        except MODEL_ERRORS:
            pass  # a loss that cannot be asked for is nobody's
        self._compared = True
        if losses is None:
            return
        own, learned = map(float, losses)
        # Most models widen their logits for their loss, as the other loss does.
        bound = 1e-4 if losses[0].dtype in (torch.float32, torch.float64) else 0.02
        if not abs(own - learned) <= bound * max(1.0, abs(learned)):
            warnings.warn(
                f"hullkit: slots learn by the mean next-token cross entropy, {learned:.6g} of the "
                f"first text, where the model's own loss is {own:.6g}; TestTimeFinetuner on a PEFT "
                "model trains by that one",
                stacklevel=5,
            )

    def logits_of_tried_slots(self, ids: Tensor, first: int) -> Tensor:
        """As `logits`, where row i goes through slot first + i of `SlotForwards.tried`."""
        with self._forwards.tried():
            return self.logits(ids, self._forwards.some(first, len(ids)))

    def steps_of_tried_slots(
        self, ids: Tensor, first: int, tokens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """A step of `generate` after ids (R, T), where row i goes through slot first + i as above.

        tokens (R,): the first tokens that are added; None: those of the largest logits.

        Returns the step's logits (R, V), and the tokens.
        """
        model: Any = self._model

        def chosen(_: Any, scores: Tensor) -> Tensor:
            if tokens is None:
                return scores
            return torch.full_like(scores, -math.inf).scatter(1, tokens[:, None], 0.0)

        blocks = (self.products(), self.autocast(), self._forwards.some(first, len(ids)))
        with self._forwards.tried(), Borrowed(model, self.stretched, *blocks), torch.no_grad():
            ids = ids.to(self._device)
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, num_beams=1,
                max_new_tokens=2, min_new_tokens=2, pad_token_id=int(ids[0, 0]),
                return_dict_in_generate=True, output_logits=True, logits_processor=[chosen],
            )  # fmt: skip
        return out.logits[1], out.sequences[:, -2]

    def held(self, length: int) -> int:
        """The bytes that a pass of one text of this length holds at a time."""
        held = HeldTensors(self._model, _BOUNDLESS, None)
        with self._training(held.hooks()):
            tokens = torch.zeros(2, 1, length, dtype=torch.int64, device=self._device)
            self.gradients(tokens, 0)
        return with_gaps(held.num_bytes)

    def gradients(self, tokens: Tensor, first: int, served: Block = nullcontext) -> Tensor:
        """Each row's loss (R,). Gradients of its factors are in their memory afterwards.

        first: the row of the factors of the first text.
        """
        ids, labels = tokens.unbind()
        head = fused_head_weight(self._model)
        inputs = SharedInputs()
        pieces = stand_ins(self._model, inputs=inputs, plain_positions=True)
        with self._forwards.learning(first, ids.shape, self._anchor, inputs), served():
            with pieces, self.autocast():
                out = logits_of(self._model(ids, **self._options), ids)
                if head is None:
                    total, losses = next_token_losses(out, labels)
                else:  # the last layer has returned its input
                    total, losses = linear_next_token_losses(out, head, labels)
            if not total.requires_grad:
                ran = "a loss that depends on none" if self._forwards.ran else "none"
                raise RuntimeError(
                    "model: expected chosen layers to run in a pass and its loss to depend on one, "
                    f"got {ran}"
                )
            self._forwards.forget()
            (total * self._scale).backward()
        self._forwards.clear_unlearned()
        return losses

    def _graph(self, tokens: Tensor) -> _Graph | None:
        if self._graphs is None:
            return None
        first = self._factors.slots if self._factors.spare else 0
        try:
            return self._graphs.of(
                tokens.shape[2], lambda recording: _Graph(self, tokens, first, recording)
            )
        except NotCapturable as error:
            if self._capture:
                raise RuntimeError(
                    f"capture: expected a pass that can be recorded: {error}"
                ) from error
            warnings.warn(f"passes run eagerly, for one was not recorded: {error}", stacklevel=5)
            self.release()
            self._graphs = None
            return None

    def follow(self) -> None:
        """Takes the model as it is now. Graphs of other tensors than its present ones are freed.

        Raises RuntimeError for a layer that is no longer the model's, and for another dtype.
        """
        with self._forwards.refreshed(self._model):
            own = [*self._model.parameters(), *self._model.buffers()]
        read = [(t.data_ptr(), t.dtype, t.shape, t.stride()) for t in own]
        if self._graphs and read != self._read:
            self.release()
        self._read = read

    def release(self) -> None:
        """Frees the graphs and their memory."""
        if self._graphs is not None:
            self._graphs.release()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


class _Graph:
    """A captured pass of texts of one length, the first of them with the factors in row `first`."""

    def __init__(self, owner: SlotPasses, tokens: Tensor, first: int, recording: Recording) -> None:
        self._recording = recording
        device = owner._device
        self._tokens = tokens.to(device)
        # Everything lazy is done before the capture.
        held = HeldTensors(owner._model, recording.memory.free(), None)
        with held.hooks():
            owner.gradients(self._tokens, first, recording.noted)
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()

        def recorded() -> None:
            self._losses = owner.gradients(self._tokens, first, recording.served)
            self.left_out = owner._forwards.left_out

        self._graph = recording.graph(with_gaps(held.num_bytes), recorded)

    def replay(self, tokens: Tensor) -> Tensor:
        """The losses, which the next replay overwrites."""
        self._tokens.copy_(tokens.pin_memory(), non_blocking=True)
        self._graph.replay()
        return self._losses
