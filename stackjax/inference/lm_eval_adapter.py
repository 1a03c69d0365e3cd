"""Adapter for lm-evaluation-harness, with the same results as the harness's `hf` model."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
import rich.console
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from stackjax.inference.generation import continuations
from stackjax.inference.pretrained import Pretrained
from stackjax.inference.scoring import Span, score
from stackjax.options import Sampling
from stackjax.runtime.errors import UserError

_SAMPLING = ("do_sample", "temperature", "top_k", "top_p")
_TOP_K = 50
"""Default `top_k` in transformers."""
_NEUTRAL = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0}
Request = tuple[Any, list[int], list[int]]
"""Cache key or None, context tokens, continuation tokens."""


class StackjaxLM(TemplateLM):
    """A pretrained model with lm-evaluation-harness's interface."""

    def __init__(
        self,
        pretrained: Pretrained,
        batch_size: int = 32,
        console: rich.console.Console | None = None,
    ):
        """Wraps a model.

        Args:
          batch_size: Texts per batch.
          console: Terminal for the progress bar.
        """
        super().__init__()
        self._pretrained = pretrained
        self._batch_size = batch_size
        self._key = jax.random.key(0)
        self._console = console

    @property
    def eot_token_id(self) -> int:
        """End-of-text token."""
        return self._pretrained.tokenization.end_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """Token before a text without context."""
        return self._pretrained.tokenization.prefix_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Returns the tokens for a text; special tokens in the text are recognized.

        Args:
          add_special_tokens: Whether to add begin and end tokens; by default unless the text
            starts with the begin token already.
        """
        tokenization = self._pretrained.tokenization
        tokens = tokenization.tokenizer.encode_special(string).tolist()
        if add_special_tokens is None:
            add_special_tokens = not tokenization.begins_with_prefix(string)
        if not add_special_tokens:
            return tokens
        return [*tokenization.begin_ids, *tokens, *tokenization.tokenizer.suffix_ids]

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        """Returns each continuation's log-likelihood and whether greedy decoding yields it.

        Raises:
          UserError: A continuation is empty or too long.
        """
        for request in requests:
            context, text = request.arguments
            if not context and not self.tok_encode(text, add_special_tokens=False):
                raise _nothing_to_score(context)
        return super().loglikelihood(requests, disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        seq_len = self._pretrained.seq_len
        for asked, context, target in requests:
            if not target:
                raise _nothing_to_score(asked[0] if asked else context)
        # A context of spaces may have no tokens.
        prefix = [self.prefix_token_id]
        spans = [_span(context or prefix, target, seq_len) for _, context, target in requests]
        scores = score(self._pretrained, spans, self._batch_size, self._console)
        answers = [(answer.log_likelihood, answer.is_greedy) for answer in scores]
        for (asked, _, _), answer in zip(requests, answers, strict=True):
            if asked is not None:
                self.cache_hook.add_partial("loglikelihood", asked, answer)
        return answers

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[float]:
        """Returns log-likelihoods of whole texts, summed over consecutive windows."""
        texts = [request.args[0] for request in requests]
        windows = [self._windows(text) for text in texts]
        scores = iter(self._loglikelihood_tokens(list(itertools.chain(*windows))))
        sums = [sum(next(scores)[0] for _ in of_text) for of_text in windows]
        for text, answer in zip(texts, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), answer)
        return sums

    def _windows(self, text: str) -> list[Request]:
        windows = get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self._pretrained.seq_len,
            context_len=1,
        )
        return [(None, *make_disjoint_window(window)) for window in windows]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Returns generated text for each context, up to a stop string."""
        asked: list[Any] = [request.args for request in requests]
        prompts = [self.tok_encode(context) for context, _ in asked]
        texts = [""] * len(requests)
        for batch in self._batches([repr(kwargs) for _, kwargs in asked], prompts):
            _, kwargs = asked[batch[0]]
            found = self._generate([prompts[i] for i in batch], kwargs)
            for i, text in zip(batch, found, strict=True):
                texts[i] = text
                self.cache_hook.add_partial("generate_until", asked[i], text)
        return texts

    def _batches(self, kinds: list[str], prompts: list[list[int]]) -> Iterator[list[int]]:
        """Yields batches of prompt indices with equal kinds and similar lengths."""
        order = sorted(range(len(kinds)), key=lambda i: (kinds[i], -len(prompts[i])))
        for _, group in itertools.groupby(order, kinds.__getitem__):
            same = list(group)
            for first in range(0, len(same), self._batch_size):
                yield same[first : first + self._batch_size]

    def _generate(self, prompts: list[list[int]], wanted: dict[str, Any]) -> list[str]:
        tokenizer = self._pretrained.tokenizer
        end = tokenizer.written(self.eot_token_id)
        until, max_tokens, sampling = _settings(wanted, end)
        seq_len = self._pretrained.seq_len
        if not 0 < max_tokens < seq_len:
            raise UserError(
                f"generation_kwargs.max_gen_toks of a task is {max_tokens}; it must be "
                f"at least 1 and less than {seq_len}, the model's context."
            )
        prompts = [
            prompt[max_tokens - seq_len :] or [self.prefix_token_id] for prompt in prompts
        ]
        self._key, key = jax.random.split(self._key)
        rows = continuations(
            self._pretrained,
            [np.array(prompt) for prompt in prompts],
            sampling,
            # Every text contains an empty stop string, so one token is enough.
            1 if "" in until else max_tokens,
            key,
            until,
            # Like the hf model, draw ids outside the tokenizer's vocabulary too.
            self._pretrained.config.vocab_size,
        )
        texts = [tokenizer.decode(row.tolist()) for row in rows]
        return [postprocess_generated_text(text, until, None) for text in texts]


