"""Keys and values of the tokens already read, in tensors allocated once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from unmask.model.config import ModelConfig

if TYPE_CHECKING:
    from unmask.model.step import Step


class Cache:
    """Keys and values for `rows` sequences of up to `length` tokens; `lengths_B` counts what each row holds.

    `Decoder.hidden(ids_BT, cache=cache)` writes T tokens of every row at that row's own length and does not
    move the lengths; `advance` does. So prompts of unequal length are padded to the right and advanced by
    their own lengths: what the padding wrote lies beyond, is never attended to, and is overwritten later.

    A cache belongs to one model with the weights of the moment: it may hold them laid out for single steps.
    """

    def __init__(
        self, config: ModelConfig, rows: int, length: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        shape = (config.num_hidden_layers, rows, config.num_key_value_heads, length, config.head_dim)
        # Zeros, not empty: a masked key has weight 0, and 0 · NaN from uninitialised memory would be NaN.
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths_B = torch.zeros(rows, dtype=torch.int64, device=device)
        self.step: Step | None = None

    @property
    def rows(self) -> int:
        return self.k.shape[1]

    @property
    def length(self) -> int:
        return self.k.shape[3]

    def write(
        self, layer: int, k_BTGK: Tensor, v_BTGK: Tensor, positions_BT: Tensor, reach: int
    ) -> tuple[Tensor, Tensor]:
        """Store keys and values at their positions; return views (B, G, reach, K) of the layer."""
        rows = torch.arange(self.rows, device=self.k.device)[:, None]
        self.k[layer].transpose(1, 2)[rows, positions_BT] = k_BTGK.to(self.k.dtype)
        self.v[layer].transpose(1, 2)[rows, positions_BT] = v_BTGK.to(self.v.dtype)
        return self.k[layer, :, :, :reach], self.v[layer, :, :, :reach]

    def advance(self, n_B: Tensor | int) -> None:
        """Count the last n tokens of each row as read."""
        self.lengths_B = self.lengths_B + n_B

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in this order."""
        self.k, self.v, self.lengths_B = self.k[:, rows], self.v[:, rows], self.lengths_B[rows]

    def put(self, rows: Tensor, source: Cache) -> None:
        """Overwrite these rows with those of another cache: prompts that were read apart take free places."""
        n = min(self.length, source.length)
        assert int(source.lengths_B.max()) <= n
        self.k[:, rows, :, :n] = source.k[:, :, :, :n]
        self.v[:, rows, :, :n] = source.v[:, :, :, :n]
        self.lengths_B[rows] = source.lengths_B
