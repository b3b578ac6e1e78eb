import pytest
import torch

from diffusers_bitsfusion.codec.time_table import quantize_table
from diffusers_bitsfusion.nn.time_features import (
    TimeFeatureCache,
    TimeFeaturePassThrough,
    TimeFeatureSlice,
    TimeFeatureTable,
)


def filled_cache(timesteps, features=12):
    torch.manual_seed(0)
    cache = TimeFeatureCache([float(t) for t in timesteps], features)
    exact = torch.randn(len(timesteps), features)
    cache.set_features(exact)
    return cache, exact


def filled_table(function, num_timesteps=50):
    """Table of the features `function(t)` at -1, 0, ..., num_timesteps."""
    features = torch.stack([function(torch.tensor(float(t))) for t in range(-1, num_timesteps + 1)])
    table = TimeFeatureTable(num_timesteps, features.shape[1])
    table.set_codes(*quantize_table(features))
    return table


def waves(t):
    return torch.stack([torch.sin(t / 8 + phase) for phase in (0.0, 1.0, 2.0)])


def test_the_cache_gives_the_fp16_features_of_each_timestep():
    timesteps = [1, 21, 41, 980.5]
    cache, exact = filled_cache(timesteps)
    for i, t in enumerate(timesteps):
        assert torch.equal(cache(torch.tensor([t]))[0], exact[i].half().float())


def test_the_cache_is_lossless_for_fp16_features():
    cache, _ = filled_cache([3, 7])
    features = torch.tensor([[1.5, -0.0, 65504.0, 6e-8], [2**-24, 1e-5, -3.25, 0.1]]).half().float()
    cache.set_features(features)
    assert torch.equal(cache(torch.tensor([3, 7])), features)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32, torch.float64, torch.float16])
def test_timesteps_of_any_dtype_are_found(dtype):
    cache, exact = filled_cache([999, 1, 501])
    found = cache(torch.tensor([501, 999, 501], dtype=dtype))
    assert found.dtype == torch.float32
    assert torch.equal(found, exact[[2, 0, 2]].half().float())


@pytest.mark.parametrize("make", [lambda: filled_cache(range(51))[0], lambda: filled_table(waves)])
def test_a_call_for_each_timestep_is_one_for_all_of_them(make):
    lookup, asked = make(), torch.tensor([3.0, 50.0, 17.0])
    each = torch.func.vmap(lambda t: lookup(t.unsqueeze(0))[0])
    torch.testing.assert_close(each(asked), lookup(asked))
    with pytest.raises(ValueError, match=r"Timestep 63, 77, 110: "):
        each(asked + 60)


@pytest.mark.parametrize("asked", [[2], [1, 2], [1.5], [-1], [float("nan")]])
def test_a_timestep_that_is_not_cached_is_refused_naming_it_and_what_is_there(asked):
    cache, _ = filled_cache([1, 21, 981.25])
    with pytest.raises(ValueError, match=r"cached for the timesteps 1, 21, 981.25 only") as error:
        cache(torch.tensor(asked))
    assert str(error.value).startswith(f"Timestep {asked[-1]:g}: ")
    assert "scheduler" in str(error.value) and 'time_embedding="table"' in str(error.value)


def test_the_message_names_each_missing_timestep_once():
    cache, _ = filled_cache([1, 21])
    with pytest.raises(ValueError, match=r"^Timestep 5, 8: "):
        cache(torch.tensor([8, 21, 5, 8]))


@pytest.mark.parametrize("make", [lambda: filled_cache([1, 5])[0], lambda: filled_table(waves)])
def test_no_cast_changes_the_features(make):
    lookup = make()
    expected = lookup(torch.tensor([1, 5]))
    lookup.half().bfloat16().double()
    assert torch.equal(lookup(torch.tensor([1, 5])), expected)
    assert all(not p.is_floating_point() and not p.requires_grad for p in lookup.parameters())


