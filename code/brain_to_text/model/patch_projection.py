"""The first GRU layer's input gates without making patches: half the multiplications, no copy.

Patches overlap: with 14 bins every 4, each bin is multiplied 3.5 times. Read in blocks of one
stride (4 bins), the product of patches and weights is a short convolution over blocks, and four of
its outputs need only 7 products where there are 4 taps (6 where there are 3) instead of 16 (12):
the minimal filtering algorithms F(4, 4) and F(4, 3) of Winograd, "Arithmetic Complexity of
Computations" (1980), built from Toom-Cook's interpolation points.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from .packed_gru import linear

OUTPUTS = 4  # frames computed together
_POINTS = (0.0, 1.0, -1.0, 0.5, -2.0, 2.0)  # and infinity: rounding grows 4 x over plain products


@dataclass(frozen=True)
class Transforms:
    """Matrices of F(m, r): outputs = outputs_from @ ((taps_to @ taps) * (inputs_to @ inputs)).

    outputs_from: [m, n]. taps_to: [n, r]. inputs_to: [n, n], with n = m + r - 1; float32.
    """

    outputs_from: torch.Tensor
    taps_to: torch.Tensor
    inputs_to: torch.Tensor


def minimal_filter(outputs: int, taps: int) -> Transforms:
    """Toom-Cook's algorithm for a correlation, transposed from that for a product of polynomials.

    Args:
        outputs, taps: m and r; m + r - 2 finite points are used, of six.
    """
    n = outputs + taps - 1

    def evaluated(coefficients: int) -> np.ndarray:
        powers = np.vander(np.array(_POINTS[: n - 1]), coefficients, increasing=True)
        return np.vstack(
            [powers, np.eye(coefficients)[-1]]
        )  # the leading one: the value at infinity

    matrices = (evaluated(outputs).T, evaluated(taps), np.linalg.inv(evaluated(n)).T)
    return Transforms(*(torch.tensor(matrix, dtype=torch.float32) for matrix in matrices))


@dataclass
class _Columns:
    """Columns [begin, end) of a block, which the same number of taps sees."""

    begin: int
    end: int
    transforms: Transforms
    weights: torch.Tensor  # [n, G, end - begin]: the transformed taps


class PatchProjection:
    """patches W^T + b from blocks, for overlapping patches.

    Args:
        weight: [G, patch_size * C], bin-major.
        bias: [G].
        patch_size, patch_stride: bins; `suits` says which are possible.
    """

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor, patch_size: int, patch_stride: int
    ) -> None:
        n_features = weight.shape[1] // patch_size
        self.bias = bias
        self.patch_stride = patch_stride
        self.block = patch_stride * n_features
        self.most_taps = -(-patch_size // patch_stride)
        self._columns: list[_Columns] = []
        self._products: torch.Tensor | None = None
        boundary = (patch_size % patch_stride or patch_stride) * n_features
        for begin, end, taps in (
            (0, boundary, self.most_taps),
            (boundary, self.block, self.most_taps - 1),
        ):
            if begin == end:
                continue
            transforms = minimal_filter(OUTPUTS, taps)
            parts = [weight[:, t * self.block + begin : t * self.block + end] for t in range(taps)]
            stacked = torch.stack(parts).view(taps, -1)
            weights = torch.mm(transforms.taps_to, stacked).view(-1, *parts[0].shape)
            self._columns.append(_Columns(begin, end, transforms, weights))

    @staticmethod
    def suits(patch_size: int, patch_stride: int) -> bool:
        """Whether patches overlap in a way that the points at hand can serve: 3 or 4 strides."""
        return patch_stride > 0 and 2 * patch_stride < patch_size <= 4 * patch_stride

    def blocks_of(self, frames: int) -> int:
        """Blocks that a trial of this many frames takes up: whole tiles and what they look at."""
        return -(-frames // OUTPUTS) * OUTPUTS + self.most_taps - 1

    def __call__(self, blocks: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        """[OUTPUTS, tiles, G]: the gates of frame OUTPUTS * tile + output of each tile.

        Args:
            blocks: [M, block] float32, each `patch_stride` bins; trials one after another, each
                with `blocks_of` its frames.
            starts: [tiles] the first block of each tile.
        """
        tiles, width = len(starts), len(self.bias)
        gates: torch.Tensor | None = None
        for columns in self._columns:
            n = len(columns.weights)
            rows = (starts + torch.arange(n).unsqueeze(1)).flatten()
            inputs = blocks[:, columns.begin : columns.end].index_select(0, rows).view(n, -1)
            inputs = torch.mm(columns.transforms.inputs_to, inputs).view(n, tiles, -1)
            products = self._room(n, tiles, width)
            for point, weights in enumerate(columns.weights):
                # every output takes the product at the point 1 once, and so its bias
                bias = self.bias if gates is None and _POINTS[point : point + 1] == (1.0,) else None
                products[point].copy_(linear(inputs[point], weights, bias))
            flat = products.view(n, -1)
            if gates is None:
                gates = torch.mm(columns.transforms.outputs_from, flat)
            else:
                gates.addmm_(columns.transforms.outputs_from, flat)
        assert gates is not None
        return gates.view(OUTPUTS, tiles, width)

    def _room(self, n: int, tiles: int, width: int) -> torch.Tensor:
        """Memory for products, kept: fresh memory costs as much as what is written there."""
        if self._products is None or self._products.numel() < n * tiles * width:
            self._products = self.bias.new_empty(n * tiles * width)
        return self._products[: n * tiles * width].view(n, tiles, width)