def _settings(wanted: dict[str, Any], end: str) -> tuple[list[str], int, Sampling]:
    """Returns stop strings, maximum tokens and sampling for a task's generation_kwargs.

    The rules are the same as for the harness's `hf` model.

    Args:
      end: Text of the end token.

    Raises:
      UserError: An argument is unknown or has an invalid value.
    """
    try:
        kwargs: dict[str, Any] = dict(normalize_gen_kwargs(wanted))
    except (TypeError, ValueError) as error:
        raise UserError(f"generation_kwargs of a task are {wanted}: {error}.") from error
    until = handle_stop_sequences(kwargs.pop("until"), end)
    max_tokens = kwargs["max_gen_toks"]
    unknown = kwargs.keys() - {"max_gen_toks", *_SAMPLING} - _neutral(kwargs)
    if unknown:
        raise UserError(
            f"generation_kwargs of a task has {', '.join(sorted(unknown))}; only until, "
            f"max_gen_toks, {', '.join(_SAMPLING)} are supported: leave it out."
        )
    if not kwargs["do_sample"]:
        return until, max_tokens, Sampling(temperature=0.0)
    if not kwargs.get("temperature"):
        raise UserError(
            "generation_kwargs of a task has do_sample without a temperature above 0; set one, "
            "or leave do_sample out."
        )
    sampling = Sampling(
        temperature=kwargs["temperature"],
        top_k=kwargs.get("top_k", _TOP_K) or None,
        top_p=kwargs.get("top_p", 1.0),
    )
    return until, max_tokens, sampling


def _neutral(kwargs: dict[str, Any]) -> set[str]:
    """Returns the names of arguments with a value that has no effect."""
    return {name for name, value in _NEUTRAL.items() if kwargs.get(name) == value}


def _nothing_to_score(context: object) -> UserError:
    return UserError(
        f"a task asks for the likelihood of an empty text after {str(context)[-40:]!r}; fix "
        f"the documents, or leave the task out."
    )


def _span(context: list[int], target: list[int], seq_len: int) -> Span:
    """Returns the span for a continuation; the context is truncated on the left."""
    if len(target) > seq_len:
        raise UserError(
            f"a continuation has {len(target)} tokens, but the model's context is {seq_len}; "
            f"leave this task out."
        )
    tokens = (context + target)[-(seq_len + 1) :]
    return Span(tokens, len(tokens) - len(target), len(tokens))
