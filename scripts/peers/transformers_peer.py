"""LlamaForCausalLM from transformers, compiled, with the Trainer's optimizer."""

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from scripts.peers.peer import LEARNING_RATE, Peer, Shape

MAX_NORM = 1.0
"""The Trainer's default."""


def build(shape: Shape) -> Peer:
    """Returns the step; the first call compiles."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.embed_dim,
        intermediate_size=shape.mlp_dim,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        max_position_embeddings=shape.seq_len,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    compiled = torch.compile(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)

    def step(_: Any, tokens: torch.Tensor) -> tuple[Any, torch.Tensor]:
        loss = compiled(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return None, loss.detach()

    return Peer(
        step=step,
        state=None,
        batch=torch.from_numpy(shape.tokens()[:, :-1]).long(),
        wait=lambda _: None,
        num_params=sum(leaf.numel() for leaf in model.parameters()),
    )
