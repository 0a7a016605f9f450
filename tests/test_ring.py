"""Ring attention on eight virtual devices equals dense attention on one, gradients too."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from causal_jax.attention import Dense, dense_attention
from causal_jax.attention.ring import Ring, _Local, ring_attention, starts
from causal_jax.errors import InputError
from causal_jax.masks import Causal, Documents, Sinks, Window
from causal_jax.models.decoder import Decoder

B, T, N, H = 2, 64, 4, 8


def mesh_of(**axes):
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def qkv(K=N, length=T):
    rng = np.random.default_rng(0)
    shapes = ((B, length, N, H), (B, length, K, H), (B, length, K, H))
    return [jnp.asarray(rng.standard_normal(s), jnp.float32) for s in shapes]


def close(a, b, tol=2e-5):
    np.testing.assert_allclose(a, b, atol=tol, rtol=tol)


def results(f, *x):
    """o, lse and gradients, the lse having a cotangent too."""

    def loss(*a):
        o, lse = f(*a)
        return jnp.sum(jnp.sin(o)) + jnp.sum(jnp.where(lse == -jnp.inf, 0, jnp.cos(lse)))

    return jax.jit(lambda *a: (f(*a), jax.grad(loss, (0, 1, 2))(*a)))(*x)


SEGMENTS = jnp.asarray(np.sort(np.random.default_rng(1).integers(0, 4, (B, T)), 1))
MASKS = {
    "causal": Causal(),
    "none": None,
    "documents": Causal() & Documents(SEGMENTS),
    "stream": Causal() & (Window(9, 0) | Sinks(3)),
    "heads": jnp.asarray(np.random.default_rng(2).random((B, N, T, T)) < 0.3),
}
MESHES = {
    "context 8": {"context": 8},
    "data 2, context 4": {"data": 2, "context": 4},
    "tensor 2, context 4": {"tensor": 2, "context": 4},
}


@pytest.mark.parametrize(
    ("mask", "mesh", "K", "zigzag"),
    [
        ("causal", "context 8", 4, True),
        ("causal", "context 8", 2, False),
        ("none", "data 2, context 4", 2, True),
        ("documents", "data 2, context 4", 2, True),
        ("stream", "tensor 2, context 4", 2, False),
        ("heads", "tensor 2, context 4", 4, True),
        ("heads", "context 8", 1, True),
    ],
)
def test_equals_dense(mask, mesh, K, zigzag):
    x, mesh = qkv(K), mesh_of(**MESHES[mesh])
    ring = functools.partial(
        ring_attention, mask=MASKS[mask], mesh=mesh, zigzag=zigzag, return_lse=True
    )
    dense = functools.partial(
        dense_attention, mask=MASKS[mask], return_lse=True, implementation="reference"
    )
    split = NamedSharding(mesh, PartitionSpec(None, "context"))
    ours = results(ring, *(jax.device_put(a, split) for a in x))
    jax.tree.map(close, ours, results(dense, *x))


def test_tiles_of_the_xla_implementation():
    """Stripes of 128 in tiles of 256: some tiles lie in two stripes."""
    rng = np.random.default_rng(0)
    x = [jnp.asarray(rng.standard_normal((1, 1024, 2, 8)), jnp.float32) for _ in range(3)]
    mesh = mesh_of(context=4)
    args = {"mask": Causal() & Window(300, 0), "return_lse": True}
    ring = functools.partial(ring_attention, mesh=mesh, implementation="xla", **args)
    dense = functools.partial(dense_attention, implementation="reference", **args)
    jax.tree.map(close, results(ring, *x), results(dense, *x))


def test_rows_that_see_nothing():
    x, nobody = qkv(), jnp.ones((T, T), bool).at[5].set(False)
    ring = functools.partial(ring_attention, mask=nobody, mesh=mesh_of(context=8), return_lse=True)
    (o, lse), grads = results(ring, *x)
    assert not jnp.any(o[:, 5])
    assert jnp.all(lse[:, 5] == -jnp.inf)
    assert all(jnp.all(jnp.isfinite(g)) for g in grads)
    assert not jnp.any(grads[0][:, 5])


def test_zigzag_shares_out_the_work():
    """Live tiles of all steps, device by device: equal with zigzag, 1 to n without."""
    n, length, tile = 4, 128, 4

    def work(zigzag):
        stripe = length // (2 * n) if zigzag else length // n
        ends = [starts(jnp.asarray(r), n, stripe, zigzag) for r in range(n)]
        zero = jnp.zeros((), jnp.int32)
        return [
            sum(
                int(
                    _Local(Causal(), zero, zero, q, k, stripe, (1, 1))
                    .block_map(length // n, length // n, tile, tile)
                    .cnt.sum()
                )
                for k in ends
            )
            for q in ends
        ]

    balanced, plain = work(True), work(False)
    assert max(balanced) == min(balanced)
    assert max(plain) > 4 * min(plain)
    assert sum(balanced) == sum(plain) == 32 * 33 // 2


def test_keys_are_never_gathered():
    """What a device holds: its own pieces, never all keys (no all-gather in the program)."""
    mesh = mesh_of(context=8)
    split = NamedSharding(mesh, PartitionSpec(None, "context"))
    x = [jax.device_put(a, split) for a in qkv()]
    f = functools.partial(ring_attention, mask=Causal(), mesh=mesh, return_lse=True)
    grad = jax.jit(jax.grad(lambda *a: jnp.sum(f(*a)[0] ** 2), (0, 1, 2)))
    text = grad.lower(*x).compile().as_text()
    assert "collective-permute" in text
    assert "all-gather" not in text


def test_a_decoder_under_a_mesh_with_a_context_axis():
    spec = {"vocab": 50, "layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "context": 64}
    dense = Decoder(**spec, attention=(Dense(),)).build(jax.random.key(0))
    ring = Decoder(**spec, attention=(Ring(),)).build(jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 64), 0, 50)
    want = jax.jit(lambda t: dense(t, segments=SEGMENTS))(tokens)
    with jax.set_mesh(mesh_of(data=2, context=4)):
        program = jax.jit(lambda t: ring(t, segments=SEGMENTS)).lower(tokens).compile()
    assert "collective-permute" in program.as_text()
    with jax.set_mesh(mesh_of(data=2, context=4)):
        got = jax.jit(lambda t: ring(t, segments=SEGMENTS))(tokens)
    close(got, want, 1e-4)


def test_bad_input():
    mesh = mesh_of(context=8)
    with pytest.raises(InputError, match="multiple of context=8"):
        ring_attention(*qkv(length=60), mesh=mesh)
    with pytest.raises(InputError, match="zigzag needs a multiple of 2 x context = 16"):
        ring_attention(*qkv(length=40), mesh=mesh, zigzag=True)
    with pytest.raises(InputError, match="no such axis"):
        ring_attention(*qkv(), mesh=mesh, axis="tensor")
    with pytest.raises(InputError, match="no mesh is set"):
        ring_attention(*qkv())
    q, k, v = qkv()
    with pytest.raises(InputError, match="self-attention"):
        ring_attention(q[:, :32], k, v, mesh=mesh)
