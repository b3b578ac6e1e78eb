"""Time features looked up instead of computed (paper, section 3.3 "time embedding caching").

A ResBlock uses the timestep only through F = time_emb_proj(silu(time_embedding(t))). `time_proj` becomes a look-up of
all blocks' F side by side, `time_embedding` passes it on, and each `time_emb_proj` takes its slice. Beside them a
table has time_embedding(t), from which an adapter of a `time_emb_proj` computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..codec.time_table import from_table_bytes, pack_table, packed_rows, table_bytes, unpack_rows
from ..ops.transforms import all_values
from ..utils.private_names import TORCH_ASSERT
from ..utils.reinterpret import reinterpret
from .earlier_states import TakesEarlierStates
from .lazy_weight import LazyWeight, refuse_assigning
from .low_rank_branch import LowRankBranch
from .packed import float_bits, from_float_bits


class TimeFeatures(TakesEarlierStates):
    """Base of the look-ups: timesteps [batch], of any dtype, to features fp32 [batch, features + embedding].

    Attributes:
        num_features (`int`): features of all blocks.
        embedding_width (`int`): width of the time embedding that follows the features; 0 where it is not kept.
    """

    num_features: int
    embedding_width: int = 0

    @property
    def device(self) -> torch.device:
        """Device of the features."""
        return next(self.parameters()).device

    def _require(self, known: Tensor, timesteps: Tensor, problem: str) -> None:
        """Refuse timesteps where `known` is false: at once on a CPU, without a synchronisation elsewhere."""
        known, timesteps = all_values(known), all_values(timesteps)  # torch.func.vmap hides the batch.
        if timesteps.device.type == "cpu" and not torch.compiler.is_compiling():
            if not known.all():
                missing = ", ".join(f"{t:g}" for t in timesteps[~known].unique().tolist())
                raise ValueError(f"Timestep {missing}: {problem}")
        else:
            TORCH_ASSERT.require(torch)(known.all(), problem)


class TimeFeatureCache(TimeFeatures):
    """Features of given timesteps only, as in the paper: lossless in fp16.

    Attributes:
        values (`nn.Parameter`): uint8 [timesteps, 2 * features], the bytes of the fp16 features, see
            `codec.time_table.table_bytes`.
        timesteps (`nn.Parameter`): int32 [timesteps, 1], the bits of the fp32 timesteps.
        known_timesteps (`list[float]`): the same, for messages.
    """

    def __init__(self, timesteps: list[float], features: int) -> None:
        super().__init__()
        self.num_features = features
        self.known_timesteps = timesteps
        self.values = nn.Parameter(torch.empty(len(timesteps), 2 * features, dtype=torch.uint8), requires_grad=False)
        self.timesteps = float_bits(torch.tensor(timesteps, dtype=torch.float32))

    def set_features(self, features: Tensor) -> None:
        """Take features fp32 [timesteps, features] and keep them in fp16."""
        self.values = nn.Parameter(table_bytes(features.to(torch.float16)), requires_grad=False)

    def features(self) -> tuple[Tensor, Tensor]:
        """(timesteps fp32 [T], features fp32 [T, features]) as kept."""
        return self.timesteps.view(torch.float32).view(-1), self.values.view(torch.float16).float()

    def forward(self, timesteps: Tensor) -> Tensor:
        """Return the features of `timesteps` [batch], or of the block."""
        match = timesteps.to(torch.float32).unsqueeze(1) == from_float_bits(self.timesteps)
        have = ", ".join(f"{t:g}" for t in self.known_timesteps)
        self._require(
            match.any(dim=1),
            timesteps,
            f"the time features of this model are cached for the timesteps {have} only. Use a scheduler with these "
            'steps, or quantize with time_embedding="table" for any number of steps.',
        )
        return reinterpret(self.values, torch.float16)[match.to(torch.uint8).argmax(dim=1)].float()


class TimeFeatureTable(TimeFeatures):
    """Features of every training timestep as integers, with cubic interpolation between them.

    It reaches one further than training does, to `num_timesteps`: there flow matching starts, and leading spacing with
    an offset of 1.

    Attributes:
        codes (`nn.Parameter`): what `codec.time_table.pack_table` makes of the codes of num_timesteps + 2 rows, of
            which row i is timestep i - 1: uint8 [packed_rows(num_timesteps + 2), features]; or, where they are not
            smooth, the bytes of 16-bit codes, uint8 [num_timesteps + 2, 2 * features].
        scale (`nn.Parameter`): int32 [features, 1], the bits of the fp32 scales.
        embedding_codes, embedding_scale (`nn.Parameter`): the same of the time embedding before its SiLU, which so can
            be given back, with embedding_width in place of features; where that is not 0.
    """

    def __init__(self, num_timesteps: int, features: int, embedding_width: int = 0) -> None:
        super().__init__()
        self.num_timesteps = num_timesteps
        self.num_features = features
        self.embedding_width = embedding_width
        self.codes = self._room_for(features)
        self.scale = float_bits(torch.empty(features))
        if embedding_width:
            self.embedding_codes = self._room_for(embedding_width)
            self.embedding_scale = float_bits(torch.empty(embedding_width))

    @property
    def rows(self) -> Tensor:
        """Timesteps of the rows, -1 to num_timesteps."""
        return torch.arange(-1, self.num_timesteps + 1)

    def set_codes(self, codes: Tensor, scale: Tensor, start: int = 0) -> None:
        """Take codes int16 [num_timesteps + 2, n] and scale fp32 [n] of the n features from `start` on."""
        part = slice(start, start + len(scale))
        packed = pack_table(codes)
        if packed.dtype != self._table.dtype:  # One part that is not smooth has all parts kept whole.
            whole = table_bytes(unpack_rows(self._table, self._all_rows).to(torch.int16))
            self.codes, packed = nn.Parameter(whole, requires_grad=False), codes
        self._table[:, part] = packed
        from_float_bits(self.scale)[part] = scale

    def set_embedding(self, codes: Tensor, scale: Tensor) -> None:
        """Take the time embedding before its SiLU: codes int16 [num_timesteps + 2, embedding_width] and scale fp32."""
        table = table_bytes(pack_table(codes)).to(self.embedding_codes.device)
        self.embedding_codes = nn.Parameter(table, requires_grad=False)
        from_float_bits(self.embedding_scale).copy_(scale)

    def expect(self, state_dict: Mapping[str, Tensor], prefix: str) -> None:
        """Make room for the tables of `state_dict`, packed or whole, whose shapes differ."""
        for name, columns in (("codes", self.num_features), ("embedding_codes", self.embedding_width)):
            loaded = state_dict.get(f"{prefix}{name}")
            if loaded is not None and name in self._parameters:
                is_whole = tuple(loaded.shape) == (self.num_timesteps + 2, 2 * columns)
                if is_whole != (getattr(self, name).shape[1] == 2 * columns):
                    self.register_parameter(name, self._room_for(columns, is_whole))

    def _room_for(self, columns: int, whole: bool = False) -> nn.Parameter:
        """Return a table of zeros, packed or as bytes of whole codes."""
        rows = self.num_timesteps + 2
        device = self.codes.device if "codes" in self._parameters else None
        shape = (rows, 2 * columns) if whole else (packed_rows(rows), columns)
        return nn.Parameter(torch.zeros(shape, dtype=torch.uint8, device=device), requires_grad=False)

    @property
    def _all_rows(self) -> Tensor:
        return torch.arange(self.num_timesteps + 2, device=self.codes.device)

    @property
    def _table(self) -> Tensor:
        """The codes as `pack_table` gives them, in the memory of the parameter."""
        return from_table_bytes(self.codes.detach(), self.num_features)

    @property
    def _embedding_table(self) -> Tensor:
        return from_table_bytes(self.embedding_codes.detach(), self.embedding_width)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any) -> None:
        self._renew_earlier(state_dict, prefix)
        self.expect(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def features(self) -> tuple[Tensor, Tensor]:
        """(timesteps fp32 [T], features fp32 [T, features]) as kept, timesteps 0 to num_timesteps."""
        codes = unpack_rows(self._table, self._all_rows[1:])
        return self.rows[1:].float(), codes.float() * from_float_bits(self.scale)

    def embedding(self) -> Tensor:
        """Return the time embedding before its SiLU as kept, fp32 [T, embedding_width], timesteps as `features`."""
        codes = unpack_rows(self._embedding_table, self._all_rows[1:])
        return codes.float() * from_float_bits(self.embedding_scale)

    def forward(self, timesteps: Tensor) -> Tensor:
        """Return the features of `timesteps` [batch], or of the block."""
        t = timesteps.to(torch.float32)
        last = self.num_timesteps
        self._require(
            (t >= 0) & (t <= last), timesteps, f"the time features of this model cover the timesteps 0 to {last}."
        )
        return look_up(t, last, *self.tables)

    @property
    def tables(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor] | None]:
        """The table of features and that of the time embedding, as `look_up` takes them, in the parameters' memory."""
        embedding = (self._embedding_table, from_float_bits(self.embedding_scale)) if self.embedding_width else None
        return (self._table, from_float_bits(self.scale)), embedding