def test_the_cache_tells_what_it_keeps():
    cache, exact = filled_cache([1, 21, 981.25])
    timesteps, features = cache.features()
    assert timesteps.tolist() == [1, 21, 981.25]
    assert torch.equal(features, exact.half().float())


def test_the_table_gives_scale_times_code_at_whole_steps():
    table = filled_table(waves)
    codes, scale = quantize_table(torch.stack([waves(torch.tensor(float(t))) for t in range(-1, 51)]))
    expected = codes[1:] * scale
    assert table.codes.dtype == torch.uint8
    assert torch.equal(table(torch.arange(51)), expected)
    timesteps, features = table.features()
    assert timesteps.tolist() == list(range(51))
    assert torch.equal(features, expected)


def test_between_whole_steps_a_cubic_is_met_exactly():
    def cubic(t):
        return torch.stack([t**3 - 60 * t**2 + 500 * t + 9, 3 * t - 7, 2 * t**2 + 1])

    table = filled_table(cubic)
    # Codes that are the integer values themselves, so that nothing but the interpolation is measured.
    rows = torch.stack([cubic(torch.tensor(float(t))) for t in range(-1, 51)])
    table.set_codes(rows.to(torch.int16), torch.ones(3))
    asked = torch.tensor([0.0, 0.25, 0.5, 7.75, 24.5, 47.5, 48.0, 48.5, 48.999, 49.0, 49.001, 49.5, 50.0])
    expected = torch.stack([cubic(t.double()) for t in asked]).float()
    torch.testing.assert_close(table(asked), expected, rtol=1e-5, atol=5e-3)


def test_smooth_features_are_met_between_whole_steps():
    table = filled_table(waves)
    asked = torch.linspace(0, 50, 501)
    expected = torch.stack([waves(t) for t in asked])
    assert (table(asked) - expected).norm() / expected.norm() < 0.006


@pytest.mark.parametrize("asked", [-1.0, -0.01, 50.01, 51.0, 1e9, float("inf"), float("nan")])
def test_a_timestep_outside_the_table_is_refused_naming_it_and_the_range(asked):
    with pytest.raises(ValueError, match="cover the timesteps 0 to 50") as error:
        filled_table(waves)(torch.tensor([3.0, asked]))
    assert f"Timestep {asked:g}: " in str(error.value)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float64, torch.float16])
def test_the_table_accepts_timesteps_of_any_dtype(dtype):
    table = filled_table(waves)
    found = table(torch.tensor([7, 49], dtype=dtype))
    assert found.dtype == torch.float32
    assert torch.equal(found, table(torch.tensor([7.0, 49.0])))


def test_the_pass_through_gives_what_it_gets():
    features = torch.randn(2, 3)
    assert TimeFeaturePassThrough()(features) is features
    assert TimeFeaturePassThrough()(features, None) is features


def test_slices_side_by_side_give_all_features():
    features = torch.randn(2, 10)
    lookup = TimeFeatureCache([1.0], 10)
    parts = [TimeFeatureSlice(lookup, *part, torch.float32)(features) for part in ((0, 3), (3, 9), (9, 10))]
    assert [part.shape[1] for part in parts] == [3, 6, 1]
    assert torch.equal(torch.cat(parts, dim=1), features)


def test_a_part_that_is_not_smooth_has_the_table_kept_whole():
    codes = torch.arange(52, dtype=torch.int16).view(52, 1).repeat(1, 3)
    table = TimeFeatureTable(50, 6)
    table.set_codes(codes, torch.ones(3))
    jumps = (codes % 2) * 1000
    table.set_codes(jumps, torch.ones(3), start=3)
    assert table.codes.shape == (52, 12)
    assert torch.equal(table(torch.arange(51)), torch.cat([codes, jumps], dim=1)[1:].float())
    loaded = TimeFeatureTable(50, 6)
    loaded.load_state_dict(table.state_dict())
    assert torch.equal(loaded(torch.arange(51)), table(torch.arange(51)))
