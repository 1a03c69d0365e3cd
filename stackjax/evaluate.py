"""Evaluation on lm-evaluation-harness tasks.

    python -m stackjax.evaluate MODEL

The default tasks are the eight of arXiv:2405.15319. The command prints the scores next to the
paper's and writes all metrics to results.json. As in the paper, accuracy is the harness's
`acc` (not normalized by answer length), and Wikitext perplexity is per word.
"""

from stackjax.options import EvaluateConfig
from stackjax.runtime.command_line import parse, program, silence_absl
from stackjax.runtime.errors import one_line_errors


def main() -> None:
    """Runs the command line."""
    with one_line_errors():
        options = parse(EvaluateConfig, prog=program("evaluate"))
        from stackjax.analysis.evaluation import write

        silence_absl()
        write(options)


if __name__ == "__main__":
    main()
