"""State dicts of earlier versions, which kept the same numbers in other shapes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..codec.time_table import table_bytes


class TakesEarlierStates(nn.Module):
    """Mixin of modules with integer parameters, whose `load_state_dict` takes what earlier versions gave.

    Codes of 16 bits were int16 [rows, n] and are their bytes, uint8 [rows, 2 * n]; bits of floats were int32 [n] and
    are [n, 1].
    """

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any) -> None:
        self._renew_earlier(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _renew_earlier(self, state_dict: dict[str, Tensor], prefix: str) -> None:
        for name, parameter in self._parameters.items():
            value = state_dict.get(f"{prefix}{name}")
            if value is None or parameter is None:
                continue
            if value.dtype == torch.int16:
                state_dict[f"{prefix}{name}"] = table_bytes(value)
            elif value.dtype == torch.int32 and value.dim() == 1:
                state_dict[f"{prefix}{name}"] = value.view(-1, 1)
