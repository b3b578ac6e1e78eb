import math

import pytest

from diffusers_bitsfusion.codec.grid import check_bits, code_range, cost_in_bits, half_range, levels


@pytest.mark.parametrize(("bits", "codes"), [(1, [-1, 0, 1]), (2, [-2, -1, 0, 1, 2]), (3, list(range(-4, 5)))])
def test_the_balanced_grid_is_symmetric_around_zero(bits, codes):
    low, high = code_range(bits)
    assert list(range(low, high + 1)) == codes


@pytest.mark.parametrize(("bits", "count"), [(1, 3), (2, 5), (3, 9), (4, 17), (5, 33), (6, 65), (7, 129), (8, 255)])
def test_the_balanced_grid_has_one_level_more_than_a_power_of_two(bits, count):
    assert levels(bits) == count
    assert half_range(bits) == (count - 1) // 2
    assert code_range(bits) == (-(count - 1) // 2, (count - 1) // 2)


@pytest.mark.parametrize("bits", range(1, 8))
def test_the_unbalanced_grid_is_twos_complement(bits):
    assert code_range(bits, balance=False) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def test_eight_bits_are_symmetric_int8_either_way():
    assert code_range(8, balance=True) == code_range(8, balance=False) == (-127, 127)


@pytest.mark.parametrize("bits", range(1, 8))
def test_the_cost_is_the_logarithm_of_the_number_of_levels(bits):
    assert cost_in_bits(bits) == pytest.approx(math.log(2**bits + 1) / math.log(2), rel=1e-12)
    assert cost_in_bits(bits, balance=False) == bits


@pytest.mark.parametrize("balance", [True, False])
def test_eight_bits_cost_eight(balance):
    assert cost_in_bits(8, balance) == 8


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_width_of_the_codec_is_accepted(bits):
    assert check_bits(bits) == bits


@pytest.mark.parametrize("bits", [0, -1, 9, 17, 2.0, "2", None, True, math.nan])
def test_an_impossible_width_is_refused_by_name_and_value(bits):
    with pytest.raises(ValueError, match="width of conv_in must be an integer from 1 to 8") as error:
        check_bits(bits, "width of conv_in")
    assert repr(bits) in str(error.value)
