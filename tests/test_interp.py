"""The catalogue of edits on a tiny decoder: what each must do exactly."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from causal_jax import masks
from causal_jax.attention import dense_attention
from causal_jax.errors import InputError
from causal_jax.interp import (
    ablate_heads,
    counterfactual,
    counterfactual_attention,
    knock_out,
    noise,
    patch,
    path_patch,
    peek,
    prefix,
    steer,
    subspace,
    sweep,
)
from causal_jax.models.decoder import Decoder
from causal_jax.taps import run
from tests.tiny_decoder import SITES, B, D, L, N, T, close, go, ids, model, two


def last_logit(logits):
    return logits[:, -1, 3].mean()


def patch_at(clean, layer, position):
    return patch(clean, layer=layer, position=position)


def test_patching_the_last_layer_where_it_is_read_gives_the_clean_logits():
    clean, _ = two()
    out, _ = go(ids(1), patch(clean, layer=L - 1, position=-1))
    close(out[:, -1], clean["logits"][:, -1], 1e-6)
    assert not np.allclose(out[:, -2], clean["logits"][:, -2])


def test_a_patch_is_not_seen_by_positions_before_it():
    clean, bad = two()
    out, _ = go(ids(1), patch(clean, layer=0, position=5))
    close(out[:, :5], bad["logits"][:, :5], 1e-6)
    assert np.abs(out[:, 5:] - bad["logits"][:, 5:]).max() > 1e-2


def test_patching_everything_at_every_layer_is_the_other_run():
    clean, _ = two()
    close(go(ids(1), patch(clean))[0], clean["logits"], 1e-6)


def test_sweep_is_the_loop_over_single_runs():
    clean, _ = two()
    edits_of = functools.partial(patch_at, clean["resid_post"])
    f = functools.partial(model(), ids(1))
    grid = sweep(last_logit, f, edits_of, range(L), range(T), chunk=5)
    assert grid.shape == (L, T)
    for layer, position in ((0, 0), (1, 7), (2, 8), (2, 3)):
        one = last_logit(go(ids(1), patch_at(clean["resid_post"], layer, position))[0])
        close(grid[layer, position], one)
    close(grid, sweep(last_logit, f, edits_of, range(L), range(T), chunk=None))


def test_a_heat_map_is_written(tmp_path):
    from causal_jax.interp.plots import heat_map, save

    figure = heat_map(np.arange(6.0).reshape(2, 3) - 2, x=["a", "$b", "\n"], label="effect")
    save(figure, tmp_path / "maps" / "map.png")
    assert (tmp_path / "maps" / "map.png").read_bytes().startswith(b"\x89PNG")


def test_a_knocked_out_edge_is_zero_and_rows_sum_to_one():
    _, acts = go(ids(0), knock_out(layer=1, head=2, query=6, key=[1, 4]))
    p = np.asarray(acts["attn.pattern"])
    assert (p[1, :, 2, 6, [1, 4]] == 0).all()
    assert (p[1, :, 1, 6, [1, 4]] > 0).all()
    assert (p[0, :, 2, 6, [1, 4]] > 0).all()
    close(p.sum(-1), np.ones(p.shape[:-1]))


def test_knocked_out_fused_and_dense_agree():
    edits = knock_out(layer=[0, 2], head=[1, 3], key=slice(2, 5))
    dense, _ = go(ids(0), edits, ("attn.pattern",))
    fused, _ = go(ids(0), edits, ())
    close(dense, fused)
    assert not np.allclose(fused, go(ids(0), (), ())[0])


def test_a_query_keeps_its_own_key_unless_told_otherwise():
    _, acts = go(ids(0), knock_out(layer=0))
    close(acts["attn.pattern"][0], np.broadcast_to(np.eye(T), (B, N, T, T)))
    _, acts = go(ids(0), knock_out(layer=0, keep_self=False))
    assert (np.asarray(acts["attn.pattern"][0]) == 0).all()
    assert np.isfinite(acts["resid_post"]).all()


def test_peeking_leaves_others_themselves_and_the_sink():
    _, acts = go(ids(0), [peek(layer=1), peek(layer=2, query=())])
    p = np.asarray(acts["attn.pattern"]) > 0
    alone = np.eye(T, dtype=bool)
    alone[:, 0] = True
    assert (p[1, :, :, :-1] == alone[:-1]).all()
    assert p[1, :, :, -1].all()
    assert (p[2] == alone).all()
    _, acts = go(ids(0), peek(layer=1, key=[2, 3], sink=()))
    assert np.flatnonzero(acts["attn.pattern"][1, 0, 0, -1]).tolist() == [2, 3, T - 1]


def test_a_prefix_sees_forwards_and_nothing_else_does():
    _, acts = go(ids(0), prefix(slice(0, 4), layer=1))
    seen = np.asarray(acts["attn.pattern"][1]) > 0
    want = np.tril(np.ones((T, T), bool))
    want[:4, :4] = True
    assert (seen == want).all()


def test_ablated_heads_write_zero_their_mean_or_what_uniform_attention_gives():
    mask = np.zeros((L, N), bool)
    mask[1, [0, 3]] = mask[2, 2] = True
    pairs = [(1, 0), (1, 3), (2, 2)]
    by_mask, acts = go(ids(0), ablate_heads(mask))
    by_pairs, _ = go(ids(0), ablate_heads(pairs))
    close(by_mask, by_pairs, 1e-6)
    plain, _ = two()
    z = np.asarray(acts["attn.z"])
    assert (z[1][:, :, [0, 3]] == 0).all()
    close(z[1][:, :, [1, 2]], plain["attn.z"][1][:, :, [1, 2]])  # the other heads of the layer

    mean = plain["attn.z"].mean((1, 2))
    _, acts = go(ids(0), ablate_heads(mask, "mean", mean=mean))
    close(acts["attn.z"][2, :, :, 2], np.broadcast_to(mean[2, 2], (B, T, 4)), 1e-6)

    _, acts = go(ids(0), ablate_heads([(0, 1)], "uniform"), (*SITES, "v"))
    causal = np.tril(np.ones((T, T))) / np.arange(1, T + 1)[:, None]
    close(acts["attn.pattern"][0, :, 1], np.broadcast_to(causal, (B, T, T)))
    close(acts["attn.z"][0, :, :, 1], np.einsum("ts,bsh->bth", causal, acts["v"][0, :, :, 0]))


def test_no_head_ablated_is_the_model_bit_for_bit():
    plain, _ = go(ids(0), (), ())
    out, _ = go(ids(0), ablate_heads(np.zeros((L, N), bool)), ())
    np.testing.assert_array_equal(plain, out)


def test_all_heads_zero_writes_nothing():
    _, acts = go(ids(0), ablate_heads(np.ones((L, N), bool)), ("attn_out",))
    assert (np.asarray(acts["attn_out"]) == 0).all()


def test_path_patching_moves_the_output_by_the_senders_write_only():
    clean, bad = two()
    _, acts = go(ids(1), path_patch(bad, clean, [(1, 2)]))
    gap = np.asarray(clean["attn.z"][1, :, :, 2] - bad["attn.z"][1, :, :, 2])
    kernel = model().stack.blocks[0][0].attention.o.kernel[...][1].reshape(N, 4, D)
    moved = np.asarray(acts["resid_post"][-1] - bad["resid_post"][-1])
    close(moved, np.einsum("bth,hd->btd", gap, kernel[2]), 1e-4)
    assert np.abs(moved).max() > 1e-2
    _, free = go(ids(1), path_patch(bad, clean, [(1, 2)], freeze=("attn.z",)))
    assert np.abs(free["resid_post"][-1] - acts["resid_post"][-1]).max() > 1e-3  # MLPs respond


def test_a_subspace_patch_changes_that_subspace_and_nothing_else():
    clean, bad = two()
    v = jnp.linalg.qr(jax.random.normal(jax.random.key(2), (D, 3)))[0]
    _, acts = go(ids(1), subspace(clean, v, layer=1, position=slice(2, None)))
    x, before, source = (a["resid_post"][1] for a in (acts, bad, clean))
    close(x[:, 2:] @ v, source[:, 2:] @ v)
    rest = jnp.eye(D) - v @ v.T
    close(x @ rest, before @ rest)
    close(x[:, :2], before[:, :2], 1e-6)
    turned = jnp.linalg.qr(jax.random.normal(jax.random.key(3), (3, 3)))[0]
    _, again = go(ids(1), subspace(clean, v @ turned, layer=1, position=slice(2, None)))
    close(again["resid_post"], acts["resid_post"], 1e-4)  # the span counts, not its basis
    _, whole = go(ids(1), subspace(clean, jnp.eye(D)))  # at every layer
    close(whole["resid_post"], clean["resid_post"], 1e-4)
    _, one = go(ids(1), subspace(clean, 5.0 * v[:, 0], layer=2))
    close(one["resid_post"][2] @ v[:, 0], clean["resid_post"][2] @ v[:, 0], 1e-4)


def test_a_direction_can_be_trained():
    clean, _ = two()

    @jax.jit
    def loss(v):
        return last_logit(run(model(), ids(1), edits=subspace(clean, v, layer=1, position=-1))[0])

    v = jnp.ones(D)
    grad, h = jax.grad(loss)(v), 1e-2
    step = jnp.zeros(D).at[3].set(h)
    assert abs((loss(v + step) - loss(v - step)) / (2 * h) - grad[3]) < 1e-2 * abs(grad).max()


def test_steering_adds_and_noise_is_the_key_s():
    _, bad = two()
    v = jax.random.normal(jax.random.key(0), (D,))
    _, acts = go(ids(1), steer(v, scale=2.0, layer=1, position=[0, 4]))
    moved = np.asarray(acts["resid_post"][1] - bad["resid_post"][1])
    close(moved[:, [0, 4]], np.broadcast_to(2 * v, (B, 2, D)), 1e-4)
    assert np.abs(moved[:, 1:4]).max() < 1e-6

    def noisy(seed):
        return go(ids(1), noise(jax.random.key(seed), 0.5, position=3), ("embed",))[1]["embed"]

    plain = go(ids(1), (), ("embed",))[1]["embed"]
    np.testing.assert_array_equal(noisy(0), noisy(0))
    assert np.abs(noisy(0) - noisy(1))[:, 3].min(-1).max() > 0
    close(np.delete(noisy(0), 3, 1), np.delete(plain, 3, 1), 0)


@pytest.mark.parametrize("kind", ["uniform", "random", "shuffled", "reversed"])
def test_counterfactual_attention_is_a_distribution_over_the_same_keys(kind):
    key = jax.random.key(4) if kind in ("random", "shuffled") else None
    _, acts = go(ids(0), counterfactual(kind, key, layer=1, head=[0, 2]))
    p, plain = np.asarray(acts["attn.pattern"][1]), np.asarray(two()[0]["attn.pattern"][1])
    close(p.sum(-1), np.ones((B, N, T)))
    assert (p[..., np.triu_indices(T, 1)[0], np.triu_indices(T, 1)[1]] == 0).all()
    close(p[:, [1, 3]], plain[:, [1, 3]], 1e-6)
    assert np.abs(p - plain)[:, [0, 2]].max() > 1e-3
    if kind == "shuffled":
        close(np.sort(p, -1), np.sort(plain, -1), 1e-6)
    if kind == "reversed":
        want = counterfactual_attention(jnp.asarray(plain), np.tril(np.ones((T, T), bool)), kind)
        close(p[:, 0], want[:, 0], 1e-6)
        assert p[0, 0, 0, 0] == 1  # the first query sees itself alone


def test_two_sweeps_of_one_form_are_one_trace():
    traced = []

    def metric(logits):
        traced.append(1)
        return logits[:, -1].sum()

    clean, bad = two()
    for acts, seed, grid in ((clean, 1, [0, 1]), (bad, 0, [1, 2])):
        edits_of = functools.partial(patch_at, acts["resid_post"])
        sweep(metric, functools.partial(model(), ids(seed)), edits_of, grid, range(T), chunk=4)
    assert len(traced) == 1


def test_a_sweep_takes_trees_and_gives_trees():
    def edits_of(point, scale):
        return steer(point["v"], scale=scale, layer=point["layer"], position=-1)

    def metric(logits):
        return {"top": logits[:, -1].max(), "all": logits[:, -1]}

    points = {"v": jnp.ones((2, D)), "layer": jnp.array([0, 2])}
    out = sweep(metric, functools.partial(model(), ids(0)), edits_of, points, [0.0, 1.0, 2.0])
    assert out["top"].shape == (2, 3)
    assert out["all"].shape == (2, 3, B, 31)
    close(out["all"][0, 0], two()[0]["logits"][:, -1], 1e-5)


WRONG = {
    "is never visited; nearest: resid_post": lambda: steer(jnp.ones(D), site="resid_pots"),
    "layer=7 is outside 0..2": lambda: steer(jnp.ones(D), layer=7),
    "position=.9. is outside 0..8": lambda: patch(two()[0], layer=0, position=[9]),
    "a value of shape .7. does not fit": lambda: steer(jnp.ones(7), layer=0),
    "a value of shape .2, 9, 4, 4. does not fit": lambda: patch(two()[0]["q"], layer=0),
    "has no heads": lambda: patch(two()[0], layer=0, head=1),
    "no captured 'resid_pots'; nearest: resid_post": lambda: patch(two()[0], site="resid_pots"),
    "layer=3 is outside 0..2": lambda: patch(two()[0], layer=3),
    "not orthonormal": lambda: subspace(two()[0], np.ones((D, 2)), layer=0),
    "a mask of 4 entries, there are 9": lambda: knock_out(key=np.ones(4, bool)),
    "is no selection": lambda: knock_out(key="a"),
    "a span has no step": lambda: knock_out(key=slice(0, 8, 2)),
    "use 'zero', 'uniform', or 'mean'": lambda: ablate_heads([(0, 0)], "mean"),
    "expected bool .L, N. or a list": lambda: ablate_heads(3),
    "expected one of uniform, random": lambda: counterfactual("flat"),
    "key=missing": lambda: counterfactual("random"),
    "is in no layer": lambda: patch({"embed": np.zeros((B, T, D))}, site="embed", layer=1),
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_wrong_input_is_refused_with_what_would_be_right(message):
    with pytest.raises(InputError, match=message):
        jax.eval_shape(lambda: run(model(), ids(0), edits=WRONG[message]())[0])


def test_a_sweep_without_points_is_refused():
    for grids in ((), ([],), ((jnp.arange(2), jnp.arange(3)),)):
        with pytest.raises(InputError, match="grid"):
            sweep(last_logit, functools.partial(model(), ids(0)), patch_at, *grids)


@pytest.mark.parametrize("mask", [masks.Causal(), masks.Causal() & masks.Window(90, None)])
def test_mask_edits_reach_the_kernel_as_functions_of_the_index(mask):
    """No [T, T] array, the same numbers and gradients as the dense reference."""
    length = 300
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(x, (B, length, n, 8)) for x, n in zip(keys, (4, 2, 2)))
    rows = np.zeros((B, length), bool)
    rows[0, 100:200] = rows[1, 7] = True
    edits = [
        knock_out(head=[1, 3], query=slice(150, None), key=rows),
        knock_out(head=0, key=-1, keep_self=False),
        peek(layer=None, query=[4, 299], key=rows),
    ]

    def attend(q, k, v, edits, implementation):
        def f(q, k, v, tap):
            return dense_attention(
                q, k, v, mask=mask, tap=tap.scope("attn"), implementation=implementation
            )

        return run(f, q, k, v, edits=edits)[0]

    def value(q, k, v, edits, implementation):
        return (attend(q, k, v, edits, implementation) ** 2).sum()

    got, want = (
        jax.jit(jax.value_and_grad(value, (0, 1, 2)), static_argnums=4)(q, k, v, edits, name)
        for name in ("xla", "reference")
    )
    jax.tree.map(functools.partial(close, tol=2e-4), got, want)
    program = jax.jit(attend, static_argnums=4).lower(q, k, v, edits, "xla").as_text()
    assert "300x300" not in program


def test_mask_edits_inside_layers_are_gated_in_the_kernel():
    """A traced layer, 300 positions: only that layer's attention changes."""
    spec = Decoder(vocab=31, layers=2, width=8, heads=2, context=300)
    graph = nnx.split(nnx.eval_shape(lambda: spec.build(jax.random.key(0))))[0]

    @jax.jit
    def read(layer):
        m = nnx.merge(graph, nnx.split(spec.build(jax.random.key(0)))[1])
        edits = [knock_out(layer=layer, key=slice(0, 9)), knock_out(layer=[1], head=1)]
        tokens = jnp.arange(300, dtype=jnp.int32)[None] % 31
        return [run(m, tokens, edits=e, capture=["attn.z"])[1]["attn.z"] for e in ((), edits)]

    for layer in (0, 1):
        plain, cut = read(layer)
        assert np.allclose(plain[0], cut[0], atol=1e-6) == (layer == 1)
        assert not np.allclose(plain[1], cut[1], atol=1e-4)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_edits_keep_the_activation_s_sharding(kind):
    """A batch spread over devices stays so, and the numbers are those of one device."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(kind,))
    x = jax.random.normal(jax.random.key(0), (4, T, D))
    clean = jax.random.normal(jax.random.key(1), (2, 4, T, D))
    rows = np.arange(4 * T).reshape(4, T) % 3 == 0

    def layers(x, *, tap):
        return tap.loop(lambda x, _, tap: (tap("resid_post", x), None), x, None, length=2)[0]

    edits = [
        patch(clean, layer=0, position=rows),
        patch(clean, position=2),
        subspace(clean, jnp.ones(D), layer=1),
        steer(jnp.arange(16.0), layer=1, position=-1),
        noise(jax.random.key(2), 0.1, site="resid_post", layer=1, position=slice(0, 3)),
    ]
    f = jax.jit(lambda x, e: run(layers, x, edits=e)[0])
    want = f(x, edits)
    with jax.set_mesh(mesh):
        got = f(jax.device_put(x, NamedSharding(mesh, P("data"))), edits)
    close(got, want)
    assert got.sharding.spec[0] == "data"
