# SPDX-License-Identifier: Apache-2.0
"""One query's passes and updates: replayed CUDA graphs, or eager passes and why."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .._tensors import DTYPES, is_dense, sharing_memory
from ..language_model.lookups import KnownIndices
from ..language_model.loss import CausalLoss
from ..language_model.own_loss import check_own_labels
from ..language_model.pass_copies import PassCopies, narrowed_tensors
from ..language_model.product_settings import matmul_precision
from . import eager_passes
from .activations import ActivationPlan
from .base_weights import Weights, adam_options
from .capture_memory import NotCapturable
from .captured_passes import CapturedPasses
from .frozen_writes import check_rescaled
from .padding import Inputs
from .report import AdaptReport, Clock, PhaseSeconds, peak_memory
from .rounding import rounding_of
from .schedule import Reuse
from .settings import Settings
from .snapshot import Snapshot


class ModelPasses:
    """A model's loss, and the CUDA graphs of its passes, which stay from query to query."""

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        self.model = model
        self._made_for = settings
        self.loss = CausalLoss(model, *settings.of_loss)
        self.indices = KnownIndices(model)
        self.activations = ActivationPlan(settings.activations)
        self.captured: CapturedPasses | None = None
        self._not_capturable: str | None = None  # why, once an attempt has failed

    def release(self) -> None:
        """Forgets the graphs, that this model could not be captured, and which passes fitted."""
        self.captured = self._not_capturable = None
        self.activations = ActivationPlan(self._made_for.activations)

    def follow(self, settings: Settings) -> None:
        """Makes anew what was made for other settings; a user may set them between two queries."""
        before, self._made_for = self._made_for, settings
        if before.of_loss != settings.of_loss:
            self.loss = CausalLoss(self.model, *settings.of_loss)
        if before.of_graphs != settings.of_graphs:
            self.release()
        if before.capture is not settings.capture:
            self._not_capturable = None  # an error, if it has to be one, is this query's

    def capture(
        self, parameters: list[nn.Parameter], buffers: list[Tensor], settings: Settings
    ) -> CapturedPasses | None:
        """The graphs for the model as it is now, or None if its passes run eagerly."""
        trained = trained_parameters(parameters)
        tensors = [*parameters, *buffers]
        if self.captured is not None and not self.captured.fits(tensors):
            self.captured = None
        if self.eager_reason(trained[0].device, settings) is not None:
            return None  # graphs stay for a query that has other settings
        if self.captured is None:
            try:
                self.captured = CapturedPasses(
                    self.model,
                    tensors,
                    trained,
                    self.loss,
                    self.activations,
                    host_snapshot=settings.snapshot == "host",
                    rounding=rounding_of(self.model, settings.rounding, settings.seed),
                )
            except NotCapturable as error:
                self.fall_back(error, settings)
        return self.captured

    def eager_reason(self, device: torch.device, settings: Settings) -> str | None:
        """Why passes run eagerly; None if they are captured, or an attempt is to be made."""
        if device.type != "cuda":
            if settings.precision == "tf32":
                raise ValueError(f"precision: expected a CUDA device for 'tf32', got {device}")
            if settings.capture:
                raise ValueError(f"capture: expected a CUDA device, got {device}")
            return f"device {device}"
        if settings.capture is False:
            return "capture=False"
        if settings.mode == "accumulate":
            return "mode='accumulate'"
        return self._not_capturable

    def fall_back(self, error: NotCapturable, settings: Settings) -> None:
        """From now on passes run eagerly; a RuntimeError if the user asked for captured ones."""
        if settings.capture:
            raise RuntimeError(f"capture: expected a model that can be captured, got {error}")
        self.captured, self._not_capturable = None, str(error)
        warnings.warn(f"hullkit: passes are not captured: {error}", stacklevel=2)


