"""Special tokens in a Hugging Face folder match transformers."""

import functools
import json

import pytest
import tokenizer_kinds
import transformers
from tokenizer_kinds import BOS, EOS, TURN, sentencepiece_model, write_kind
from tokenizers import decoders, models, pre_tokenizers, processors

from stackjax.runtime.errors import UserError
from stackjax.tokenizer.special_tokens import read_tokenization, tokenization_by_name

ENDOFTEXT, BEGIN, END = "<|endoftext|>", "<|B|>", "<|E|>"
TEXTS = ("ab", " a", "", f"a{EOS}b", f"{BOS}a", "日é", "a<unk>b", "x<|more|>y")
CLASSES = (
    None,
    "PreTrainedTokenizerFast",
    "LlamaTokenizerFast",
    "LlamaTokenizer",
    "GPT2Tokenizer",
    "Qwen2Tokenizer",
    "Unknown",
)
TEMPLATES = {
    "none": ("", ""),
    "begins": (BEGIN, ""),
    "ends": ("", END),
    "begins and ends": (BEGIN, END),
}


@pytest.fixture(autouse=True)
def quiet():
    transformers.utils.logging.set_verbosity_error()


def byte_level(template: str = "none"):
    model = tokenizer_kinds.tokenizers.Tokenizer(
        models.BPE({letter: i for i, letter in enumerate(tokenizer_kinds.LETTERS)}, [])
    )
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    model.add_special_tokens([BOS, EOS, ENDOFTEXT, BEGIN, END])
    begin, end = TEMPLATES[template]
    if begin or end:
        model.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A {end}".strip(),
            pair=f"{begin} $A {end} {begin} $B {end}".strip().replace("  ", " "),
            special_tokens=[
                (token, model.token_to_id(token)) for token in (begin, end) if token
            ],
        )
    return model


CONFIG_TOKENS = {"bos_token": BEGIN, "eos_token": END}
TOKEN_MAP = {
    "bos_token": BOS,
    "eos_token": {"content": EOS, "lstrip": False, "normalized": False},
}
ADDED_TOKENS = {
    str(256 + i): {
        "content": token,
        "lstrip": False,
        "rstrip": False,
        "single_word": False,
        "normalized": False,
        "special": True,
    }
    for i, token in enumerate((BOS, EOS, ENDOFTEXT, BEGIN, END))
}
PLACES = {
    "nowhere": (None, None),
    "tokenizer_config": (CONFIG_TOKENS, None),
    "special_tokens_map": (None, TOKEN_MAP),
    "both": (CONFIG_TOKENS, TOKEN_MAP),
    "both, and added tokens": (
        CONFIG_TOKENS | {"added_tokens_decoder": ADDED_TOKENS},
        TOKEN_MAP,
    ),
    "no BOS": ({"bos_token": None, "eos_token": END}, None),
    "not in the vocabulary": ({"eos_token": "<|new|>"}, None),
    "more": (CONFIG_TOKENS | {"additional_special_tokens": ["<|more|>", END]}, None),
    "more, in an object": (
        CONFIG_TOKENS | {"extra_special_tokens": {"image": "<|more|>"}},
        None,
    ),
}


def write(path, kind="llama", cls=None, place="nowhere", template="none", flags=None):
    named, token_map = PLACES[place]
    byte_level(template).save(str(path / "tokenizer.json"))
    settings = (named or {}) | (flags or {}) | ({} if cls is None else {"tokenizer_class": cls})
    files = {"tokenizer_config": settings, "special_tokens_map": token_map}
    for name, fields in files.items():
        if fields:
            (path / f"{name}.json").write_text(json.dumps(fields))
    (path / "config.json").write_text(json.dumps({"model_type": kind}))


def assert_matches_transformers(path) -> None:
    theirs, ours = transformers.AutoTokenizer.from_pretrained(path), read_tokenization(path)
    tokenizer = ours.tokenizer
    if theirs.eos_token_id is not None:
        assert ours.end_ids[0] == theirs.eos_token_id
    prefix = theirs.eos_token_id if theirs.bos_token_id is None else theirs.bos_token_id
    if prefix is not None:
        assert ours.prefix_id == prefix
    for text in TEXTS:
        tokens = tokenizer.encode_special(text).tolist()
        assert tokens == theirs(text, add_special_tokens=False).input_ids
        framed = [*tokenizer.begin_ids, *tokens, *tokenizer.suffix_ids]
        assert framed == theirs(text).input_ids


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("cls", CLASSES)
def test_special_tokens_of_every_file_match_transformers(kind, cls, tmp_path):
    for place in PLACES:
        directory = tmp_path / place
        directory.mkdir()
        write(directory, kind, cls, place)
        assert_matches_transformers(directory)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("cls", ["PreTrainedTokenizerFast", "LlamaTokenizer", "GPT2Tokenizer"])
