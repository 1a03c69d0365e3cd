"""A reference decoder in numpy."""

import math

import jax
import numpy as np

from stackjax.model.layer_kind import LayerKind


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
        if self.config.scale_embedding:
            xs = [x * math.sqrt(self.config.embed_dim) for x in xs]
        if self.config.positions == "learned":
            xs = self.joined(xs, [self.params["position_embedding"][p] for p in positions])
        pattern = self.config.pattern or (LayerKind(),)
        for i in range(self.config.num_layers * self.config.loops):
            i %= self.config.num_layers
            layer = self.layer(i)
            hs = [self.norm_if(layer, "attention_norm", x) for x in xs]
            outs = self.attention(layer, pattern[i % len(pattern)], hs, positions, segments)
            before = xs
            xs = self.joined(xs, [self.norm_if(layer, "attention_out_norm", y) for y in outs])
            seen = before if self.config.parallel_residual else xs
            feed = self.experts if "router" in layer else self.mlp
            outs = [feed(layer, self.norm_if(layer, "mlp_norm", x)) for x in seen]
            xs = self.joined(xs, [self.norm_if(layer, "mlp_out_norm", y) for y in outs])
        bias = self.params.get("final_norm_bias")
        xs = [self.norm(x, self.params["final_norm"], bias) for x in xs]
        tied = self.config.tie_head
        head = self.params["embedding"].T if tied else self.params["head"]
        logits = np.stack([capped(x @ head, self.config.logit_cap) for x in xs])
        logits[:, self.config.vocab_size :] = -np.inf
        return logits

    def layer(self, i):
        """Returns a layer's parameters; parameters of some layers are lists of those layers."""
        pattern = self.config.pattern or (LayerKind(),)
        dense = [pattern[j % len(pattern)].dense for j in range(self.config.num_layers)]
        some = ("gate_up", "down") if dense[i] else ("router", "expert", "shared")
        others = ("router", "expert", "shared") if dense[i] else ("gate_up", "down")
        if self.config.num_experts == 0 or len(set(dense)) == 1:
            some, others = (), ()
        place = dense[:i].count(dense[i])
        return {
            name: leaf[place if name.startswith(some) and some else i]
            for name, leaf in self.params["layers"].items()
            if not (others and name.startswith(others))
        }

    def experts(self, layer, h):
        """Returns the sum over a token's experts, one after another."""
        routing = self.config.routing
        logits = h @ layer["router"]
        if routing.score == "softmax":
            scores = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        else:
            scores = 1 / (1 + np.exp(-logits))
        chosen = np.argsort(-(scores + layer.get("router_bias", 0.0)))[: routing.top_k]
        whole = scores[chosen].sum() if routing.normalize else 1.0
        out = np.zeros_like(h)
        for e in chosen:
            one = {"gate_up": layer["expert_gate_up"][e], "down": layer["expert_down"][e]}
            out += routing.scale * scores[e] / whole * self.mlp(one, h)
        for s in range(self.config.num_shared_experts):
            one = {"gate_up": layer["shared_gate_up"][:, :, s], "down": layer["shared_down"][s]}
            out += self.mlp(one, h)
        return out

    @staticmethod
    def joined(xs, outs):
        return [x + out for x, out in zip(xs, outs, strict=True)]

    def norm(self, x, gain, bias=None):
        gain = gain + 1 if self.config.unit_offset else gain
        if self.config.norm == "layer":
            deviation = math.sqrt(np.var(x) + self.config.norm_epsilon)
            return (x - np.mean(x)) / deviation * gain + bias
        return x / math.sqrt(np.mean(x * x) + self.config.norm_epsilon) * gain

    def norm_if(self, layer, name, x):
        """Returns the norm, or the same array in a layer without it."""
        has = {"before": ("_norm",), "after": ("_out_norm",), "both": ("_norm", "_out_norm")}
        suffix = "_out_norm" if name.endswith("_out_norm") else "_norm"
        if suffix not in has[self.config.norm_placement]:
            return x
        return self.norm(x, layer[name], layer.get(f"{name}_bias"))

    def rotate(self, x, position, kind):
        rotated, half = x.copy(), int(len(x) * self.config.rotary_share) // 2
        scaling = (self.config if kind.rope_theta is None else kind).rope_scaling
        if self.config.positions == "learned":
            return x
        if kind.rotary and scaling is not None and scaling.method == "yarn":
            factor = scaling.attention_factor or 1 + math.log(scaling.factor) / 10
            rotated[: 2 * half] *= factor
            x = rotated.copy()
        for i in range(half if kind.rotary else 0):
            angle = position * self.frequency(i / half, kind)
            rotated[i] = x[i] * math.cos(angle) - x[half + i] * math.sin(angle)
            rotated[half + i] = x[half + i] * math.cos(angle) + x[i] * math.sin(angle)
        return rotated

    def frequency(self, fraction, kind):
        """Returns a channel's rotary frequency in radians per position."""
        of = self.config if kind.rope_theta is None else kind
        frequency, scaling = of.rope_theta**-fraction, of.rope_scaling
        if scaling is None:
            return frequency
        if scaling.method == "linear":
            return frequency / scaling.factor
        if scaling.method == "yarn":
            kept = yarn_share(fraction, scaling, of.rope_theta, self.config.rotary_dim)
            return frequency * (kept + (1 - kept) / scaling.factor)
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

    def heads(self, layer, name, kind, h, position):
        """Returns a token's queries or keys, a list over heads."""
        heads = self.project(layer, name, h)
        if self.config.qk_norm and self.config.qk_norm_over == "all_heads":
            heads = self.norm(heads, layer[f"{name}_norm"])
        elif self.config.qk_norm:
            heads = [self.norm(x, layer[f"{name}_norm"]) for x in heads]
        return [self.rotate(x, position, kind) for x in heads]

    def attention(self, layer, kind, hs, positions, segments):
        group = self.config.num_heads // self.config.num_kv_heads
        keys, values = [], []
        for h, position in zip(hs, positions, strict=True):
            keys.append(np.repeat(self.heads(layer, "key", kind, h, position), group, axis=0))
            value = self.project(layer, "value", h)
            values.append(np.repeat(value, group, axis=0))
        outs = []
        for t, h in enumerate(hs):
            first = 0 if kind.window is None else max(0, t + 1 - kind.window)
            seen = [s for s in range(first, t + 1) if segments[s] == segments[t]]
            out = np.zeros(self.config.embed_dim)
            for n, query in enumerate(self.heads(layer, "query", kind, h, positions[t])):
                scores = np.array([query @ keys[s][n] for s in seen])
                scores /= math.sqrt(self.config.query_scale or len(query))
                weights = np.exp(capped(scores, self.config.attention_cap))
                mixed = sum(w * values[s][n] for w, s in zip(weights, seen, strict=True))
                out += mixed / weights.sum() @ layer["out"][n]
            outs.append(out + layer.get("out_bias", 0))
        return outs

    def mlp(self, layer, h):
        activation = ACTIVATIONS[self.config.activation]
        if not self.config.gated:
            units = activation(h @ layer["up"] + layer.get("up_bias", 0))
        else:
            biases = layer.get("gate_up_bias", (0, 0))
            gate, value = (h @ layer["gate_up"][:, i] + biases[i] for i in range(2))
            units = activation(gate) * value
        return units @ layer["down"] + layer.get("down_bias", 0)


def yarn_share(fraction, scaling, theta, channels):
    """Returns the share of a frequency that YaRN keeps (arXiv:2309.00071)."""
    first, last = (
        channels / 2 * math.log(scaling.original_seq_len / 2 / math.pi / turns, theta)
        for turns in (scaling.high_freq_factor, scaling.low_freq_factor)
    )
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, channels - 1)
    last += 0.001 if first == last else 0
    return 1 - min(max((fraction * channels / 2 - first) / (last - first), 0), 1)


def logits_of_documents(config, params, tokens_BT):
    """Returns the logits of one document per row, without vocabulary padding."""
    positions_BT = np.broadcast_to(np.arange(tokens_BT.shape[1]), tokens_BT.shape)
    found = NumpyDecoder(config, params).logits(
        tokens_BT, positions_BT, np.zeros_like(tokens_BT)
    )
    return found[..., : config.vocab_size]


def capped(x, cap):
    return x if cap is None else cap * np.tanh(x / cap)


ACTIVATIONS = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: x * np.vectorize(lambda each: 1 + math.erf(each / math.sqrt(2)))(x) / 2,
    "gelu_tanh": lambda x: (
        x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    ),
}
