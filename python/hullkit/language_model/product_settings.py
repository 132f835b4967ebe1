# SPDX-License-Identifier: Apache-2.0
"""torch's settings of the precision of float32 products, through both of its interfaces."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch


class ProductSettings(NamedTuple):
    """The settings at one moment.

    common: of `torch.set_float32_matmul_precision`. None where torch does not tell it, since the
        newer settings of single backends contradict it.
    single: of the backends, "none" where nothing is set. Empty before torch has such settings.
    """

    common: str | None
    single: tuple[str, ...]

    @classmethod
    def now(cls) -> ProductSettings:
        single = tuple(backend.fp32_precision for backend in _backends())
        try:
            return cls(torch.get_float32_matmul_precision(), single)
        except RuntimeError:
            return cls(None, single)

    def put_back(self) -> None:
        # What is as before is not written: a value of its own would hide a later, wider setting.
        if ProductSettings.now() == self:
            return
        if self.common is not None:
            torch.set_float32_matmul_precision(self.common)
        for backend, value in zip(_backends(), self.single, strict=True):
            backend.fp32_precision = "none"  # torch's wider settings may give the value already
            if backend.fp32_precision != value:
                backend.fp32_precision = value


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Inside the block float32 products are TensorFloat-32 for "tf32", else full float32."""
    common, single = ("high", "tf32") if precision == "tf32" else ("highest", "ieee")
    before = ProductSettings.now()
    # A common "high" does not say that CUDA's products are; "highest" says that none are rounded.
    cuda = before.single[:1]
    if before.common == common and (single == "ieee" or cuda in ((), ("tf32",))):
        yield
        return
    try:
        if before.common is not None:
            torch.set_float32_matmul_precision(common)
        else:
            for backend in _backends():
                backend.fp32_precision = single
        yield
    finally:
        before.put_back()


def _backends() -> tuple[Any, ...]:
    """CUDA's products, then the CPU's; torch has had settings of each since 2.9."""
    cuda: Any = torch.backends.cuda.matmul
    cpu: Any = torch.backends.mkldnn
    return (cuda, cpu.matmul) if hasattr(cuda, "fp32_precision") else ()
