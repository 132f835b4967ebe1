# SPDX-License-Identifier: Apache-2.0
"""The precision of products: torch's settings for float32, through both interfaces; autocast."""

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


def autocast_of_pass(device_type: str, enabled: bool) -> torch.autocast:
    """Autocast to bfloat16 for one pass, or none. Weights are cast anew in it.

    torch keeps what it has cast until the outermost autocast ends, also when weights have changed
    by then. The caller, or the model's own forward, may have begun another one.
    """
    torch.clear_autocast_cache()
    return torch.autocast(device_type, torch.bfloat16, enabled=enabled)


def _backends() -> tuple[Any, ...]:
    """CUDA's products, then the CPU's; torch has had settings of each since 2.9."""
    cuda: Any = torch.backends.cuda.matmul
    cpu: Any = torch.backends.mkldnn
    return (cuda, cpu.matmul) if hasattr(cuda, "fp32_precision") else ()
