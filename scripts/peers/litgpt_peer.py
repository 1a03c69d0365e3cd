"""LitGPT as shipped: the compiled step of its `pretrain` command, in float32."""

from typing import Any

import lightning  # pyright: ignore[reportMissingImports]
import torch
from litgpt import GPT, Config, pretrain, utils  # pyright: ignore[reportMissingImports]

from scripts.peers.peer import LEARNING_RATE, Peer, Shape

MAX_NORM = 1.0
"""The command's default."""


def build(shape: Shape) -> Peer:
    """Returns the step; the first call compiles."""
    fabric = lightning.Fabric(devices=1, accelerator="cpu", precision="32-true")
    fabric.launch()
    fabric.seed_everything(0)
    with fabric.init_module(empty_init=True):
        model = GPT(get_config(shape))
    pretrain.initialize_weights(fabric, model, n_layer=shape.num_layers, n_embd=shape.embed_dim)
    num_params = utils.num_parameters(model)
    model = fabric.setup(torch.compile(model))
    # On a CPU the command uses the unfused optimizer.
    optimizer = utils.instantiate_torch_optimizer(
        "AdamW", model.parameters(), fused=False, lr=LEARNING_RATE
    )
    optimizer = fabric.setup_optimizers(optimizer)

    def step(_: Any, tokens: torch.Tensor) -> tuple[Any, torch.Tensor]:
        input_ids = tokens[:, :-1].contiguous().long()
        targets = tokens[:, 1:].contiguous().long()
        loss = utils.chunked_cross_entropy(model(input_ids), targets)
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return None, loss.detach()

    return Peer(
        step=step,
        state=None,
        batch=torch.from_numpy(shape.tokens()),
        wait=lambda _: None,
        num_params=num_params,
    )


def get_config(shape: Shape) -> Any:
    """Returns LitGPT's smallest LLaMA, with the shape's sizes."""
    return Config.from_name(
        "tiny-llama-1.1b",
        n_layer=shape.num_layers,
        n_embd=shape.embed_dim,
        n_head=shape.num_heads,
        n_query_groups=shape.num_heads,
        head_size=shape.head_dim,
        intermediate_size=shape.mlp_dim,
        vocab_size=shape.vocab_size,
        padded_vocab_size=shape.vocab_size,
        block_size=shape.seq_len,
    )
