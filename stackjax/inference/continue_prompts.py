"""Generated text for prompts, printed."""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from stackjax.inference.generation import continuations, generate, new_text
from stackjax.inference.pretrained import Pretrained, load_pretrained
from stackjax.options import GenerateConfig
from stackjax.runtime.errors import UserError


def run(config: GenerateConfig) -> None:
    """Prints the generated text for each prompt.

    Raises:
      UserError: MODEL is no model, or a field is invalid.
      OSError: A file could not be read.
    """
    texts = list(config.prompt)
    if config.prompt_file is not None:
        texts += read_prompts(config.prompt_file)
    texts = texts or [""]
    pretrained = load_pretrained(config.model, config.tokenizer)
    tokenization = pretrained.tokenization
    prompts = [tokenization.encode_prompt(text) for text in texts]
    _note_length(pretrained, prompts, config.max_tokens)
    key = jax.random.key(config.seed)
    args = pretrained, prompts, config.sampling, config.max_tokens, key
    if len(prompts) == 1 and not config.json:
        tokens = (int(tokens_B[0]) for tokens_B in generate(*args))
        print(texts[0], end="", flush=True)
        for piece in new_text(tokenization, prompts[0].tolist(), tokens):
            print(piece, end="", flush=True)
        print()
        return
    for index, tokens_T in enumerate(continuations(*args)):
        known, new = prompts[index].tolist(), tokens_T.tolist()
        prompt, text = texts[index], "".join(new_text(tokenization, known, new))
        if config.json:
            has_ended = new[-1] in tokenization.end_ids
            fields = {"prompt": prompt, "text": text, "tokens": len(new), "ended": has_ended}
            print(json.dumps(fields))
        else:
            print(f"--- {index + 1}\n{prompt}{text}")


def read_prompts(file: Path) -> list[str]:
    r"""Returns a file's lines, separated by \n, \r\n or \r.

    Raises:
      UserError: The file is empty, or not UTF-8.
    """
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"prompt_file {file} is not UTF-8 text at byte {error.start}; save it as UTF-8."
        ) from error
    if not text:
        raise UserError(f"prompt_file {file} is empty; write one prompt per line.")
    # Other separators, such as U+2028, belong to the prompt.
    lines = re.split("\r\n|\r|\n", text)
    return lines if lines[-1] else lines[:-1]


def _note_length(
    pretrained: Pretrained, prompts: Sequence[np.ndarray], max_tokens: int
) -> None:
    length = max(len(prompt) for prompt in prompts) + max_tokens
    if length > pretrained.seq_len:
        print(
            f"note: texts may reach {length} tokens, but the model was trained on "
            f"{pretrained.seq_len}; longer text may be poor.",
            file=sys.stderr,
        )
