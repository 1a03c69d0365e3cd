"""A reference decoder in numpy."""

import math

import jax
import numpy as np


class NumpyDecoder:
    """The decoder in float64, token by token and head by head."""

    def __init__(self, config, params):
        self.config = config
        self.params = jax.tree.map(np.float64, params)

    def logits(self, tokens_BT, positions_BT, segments_BT):
        rows = zip(tokens_BT, positions_BT, segments_BT, strict=True)
        return np.stack([self.row(*row) for row in rows])

    def row(self, tokens, positions, segments):
        xs = [self.params["embedding"][token] for token in tokens]
        for i in range(self.config.num_layers):
            layer = jax.tree.map(lambda leaf: leaf[i], self.params["layers"])  # noqa: B023
            hs = [self.norm(x, layer["attention_norm"]) for x in xs]
            outs = self.attention(layer, hs, positions, segments)
            xs = [x + out for x, out in zip(xs, outs, strict=True)]
            xs = [x + self.mlp(layer, self.norm(x, layer["mlp_norm"])) for x in xs]
        xs = [self.norm(x, self.params["final_norm"]) for x in xs]
        tied = self.config.tie_head
        head = self.params["embedding"].T if tied else self.params["head"]
        logits = np.stack([x @ head for x in xs])
        logits[:, self.config.vocab_size :] = -np.inf
        return logits

    def norm(self, x, gain):
        return x / math.sqrt(np.mean(x * x) + self.config.norm_epsilon) * gain

    def rotate(self, x, position):
        rotated, half = np.empty_like(x), len(x) // 2
        for i in range(half):
            angle = position * self.frequency(i / half)
            rotated[i] = x[i] * math.cos(angle) - x[half + i] * math.sin(angle)
            rotated[half + i] = x[half + i] * math.cos(angle) + x[i] * math.sin(angle)
        return rotated

    def frequency(self, fraction):
        """Returns a channel's rotary frequency in radians per position."""
        frequency = self.config.rope_theta**-fraction
        scaling = self.config.rope_scaling
        if scaling is None:
            return frequency
        wavelength = 2 * math.pi / frequency
        if wavelength < scaling.original_seq_len / scaling.high_freq_factor:
            return frequency
        if wavelength > scaling.original_seq_len / scaling.low_freq_factor:
            return frequency / scaling.factor
        smooth = (scaling.original_seq_len / wavelength - scaling.low_freq_factor) / (
            scaling.high_freq_factor - scaling.low_freq_factor
        )
        return (1 - smooth) * frequency / scaling.factor + smooth * frequency

    def project(self, layer, kind, h):
        """Returns a token's queries, keys or values before norm and rotation."""
        heads = np.einsum("D,DNH->NH", h, layer[kind])
        return heads + layer[f"{kind}_bias"] if self.config.qkv_bias else heads

    def heads(self, layer, kind, h, position):
        """Returns a token's queries or keys, a list over heads."""
        heads = list(self.project(layer, kind, h))
        if self.config.qk_norm:
            heads = [self.norm(x, layer[f"{kind}_norm"]) for x in heads]
        return [self.rotate(x, position) for x in heads]

    def attention(self, layer, hs, positions, segments):
        group = self.config.num_heads // self.config.num_kv_heads
        keys, values = [], []
        for h, position in zip(hs, positions, strict=True):
            keys.append(np.repeat(self.heads(layer, "key", h, position), group, axis=0))
            value = self.project(layer, "value", h)
            values.append(np.repeat(value, group, axis=0))
        outs = []
        for t, h in enumerate(hs):
            seen = [s for s in range(t + 1) if segments[s] == segments[t]]
            out = np.zeros(self.config.embed_dim)
            for n, query in enumerate(self.heads(layer, "query", h, positions[t])):
                scores = np.array([query @ keys[s][n] for s in seen])
                weights = np.exp(scores / math.sqrt(len(query)))
                mixed = sum(w * values[s][n] for w, s in zip(weights, seen, strict=True))
                out += mixed / weights.sum() @ layer["out"][n]
            outs.append(out)
        return outs

    def mlp(self, layer, h):
        gate, value = h @ layer["gate_up"][:, 0], h @ layer["gate_up"][:, 1]
        return gate / (1 + np.exp(-gate)) * value @ layer["down"]
