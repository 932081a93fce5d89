"""Which layers of a run attend in 8 bits, where that is faster: those that lose little by it.

INT8 has 255 steps for what a key channel holds; where one channel is a hundred times the others,
they are left with two or three. So a layer is measured on its own exact queries, against all keys:

    e8 = squared error of 8 bits        es = squared error of what stands in for exact attention
    8 bits where sqrt(es + e8) <= 1.1 sqrt(es); without a calibration, and so without es, where
    e8 <= 0.02^2 of the outputs' own square

Source: our own.
"""

from __future__ import annotations

from collections.abc import Hashable

from torch import Tensor

from ...kernels import ops
from ...kernels.types import BlockLayout, EightBit, TokenBlocks
from ..plan import ResolvedPlan

MORE_ERROR = 0.1  # that a layer may have beside what sparsity costs it
OWN_ERROR = 0.02  # where that is not known


class Precision:
    """What one run has found out about 8 bits. calls: how many attended in them."""

    def __init__(self, plan: ResolvedPlan) -> None:
        self.plan, self.calls = plan, 0
        self.fits: dict[Hashable, bool] = {}  # layers that were measured

    @property
    def refused(self) -> int:
        """Layers that stay in 16 bits, since 8 would cost them too much."""
        return sum(not fits for fits in self.fits.values())

    def wanted(self, x: Tensor, rows: int) -> bool:
        """Whether layers attend in 8 bits that may, with so many rows to a query block."""
        if self.plan.precision == "auto":
            return ops.prefers_eight_bit(x.device, rows)
        return self.plan.precision == "8-bit" and ops.eight_bit_works(x.device)

    def open(self, layer: Hashable, x: Tensor, rows: int) -> bool:
        """Whether a layer has still to be measured."""
        return self.plan.precision == "auto" and layer not in self.fits and self.wanted(x, rows)

    def keys_and_values(
        self,
        k: Tensor,
        v: Tensor,
        layer: Hashable,
        layout: BlockLayout,
        means: Tensor | None,
    ) -> EightBit | None:
        """Those of a call that attends in 8 bits. means: of the key blocks, where known."""
        blocks = layout.kv_blocks
        if not self.wanted(k, layout.q_blocks.block_size) or not (
            self.plan.precision == "8-bit" or self.fits.get(layer)
        ):
            return None
        self.calls += 1
        return self.quantized(k, v, blocks, means)

    def quantized(
        self, k: Tensor, v: Tensor, blocks: TokenBlocks, means: Tensor | None
    ) -> EightBit:
        """Both in 8 bits, their means taken off: hidden keys are in no block, and in no mean."""
        backend, sizes = self.plan.backend, blocks.sizes.float()[:, None]
        if means is None:
            means = ops.block_pool(k.detach(), blocks, backend=backend)
        v_means = ops.block_pool(v.detach(), blocks, backend=backend)
        k_mean, v_mean = ((x * sizes).sum(dim=2) / sizes.sum() for x in (means, v_means))
        return ops.quantize_kv(k, v, blocks, k_mean, v_mean, backend=backend)

    def judge(
        self, layer: Hashable, exact: Tensor, eight_bit: Tensor, lost: Tensor | None = None
    ) -> None:
        """Decide for a layer: exact outputs of some queries, and those in 8 bits, any shape.

        lost: the squared error of what stands in for the exact ones, a sum over the same queries.
        """
        error = (eight_bit.double() - exact.double()).square().sum()
        if lost is None:
            allowed = OWN_ERROR**2 * exact.double().square().sum()
        else:
            allowed = ((1 + MORE_ERROR) ** 2 - 1) * lost.double()
        self.fits[layer] = bool(error <= allowed)
