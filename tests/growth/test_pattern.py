"""Layer patterns in the notation of arXiv:2405.15319."""

import itertools

import hypothesis
import hypothesis.strategies as st
import pytest

from stackjax.growth.pattern import parse_pattern

# Table 5: the pattern, its 24 layers counted from 1, and the connection rate: the share of
# adjacent layer pairs also adjacent in the source.
TABLE_5 = {
    "123456*4": ("123456" * 4, 0.870),
    "12-3456*5-56": ("12" + "3456" * 5 + "56", 0.783),
    "12-345*7-6": ("12" + "345" * 7 + "6", 0.740),
    "123-456*7": ("123" + "456" * 7, 0.740),
    "1234-56*10": ("1234" + "56" * 10, 0.607),
    "12-34*10-56": ("12" + "34" * 10 + "56", 0.607),
    "1-234*7-56": ("1" + "234" * 7 + "56", 0.740),
    "123*7-456": ("123" * 7 + "456", 0.740),
}


@pytest.mark.parametrize("pattern", TABLE_5)
def test_paper_patterns_give_24_layers_and_the_printed_connection_rates(pattern):
    written_out, rate = TABLE_5[pattern]
    layers = parse_pattern(pattern)
    assert layers == tuple(int(layer) - 1 for layer in written_out)
    assert len(layers) == 24
    kept = sum(b == a + 1 for a, b in itertools.pairwise(layers))
    # The paper prints 60.7% for 14/23, but 14/23 is 60.9%.
    assert kept / 23 == pytest.approx(rate, abs=0.0025)


PARTS = st.lists(
    st.tuples(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(1, 4)),
    min_size=1,
    max_size=5,
)


@hypothesis.given(PARTS)
def test_pattern_with_commas_round_trips(parts):
    pattern = "-".join(f"({','.join(map(str, run))})*{times}" for run, times in parts)
    expected = [layer - 1 for run, times in parts for layer in run * times]
    assert parse_pattern(pattern) == tuple(expected)


@hypothesis.given(PARTS)
def test_pattern_of_single_digits_round_trips(parts):
    parts = [([1 + layer % 9 for layer in run], times) for run, times in parts]
    pattern = "-".join(f"{''.join(map(str, run))}*{times}" for run, times in parts)
    expected = [layer - 1 for run, times in parts for layer in run * times]
    assert parse_pattern(pattern) == tuple(expected)


@hypothesis.given(st.integers(1, 50), st.integers(0, 50))
def test_dots_expand_to_an_inclusive_range(first, more):
    layers = parse_pattern(f"{first}..{first + more}")
    assert layers == tuple(range(first - 1, first + more))


@pytest.mark.parametrize("pattern", ["1, 2 - (3..10)*2 - 11", "1,2-(3..10)*2-11"])
def test_pattern_may_mix_spaces_ranges_and_two_digit_layers(pattern):
    assert parse_pattern(pattern) == (0, 1, *range(2, 10), *range(2, 10), 10)


@pytest.mark.parametrize(
    "pattern", ["", "-", "12-", "1*", "*3", "12**3", "ab", "1..", "(12", "1.5", "12*-3"]
)
def test_malformed_pattern_is_rejected_with_the_syntax(pattern):
    with pytest.raises(ValueError, match=r"cannot read .*write parts joined by '-'"):
        parse_pattern(pattern)


@pytest.mark.parametrize("pattern", ["0", "0,1", "5..3", "102"])
def test_layers_count_from_one_and_ranges_ascend(pattern):
    with pytest.raises(ValueError, match="patterns count from 1 and runs go upwards"):
        parse_pattern(pattern)


def test_part_repeated_zero_times_is_dropped():
    assert parse_pattern("12-3*0-4") == (0, 1, 3)
    with pytest.raises(ValueError, match=r"'1\*0' has no layers"):
        parse_pattern("1*0")
