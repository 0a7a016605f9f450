"""The catalogue of edits on a tiny decoder: what each must do exactly."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from causal_jax.interp import (
    knock_out,
    patch,
    sweep,
)
from causal_jax.models.decoder import Decoder
from causal_jax.taps import run

SPEC = Decoder(vocab=31, layers=3, width=16, heads=4, kv_heads=2, context=32)
L, B, T, N, D = 3, 2, 9, 4, 16
SITES = ("resid_post", "attn.z", "mlp_out", "attn.pattern", "q", "resid_mid", "logits")


@functools.cache
def model():
    """Parameters away from their starting values, made by one program."""
    graph = nnx.split(nnx.eval_shape(lambda: SPEC.build(jax.random.key(0))))[0]

    @jax.jit
    def make():
        params = nnx.split(SPEC.build(jax.random.key(0)))[1]
        leaves, tree = jax.tree.flatten(params)
        keys = jax.random.split(jax.random.key(1), len(leaves))
        noisy = [x + 0.2 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys)]
        return jax.tree.unflatten(tree, noisy)

    return nnx.merge(graph, make())


@functools.partial(jax.jit, static_argnames="capture")
def _run(params, tokens, edits, capture):
    out, acts = run(nnx.merge(nnx.split(model())[0], params), tokens, edits=edits, capture=capture)
    return out, acts


def go(tokens, edits=(), capture=SITES):
    """(logits, captures) of the tiny decoder."""
    return _run(nnx.split(model())[1], tokens, edits, capture)


def ids(seed=0, length=T):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 31, (B, length)), jnp.int32)


@functools.cache
def two():
    """(captures of one batch, captures of another)."""
    return go(ids(0))[1], go(ids(1))[1]


def close(a, b, tol=2e-5):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=tol, atol=tol)


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