class QueryRun:
    """The finetuning of one query, in place: `prepare`, then `run` once a snapshot is taken.

    An empty schedule prepares the passes of `inputs` (graphs, compilation) and updates nothing.
    """

    def __init__(
        self,
        passes: ModelPasses,
        settings: Settings,
        inputs: list[Inputs],
        schedule: list[Reuse],
        select_seconds: float | None = None,
    ) -> None:
        self.snapshot_place = settings.snapshot
        self._passes = passes
        self._settings = settings
        self._inputs = inputs
        self._schedule = schedule
        self._select_seconds = select_seconds
        self._captured: CapturedPasses | None = None
        self._fused: tuple[str, ...] = ()
        self._recomputed = False
        self._num_updates = 0

    def prepare(self, parameters: list[nn.Parameter], buffers: list[Tensor]) -> Weights | None:
        """The memory that keeps base values for captured passes; None where passes run eagerly.

        Nothing of the model is written.
        """
        check_rescaled(self._passes.model)
        self._passes.follow(self._settings)
        self._captured = self._passes.capture(parameters, buffers, self._settings)
        return None if self._captured is None else self._captured.weights

    def run(self, snapshot: Snapshot, clock: Clock) -> AdaptReport:
        """Finetunes the model and reports. Gradients are None before and after."""
        # Not kept: graphs that the tuner releases in the block give their memory back at once.
        captured, self._captured = self._captured, None
        losses: list[float] | None = None
        self._passes.loss.fused = ()
        if self._check_indices():
            snapshot.restore_state()
        with matmul_precision(self._settings.precision):
            if captured is not None:
                losses = self._replay(captured, snapshot, clock)
            path = "eager" if losses is None else "captured"
            if losses is None:
                losses = self._run_eagerly(clock)
                self._fused = self._passes.loss.fused
                self._recomputed = any(
                    self._passes.activations.recomputes(self._inputs[example])
                    for example, _ in self._schedule
                )
        return self._report(path, losses, clock)

    def _check_indices(self) -> bool:
        """Checks the indices among the inputs of examples. Whether the model ran for that."""
        passes, ran = self._passes, False
        for i in dict.fromkeys(burst.example for burst in self._schedule):
            run = passes.loss.forward_alone
            ran |= passes.indices.check(f"examples[{i}]", self._inputs[i], run)
        return ran

    def release(self) -> None:
        """Forgets the graphs of the model's passes."""
        self._passes.release()

    def _replay(
        self, captured: CapturedPasses, snapshot: Snapshot, clock: Clock
    ) -> list[float] | None:
        """The losses of captured passes; None if these examples cannot be captured."""
        settings, schedule = self._settings, self._schedule
        most = max((burst.num_steps for burst in schedule), default=1)
        used = {burst.example for burst in schedule} or range(len(self._inputs))
        known = self._passes.loss.in_place  # then `adapted` has checked the labels
        try:
            passes = captured.prepare({i: self._inputs[i] for i in used}, most)
        except NotCapturable as error:
            self._passes.fall_back(error, settings)
            snapshot.restore_state()
            return None
        if self._passes.loss.in_place and not known:
            for i in used:
                labels, ids = self._inputs[i]["labels"], self._inputs[i]["input_ids"]
                check_own_labels(f"examples[{i}]['labels']", labels, ids)
        snapshot.restore_state()
        clock.lap("prepare")
        options = adam_options(settings.lr, settings.betas, settings.eps)
        names = {name for recorded, _ in passes.values() for name in recorded.fused}
        self._fused = tuple(sorted(names))
        self._recomputed = any(recorded.recomputes for recorded, _ in passes.values())
        results = captured.run(passes, schedule, options)
        self._num_updates = sum(burst.num_steps for burst in schedule)
        clock.lap("passes")
        for burst, (loss, finite) in zip(schedule, results, strict=True):
            name = f"examples[{burst.example}]"
            eager_passes.check_finite(f"loss of {name}", loss)
            if not finite:
                raise FloatingPointError(
                    f"largest gradient entry of {name}: expected a finite number, got NaN or "
                    "infinity"
                )
        return [loss for loss, _ in results]

    def _run_eagerly(self, clock: Clock) -> list[float]:
        settings, model, loss_of = self._settings, self._passes.model, self._passes.loss
        plan = self._passes.activations
        parameters = trained_parameters(model.parameters())
        if not self._schedule and not settings.compile:
            return []
        copies = PassCopies(narrowed_tensors(model))
        copies.refresh()
        with copies.in_place():
            if not self._schedule:
                eager_passes.compile_passes(loss_of, self._inputs, parameters)
                return []
            clock.lap("prepare")
            trained = eager_passes.Trained(
                parameters,
                copies,
                rounding_of(model, settings.rounding, settings.seed),
                lr=settings.lr,
                betas=settings.betas,
                eps=settings.eps,
            )
            run = eager_passes.reuse if settings.mode == "reuse" else eager_passes.accumulate
            try:
                losses = run(loss_of, self._inputs, self._schedule, trained, plan, clock)
                self._num_updates = trained.num_updates
                return losses
            finally:
                # A traceback keeps this frame; it must not keep the moments.
                trained.reset()

    def _report(self, path: str, losses: list[float], clock: Clock) -> AdaptReport:
        seconds = clock.seconds()
        eager = path == "eager"
        return AdaptReport(
            num_updates=self._num_updates,
            num_passes=len(losses),
            losses=tuple(losses),
            seconds=PhaseSeconds(
                select=self._select_seconds,
                prepare=seconds.get("prepare", 0.0),
                passes=seconds.get("passes", 0.0),
                updates=seconds.get("updates"),
                restore=None,
            ),
            peak_memory=peak_memory(clock.device),
            path=path,
            reason=self._passes.eager_reason(clock.device, self._settings) if eager else None,
            fused=self._fused,
            activations="recompute" if self._recomputed else "keep",
        )


def check_trained(model: nn.Module) -> None:
    """Refuses parameters with `requires_grad` that the optimizer would not update."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    trained_parameters(parameter for _, parameter in named)
    for name, parameter in named:
        if parameter.dtype not in DTYPES:
            expected = "float64, float32, float16 or bfloat16"
            raise TypeError(f"model: expected dtype {expected}, got {parameter.dtype}: {name!r}")
        if not is_dense(parameter):
            raise ValueError(
                "model: expected elements side by side in memory in parameters with requires_grad, "
                f"got strides {parameter.stride()}: {name!r}"
            )
    _check_apart([(name, p) for name, p in named if type(p) is nn.Parameter])


def _check_apart(named: list[tuple[str, nn.Parameter]]) -> None:
    """Refuses two trained parameters over one memory, which would be updated twice."""
    parameters = [parameter for _, parameter in named]
    places = sharing_memory(parameters, [p.data_ptr() for p in parameters])
    if places is not None:
        one, other = (named[place][0] for place in places)
        raise ValueError(
            "model: expected parameters with requires_grad that share no memory, got two that "
            f"do: {one!r} and {other!r}; tie them by one nn.Parameter"
        )


def trained_parameters(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """The parameters with `requires_grad`; a ValueError if there is none."""
    trained = [p for p in parameters if p.requires_grad]
    if not trained:
        raise ValueError("model: expected a parameter with requires_grad, got none")
    return trained