def look_up(
    timesteps: Tensor, last: int, table: tuple[Tensor, Tensor], embedding: tuple[Tensor, Tensor] | None
) -> Tensor:
    """Return the features of timesteps in a table, interpolated.

    Args:
        timesteps: fp32 [batch], 0 to `last`.
        last: the last timestep that the table was made for.
        table: codes, as `codec.time_table.pack_table` packs them, and their fp32 scales.
        embedding: the same of the time embedding before its SiLU; None where the table has none.

    Returns:
        fp32 [batch, features], the activated time embedding after them where there is one.
    """
    rows, weights = cubic_weights(timesteps, last)

    def interpolated(codes: Tensor, scale: Tensor) -> Tensor:
        return (unpack_rows(codes, rows).to(torch.float32) * weights).sum(dim=1) * scale

    features = interpolated(*table)
    return features if embedding is None else torch.cat([features, F.silu(interpolated(*embedding))], dim=1)


def cubic_weights(timesteps: Tensor, last: int) -> tuple[Tensor, Tensor]:
    """Return the four rows of a table around each timestep, and their shares in Lagrange's cubic through them.

    The rows are those at -1, 0, 1 and 2 from the whole step, or near the end from an earlier one, where there are such
    rows; on whole steps one of them has the share 1 and the others 0.

    Args:
        timesteps: fp32 [batch], 0 to `last`.
        last: the last timestep that the table was made for.

    Returns:
        Rows int64 [batch, 4] and shares fp32 [batch, 4, 1].
    """
    whole = timesteps.floor().clamp(max=last - 2)
    f = (timesteps - whole).unsqueeze(1)
    weights = torch.stack(
        [
            -f * (f - 1) * (f - 2) / 6,
            (f + 1) * (f - 1) * (f - 2) / 2,
            -(f + 1) * f * (f - 2) / 2,
            (f + 1) * f * (f - 1) / 6,
        ],
        dim=1,
    )
    neighbours = whole.to(torch.int64).unsqueeze(1) + torch.arange(4, device=timesteps.device)
    return neighbours.clamp(0, last + 1), weights


