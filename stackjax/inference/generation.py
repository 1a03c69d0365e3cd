"""Autoregressive text generation with a KV cache.

Shapes: B batch, T tokens, V vocabulary (padded).
"""

import functools
from collections.abc import Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from stackjax.data.device import put_rows
from stackjax.inference.pretrained import Pretrained
from stackjax.inference.sampling import sample
from stackjax.model import ModelConfig, Params
from stackjax.model.config import check_length
from stackjax.model.decoding import Cache, empty_cache, extend, next_logits
from stackjax.options import Sampling
from stackjax.runtime.errors import UserError
from stackjax.sharding.partition import auto_sharded, logical, num_shards
from stackjax.tokenizer.tokenization import Tokenization

_PREFILL_TOKENS = 256
"""Prompt tokens per prefill step; bounds attention memory."""
_CAPACITY_MULTIPLE = 256
"""KV cache capacities are multiples of this, so that few programs are compiled."""
_TOKENS_PER_CHECK = 16
"""Tokens between two checks for stop strings."""
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""Decoded form of an incomplete UTF-8 character."""


def generate(
    pretrained: Pretrained,
    prompts: Sequence[np.ndarray],
    sampling: Sampling,
    max_tokens: int,
    key: jax.Array,
    vocab_size: int | None = None,
) -> Iterator[np.ndarray]:
    """Returns an iterator over the next token of every prompt, int32 [B].

    Generation stops when every row has ended; a finished row repeats the end token. A row
    depends on prompt, index and key, but not on other prompts. An empty prompt
    starts from `prefix_id`, which is not returned.

    Args:
      vocab_size: Only tokens below this are drawn; the tokenizer's vocabulary by default.

    Raises:
      UserError: There are no prompts, `max_tokens` is below 1, or a text would have more tokens
        than learned positions.
    """
    if not prompts:
        raise UserError("prompts is empty; give at least one prompt; it may be empty.")
    if max_tokens < 1:
        raise UserError(f"max_tokens is {max_tokens}; it must be at least 1.")
    longest = max(1, *map(len, prompts)) + max_tokens
    check_length(pretrained.config, longest, "the longest prompt with its continuation")
    num_known = pretrained.tokenizer.vocab_size if vocab_size is None else vocab_size
    drawn = _draws(pretrained, prompts, sampling, max_tokens, key, num_known)
    return _until_ended(drawn, len(prompts), pretrained.tokenization.end_ids)


def _until_ended(
    drawn: Iterable[jax.Array], num_prompts: int, end_ids: Sequence[int]
) -> Iterator[np.ndarray]:
    """Yields the tokens for all prompts until every row has ended."""
    has_ended_B = np.zeros(num_prompts, bool)
    tokens_B = np.zeros(num_prompts, np.int32)
    for drawn_B in drawn:
        tokens_B = np.where(has_ended_B, tokens_B, np.asarray(drawn_B)[:num_prompts])
        has_ended_B |= np.isin(tokens_B, end_ids)
        yield tokens_B
        if has_ended_B.all():
            return


def continuations(
    pretrained: Pretrained,
    prompts: Sequence[np.ndarray],
    sampling: Sampling,
    max_tokens: int,
    key: jax.Array,
    until: Sequence[str] = (),
    vocab_size: int | None = None,
) -> list[np.ndarray]:
    """Returns the tokens generated for each prompt, including the end token.

    Args:
      until: Stop strings; generation may stop once every row has ended or contains one.
      vocab_size: As in `generate`.
    """
    tokenizer, end_ids = pretrained.tokenizer, set(pretrained.tokenization.end_ids)
    rows: list[list[int]] = [[] for _ in prompts]

    def is_finished(row: list[int]) -> bool:
        if row[-1] in end_ids:
            return True
        text = tokenizer.decode(row)
        return any(end in text for end in until)

    drawn = generate(pretrained, prompts, sampling, max_tokens, key, vocab_size)
    for count, tokens_B in enumerate(drawn, start=1):
        for row, token in zip(rows, tokens_B.tolist(), strict=True):
            if end_ids.isdisjoint(row[-1:]):
                row.append(token)
        # Decoding is slower than drawing a few more tokens.
        if until and count % _TOKENS_PER_CHECK == 0 and all(map(is_finished, rows)):
            break
    return [np.array(row) for row in rows]


def new_text(
    tokenization: Tokenization, prompt: Sequence[int], tokens: Iterable[int]
) -> Iterator[str]:
    """Yields the text generated after a prompt, as soon as characters are complete.

    End tokens have no text.
    """
    # A token's text may depend on earlier tokens, so the whole text is decoded each time.
    tokenizer, known = tokenization.tokenizer, list(prompt)
    text = tokenizer.decode(known)
    shown = len(text)
    for token in tokens:
        if token in tokenization.end_ids:
            break
        known.append(token)
        text = tokenizer.decode(known)
        if not text.endswith(_INCOMPLETE):
            yield text[shown:]
            shown = len(text)
    yield text[shown:]


def _draws(
    pretrained: Pretrained,
    prompts: Sequence[np.ndarray],
    sampling: Sampling,
    max_tokens: int,
    key: jax.Array,
    vocab_size: int,
) -> Iterator[jax.Array]:
    """Yields the tokens drawn for every row of a batch, [B]."""
    config, params, mesh = pretrained.config, pretrained.params, pretrained.mesh
    with jax.set_mesh(mesh):
        tokens_BT, lengths_B = _batch(
            prompts, pretrained.tokenization.prefix_id, num_shards("batch")
        )
        num_rows, width = tokens_BT.shape
        capacity = _round_up(max(width, int(lengths_B.max()) + max_tokens), _CAPACITY_MULTIPLE)
        cache = empty_cache(config, num_rows, capacity)
        logits_BV = jnp.zeros(
            (num_rows, config.padded_vocab_size), out_sharding=logical("batch", "vocab")
        )
        lengths_B = put_rows(lengths_B)
        piece = min(width, _PREFILL_TOKENS)
        for start in range(0, width, piece):
            piece_BT = put_rows(tokens_BT[:, start : start + piece])
            logits_BV, cache = _prefill(
                config, params, cache, logits_BV, piece_BT, start, lengths_B
            )
        tokens_B = _draw(sampling, vocab_size, logits_BV, key, 0)
    for count in range(1, max_tokens):
        with jax.set_mesh(mesh):
            next_B, cache = _step(
                config, sampling, vocab_size, params, cache, tokens_B, lengths_B, key, count
            )
        # The next step is dispatched before this result is read.
        yield tokens_B
        tokens_B = next_B
    yield tokens_B


def _batch(
    prompts: Sequence[np.ndarray], prefix_id: int, divisor: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns right-padded prompts, [B, T], and their lengths, [B].

    T is a power of two or a multiple of `_PREFILL_TOKENS`; B is a multiple of `divisor`.
    """
    texts = [prompt if len(prompt) else [prefix_id] for prompt in prompts]
    texts += [[prefix_id]] * (-len(texts) % divisor)
    lengths_B = np.array([len(text) for text in texts], np.int32)
    longest = int(lengths_B.max())
    width = min(1 << (longest - 1).bit_length(), _round_up(longest, _PREFILL_TOKENS))
    tokens_BT = np.zeros((len(texts), width), np.int32)
    for row_T, text in zip(tokens_BT, texts, strict=True):
        row_T[: len(text)] = text
    return tokens_BT, lengths_B


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _prefill(
    config: ModelConfig,
    params: Params,
    cache: Cache,
    logits_BV: jax.Array,
    tokens_BT: jax.Array,
    start: int | jax.Array,
    lengths_B: jax.Array,
) -> tuple[jax.Array, Cache]:
    """Returns next-token logits and the KV cache after a prefill step.

    Args:
      logits_BV: Logits for prompts that ended in an earlier step.
      start: Position of the first token.
    """
    length = tokens_BT.shape[1]
    steps_1T = jax.lax.broadcasted_iota(jnp.int32, tokens_BT.shape, 1)
    x_BTD, cache = extend(config, params, cache, tokens_BT, start + steps_1T)
    last_B = lengths_B - 1 - start
    found_BV = next_logits(config, params, x_BTD, jnp.clip(last_B, 0, length - 1))
    is_here_B = (last_B >= 0) & (last_B < length)
    return jnp.where(is_here_B[:, None], found_BV, logits_BV), cache


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def _step(
    config: ModelConfig,
    sampling: Sampling,
    vocab_size: int,
    params: Params,
    cache: Cache,
    tokens_B: jax.Array,
    lengths_B: jax.Array,
    key: jax.Array,
    count: int | jax.Array,
) -> tuple[jax.Array, Cache]:
    """Returns the next tokens, [B], and the KV cache.

    Args:
      tokens_B: Tokens from the previous step.
      lengths_B: Prompt lengths.
      count: Tokens drawn so far for each row.
    """
    tokens_B = jax.reshard(tokens_B, logical("batch"))
    positions_B1 = (lengths_B + count - 1)[:, None]
    x_B1D, cache = extend(config, params, cache, tokens_B[:, None], positions_B1)
    logits_BV = next_logits(config, params, x_B1D, jnp.zeros_like(lengths_B))
    return _draw(sampling, vocab_size, logits_BV, key, count), cache


@functools.partial(jax.jit, static_argnums=(0, 1))
def _draw(
    sampling: Sampling,
    vocab_size: int,
    logits_BV: jax.Array,
    key: jax.Array,
    count: int | jax.Array,
) -> jax.Array:
    def draw(logits_BV: jax.Array, key: jax.Array) -> jax.Array:
        token_BV = jax.lax.broadcasted_iota(jnp.int32, logits_BV.shape, 1)
        return sample(jnp.where(token_BV < vocab_size, logits_BV, -jnp.inf), sampling, key)

    # Sampling needs all logits of a row, and every process needs all rows: replicate.
    return auto_sharded(draw, logical(None))(logits_BV, jax.random.fold_in(key, count))
