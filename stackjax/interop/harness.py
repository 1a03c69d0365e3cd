"""A model as lm-evaluation-harness asks it: the same answers as its own `hf` model gives."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
import rich.console
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from stackjax.continuation import continue_texts
from stackjax.errors import UserError
from stackjax.pretrained import Pretrained
from stackjax.sampling import Sampling
from stackjax.scoring import Span, score

Request = tuple[Any, list[int], list[int]]
"""What the answer is kept by, if at all; the tokens of a context; those of what follows it."""


class StackjaxLM(TemplateLM):
    """A pretrained model behind the interface of lm-evaluation-harness."""

    def __init__(
        self,
        pretrained: Pretrained,
        batch_size: int = 32,
        console: rich.console.Console | None = None,
    ):
        """Wraps a model.

        Args:
          batch_size: Texts that are scored or continued together.
          console: The terminal that shows a bar, if any does.
        """
        super().__init__()
        self._pretrained = pretrained
        self._batch_size = batch_size
        self._key = jax.random.key(0)
        self._console = console

    @property
    def eot_token_id(self) -> int:
        """The token that ends a document."""
        return self._pretrained.tokenizer.end_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that has no context."""
        return self._pretrained.prefix_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Returns the tokens of a text, none added whatever is asked for."""
        return self._pretrained.tokenizer.encode(string).tolist()

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        """Returns log-likelihoods of texts after contexts, and whether they are greedy."""
        return super().loglikelihood(requests, disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        seq_len = self._pretrained.seq_len
        # A context of spaces has no tokens of its own.
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
        """Returns log-likelihoods of whole texts, window after window."""
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
        """Returns what follows each context, up to a string that ends it."""
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
        """Yields indices of prompts of one kind, of nearly one length."""
        order = sorted(range(len(kinds)), key=lambda i: (kinds[i], -len(prompts[i])))
        for _, group in itertools.groupby(order, kinds.__getitem__):
            same = list(group)
            for first in range(0, len(same), self._batch_size):
                yield same[first : first + self._batch_size]

    def _generate(self, prompts: list[list[int]], wanted: dict[str, Any]) -> list[str]:
        kwargs: dict[str, Any] = dict(normalize_gen_kwargs(wanted))
        until, max_tokens = kwargs.pop("until"), kwargs.pop("max_gen_toks")
        is_sampled, temperature = kwargs.pop("do_sample"), kwargs.pop("temperature", 0.0)
        if kwargs:
            raise UserError(
                f"generation_kwargs of a task has {', '.join(sorted(kwargs))}; only until, "
                f"max_gen_toks, do_sample and temperature are known, so leave it out."
            )
        seq_len = self._pretrained.seq_len
        if not 0 < max_tokens < seq_len:
            raise UserError(
                f"generation_kwargs.max_gen_toks of a task is {max_tokens}; it must be at "
                f"least 1 and leave room for a prompt in the {seq_len} tokens of the model; "
                f"set it to less than {seq_len}."
            )
        prompts = [
            prompt[max_tokens - seq_len :] or [self.prefix_token_id] for prompt in prompts
        ]
        sampling = Sampling(temperature=temperature if is_sampled else 0.0)
        self._key, key = jax.random.split(self._key)
        rows = [np.array(prompt) for prompt in prompts]
        texts = continue_texts(self._pretrained, rows, sampling, max_tokens, until, key)
        return [postprocess_generated_text(text, until, None) for text in texts]


def _span(context: list[int], target: list[int], seq_len: int) -> Span:
    """Returns what follows a context, which is cut on its left to what the model reads."""
    if len(target) > seq_len:
        raise UserError(
            f"a text to be scored has {len(target)} tokens, but the model reads {seq_len}; "
            f"leave its task out."
        )
    tokens = (context + target)[-(seq_len + 1) :]
    return Span(tokens, len(tokens) - len(target), len(tokens))
