from stackjax import growth, model
from stackjax.config import Config
from stackjax.inference.pretrained import Pretrained, load_pretrained
from stackjax.library import (
    batches,
    compare_runs,
    generate_text,
    grow_state,
    init_state,
    load_config,
    make_step,
    score_texts,
    train_run,
    validation_loss,
)
from stackjax.options import Sampling
from stackjax.training.expand import expand
from stackjax.training.phase import Phase
from stackjax.training.train_state import TrainState

__all__ = [
    "Config",
    "Phase",
    "Pretrained",
    "Sampling",
    "TrainState",
    "batches",
    "compare_runs",
    "expand",
    "generate_text",
    "grow_state",
    "growth",
    "init_state",
    "load_config",
    "load_pretrained",
    "make_step",
    "model",
    "score_texts",
    "train_run",
    "validation_loss",
]
