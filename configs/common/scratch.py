"""A grown run's target from scratch."""

import dataclasses

from stackjax.analysis.budget import scratch_tokens
from stackjax.config import Config


def of(grown: Config, workdir: str) -> Config:
    """Returns the run from scratch with the grown run's total FLOPs (6ND)."""
    stage = dataclasses.replace(grown.stages[-1], tokens=scratch_tokens(grown), growth=None)
    return dataclasses.replace(grown, stages=(stage,), workdir=workdir)
