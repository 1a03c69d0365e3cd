"""Text form of growths: parsing, printing, overrides and errors."""

import dataclasses
import re
from fractions import Fraction

import hypothesis
import hypothesis.strategies as st
import pytest
from conftest import GROWTHS, tiny_run

from stackjax.config_file import flatten, load_config
from stackjax.growth import (
    DepthFresh,
    DepthRandom,
    DepthUpscale,
    DepthZero,
    ExpertsCopy,
    Growth,
    InsertBlock,
    Interleave,
    LayerMap,
    Learn,
    Noise,
    Shrink,
    Stack,
    Untie,
    Upcycle,
    WidthRandom,
    WidthSplit,
    WidthZero,
    chain,
    parse_growth,
)
from stackjax.growth.base import operators
from stackjax.growth.text import replace_field
from stackjax.runtime.errors import UserError

HALF_MORE = Fraction(3, 2)
BUILT_IN = {
    name: kind for name, kind in operators().items() if kind.__module__.startswith("stackjax.")
}

WHOLE = st.integers(1, 1000)
RATIOS = st.integers(1, 9) | st.fractions(1, 5, max_denominator=9)
PATTERNS = st.lists(
    st.tuples(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(1, 3)),
    min_size=1,
    max_size=4,
).map(lambda parts: " - ".join(f"({', '.join(map(str, run))})*{n}" for run, n in parts))
WIDTHS = {
    "embed": RATIOS,
    "mlp": RATIOS,
    "heads": WHOLE,
    "kv_heads": st.none() | WHOLE,
}
POSITIVE = st.floats(1e-37, 1e37)
SHARE = st.floats(0, 1, width=32, allow_subnormal=False)
OPEN = [
    st.builds(Stack, WHOLE),
    st.builds(Interleave, WHOLE),
    st.builds(LayerMap, st.lists(st.integers(0, 99), min_size=1).map(tuple) | PATTERNS),
    st.builds(DepthUpscale, WHOLE),
    st.builds(InsertBlock, WHOLE, st.sampled_from(["middle", "last", "center"])),
    st.builds(DepthFresh, WHOLE),
    st.builds(
        DepthZero,
        WHOLE,
        st.sampled_from(["interleave", "stack"]),
        st.sampled_from(["copy", "fresh"]),
    ),
    st.builds(
        WidthSplit,
        **WIDTHS,
        split=st.sampled_from(["even", "uneven"]),
        noise=st.just(0.0) | POSITIVE,
        new_units=st.sampled_from(["same_layer", "next_layer"]),
    ),
    st.builds(WidthZero, **WIDTHS),
    st.builds(
        Learn,
        factor=WHOLE,
        embed=RATIOS,
        mlp=RATIOS,
        heads=WHOLE,
        fit_steps=WHOLE,
        learning_rate=POSITIVE,
    ),
    st.builds(Untie, WHOLE),
    st.builds(Noise, SHARE),
    st.builds(Shrink, st.floats(0.001, 1)),
]
# Masked operators come last in a chain.
MASKED = [
    st.builds(
        DepthRandom,
        WHOLE,
        WHOLE,
        st.sampled_from(["interleave", "stack"]),
        st.sampled_from(["fresh", "copy"]),
        st.sampled_from(["together", "bottom_up"]),
    ),
    st.builds(
        WidthRandom,
        **WIDTHS,
        mask_tokens=WHOLE,
        phases=st.sampled_from(["in_turn", "together"]),
        init=st.sampled_from(["fresh", "copy"]),
    ),
]
ANY_GROWTH = st.tuples(
    st.lists(st.one_of(OPEN), min_size=1, max_size=3), st.lists(st.one_of(MASKED), max_size=2)
).map(lambda links: chain(*links[0], *links[1])) | st.one_of(MASKED)


@pytest.mark.parametrize("name", GROWTHS)
def test_growth_text_round_trips(name):
    assert parse_growth(str(GROWTHS[name])) == GROWTHS[name]


