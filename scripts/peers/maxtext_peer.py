"""MaxText as shipped: base.yml with the shape's sizes, in float32."""

import tempfile
from typing import Any

import jax
from flax import nnx
from flax.core.spmd import logical_axis_rules
from maxtext.trainers.pre_train import train  # pyright: ignore[reportMissingImports]
from maxtext.utils import sharding, train_utils  # pyright: ignore[reportMissingImports]
from maxtext.utils.globals import MAXTEXT_CONFIGS_DIR  # pyright: ignore[reportMissingImports]

from scripts.peers.peer import LEARNING_RATE, Peer, Shape


def build(shape: Shape) -> Peer:
    """Returns the train loop's step, and MaxText's synthetic batch."""
    config, recorder = train.initialize(arguments(shape))
    _, _, layout, _, mesh, _, _, loader, _, _, state = train_utils.setup_train_loop(
        config, recorder
    )
    graph, state = nnx.split(state)
    params_layout, layout = sharding.maybe_update_params_sharding_with_opt(config, layout)
    jitted, _ = train_utils.jit_train_and_eval_step(
        config, graph, mesh, state, layout, train.train_step, params_shardings=params_layout
    )

    def step(state: Any, batch: Any) -> tuple[Any, jax.Array]:
        with jax.set_mesh(mesh), logical_axis_rules(config.logical_axis_rules):
            state, metrics = jitted(state, batch)
        return state, metrics["scalar"]["learning/loss"]

    params = nnx.merge(graph, state).model
    return Peer(
        step=step,
        state=state,
        batch=loader.load_next_batch(),
        wait=jax.block_until_ready,
        num_params=sum(leaf.size for leaf in jax.tree.leaves(nnx.state(params, nnx.Param))),
    )


def arguments(shape: Shape) -> list[str]:
    """Returns the command line; other options have MaxText's defaults."""
    fields = {
        "base_num_decoder_layers": shape.num_layers,
        "base_emb_dim": shape.embed_dim,
        "base_num_query_heads": shape.num_heads,
        "base_num_kv_heads": shape.num_heads,
        "head_dim": shape.head_dim,
        "base_mlp_dim": shape.mlp_dim,
        "vocab_size": shape.vocab_size,
        "max_target_length": shape.seq_len,
        "per_device_batch_size": shape.batch_size,
        "dtype": "float32",
        "weight_dtype": "float32",
        "learning_rate": LEARNING_RATE,
        "warmup_steps_fraction": 0.0,
        "dataset_type": "synthetic",
        "hardware": "cpu",
        # Initialization would wait for cluster addresses.
        "skip_jax_distributed_system": "true",
        "run_name": "peers",
        "base_output_directory": tempfile.mkdtemp(),
        "enable_checkpointing": "false",
        # The first step is to compile.
        "jax_cache_dir": "",
        "log_config": "false",
    }
    base = f"{MAXTEXT_CONFIGS_DIR}/base.yml"
    return ["", base, *(f"{field}={value}" for field, value in fields.items())]
