# SPDX-License-Identifier: Apache-2.0
"""The factors of all slots in one memory, and their updates."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .._tensors import uses_triton
from .layers import Layer

_ALIGNED = 64  # elements: where a factor begins
_LEAST = 1.1754943508222875e-38  # normal numbers of float32 begin there
_ROWS = 2  # of fresh factors that are kept: the batch's, and those of a query with its own seed
RESET = -1  # in the place of a number of updates


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A host's tensor on the device. The host goes on, whatever the device still has to do."""
    if device.type != "cuda":
        return tensor.to(device)
    # The host would wait for a copy from memory that is not pinned.
    return tensor.pin_memory().to(device, non_blocking=True)


class SlotFactors:
    """The factors of all layers and slots, their gradients and Adam's moments.

    Memory has a row for each slot: the first layer's A (R, I), its B (O, R), the second layer's A,
    and so on. Fresh factors are as PEFT's: A uniform within 1 / sqrt(I), B 0.

    half: the dtype of the copies that products read; None if they read the float32 factors.
    betas, eps: Adam's. unscale: what gradients are multiplied with first, a power of 2.
    spare: whether float32 factors and gradients have one more row beyond those of the slots. A
        captured pass of one text, of whatever slot, works there: `to_spare`, `from_spare`.
    backend: "triton" takes CPU tensors too, in Triton's interpreter.
    """

    def __init__(
        self,
        layers: list[Layer],
        slots: int,
        rank: int,
        device: torch.device,
        half: torch.dtype | None,
        betas: tuple[float, float],
        eps: float,
        unscale: float,
        spare: bool,
        backend: str | None,
    ) -> None:
        self.slots = slots
        self.spare = spare
        self._layers = layers
        self._betas, self._eps, self._unscale, self._backend = betas, eps, unscale, backend
        self._rank = rank
        self._places: list[tuple[int, int]] = []  # in a row: where a factor begins, and its size
        size = 0
        for layer in layers:
            for width in (layer.inputs, layer.outputs):
                self._places.append((size, rank * width))
                size += -(-rank * width // _ALIGNED) * _ALIGNED
        self.params, self.grads = (
            torch.zeros(slots + spare, size, dtype=torch.float32, device=device) for _ in range(2)
        )
        self.exp_avg, self.exp_avg_sq = (
            torch.zeros(slots, size, dtype=torch.float32, device=device) for _ in range(2)
        )
        self.copies = None if half is None else torch.zeros(slots, size, dtype=half, device=device)
        self._share()
        self._initial: dict[int, Tensor] = {}  # rows of fresh factors, by their seed
        # With which slots became fresh, until they are trained.
        self.seeds: list[int | None] = [None] * slots

    def _share(self) -> None:
        """Gives layers their parts of the memory, as views."""
        read = self.params if self.copies is None else self.copies
        for place, layer in enumerate(self._layers):
            of_a, of_b = (self._rank, layer.inputs), (layer.outputs, self._rank)
            layer.a, layer.d_a = (self._factor(m, 2 * place, of_a) for m in (read, self.grads))
            layer.b, layer.d_b = (self._factor(m, 2 * place + 1, of_b) for m in (read, self.grads))

    def _factor(self, memory: Tensor, place: int, shape: tuple[int, int]) -> Tensor:
        """A factor of all rows of a memory."""
        first, size = self._places[place]
        found: Tensor = memory[:, first : first + size].unflatten(1, shape)
        return found

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._share()  # a pickled tensor shares its memory with no other

    @property
    def num_bytes(self) -> int:
        """Bytes of all slots: factors, gradients, moments, and copies."""
        memories = (self.params, self.grads, self.exp_avg, self.exp_avg_sq, self.copies)
        return sum(memory.nbytes for memory in memories if memory is not None)

    def of_slot(self, slot: int) -> dict[str, tuple[Tensor, Tensor]]:
        """Each layer's float32 factors (R, I) and (O, R) of one slot."""
        row = self.params[slot]
        found = [row[first : first + size] for first, size in self._places]
        pairs = zip(self._layers, found[::2], found[1::2], strict=True)
        return {x.name: (a.view(self._rank, -1), b.view(-1, self._rank)) for x, a, b in pairs}

    def to_spare(self, slot: int) -> None:
        """Copies a slot's factors to the row beyond all slots, for a pass."""
        self.params[self.slots].copy_(self.params[slot])

    def from_spare(self, slot: int) -> None:
        """Copies gradients from the row beyond all slots to a slot's."""
        self.grads[slot].copy_(self.grads[self.slots])

    def fresh(self, seed: int) -> Tensor:
        """A row of fresh factors."""
        row = self._initial.pop(seed, None)
        if row is None:
            random = torch.Generator().manual_seed(seed)
            own: Any = {"dtype": torch.float32, "device": "cpu"}  # whatever torch's defaults are
            row = torch.zeros(self.params.shape[1], **own)
            for layer, (first, size) in zip(self._layers, self._places[::2], strict=True):
                a = row[first : first + size].view(self._rank, layer.inputs)
                nn.init.kaiming_uniform_(a, a=math.sqrt(5.0), generator=random)
            row = row.to(self.params.device)
            if len(self._initial) == _ROWS:
                self._initial.pop(next(iter(self._initial)))
        self._initial[seed] = row  # as the latest
        return row

    def reset_(self, slots: Iterable[int], seed: int) -> None:
        """Fresh factors and moments, whatever the slots held."""
        fresh, chosen = self.fresh(seed), set(slots)
        for slot in chosen:
            self.seeds[slot] = None  # until they are
        if uses_triton("params", self.params.device, self._backend):
            steps = [RESET if slot in chosen else 0 for slot in range(self.slots)]
            zeros = [0.0] * self.slots
            control = to_device(self.control(steps, [0] * self.slots, zeros, 1), fresh.device)
            broken = torch.zeros(self.slots, dtype=torch.int32, device=fresh.device)
            self._launch(control, broken, fresh)
        else:
            for slot in chosen:
                self.params[slot].copy_(fresh)
                self.exp_avg[slot].zero_()
                self.exp_avg_sq[slot].zero_()
                self._copy(slot)
        for slot in chosen:
            self.seeds[slot] = seed

    def control(
        self, num_steps: list[int], done: list[int], lr: list[float], capacity: int
    ) -> Tensor:
        """What `update_` obeys, (K, 1 + 2 capacity) float32 on the host: for each slot the number
        of updates, then each one's step size and the number added to its root.

        lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps) is size m / (sqrt(v) + damping) with
        root = sqrt(1 - b2^t), size = lr root / (1 - b1^t), damping = eps root.
        """
        beta1, beta2 = self._betas
        rows = []
        for steps, before, rate in zip(num_steps, done, lr, strict=True):
            row = [float(steps)]
            for t in range(before + 1, before + capacity + 1):
                root = math.sqrt(1.0 - beta2**t)
                damping = max(self._eps * root, _LEAST if self._eps else 0.0)
                row += [rate * root / (1.0 - beta1**t), damping]
            rows.append(row)
        return torch.tensor(rows, dtype=torch.float32, device="cpu")

    def update_(self, control: Tensor, broken: Tensor) -> None:
        """Adam's updates with the gradients in memory.

        Slots without updates are neither read nor written. torch's path reads `control` on the
        host. The kernel reads it on the device, so that a captured launch obeys its new content.

        broken: (K,) int32, set to 1 where a gradient is not finite.
        """
        if uses_triton("params", self.params.device, self._backend):
            self._launch(control, broken, self.params)
            return
        beta1, beta2 = self._betas
        for slot, (steps, *coefficients) in enumerate(control.tolist()):
            if steps <= 0:
                continue
            grad = self.grads[slot] * self._unscale
            if not grad.isfinite().all():
                broken[slot] = 1
            mean, square = self.exp_avg[slot], self.exp_avg_sq[slot]
            for i in range(int(steps)):
                size, damping = coefficients[2 * i : 2 * i + 2]
                mean.lerp_(grad, 1.0 - beta1)
                square.mul_(beta2).addcmul_(grad, grad, value=1.0 - beta2)
                self.params[slot].addcdiv_(mean, square.sqrt().add_(damping), value=-size)
            self._copy(slot)

    def _copy(self, slot: int) -> None:
        if self.copies is not None:
            self.copies[slot].copy_(self.params[slot])

    def _launch(self, control: Tensor, broken: Tensor, fresh: Tensor) -> None:
        from ..triton_kernels.launch import launch
        from ..triton_kernels.multi_tensor import BLOCK_SIZE
        from ..triton_kernels.stacked_adam import BLOCKS

        beta1, beta2 = self._betas
        copies = self.params if self.copies is None else self.copies
        memory = (self.params, self.grads, self.exp_avg, self.exp_avg_sq, copies)
        size = self.params.shape[1]
        options: tuple[Any, ...] = (self._unscale, beta1, 1.0 - beta1, beta2, 1.0 - beta2)
        with torch.cuda.device_of(self.params):
            launch(
                "stacked_adam", (-(-size // (BLOCK_SIZE * BLOCKS)), self.slots),
                (*memory, fresh, control, broken, size, control.shape[1], *options),
                {"COPY": self.copies is not None},
            )  # fmt: skip