def test_growth_table_has_every_operator():
    links = [
        link for growth in GROWTHS.values() for link in getattr(growth, "growths", (growth,))
    ]
    # Operators for other models have tables of their own: test_untie.py for looped models,
    # test_growth_of_experts.py for experts.
    others = {Untie, Upcycle, ExpertsCopy}
    assert {type(link) for link in links} | others == set(BUILT_IN.values())


@hypothesis.settings(max_examples=200, deadline=None)
@hypothesis.given(ANY_GROWTH)
def test_random_growth_text_round_trips(growth):
    assert parse_growth(str(growth)) == growth


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(ANY_GROWTH, st.data())
def test_whitespace_around_punctuation_is_ignored(growth, data):
    blanks = st.sampled_from(["", " ", "  ", "\t", "\n"])
    spaced = re.sub(
        r" *([(),=*\[\]]|(?<!e)\+) *",  # but keep the plus sign in 1e+16
        lambda mark: data.draw(blanks) + mark[1] + data.draw(blanks),
        f" {growth} ",
    )
    assert parse_growth(spaced) == growth


# The text of growths: a single field by value, other fields by name unless default.
WRITTEN = {
    "stack(4)": Stack(),
    "layer_map([0,1,1,2])": LayerMap((0, 1, 1, 2)),
    "layer_map(1,2-(3..10)*2)": LayerMap("1, 2 - (3..10)*2"),
    "insert_block(size=2)": InsertBlock(2),
    "depth_random(factor=2, mask_tokens=128)": DepthRandom(2, 128),
    "width_split()": WidthSplit(),
    "width_split(embed=2, mlp=3/2, kv_heads=1)": WidthSplit(2, HALF_MORE, kv_heads=1),
    "stack(2) + noise(1e-05)": chain(Stack(2), Noise(1e-5)),
}


@pytest.mark.parametrize("text", WRITTEN)
def test_growth_text_is_short(text):
    assert str(WRITTEN[text]) == text


# Alternative texts for a growth.
SAME = {
    "stack()": Stack(4),
    "stack(factor=2)": Stack(2),
    "stack(2e0)": Stack(2),
    "layer_map(layers=12-3*2)": LayerMap("12-3*2"),
    "layer_map((1..3)*2-4)": LayerMap("(1..3)*2-4"),
    "layer_map((1,2)*2-(3..10)) + noise(.5)": chain(LayerMap("(1,2)*2-(3..10)"), Noise(0.5)),
    "layer_map([0, 1_0, 2e0])": LayerMap((0, 10, 2)),
    "depth_random(2, 2e6)": DepthRandom(2, 2_000_000),
    "depth_random(2, mask_tokens=2_000_000)": DepthRandom(2, 2_000_000),
    "depth_random(mask_tokens=9007199254740993, factor=2)": DepthRandom(2, 2**53 + 1),
    "depth_zero(2, stack, fresh)": DepthZero(2, order="stack", rest="fresh"),
    "width_split(3/2, 1.5)": WidthSplit(embed=HALF_MORE, mlp=HALF_MORE),
    "width_split(embed=4/2, kv_heads=none)": WidthSplit(embed=2),
    "width_zero(2, 2, 2, 1)": WidthZero(embed=2, mlp=2, heads=2, kv_heads=1),
    "width_random(embed=2, mask_tokens=1e3)": WidthRandom(embed=2, mask_tokens=1000),
    "learn(2, fit_steps=1e2, learning_rate=1e-3)": Learn(2),
    "noise(1e+0)": Noise(1.0),
}


@pytest.mark.parametrize("text", SAME)
def test_text_accepts_positional_fields_and_exponents(text):
    assert parse_growth(text) == SAME[text]


CANNOT_READ = r"cannot read {}; write operators with their fields, joined by '\+'"
RATIO = r"it must be a whole number, or a ratio such as 3/2\."
LAYERS = r"it must be a text, or a list from 0 such as \[0,1,1,2\]\."

