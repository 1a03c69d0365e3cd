"""Checks the English of docstrings and comments: some words per 1,000 may not be frequent.

    python -m scripts.words

Frequent pronouns and chains of "of" mean sentences without nouns. A pronoun replaced by another
one is no cure. optax, grain and flax stay within all limits.
"""

import ast
import re
import sys
import tokenize
from collections import Counter
from pathlib import Path

LIMITS = {
    "what": 1.5,
    "those": 1.0,
    "that": 9.0,
    "of": 28.0,
    "which": 3.5,
    "where": 2.5,
    "it": 5.0,
    "its": 2.5,
    "one": 3.0,
    "they": 1.2,
    "them": 1.2,
}
"""The most occurrences per 1,000 words."""


def prose(path: Path) -> list[str]:
    """Returns the docstrings and comments of a module, those of dataclass fields included."""
    strings = [
        node.value.value
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    ]
    with tokenize.open(path) as file:
        tokens = tokenize.generate_tokens(file.readline)
        return strings + [token.string for token in tokens if token.type == tokenize.COMMENT]


def main() -> None:
    """Prints the rate of every word; exits with 1 if a rate is above its limit."""
    texts = (text for path in sorted(Path("stackjax").rglob("*.py")) for text in prose(path))
    words = [word for text in texts for word in re.findall(r"[a-z']+", text.lower())]
    counts = Counter(words)
    rates = {word: 1000 * counts[word] / len(words) for word in LIMITS}
    for word, rate in rates.items():
        verdict = "" if rate <= LIMITS[word] else "  too frequent"
        print(f"{word:>6} {rate:5.1f}, at most {LIMITS[word]}{verdict}")
    sys.exit(any(rates[word] > LIMITS[word] for word in LIMITS))


if __name__ == "__main__":
    main()
