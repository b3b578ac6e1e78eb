"""Time features of a trained model, which are sums of a few functions of time, looked up as such.

See `codec.low_rank_table` for how the functions and the shares of them are found.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..codec.low_rank_table import LowRankTable
from ..codec.time_table import table_bytes
from ..utils.reinterpret import reinterpret
from .packed import float_bits, from_float_bits
from .time_features import TimeFeatures, cubic_weights


class LowRankTimeFeatures(TimeFeatures):
    """A `TimeFeatureTable` in about `rank` values a feature instead of one for every timestep.

    It covers the same timesteps, with the same interpolation between them.

    Attributes:
        basis (`nn.Parameter`): uint8 [num_timesteps + 2, 2 * rank], the bytes of codes of 16 bits of the functions of
            time, see `codec.time_table.table_bytes`; row i is timestep i - 1.
        basis_scale (`nn.Parameter`): int32 [rank, 1], the bits of their fp32 scales.
        coefficients (`nn.Parameter`): uint8 [rank, 2 * (num_features + embedding_width)], the same of the share that
            each feature has of each function. Columns from `num_features` on are of the time embedding before its
            SiLU.
        scale (`nn.Parameter`): int32 [num_features + embedding_width, 1], the bits of the fp32 scales of features.
    """

    def __init__(self, num_timesteps: int, features: int, embedding_width: int, rank: int) -> None:
        super().__init__()
        self.num_timesteps = num_timesteps
        self.num_features = features
        self.embedding_width = embedding_width
        columns = features + embedding_width
        self.basis = nn.Parameter(torch.empty(num_timesteps + 2, 2 * rank, dtype=torch.uint8), requires_grad=False)
        self.basis_scale = float_bits(torch.empty(rank))
        self.coefficients = nn.Parameter(torch.empty(rank, 2 * columns, dtype=torch.uint8), requires_grad=False)
        self.scale = float_bits(torch.empty(columns))

    @property
    def rank(self) -> int:
        """Number of functions of time."""
        return self.basis.shape[1] // 2

    @property
    def table(self) -> LowRankTable:
        """The table that is kept, which shares memory with the parameters."""
        return LowRankTable(
            reinterpret(self.basis.detach(), torch.int16),
            from_float_bits(self.basis_scale),
            reinterpret(self.coefficients.detach(), torch.int16),
            from_float_bits(self.scale),
        )

    def set_table(self, table: LowRankTable) -> None:
        """Take a table of the sizes of this one."""
        self.basis.copy_(table_bytes(table.basis))
        self.coefficients.copy_(table_bytes(table.coefficients))
        from_float_bits(self.basis_scale).copy_(table.basis_scale)
        from_float_bits(self.scale).copy_(table.scale)

    def features(self) -> tuple[Tensor, Tensor]:
        """(timesteps fp32 [T], features fp32 [T, features]) as kept, timesteps 0 to num_timesteps."""
        timesteps = torch.arange(self.num_timesteps + 1, dtype=torch.float32)
        return timesteps, self.table.dense()[1:, : self.num_features]

    def embedding(self) -> Tensor:
        """Return the time embedding before its SiLU as kept, fp32 [T, embedding_width], timesteps as `features`."""
        return self.table.dense()[1:, self.num_features :]

    def forward(self, timesteps: Tensor) -> Tensor:
        """Return the features of `timesteps` [batch], the activated time embedding after them."""
        t = timesteps.to(torch.float32)
        last = self.num_timesteps
        self._require(
            (t >= 0) & (t <= last), timesteps, f"the time features of this model cover the timesteps 0 to {last}."
        )
        return look_up_sums(t, last, self.table, self.num_features)


def look_up_sums(timesteps: Tensor, last: int, table: LowRankTable, features: int) -> Tensor:
    """Return the features of timesteps in a table of low rank, interpolated.

    Args:
        timesteps: fp32 [batch], 0 to `last`.
        last: the last timestep that the table was made for.
        table: functions of time and shares of them.
        features: number of features; columns after them are of the time embedding before its SiLU.

    Returns:
        fp32 [batch, columns], the activated time embedding after the features.
    """
    rows, weights = cubic_weights(timesteps, last)
    functions = (table.basis[rows].to(torch.float32) * weights).sum(dim=1) * table.basis_scale
    with torch.autocast(timesteps.device.type, enabled=False):
        sums = functions @ table.coefficients.to(torch.float32) * table.scale
    return torch.cat([sums[:, :features], F.silu(sums[:, features:])], dim=1)