# Invalid texts and the expected error messages.
WRONG = {
    "": CANNOT_READ.format("''"),
    "stack": CANNOT_READ.format("'stack'"),
    "stack 2": CANNOT_READ.format("'stack 2'"),
    "stack(2": CANNOT_READ.format(r"'stack\(2'"),
    "(2)": CANNOT_READ.format(r"'\(2\)'"),
    "stack(2)+": CANNOT_READ.format("''"),
    "+stack(2)": CANNOT_READ.format("''"),
    "stack(2) noise(0.2)": r"stack has factor '2\) noise\(0\.2'; it must be a whole number",
    "stak(2)": "there is no operator 'stak'; there are .*stack",
    "Stack(2)": "there is no operator 'Stack'; there are .*stack",
    "stack(2)+nose(1)": "there is no operator 'nose'; there are .*noise",
    "stack(2, 3)": "stack takes factor, no more",
    "depth_zero(2, stack, fresh, 1)": "depth_zero takes factor, order, rest, no more",
    "stack(2, factor=3)": "stack has 'factor' twice",
    "stack(g=2)": "stack has no field 'g'; it has factor",
    "stack(=2)": "stack has no field ''; it has factor",
    "width_split(width=2)": "has no field 'width'; it has embed, mlp, heads, kv_heads, split",
    "layer_map(map=12)": "layer_map has no field 'map'; it has layers",
    "layer_map()": "layer_map needs layers",
    "depth_random()": "depth_random needs factor, mask_tokens",
    "width_random(2)": "width_random needs mask_tokens",
    "stack(two)": r"stack has factor 'two'; it must be a whole number\.",
    "stack(1.5)": r"stack has factor '1\.5'; it must be a whole number\.",
    "stack(,)": r"stack has factor ''; it must be a whole number\.",
    "stack(2))": r"stack has factor '2\)'; it must be a whole number\.",
    "stack(2)stack(2)": r"stack has factor '2\)stack\(2'; it must be a whole number\.",
    "stack(nan)": "stack has factor 'nan'; it must be a whole number",
    "stack(inf)": "stack has factor 'inf'; it must be a whole number",
    "depth_random(2, 1e999)": "has mask_tokens '1e999'; it must be a whole number",
    "width_split(heads=3/2)": r"width_split has heads '3/2'; it must be a whole number\.",
    "width_split(kv_heads=3/2)": r"kv_heads '3/2'; it must be a whole number, or none\.",
    "width_split(embed=two)": rf"width_split has embed 'two'; {RATIO}",
    "width_split(embed=3/0)": rf"width_split has embed '3/0'; {RATIO}",
    "width_split(mlp=inf)": rf"width_split has mlp 'inf'; {RATIO}",
    "width_split(mlp=1e9999999999)": rf"width_split has mlp '1e9999999999'; {RATIO}",
    "width_split(mlp=1e-9999999999)": rf"width_split has mlp '1e-9999999999'; {RATIO}",
    "width_split(split=odd)": r"split 'odd'; it must be one of even, uneven\.",
    "insert_block(2, first)": r"at 'first'; it must be one of middle, last, center\.",
    "noise(some)": r"noise has alpha 'some'; it must be a number\.",
    "noise(nan)": r"noise has alpha 'nan'; it must be a number\.",
    "width_split(noise=inf)": r"width_split has noise 'inf'; it must be a number\.",
    "learn(learning_rate=nan)": r"learn has learning_rate 'nan'; it must be a number\.",
    "layer_map([0,x])": rf"layer_map has layers '\[0,x\]'; {LAYERS}",
    "layer_map([0,1.5])": rf"layer_map has layers '\[0,1\.5\]'; {LAYERS}",
    "layer_map([0,inf])": rf"layer_map has layers '\[0,inf\]'; {LAYERS}",
    "layer_map([])": rf"layer_map has layers '\[\]'; {LAYERS}",
    "layer_map([0,1)": r"cannot read .*; write parts joined by '-'",
    "layer_map((1..3)": r"cannot read '\(1\.\.3'; write parts joined by '-'",
    "layer_map(1 2)": r"cannot read .*; write parts joined by '-'",
    "layer_map(0)": "patterns count from 1",
    "layer_map(1..9999999999)": "more layers than 10000",
    "layer_map(12*9999999999999999999)": "more layers than 10000",
    "layer_map([-1])": "layer_map.layers.0 is -1; it must be at least 0",
    "stack(0)": "stack.factor is 0; it must be at least 1",
    "depth_upscale(0)": "depth_upscale.drop is 0; it must be at least 1",
    "insert_block(0)": "insert_block.size is 0; it must be at least 1",
    "depth_random(2, 0)": "depth_random.mask_tokens is 0; it must be at least 1",
    "width_split(embed=1/2)": "width_split.embed is 1/2; it must be at least 1",
    "width_split(noise=-1)": r"width_split.noise is -1\.0; it must be at least 0",
    "learn(fit_steps=0)": "learn.fit_steps is 0; it must be at least 1",
    "shrink(0)": r"shrink.factor is 0\.0; it must be at least 0\.001 and at most 1",
    "noise(2)": r"noise.alpha is 2\.0; it must be at least 0 and at most 1",
    "depth_random(2, 8)+stack(2)": r"stack\(2\) follows depth_random.*masks comes last",
}


