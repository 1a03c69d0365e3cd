"""Small tokenizers: BPE, Unigram, WordLevel, WordPiece and SentencePiece."""

import io
import json
from pathlib import Path

import sentencepiece
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

BOS, EOS, TURN = "<s>", "</s>", "<|turn|>"
"""The BOS, the end token, and another stop token."""
LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
TEXT = "a model that grows while it trains, in HTML <s>struck</s> text <|turn|>\n"
WORDS = ("a", "model", "that", "grows", "<", "/", "s", ">", "s>", "</", "x")
CHARACTERS = sorted(set(TEXT + "xyz0189") - {" ", "\n"})


def _byte_level(special: list[str], **options) -> tokenizers.Tokenizer:
    vocab = {token: index for index, token in enumerate([*special, *LETTERS])}
    merges = [("<", "/"), ("</", "s"), ("</s", ">"), ("a", "t"), ("t", "h")]
    vocab |= {
        left + right: len(vocab) + i
        for i, (left, right) in enumerate(merges)
        if left + right not in vocab
    }
    model = tokenizers.Tokenizer(models.BPE(vocab, merges, **options))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.decoder = decoders.ByteLevel()
    return model


def bpe_with_merges() -> tokenizers.Tokenizer:
    model = _byte_level([BOS, EOS, TURN])
    model.add_special_tokens([BOS, EOS, TURN])
    return model


def bpe_ignoring_merges() -> tokenizers.Tokenizer:
    model = _byte_level([BOS, EOS, TURN], ignore_merges=True)
    model.add_special_tokens([BOS, EOS, TURN])
    return model


def bpe_with_nonspecial_added_tokens() -> tokenizers.Tokenizer:
    model = _byte_level([])
    model.add_tokens([AddedToken(EOS, special=False, normalized=False)])
    model.add_special_tokens([BOS, TURN])
    return model


def bpe_with_byte_fallback() -> tokenizers.Tokenizer:
    special = ["<unk>", BOS, EOS, TURN]
    pieces = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "<", "/", "s", ">"]
    vocab = {piece: index for index, piece in enumerate([*pieces, "</", "</s"])}
    merges = [("<", "/"), ("</", "s"), ("</s", ">")]
    model = tokenizers.Tokenizer(
        models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    model.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    model.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    model.add_special_tokens(special)
    return model


def unigram() -> tokenizers.Tokenizer:
    pieces = [("<unk>", 0.0), (BOS, 0.0), (EOS, 0.0), (TURN, 0.0), ("▁", -2.0)]
    pieces += [(character, -3.0) for character in CHARACTERS]
    model = tokenizers.Tokenizer(models.Unigram(pieces, 0, False))
    model.normalizer = normalizers.NFKC()
    model.pre_tokenizer = pre_tokenizers.Metaspace()
    model.decoder = decoders.Metaspace()
    model.add_special_tokens(["<unk>", BOS, EOS, TURN])
    return model


def word_level() -> tokenizers.Tokenizer:
    names = ["<unk>", BOS, EOS, TURN, *WORDS]
    vocab = {name: index for index, name in enumerate(names)}
    model = tokenizers.Tokenizer(models.WordLevel(vocab, "<unk>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model.add_special_tokens(["<unk>", BOS, EOS, TURN])
    return model


def word_level_with_unknown_as_end() -> tokenizers.Tokenizer:
    """Returns a tokenizer with the end token as unknown token."""
    vocab = {name: index for index, name in enumerate([EOS, BOS, TURN, *WORDS])}
    model = tokenizers.Tokenizer(models.WordLevel(vocab, EOS))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model.add_special_tokens([EOS, BOS, TURN])
    return model


def word_piece() -> tokenizers.Tokenizer:
    names = ["<unk>", BOS, EOS, TURN, *CHARACTERS, *(f"##{each}" for each in CHARACTERS)]
    vocab = {name: index for index, name in enumerate(names)}
    model = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model.decoder = decoders.WordPiece()
    model.add_special_tokens(["<unk>", BOS, EOS, TURN])
    return model


JSON_KINDS = (
    bpe_with_merges,
    bpe_ignoring_merges,
    bpe_with_nonspecial_added_tokens,
    bpe_with_byte_fallback,
    unigram,
    word_level,
    word_level_with_unknown_as_end,
    word_piece,
)
SENTENCEPIECE_KINDS = {
    "sentencepiece": {},
    "sentencepiece, bpe": {"model_type": "bpe"},
    "sentencepiece, user-defined end": {
        "eos_id": -1,
        "bos_id": -1,
        "user_defined_symbols": [BOS, EOS],
    },
    "sentencepiece, no prefix": {"add_dummy_prefix": False},
}
JSON_NAMES = tuple(kind.__name__ for kind in JSON_KINDS)
KINDS = (*JSON_NAMES, *SENTENCEPIECE_KINDS)


def sentencepiece_model(**options) -> bytes:
    data = io.BytesIO()
    fixed = {"vocab_size": 310, "hard_vocab_limit": False, "minloglevel": 2}
    free = {
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
    }
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter([TEXT.strip()] * 20),
        model_writer=data,
        **fixed | free | options,
    )
    return data.getvalue()


def write_kind(kind: str, directory: Path, begins: bool = False) -> str:
    """Writes a tokenizer file and returns the path.

    Args:
      begins: Add a template with the BOS before every text.
    """
    if kind in SENTENCEPIECE_KINDS:
        path = directory / "tokenizer.model"
        path.write_bytes(sentencepiece_model(**SENTENCEPIECE_KINDS[kind]))
        return str(path)
    model = next(make for make in JSON_KINDS if make.__name__ == kind)()
    if begins:
        model.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A",
            pair=f"{BOS} $A {BOS} $B",
            special_tokens=[(BOS, model.token_to_id(BOS))],
        )
    path = directory / "tokenizer.json"
    model.save(str(path))
    return str(path)


def rewritten(path: Path, **fields) -> Path:
    """Changes fields in a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return path