def test_template_takes_precedence_over_flags(cls, template, tmp_path):
    for i, flags in enumerate(({}, {"add_bos_token": True}, {"add_eos_token": True})):
        directory = tmp_path / str(i)
        directory.mkdir()
        write(directory, "llama", cls, "tokenizer_config", template, flags)
        assert_matches_transformers(directory)


@functools.cache
def bpe_pieces() -> bytes:
    return sentencepiece_model(model_type="bpe")


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"add_bos_token": True},
        {"add_bos_token": False},
        {"add_eos_token": True},
        {"add_bos_token": True, "add_eos_token": True, "eos_token": EOS},
    ],
)
def test_sentencepiece_flags_match_transformers(flags, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(bpe_pieces())
    settings = {"tokenizer_class": "LlamaTokenizer"} | flags
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert_matches_transformers(tmp_path)


def test_user_defined_bos_and_eos_are_special_in_prompts(tmp_path):
    write_kind("sentencepiece, user-defined end", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert_matches_transformers(tmp_path)


def test_added_tokens_have_the_ids_of_transformers(tmp_path):
    more = {"added_tokens_decoder": {"300": ADDED_TOKENS["256"] | {"content": "<|more|>"}}}
    write(tmp_path, cls="PreTrainedTokenizerFast", flags={"eos_token": "<|new|>"} | more)
    assert_matches_transformers(tmp_path)
    for found in (read_tokenization(tmp_path), tokenization_by_name(str(tmp_path), EOS)):
        find = found.tokenizer.find
        assert (find("<|more|>"), find("<|new|>")) == (261, 262)


def test_invalid_template_is_one_line(tmp_path):
    model = byte_level("begins and ends")
    model.post_processor = processors.Sequence([model.post_processor] * 2)
    model.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="cannot be read: not yet implemented"):
        read_tokenization(tmp_path)


def test_documents_contain_no_stop_tokens(tmp_path):
    model = byte_level()
    model.add_tokens(["<|stop|>", "<|begin|>"])  # not special
    model.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<|begin|>"}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [257, 261]}')
    found = read_tokenization(tmp_path)
    assert found.end_ids == (257, 261)
    tokens = found.tokenizer.encode("a<|stop|>b<|begin|>")
    assert {257, 261, found.prefix_id}.isdisjoint(tokens.tolist())
    assert found.tokenizer.decode(tokens) == "a<|stop|>b<|begin|>"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split_special_tokens": True}, "split_special_tokens is true"),
        ({"additional_special_tokens": 5}, "it must be a list or an object"),
        ({"extra_special_tokens": [5]}, "the name of a token"),
        ({"bos_token": "<|new|>"}, r"has no token '<\|new\|>', the bos_token"),
    ],
    ids=str,
)
def test_unsupported_settings_are_refused(settings, message, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(bpe_pieces())
    if "bos_token" not in settings:
        byte_level().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=message):
        read_tokenization(tmp_path)


def write_end_tokens(path, settings, generation, config=None):
    byte_level().save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    (path / "generation_config.json").write_text(json.dumps(generation))
    (path / "config.json").write_text(json.dumps({"model_type": "llama"} | (config or {})))
    return read_tokenization(path)


@pytest.mark.parametrize(
    ("settings", "generation", "config", "end_ids", "separator"),
    [
        # Qwen: end of turn and end of document.
        ({"eos_token": END}, {"eos_token_id": [260, 258]}, None, (260, 258), 258),
        ({"eos_token": ENDOFTEXT}, {"eos_token_id": [260, 258]}, None, (258, 260), 258),
        ({"eos_token": END}, {}, None, (260,), 260),
        ({}, {"eos_token_id": 259}, {"eos_token_id": 260}, (259,), 259),
        ({}, {}, {"eos_token_id": [260, 259]}, (260, 259), 260),
        ({}, {"eos_token_id": []}, {"eos_token_id": 257}, (257,), 257),
        ({}, {}, None, (257,), 257),
    ],
)
def test_several_end_tokens_end_texts_and_one_separates_documents(
    settings, generation, config, end_ids, separator, tmp_path
):
    found = write_end_tokens(tmp_path, settings, generation, config)
    assert (found.end_ids, found.tokenizer.end_id) == (end_ids, separator)
    by_name = tokenization_by_name(str(tmp_path))
    assert (by_name.end_ids, by_name.tokenizer.end_id) == (end_ids, separator)


def test_requested_end_token_separates_documents(tmp_path):
    write_end_tokens(tmp_path, {"eos_token": END}, {"eos_token_id": [260, 258]})
    found = tokenization_by_name(str(tmp_path), EOS)
    assert (found.end_ids, found.tokenizer.end_id) == ((257, 260, 258), 257)
    assert found.tokenizer.encode(EOS).tolist() == [27, 14, 82, 29]


