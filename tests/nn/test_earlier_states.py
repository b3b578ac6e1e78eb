"""State dicts in memory as earlier versions gave them, which differ from those of the files."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_same_tensors
from torch import nn

from diffusers_bitsfusion.codec.rounding import Rounding
from diffusers_bitsfusion.nn.conversion import pack_weight, packed_from_float
from diffusers_bitsfusion.nn.low_rank_time_features import LowRankTimeFeatures
from diffusers_bitsfusion.nn.time_features import TimeFeatureCache, TimeFeatureTable


def cache(seed):
    module = TimeFeatureCache([1.0, 7.0 + seed], 3)
    module.set_features(torch.randn(2, 3, generator=torch.Generator().manual_seed(seed)))
    return module, ["values"]


def whole_table(seed):
    generator = torch.Generator().manual_seed(seed)
    module = TimeFeatureTable(20, 6, embedding_width=4)
    for put, columns in ((module.set_codes, 6), (module.set_embedding, 4)):
        codes = torch.randint(-9000, 9000, (22, columns), dtype=torch.int16, generator=generator)
        put(codes, torch.rand(columns, generator=generator))
    return module, ["codes", "embedding_codes"]


def low_rank(seed):
    module = LowRankTimeFeatures(20, 6, 4, rank=2)
    for value in module.parameters():
        value.copy_(torch.randint(1, 90, value.shape, generator=torch.Generator().manual_seed(seed)))
    return module, ["basis", "coefficients"]


def layer(seed):
    torch.manual_seed(seed)
    plain = nn.Linear(10, 6)
    return pack_weight(packed_from_float(plain, 2, torch.float32), plain.weight, Rounding()), []


@pytest.mark.parametrize("make", [cache, whole_table, low_rank, layer])
@pytest.mark.parametrize("assign", [False, True])
def test_codes_of_16_bits_and_scales_of_one_dimension_load(make, assign):
    (written, of_16_bits), (read, _) = make(0), make(1)
    state = written.state_dict()
    earlier = {
        name: value.view(torch.int16) if name in of_16_bits else value.view(-1) if value.shape[-1] == 1 else value
        for name, value in state.items()
    }
    assert any(value.shape != state[name].shape for name, value in earlier.items())
    outer = nn.Sequential(read)
    outer.load_state_dict({f"0.{name}": value for name, value in earlier.items()}, assign=assign)
    assert_same_tensors(read, written)


def test_an_earlier_table_loads_into_one_that_is_packed_in_8_bits():
    written, _ = whole_table(0)
    read = TimeFeatureTable(20, 6, embedding_width=4)
    state = written.state_dict()
    for name in ("codes", "embedding_codes"):
        state[name] = state[name].view(torch.int16)
    read.load_state_dict(state)
    timesteps = torch.arange(20)
    assert torch.equal(read(timesteps), written(timesteps))