@pytest.mark.parametrize("text", WRONG)
def test_invalid_text_is_rejected_with_the_reason(text):
    with pytest.raises(ValueError, match=WRONG[text]):
        parse_growth(text)


WORDS = [*BUILT_IN, *"()[]+-*,=./ e_0123456789", "..", "inf", "nan", "embed", "layers", "٣"]


@st.composite
def damaged(draw) -> str:
    """Draws the text of a growth with one piece replaced."""
    text = str(draw(ANY_GROWTH))
    start = draw(st.integers(0, len(text)))
    stop = draw(st.integers(start, min(len(text), start + 4)))
    return text[:start] + draw(st.just("") | st.sampled_from(WORDS)) + text[stop:]


@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(st.text() | st.lists(st.sampled_from(WORDS)).map("".join) | damaged())
def test_any_text_round_trips_or_raises_value_error(text):
    try:
        growth = parse_growth(text)
    except ValueError as error:
        assert str(error)
    else:
        assert isinstance(growth, Growth)
        assert parse_growth(str(growth)) == growth


PAIRS = st.one_of(*(st.tuples(kind, kind) for kind in OPEN + MASKED))


@hypothesis.settings(max_examples=120, deadline=None)
@hypothesis.given(PAIRS)
def test_replace_field_accepts_the_text_of_any_field(pair):
    growth, other = pair
    for field in dataclasses.fields(growth):
        value = getattr(other, field.name)
        text = str(list(value) if isinstance(value, tuple) else value)
        replaced = replace_field(growth, field.name, text)
        assert replaced == dataclasses.replace(growth, **{field.name: value})


# The config file imports the tiny run from conftest.
FILE = """
import dataclasses

from conftest import tiny_run
from stackjax.growth import parse_growth

def get_config():
    config = tiny_run()
    growth = parse_growth({growth!r})
    last = dataclasses.replace(config.stages[1], growth=growth)
    return dataclasses.replace(config, stages=(config.stages[0], last))
"""


@pytest.fixture
def load(tmp_path):
    """Loads a run with this growth in its second stage, plus overrides."""

    def load(growth, *args):
        path = tmp_path / "experiment.py"
        path.write_text(FILE.format(growth=growth))
        return load_config("train", ["--config", str(path), *args])

    return load