DAMAGED_FILES = {
    "tokenizer_config.json": [
        ("[1]", "is not a JSON object"),
        ('{"eos_token": 5}', "eos_token is 5; "),
        ('{"eos_token": {"x": 1}}', "eos_token is"),
        ('{"bos_token": ["a"]}', "bos_token is"),
        ('{"bos_token": ""}', "bos_token is ''"),
        ("[" * 100_000, "is not JSON"),
        ("\0", "is not JSON"),
    ],
    "special_tokens_map.json": [("5", "is not a JSON object"), ('{"eos_token": true}', "True")],
    "generation_config.json": [
        ('{"eos_token_id": -1}', "is -1, and its vocabulary has the ids 0 to 260"),
        ('{"eos_token_id": 261}', "is 261, and its"),
        ('{"eos_token_id": [256, 9e99]}', r"eos_token_id is \[256, 9e\+99\]"),
        ('{"eos_token_id": "x"}', "eos_token_id is 'x'"),
        ('{"eos_token_id": true}', "eos_token_id is True"),
        ('{"eos_token_id": 99999999999999999999}', "is 99999999999999999999, and"),
    ],
    "config.json": [('{"eos_token_id": {}}', "eos_token_id is {}"), ("null", "not a JSON obj")],
}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [(name, *each) for name, cases in DAMAGED_FILES.items() for each in cases],
    ids=lambda value: str(value)[:30],
)
def test_damaged_file_is_one_line(name, text, message, tmp_path):
    byte_level().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message) as error:
        read_tokenization(tmp_path)
    assert "\n" not in str(error.value)


def added(**fields):
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": 256, "content": EOS, "special": True} | flags | fields


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": {}}, "no model with a vocabulary"),
        ({"model": 5}, "no model with a vocabulary"),
        ({"model": {"type": "BPE", "vocab": {}, "merges": []}}, "vocabulary is empty"),
        ({"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}, "-1"),
        ({"model": {"type": "BPE", "vocab": {"a": "x"}, "merges": []}}, "cannot be read"),
        (
            {"model": {"type": "BPE", "vocab": {"a": 4294967295}, "merges": []}},
            "largest id is 4294967295",
        ),
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}}, "cannot be read"),
        ({"model": {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 7}}, "UnkId"),
        (
            {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "z"}},
            "lacks unk",
        ),
        ({"added_tokens": 5}, "expected a sequence"),
        ({"added_tokens": [added(id=-1)]}, "-1"),
        ({"added_tokens": [{"id": 256}]}, "missing field"),
        ({"added_tokens": []}, "none of the common end tokens"),
        (
            {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(("}, "invert": False}},
            "cannot be read",
        ),
        (
            {
                "post_processor": {
                    "type": "TemplateProcessing",
                    "single": [{"SpecialToken": {"id": "<x>", "type_id": 0}}],
                    "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
                    "special_tokens": {},
                }
            },
            "post_processor has no id for '<x>'",
        ),
        (
            {
                "post_processor": {
                    "type": "TemplateProcessing",
                    "single": [
                        {"SpecialToken": {"id": "<x>", "type_id": 0}},
                        {"Sequence": {"id": "A", "type_id": 0}},
                    ],
                    "pair": [
                        {"Sequence": {"id": "A", "type_id": 0}},
                        {"Sequence": {"id": "B", "type_id": 0}},
                    ],
                    "special_tokens": {"<x>": {"id": "<x>", "ids": [999], "tokens": ["<x>"]}},
                }
            },
            "template of tokenizer .* is 999",
        ),
    ],
    ids=str,
)
def test_damaged_tokenizer_is_one_line(fields, message, tmp_path):
    file = tmp_path / "tokenizer.json"
    byte_level().save(str(file))
    tokenizer_kinds.rewritten(file, **fields)
    with pytest.raises(UserError, match=message):
        read_tokenization(tmp_path)


def test_tokenizer_link_out_of_the_folder_is_refused(tmp_path):
    (tmp_path / "folder").mkdir()
    byte_level().save(str(tmp_path / "secret.json"))
    (tmp_path / "folder" / "tokenizer.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(ValueError, match="is a link to"):
        read_tokenization(tmp_path / "folder")


def test_rewritten_file_has_the_same_digest(tmp_path):
    directories = [tmp_path / name for name in ("one", "two", "three")]
    for directory in directories:
        directory.mkdir()
    write_kind("bpe_with_merges", directories[0], begins=True)
    (directories[0] / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS})
    )
    transformers.AutoTokenizer.from_pretrained(directories[0]).save_pretrained(directories[1])
    fields = json.loads((directories[0] / "tokenizer.json").read_text())
    fields["model"]["merges"] = [" ".join(pair) for pair in fields["model"]["merges"]]
    (directories[2] / "tokenizer.json").write_text(json.dumps(fields, indent=4))
    digests = {read_tokenization(each).tokenizer.digest for each in directories}
    assert len(digests) == 1
    fields["model"]["merges"] = fields["model"]["merges"][:-1]
    (directories[2] / "tokenizer.json").write_text(json.dumps(fields))
    assert read_tokenization(directories[2]).tokenizer.digest not in digests
    assert TURN in fields["model"]["vocab"]
