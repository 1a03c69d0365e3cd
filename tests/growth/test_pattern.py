"""Patterns of layers mean what arXiv:2405.15319 means by them."""

import itertools

import hypothesis
import hypothesis.strategies as st
import pytest

from stackjax.growth.pattern import parse_pattern

# Table 5: the pattern, its 24 layers written out from 1, and the share of neighbours that
# are neighbours in the source too.
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
def test_patterns_of_the_paper_make_24_layers_with_its_connection_rates(pattern):
    written_out, rate = TABLE_5[pattern]
    layers = parse_pattern(pattern)
    assert layers == tuple(int(layer) - 1 for layer in written_out)
    assert len(layers) == 24
    kept = sum(b == a + 1 for a, b in itertools.pairwise(layers))
    # The paper prints 60.7 % for 14 of 23, which is 60.9 %.
    assert kept / 23 == pytest.approx(rate, abs=0.0025)


PARTS = st.lists(
    st.tuples(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(1, 4)),
    min_size=1,
    max_size=5,
)


@hypothesis.given(PARTS)
def test_any_list_of_layers_that_is_written_as_a_pattern_reads_back(parts):
    pattern = "-".join(f"({','.join(map(str, run))})*{times}" for run, times in parts)
    expected = [layer - 1 for run, times in parts for layer in run * times]
    assert parse_pattern(pattern) == tuple(expected)


@hypothesis.given(PARTS)
def test_layers_below_ten_need_neither_commas_nor_parentheses(parts):
    parts = [([1 + layer % 9 for layer in run], times) for run, times in parts]
    pattern = "-".join(f"{''.join(map(str, run))}*{times}" for run, times in parts)
    expected = [layer - 1 for run, times in parts for layer in run * times]
    assert parse_pattern(pattern) == tuple(expected)


@hypothesis.given(st.integers(1, 50), st.integers(0, 50))
def test_dots_are_all_layers_from_one_to_the_other(first, more):
    layers = parse_pattern(f"{first}..{first + more}")
    assert layers == tuple(range(first - 1, first + more))


@pytest.mark.parametrize("pattern", ["1, 2 - (3..10)*2 - 11", "1,2-(3..10)*2-11"])
def test_blanks_and_runs_may_be_mixed_with_numbers_of_two_digits(pattern):
    assert parse_pattern(pattern) == (0, 1, *range(2, 10), *range(2, 10), 10)


@pytest.mark.parametrize(
    "pattern", ["", "-", "12-", "1*", "*3", "12**3", "ab", "1..", "(12", "1.5", "12*-3"]
)
def test_what_is_no_pattern_is_named_together_with_the_way_out(pattern):
    with pytest.raises(ValueError, match=r"cannot read .*write parts joined by '-'"):
        parse_pattern(pattern)


@pytest.mark.parametrize("pattern", ["0", "0,1", "5..3", "102"])
def test_layers_count_from_one_and_upwards(pattern):
    with pytest.raises(ValueError, match="patterns count from 1 and runs go upwards"):
        parse_pattern(pattern)


def test_a_part_that_is_repeated_zero_times_is_left_out():
    assert parse_pattern("12-3*0-4") == (0, 1, 3)
    with pytest.raises(ValueError, match=r"'1\*0' has no layers"):
        parse_pattern("1*0")