# The growth in the file, the command line, and the expected growth.
OVERRIDES = [
    ("stack(3)", ["--stages.1.growth", "width_split(embed=2)"], "width_split(embed=2)"),
    ("stack(3)", ["--stages.1.growth=stack(2)+noise(0.1)"], "stack(2) + noise(0.1)"),
    ("stack(3)", ["--stages.1.growth", "layer_map((1..3)*2)"], "layer_map((1..3)*2)"),
    ("stack(3)", ["--stages.1.growth.factor", "2"], "stack(2)"),
    ("stack(3)", ["--stages.1.growth.factor=2e0"], "stack(2)"),
    ("learn(2)", ["--stages.1.growth.fit-steps", "1e3"], "learn(2, fit_steps=1000)"),
    ("learn(2)", ["--stages.1.growth.fit_steps", "7"], "learn(2, fit_steps=7)"),
    ("width_zero(2)", ["--stages.1.growth.mlp", "3/2"], "width_zero(2, mlp=3/2)"),
    ("width_zero(2, kv_heads=1)", ["--stages.1.growth.kv-heads", "None"], "width_zero(2)"),
    (
        "depth_zero(2)",
        ["--stages.1.growth.rest", "fresh", "--stages.1.growth.order", "stack"],
        "depth_zero(2, stack, fresh)",
    ),
    (
        "stack(3)",
        ["--stages.1.growth", "depth_zero(2)", "--stages.1.growth.rest", "fresh"],
        "depth_zero(2, rest=fresh)",
    ),
    (
        "stack(3)",
        ["--stages.1.growth.factor", "2", "--stages.1.growth", "interleave(2)"],
        "interleave(2)",
    ),
]


@pytest.mark.parametrize(("growth", "args", "expected"), OVERRIDES)
def test_command_line_overrides_a_growth_or_its_fields_in_order(load, growth, args, expected):
    config = load(growth, *args, "--seed", "7")
    assert config.stages[1].growth == parse_growth(expected)
    differing = flatten(config).items() ^ flatten(load(growth)).items()
    assert {name for name, _ in differing} == {"stages.1.growth", "seed"}


@pytest.mark.parametrize("nothing", ["None", "none"])
def test_command_line_can_remove_a_growth(load, nothing):
    assert load("stack(3)", "--stages.1.growth", nothing).stages[1].growth is None


def test_command_line_can_add_a_growth(load):
    config = load("stack(3)", "--stages.0.growth", "stack(2)", "--stages.0.growth.factor", "5")
    assert [stage.growth for stage in config.stages] == [Stack(5), Stack(3)]


# The growth in the file, the command line, and the expected message.
REFUSED = [
    ("stack(3)", ["--stages.1.growth", "stak(2)"], "there is no operator 'stak'"),
    ("stack(3)", ["--stages.1.growth"], "cannot read ''"),
    ("stack(3)", ["--stages.1.growth.factor"], "stack has factor ''"),
    ("stack(3)", ["--stages.1.growth.factor", "x"], "stack has factor 'x'"),
    ("stack(3)", ["--stages.1.growth.depth", "2"], "has no field 'depth'; it has factor"),
    (
        "stack(3)+noise(0.1)",
        ["--stages.1.growth.alpha", "0.2"],
        "stack(3) + noise(0.1) has several operators; write the whole growth.",
    ),
    ("stack(3)", ["--stages.0.growth.factor", "2"], "--stages.0.growth.factor"),
    ("stack(3)", ["--stages.7.growth.factor", "2"], "--stages.7.growth.factor"),
    ("stack(3)", ["--stages.7.growth", "stack(2)"], "--stages.7.growth"),
]


@pytest.mark.parametrize(("growth", "args", "shown"), REFUSED)
def test_invalid_growth_override_is_rejected_by_field_and_value(load, growth, args, shown):
    with pytest.raises(UserError) as raised:
        load(growth, *args)
    assert shown in str(raised.value)


def test_config_file_matches_the_tiny_run(load):
    assert load(str(tiny_run().stages[1].growth)) == tiny_run()
