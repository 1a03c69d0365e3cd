"""Mixtures of experts match transformers, and the same products on every device layout."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from conftest import EXPERTS, first_microbatch, random_batch, tiny_model
from jax.sharding import NamedSharding
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from stackjax import model
from stackjax.model import experts, flops, grouped, router
from stackjax.model.config import CompleteP, axis_size, layers_along
from stackjax.model.layer_kind import LayerKind
from stackjax.model.routing_config import Routing
from stackjax.runtime.errors import UserError
from stackjax.sharding.axes import Axes
from stackjax.sharding.config import MeshConfig
from stackjax.sharding.mesh import build_mesh
from stackjax.sharding.partition import logical, partition

DENSE = LayerKind(dense=True)
FIELDS = {"num_experts": 4, "expert_dim": 8, "routing": Routing(top_k=2)}


# --- transformers ---------------------------------------------------------------------------

SHAPE = {
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "rope_theta": 1e4,
}
OURS = tiny_model(vocab_size=24, vocab_multiple=24, norm_epsilon=1e-5)


def qwen(**fields):
    config = transformers.Qwen3MoeConfig(
        **SHAPE,
        num_experts=8,
        num_experts_per_tok=3,
        moe_intermediate_size=8,
        rms_norm_eps=1e-5,
        **fields,
    )
    return transformers.Qwen3MoeForCausalLM(config)


def mixtral(window):
    config = transformers.MixtralConfig(
        **SHAPE, num_hidden_layers=3, num_local_experts=4, sliding_window=window
    )
    return transformers.MixtralForCausalLM(config)


MIXTRAL = dataclasses.replace(
    OURS, num_experts=4, expert_dim=20, routing=Routing(top_k=2, balance_weight=0.02)
)
QWEN = dataclasses.replace(
    OURS, num_experts=8, expert_dim=8, routing=Routing(top_k=3), qk_norm=True
)
# The network, and the same model here.
JUDGES = {
    "mixtral": (lambda: mixtral(None), MIXTRAL),
    "mixtral, window": (
        lambda: mixtral(3),
        dataclasses.replace(MIXTRAL, pattern=(LayerKind(window=3),)),
    ),
    "qwen3_moe": (
        lambda: qwen(num_hidden_layers=3, norm_topk_prob=True),
        QWEN,
    ),
    "qwen3_moe, dense layers": (
        lambda: qwen(num_hidden_layers=5, norm_topk_prob=False, mlp_only_layers=[0, 2, 4]),
        dataclasses.replace(
            QWEN,
            num_layers=5,
            pattern=(DENSE, LayerKind()),
            routing=Routing(top_k=3, normalize=False),
        ),
    ),
}


def weights(config, named):
    """Returns the parameter tree from tensors by their name in transformers."""
    d, n, k, h = config.embed_dim, config.num_heads, config.num_kv_heads, config.head_dim
    ours = {
        "attention_norm": ("input_layernorm", lambda w: w),
        "mlp_norm": ("post_attention_layernorm", lambda w: w),
        "query": ("self_attn.q_proj", lambda w: w.T.reshape(d, n, h)),
        "key": ("self_attn.k_proj", lambda w: w.T.reshape(d, k, h)),
        "value": ("self_attn.v_proj", lambda w: w.T.reshape(d, k, h)),
        "out": ("self_attn.o_proj", lambda w: w.T.reshape(n, h, d)),
        "query_norm": ("self_attn.q_norm", lambda w: w),
        "key_norm": ("self_attn.k_norm", lambda w: w),
        "router": ("mlp.gate", lambda w: w.T),
        "down": ("mlp.down_proj", lambda w: w.T),
    }

    def leaf(name, axes):
        if axes.layer_axis is None:
            place = {"embedding": "model.embed_tokens", "final_norm": "model.norm"}
            value = named[f"{place.get(name, 'lm_head')}.weight"]
            return value.T if name == "head" else value
        return np.stack([of_layer(name, i) for i in layers_along(config, axes.layer_axis)])

    def of_layer(name, i):
        place = f"model.layers.{i}."
        if name == "gate_up":
            sides = (named[f"{place}mlp.{side}_proj.weight"].T for side in ("gate", "up"))
            return np.stack([*sides], axis=1)
        if name == "expert_gate_up":
            both = named[f"{place}mlp.experts.gate_up_proj"]
            return both.reshape(both.shape[0], 2, -1, d).transpose(0, 3, 1, 2)
        if name == "expert_down":
            return named[f"{place}mlp.experts.down_proj"].transpose(0, 2, 1)
        theirs, change = ours[name]
        return change(named[f"{place}{theirs}.weight"])

    axes = model.logical_axes(config)
    layers = {name: leaf(name, names) for name, names in axes["layers"].items()}
    outer = {name: leaf(name, names) for name, names in axes.items() if name != "layers"}
    return outer | {"layers": layers}


@pytest.mark.parametrize("name", JUDGES)
def test_logits_and_gradients_match_transformers(name):
    make, config = JUDGES[name]
    torch.manual_seed(0)
    network = make().to(torch.float64)
    # The grouped products of torch have no float64.
    network.config._experts_implementation = "eager"
    for weight in network.parameters():
        near = 1.0 if weight.ndim == 1 else 0.0
        weight.data = near + torch.randn(weight.shape, dtype=torch.float64) / 4
    batch = first_microbatch(random_batch(rows=2, seq_len=8, vocab_size=24))
    tokens = torch.tensor(batch.tokens, dtype=torch.long)
    out = network(tokens, use_cache=False, output_router_logits=True)
    normalizers = torch.log_softmax(out.logits[:, :-1], dim=-1)
    losses = -torch.gather(normalizers, -1, tokens[:, 1:, None])[..., 0]
    loss = (losses * torch.tensor(batch.loss_weights[:, :-1])).sum()
    total = config.num_experts, config.routing.top_k
    # The balance loss of transformers pools loads over layers; ours is the mean over layers.
    balance = torch.stack(
        [load_balancing_loss_func((each,), *total) for each in out.router_logits]
    ).mean()
    weight = batch.loss_weights.sum() * config.routing.balance_weight
    (loss + float(weight) * balance).backward()
    named = network.state_dict(keep_vars=True)
    params = weights(config, {n: w.detach().numpy() for n, w in named.items()})
    expected = weights(config, {n: w.grad.numpy() for n, w in named.items()})
    params = jax.tree.map(jnp.float32, params)
    positions = np.broadcast_to(np.arange(8, dtype=np.int32), (2, 8))
    whole = batch._replace(positions=positions, segments=None)
    apply = jax.jit(model.apply, static_argnums=0)
    logits = apply(config, params, whole.tokens, positions, None)
    # Float32 through a few layers.
    theirs = out.logits.detach().numpy()
    np.testing.assert_allclose(logits, theirs, atol=1e-5 * np.abs(theirs).max())

    def objective(params):
        sums = model.next_token_loss(config, params, whole)
        return sums.objective, sums

    gradients, sums = jax.jit(jax.grad(objective, has_aux=True))(params)
    assert float(sums.nll) == pytest.approx(loss.item(), rel=1e-5)
    mean = sums.router.balance / batch.loss_weights.sum()
    assert float(mean) == pytest.approx(balance.item(), rel=1e-5)
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_allclose(
            ours, theirs, atol=2e-5 * max(1.0, np.abs(theirs).max())
        ),
        gradients,
        expected,
    )


# --- products -------------------------------------------------------------------------------

E, K, B, T, D, F = 8, 3, 8, 4, 16, 10
INTO = Axes(("experts",), ("embed",), ("expert_mlp",), ("gate_up",))
OUT = Axes(("experts",), ("expert_mlp",), ("embed",))
TOKENS = ("batch", "seq", None)


def loop(x_BTD, share_BTK, chosen_BTK, gate_up, down):
    """Returns the sum over experts, one token and expert after another, in float64."""
    out = np.zeros_like(x_BTD)
    for place in np.ndindex(chosen_BTK.shape):
        x, e = x_BTD[place[:2]], chosen_BTK[place]
        gate, value = x @ gate_up[e, :, 0], x @ gate_up[e, :, 1]
        out[place[:2]] += share_BTK[place] * ((np.tanh(gate) * value) @ down[e])
    return out


LAYOUTS = {
    "no mesh": None,
    "fsdp, tensor": MeshConfig(fsdp=4, tensor=2),
    "context, expert": MeshConfig(replica=1, context=2, expert=2),
    "expert": MeshConfig(replica=1, fsdp=1, expert=8),
    "all": MeshConfig(replica=2, fsdp=1, expert=2, tensor=2),
}


@pytest.mark.parametrize("uneven", [False, True], ids=["spread", "one expert has all"])
@pytest.mark.parametrize("rows", [1, 4, 16], ids=["ragged dot", "blocks of 4", "blocks of 16"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.sample(2)
def test_products_and_gradients_match_a_loop_over_experts(layout, rows, uneven, monkeypatch):
    monkeypatch.setitem(grouped._BLOCKS, "cpu", (rows, rows))
    rng = np.random.default_rng(0)
    shapes = (B, T, D), (B, T, K), (E, D, 2, F), (E, F, D), (B, T, D)
    x, share, gate_up, down, pull = (rng.normal(size=shape) for shape in shapes)
    ranked = rng.normal(size=(B, T, E)) + (np.arange(E) * 100 if uneven else 0)
    chosen = np.argsort(-ranked, axis=-1)[..., :K].astype(np.int32)
    expected = loop(x, share, chosen, gate_up, down)
    names = TOKENS, TOKENS, TOKENS, INTO, OUT, TOKENS

    def run(x, share, chosen, gate_up, down, pull):
        def total(x, share, gate_up, down):
            gated = lambda gate, value: jnp.tanh(gate) * value  # noqa: E731
            out = experts.mixture(x, share, chosen, gate_up, down, gated)
            return jnp.sum(out * pull), out

        return jax.grad(total, (0, 1, 2, 3), has_aux=True)(x, share, gate_up, down)

    args = x, share, chosen, gate_up, down, pull
    with jax.enable_x64(True):
        if LAYOUTS[layout] is None:
            grads, out = jax.jit(run)(*args)
        else:
            with jax.set_mesh(build_mesh(LAYOUTS[layout])):
                specs = [partition(n) if isinstance(n, Axes) else logical(*n) for n in names]
                mesh = jax.sharding.get_mesh()
                put = [
                    jax.device_put(a, NamedSharding(mesh, spec))
                    for a, spec in zip(args, specs, strict=True)
                ]
                grads, out = jax.jit(run)(*put)
    np.testing.assert_allclose(out, expected, atol=1e-11)
    # The output is linear in shares and `down`, and quadratic in rows of tanh(gate) value.
    for place, arg in ((1, share), (3, down)):
        total = np.sum(np.asarray(grads[place]) * arg)
        assert total == pytest.approx(np.sum(expected * pull), rel=1e-11)
    step = 1e-6
    for place, arg in ((0, x), (2, gate_up)):
        move = rng.normal(size=arg.shape)
        moved = [
            np.sum(pull * loop(*(a if a is not arg else a + s * move for a in args[:5])))
            for s in (step, -step)
        ]
        slope = (moved[0] - moved[1]) / (2 * step)
        assert np.sum(np.asarray(grads[place]) * move) == pytest.approx(slope, rel=1e-6)


def test_program_has_as_many_operations_for_any_number_of_periods():
    def lines(num_layers):
        config = dataclasses.replace(EXPERTS["like deepseek"], num_layers=num_layers)
        batch = first_microbatch(random_batch(rows=1))
        abstract = jax.eval_shape(lambda: model.init(config, jax.random.key(0)))
        run = jax.grad(lambda params: model.next_token_loss(config, params, batch).objective)
        return jax.jit(run).lower(abstract).as_text().count("\n")

    assert lines(8) == lines(16)


# --- the router -----------------------------------------------------------------------------


def routed(routing, logits, bias=None):
    """Returns the result of `route` for logits [T, E]."""
    num_experts = logits.shape[-1]
    eye = jnp.eye(num_experts)
    return router.route(routing, jnp.float32(logits)[None], eye, bias)


LOGITS = np.float32([[2.0, 1.0, 0.5, -1.0], [0.0, 3.0, 0.5, 0.2], [1.0, 0.9, -2.0, 0.8]])


def test_normalized_softmax_is_a_softmax_of_the_chosen_logits():
    share, chosen, _ = routed(Routing(top_k=2), LOGITS)
    picked = np.take_along_axis(LOGITS, np.asarray(chosen[0]), axis=-1)
    np.testing.assert_allclose(share[0], jax.nn.softmax(picked), rtol=1e-6)
    raw, same, _ = routed(Routing(top_k=2, normalize=False, scale=3.0), LOGITS)
    np.testing.assert_array_equal(same, chosen)
    whole = np.take_along_axis(jax.nn.softmax(LOGITS), np.asarray(chosen[0]), axis=-1)
    np.testing.assert_allclose(raw[0], 3 * whole, rtol=1e-6)


def test_bias_changes_the_choice_and_not_the_shares():
    routing = Routing(top_k=2, score="sigmoid", normalize=False, balance="bias")
    share, chosen, _ = routed(routing, LOGITS, jnp.float32([0, 0, 0, 10.0]))
    assert (np.asarray(chosen[0])[:, 0] == 3).all()
    np.testing.assert_allclose(share[0, :, 0], jax.nn.sigmoid(LOGITS[:, 3]), rtol=1e-6)


def test_statistics_are_means_over_tokens():
    _, _, found = routed(Routing(top_k=2), LOGITS)
    np.testing.assert_allclose(found.load_E, np.float32([2, 3, 1, 0]) / 3, rtol=1e-6)
    probs = np.asarray(jax.nn.softmax(LOGITS))
    np.testing.assert_allclose(found.score_E, probs.mean(0), rtol=1e-6)
    entropy = -(probs * np.log(probs)).sum(-1).mean()
    assert float(found.entropy) == pytest.approx(entropy, rel=1e-6)
    squares = np.log(np.exp(LOGITS).sum(-1)) ** 2
    assert float(found.square) == pytest.approx(squares.mean(), rel=1e-6)


def test_balance_loss_of_equal_loads_is_top_k():
    even = router.Routed(*(jnp.full((2, 4), each) for each in (0.75, 0.25)), *jnp.ones((2, 2)))
    routing = Routing(top_k=3, balance_weight=0.5, z_loss=2.0)
    loss, sums = router.router_loss(routing, even, jnp.float32(2))
    assert float(loss) == pytest.approx(2 * (0.5 * 3 + 2))
    metrics = router.router_metrics(sums)
    assert float(metrics["max_load"]) == float(metrics["min_load"]) == pytest.approx(1)


# --- sizes and refusals ---------------------------------------------------------------------


@pytest.mark.parametrize("name", EXPERTS)
def test_num_params_match_all_arrays(name):
    config = EXPERTS[name]
    shapes = jax.tree.leaves(jax.eval_shape(lambda: model.init(config, jax.random.key(0))))
    padding = 2 * (config.padded_vocab_size - config.vocab_size) * config.embed_dim
    assert flops.num_params(config) == sum(leaf.size for leaf in shapes) - padding
    axes = model.logical_axes(config)
    jax.tree.map(
        lambda leaf, names: leaf.shape == tuple(axis_size(config, n) for n in names.names),
        jax.eval_shape(lambda: model.init(config, jax.random.key(0))),
        axes,
    )


# Billions of all and of active parameters, as published.
PUBLISHED = {
    "Mixtral 8x7B": (32000, 32, 4096, 14336, 32, 8, 128, 8, 2, False, 46.7, 12.9),
    "OLMoE 1B-7B": (50304, 16, 2048, 1024, 16, 16, 128, 64, 8, True, 6.92, 1.28),
    "Qwen3 30B-A3B": (151936, 48, 2048, 768, 32, 4, 128, 128, 8, True, 30.5, 3.35),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_active_and_all_parameters_match_published_models(name):
    vocab, layers, embed, units, n, k, h, num_experts, top_k, norm, total, active = PUBLISHED[
        name
    ]
    config = tiny_model(
        vocab_size=vocab,
        num_layers=layers,
        embed_dim=embed,
        num_heads=n,
        num_kv_heads=k,
        head_dim=h,
        num_experts=num_experts,
        expert_dim=units,
        qk_norm=norm,
        routing=Routing(top_k=top_k),
    )
    assert flops.num_params(config) / 1e9 == pytest.approx(total, rel=3e-3)
    assert flops.num_active_params(config) / 1e9 == pytest.approx(active, rel=5e-3)
    assert flops.flops_6nd(config) == 6 * flops.num_active_params(config)


def test_matmul_flops_count_the_chosen_and_the_shared_experts():
    config = EXPERTS["like deepseek"]
    units = [20, *(6 * (2 + 2),) * 3]
    dense = [tiny_model(num_layers=1, mlp_dim=each) for each in units]
    head = flops.matmul_flops(tiny_model(num_layers=0), 8)
    routers = 3 * 3 * 2 * config.embed_dim * config.num_experts
    expected = sum(flops.matmul_flops(each, 8) - head for each in dense) + head + routers
    assert flops.matmul_flops(config, 8) == expected


WRONG = {
    "no routing": ({"num_experts": 4, "expert_dim": 8}, "routing is None"),
    "no units": ({"num_experts": 4, "routing": Routing(top_k=1)}, "expert_dim is 0"),
    "units alone": ({"expert_dim": 8}, "expert_dim is 8, which has no effect"),
    "shared alone": ({"num_shared_experts": 1}, "no effect while model.num_experts is 0"),
    "dense kind alone": ({"pattern": (DENSE,)}, "dense kind, which has no effect"),
    "all dense": (FIELDS | {"pattern": (DENSE,)}, "all kinds in model.pattern are dense"),
    "top_k": (FIELDS | {"routing": Routing(top_k=5)}, "top_k is 5; it may be"),
    "completep": (FIELDS | {"completep": CompleteP.of(tiny_model())}, "num_experts is 4"),
}


@pytest.mark.parametrize("name", WRONG)
def test_fields_without_effect_are_refused(name):
    fields, message = WRONG[name]
    with pytest.raises(UserError, match=message):
        tiny_model(**fields)


@pytest.mark.parametrize("fields", [{"balance_weight": 0.1}, {"bias_rate": 0.1}])
def test_fields_of_other_balances_are_refused(fields):
    with pytest.raises(UserError, match=r"no effect while model\.routing\.balance is"):
        Routing(top_k=2, balance="none", **fields)