class TimeFeaturePassThrough(nn.Module):
    """Stands where `time_embedding` was: the looked-up features need no MLP."""

    def forward(self, sample: Tensor, condition: None = None) -> Tensor:
        """Return the features of `timesteps` [batch], or of the block."""
        return sample


class TimeFeatureSlice(LowRankBranch):
    """Stands where a block's `time_emb_proj` was: features [batch, all] to the block's own [batch, stop - start].

    With a branch, from merged adapters, its product with the time embedding is added.

    Args:
        lookup: what the features come from.
        start, stop: columns of the block's features.
        dtype: dtype of the weight that `time_emb_proj` had.

    Attributes:
        in_features (`int`): width of the time embedding; 0 where it is not kept, and no adapter can be added.
        out_features (`int`): features of the block.
    """

    _lookup: TimeFeatures

    def __init__(self, lookup: TimeFeatures, start: int, stop: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.__dict__["_lookup"] = lookup  # nn.Module would register an attribute as a submodule.
        self.start, self.stop, self.weight_dtype = start, stop, dtype
        self.in_features, self.out_features = lookup.embedding_width, stop - start
        self.register_parameter("branch_down", None)
        self.register_parameter("branch_up", None)

    @property
    def weight(self) -> Tensor:
        """The weight that there was, of which dtype, device and shape are left."""
        like = torch.empty(self.out_features, self.in_features, dtype=self.weight_dtype, device="meta")
        return LazyWeight(_refuse_weight, like, self._lookup.device, owner=self)

    @weight.setter
    def weight(self, value: Tensor) -> None:
        refuse_assigning(self, value)

    def embedding(self, input: Tensor) -> Tensor:
        """Return silu(time_embedding(t)) [batch, in_features], which `input` has after the features."""
        return input[:, self._lookup.num_features :]

    def forward(self, input: Tensor) -> Tensor:
        """Return the features of `timesteps` [batch], or of the block."""
        features = input[:, self.start : self.stop]
        if not self.branch_rank:
            return features
        down, up = self.branch_down.to(input.dtype), self.branch_up.to(input.dtype)
        return features + F.linear(F.linear(self.embedding(input), down), up)

    def extra_repr(self) -> str:
        """Return what a printed model shows of the slice."""
        return f"{self.start}, {self.stop}"


def _refuse_weight() -> NoReturn:
    raise RuntimeError(
        "The weight of this time_emb_proj is gone: the model keeps the time features that it gave. Quantize with "
        'time_embedding="keep" to keep the weight.'
    )
