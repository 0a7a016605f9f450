"""Dense attention: the reference against a loop in float64, every implementation against that."""

import functools
import itertools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from dense_problems import (  # noqa: F401
    MASKS,
    _small_tiles,
    arrays,
    attention,
    close,
    graded,
    qkv,
    reference,
    visible,
)

from causal_jax import taps
from causal_jax.attention import Dense, choose, dense_attention
from causal_jax.attention._tiles import choose_tiles
from causal_jax.masks import (
    Causal,
    Documents,
    Full,
    HeadSplit,
    Prefix,
    Sinks,
    Window,
    bigbird,
    from_fn,
    top_k_blocks,
)


def loop(q, k, v, allowed, bias, scale, cap, sinks):
    """The definition, row by row, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    (B, T, N, _), K = q.shape, k.shape[2]
    o, lse = np.zeros((B, T, N, v.shape[-1])), np.full((B, T, N), -np.inf)
    allowed = np.broadcast_to(allowed, (B, N, T, k.shape[1]))
    for b, i, h in itertools.product(range(B), range(T), range(N)):
        g = h // (N // K)
        s = scale * k[b, :, g] @ q[b, i, h]
        s = cap * np.tanh(s / cap) if cap else s
        if bias is not None:
            s = s + np.broadcast_to(bias, (B, N, *bias.shape[2:]))[b, h, i]
        e = np.exp(s) * allowed[b, h, i]
        total = e.sum() + (np.exp(sinks[h]) if sinks is not None else 0)
        if total > 0:
            o[b, i, h], lse[b, i, h] = e @ v[b, :, g] / total, np.log(total)
    return o, lse


@pytest.mark.parametrize("extras", [False, True])
def test_reference_is_the_definition(extras):
    q, k, v = qkv(Hv=6)
    bias, sinks = arrays((1, 4, 37, 45), (4,)) if extras else (None, None)
    cap, scale = (2.5, 0.6) if extras else (None, None)
    for name in MASKS:
        allowed = visible(name)
        o, lse = attention(
            q, k, v, mask=allowed, bias=bias, scale=scale, soft_cap=cap, sinks=sinks,
            return_lse=True, implementation="reference",
        )  # fmt: skip
        expected = loop(q, k, v, allowed, bias, scale or 8**-0.5, cap, sinks)
        close(o, expected[0])
        close(lse, expected[1])


def test_reference_takes_masks_as_they_come():
    q, k, v = qkv()
    for name, mask in MASKS.items():
        o = dense_attention(q, k, v, mask=mask, implementation="reference")
        expected = attention(q, k, v, mask=visible(name), implementation="reference")
        np.testing.assert_array_equal(o, expected)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_nan_reaches_nobody_who_may_not_see_it(implementation, small_tiles):
    q, k, v = qkv(T=40, S=40)
    mask = Causal() & Documents(jnp.where(jnp.arange(40) < 31, 0, 1)[None].repeat(2, 0))

    def f(q, k, v):
        o, lse = dense_attention(q, k, v, mask=mask, return_lse=True, implementation=implementation)
        return jnp.sum(jnp.sin(o[:, :20])) + jnp.sum(lse[:, :20]), o

    run = jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2), has_aux=True))
    (_, clean), grads = run(q, k, v)
    late = (jnp.arange(40) >= 20)[None, :, None, None]
    for bad in (jnp.nan, jnp.inf):
        (_, dirty), dirty_grads = run(q, *(jnp.where(late, bad, x) for x in (k, v)))
        close(clean[:, :20], dirty[:, :20])
        assert jnp.all(jnp.isnan(dirty[:, 20:31]))  # these do attend to it: nothing is hidden
        close(grads[0][:, :20], dirty_grads[0][:, :20])
    # Padding that sees only itself, all NaN, gets no gradient from the loss and gives none.
    pad = (jnp.arange(40) >= 31)[None, :, None, None]
    (_, dirty), dirty_grads = run(*(jnp.where(pad, jnp.nan, x) for x in (q, k, v)))
    close(clean[:, :31], dirty[:, :31])
    for a, b in zip(grads, dirty_grads):
        close(a[:, :31], b[:, :31])


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("sinks", [False, True])
def test_rows_that_see_nothing(implementation, sinks, small_tiles):
    q, k, v = qkv()
    mask = Window(-1 + 2, -2 + 2) & from_fn(lambda b, h, i, j: i % 5 > 0)
    virtual = jnp.arange(4.0) if sinks else None
    args = (q, k, v, mask, None, virtual, *arrays((2, 37, 4, 8), (2, 37, 4)))
    o, lse, (dq, _, _, _, dsinks) = graded(*args, implementation=implementation)
    assert not jnp.any(o[:, ::5])
    assert not jnp.any(dq[:, ::5])
    if sinks:
        close(lse[:, ::5], jnp.broadcast_to(virtual[None, None], lse[:, ::5].shape))
        assert jnp.all(jnp.isfinite(dsinks))
    else:
        assert jnp.all(lse[:, ::5] == -jnp.inf)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_nothing_visible_at_all(implementation):
    q, k, v = qkv()
    args = (q, k, v, ~Full(), None, None, *arrays((2, 37, 4, 8), (2, 37, 4)))
    o, lse, grads = graded(*args, implementation=implementation)
    assert not jnp.any(o)
    assert jnp.all(lse == -jnp.inf)
    assert not any(jnp.any(g) for g in grads[:3])


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_chunks_with_offsets_make_the_whole(implementation, small_tiles):
    q, k, v = qkv(T=40, S=40)
    mask = Causal() & (Window(9, None) | Sinks(2))
    whole = attention(q, k, v, mask=mask)
    part = jax.jit(
        lambda q, offset: dense_attention(
            q, k, v, mask=mask, q_offset=offset, implementation=implementation
        )
    )
    for start in (0, 13, 27):
        close(whole[:, start : start + 13], part(q[:, start : start + 13], jnp.full(2, start)))
    starts = jnp.array([3, 21])  # one offset per sequence
    rows = jnp.stack([q[0, 3:16], q[1, 21:34]])
    close(jnp.stack([whole[0, 3:16], whole[1, 21:34]]), part(rows, starts))
    static = attention(q[:, 5:9], k, v, mask=mask, q_offset=5, implementation=implementation)
    close(whole[:, 5:9], static)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("T", [1, 20])
def test_keys_beyond_the_length_do_not_exist(implementation, T, small_tiles):
    q, k, v = qkv(T=T, S=64)
    length = jnp.array([33, 7])
    f = jax.jit(
        lambda q, k, v, n: dense_attention(
            q, k, v, kv_length=n, mask=Causal(), q_offset=n - T if T == 1 else n,
            implementation=implementation,
        )
    )  # fmt: skip
    unwritten = jnp.arange(64)[None, :, None, None] >= length[:, None, None, None]
    o = f(q, *(jnp.where(unwritten, jnp.nan, x) for x in (k, v)), length)
    for b, n in enumerate([33, 7]):
        close(o[b], dense_attention(q[b : b + 1], k[b : b + 1, :n], v[b : b + 1, :n])[0])


def test_one_query_copies_no_keys():
    q, k, v = qkv(B=2, T=1, S=4096, N=8, K=2, H=64, Hv=64)
    f = jax.jit(
        lambda q, k, v, n: dense_attention(q, k, v, kv_length=n, mask=Causal(), q_offset=n - 1)
    )
    length = jnp.array([9, 4000])
    (call,) = (e for e in jax.make_jaxpr(f)(q, k, v, length).eqns if e.primitive.name == "jit")
    steps = [e for e in call.params["jaxpr"].eqns if e.primitive.name not in ("cond", "reshape")]
    made = max(x.aval.size for e in steps for x in e.outvars)  # `cond` keeps the reference at hand
    assert made <= 2 * 8 * 4096  # the scores; nothing of the size of the keys
    rows = [
        attention(q[b : b + 1], k[b : b + 1, :n], v[b : b + 1, :n], implementation="reference")
        for b, n in enumerate([9, 4000])
    ]
    close(f(q, k, v, length), jnp.concatenate(rows))


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_mixed_and_half_precision(implementation, small_tiles):
    q, k, v = qkv(T=40, S=40, dtype=jnp.bfloat16)
    exact = attention(*(x.astype(jnp.float32) for x in (q, k, v)), mask=Causal())
    o = attention(q, k, v, mask=Causal(), implementation=implementation)
    assert o.dtype == jnp.bfloat16
    close(o, exact, 1e-2)
    mixed = (q.astype(jnp.float32), k, v.astype(jnp.float16), Causal(), None, None)
    o, lse, grads = graded(
        *mixed, *arrays((2, 40, 4, 8), dtype=jnp.float16), *arrays((2, 40, 4)),
        implementation=implementation,
    )  # fmt: skip
    assert (o.dtype, lse.dtype) == (jnp.float16, jnp.float32)
    close(o, exact, 2e-3)
    assert [g.dtype for g in grads[:3]] == [jnp.float32, jnp.bfloat16, jnp.float16]


def test_float64_is_kept():
    with jax.enable_x64(True):
        q, k, v = qkv(dtype=jnp.float64)
        o, lse = dense_attention(q, k, v, mask=Causal(), return_lse=True, implementation="xla")
        ref = dense_attention(q, k, v, mask=Causal(), return_lse=True, implementation="reference")
        close(o, ref[0], 1e-12)
        close(lse, ref[1], 1e-12)


def test_scattered_blocks_get_small_tiles():
    """Tall ones would touch most of what is before; whole documents and windows keep theirs."""
    T, size = 4096, {}
    scattered = bigbird(T, window=64, globals=64, random=3, block=64)
    listed = Causal() & top_k_blocks(jnp.cos(jnp.arange(43.0**2)).reshape(1, 1, 43, 43), 6, 96, 96)
    masks = {"causal": Causal(), "window": Window(2000, 0), "blocks": scattered, "listed": listed}
    for name, mask in masks.items():
        tiles, _ = choose_tiles(mask, T, T, 0)
        size[name] = (tiles.block_q, tiles.block_k)
    sides = {"causal": (512, 256), "window": (512, 256), "blocks": (64, 64), "listed": (96, 96)}
    assert size == sides
    q, k, v = qkv(B=1, T=T, S=T, N=2, K=1, H=4, Hv=4)

    def loss(q, k, v, mask, name):
        o = dense_attention(q, k, v, mask=mask, implementation=name)
        return jnp.sum(jnp.sin(o)), o

    grad = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True), static_argnums=4)
    for mask in (scattered, listed):
        (ours, o), (theirs, ref) = grad(q, k, v, mask, "xla"), grad(q, k, v, mask, "reference")
        close(o, ref)
        jax.tree.map(close, ours, theirs)


def test_reference_has_second_derivatives():
    q, k, v = qkv(B=1, T=4, S=4, N=1, K=1, H=3, Hv=3)
    loss = lambda q: jnp.sum(  # noqa: E731
        dense_attention(q, k, v, mask=Causal(), implementation="reference") ** 2
    )
    hessian = jax.jit(jax.hessian(loss))(q).reshape(12, 12)
    close(hessian, hessian.T)
    assert jnp.abs(hessian).max() > 1e-3


# ------------------------------------------------------------------------------------------ taps


def attend(q, k, v, *, tap, **kw):
    return dense_attention(q, k, v, tap=tap, **{"mask": Causal(), **kw})


def test_capture_and_edit_of_the_pattern():
    q, k, v = qkv(T=12, S=12)
    o, seen = taps.run(attend, q, k, v, capture=["scores", "pattern", "mask", "z"])
    assert {x.shape for n, x in seen.items() if n != "z"} == {(2, 4, 12, 12)}
    assert seen["scores"].dtype == seen["pattern"].dtype == jnp.float32
    close(seen["pattern"].sum(-1), np.ones((2, 4, 12)))
    assert not jnp.any(jnp.where(seen["mask"], 0, seen["pattern"]))
    close(o, jnp.einsum("bnts,bsnh->btnh", seen["pattern"], jnp.repeat(v, 2, 2)))
    close(seen["scores"][1, 3, 5, 2], 8**-0.5 * q[1, 5, 3] @ k[1, 2, 1])
    uniform = [taps.site("scores").mul(0.0)]
    o, _ = taps.run(attend, q, k, v, edits=uniform)
    close(o[:, 3, 0], v[:, :4, 0].mean(1))


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_knock_out_keeps_the_fast_path(implementation, small_tiles):
    q, k, v = qkv(T=40, S=40)
    off = [taps.site("mask").at[:, 1, 30, :10].set(False)]
    f = functools.partial(attend, implementation=implementation)
    o, _ = taps.run(f, q, k, v, edits=off)
    allowed = Causal().to_dense(40).repeat(4, 1).at[:, 1, 30, :10].set(False)
    close(o, dense_attention(q, k, v, mask=allowed, implementation="reference"))
    push = [taps.site("bias").at[:, 2, :, 5].add(3.0)]
    o, _ = taps.run(f, q, k, v, edits=push)
    bias = jnp.zeros((1, 4, 40, 40)).at[:, 2, :, 5].add(3.0)
    close(o, dense_attention(q, k, v, mask=Causal(), bias=bias, implementation="reference"))


def test_mask_site_with_an_offset():
    q, k, v = qkv(T=5, S=12)
    o, seen = taps.run(attend, q, k, v, capture=["mask"], q_offset=7)
    np.testing.assert_array_equal(seen["mask"][0, 0], np.tri(12, dtype=bool)[7:])
    close(o, dense_attention(q, k, v, mask=Causal(), q_offset=7))


def test_scores_cannot_be_had_from_a_fast_path():
    q, k, v = qkv(T=12, S=12)
    with pytest.raises(NotImplementedError, match="scores"):
        taps.run(attend, q, k, v, capture=["scores"], implementation="xla")


# ---------------------------------------------------------------------------- choice and complaints


def shape(*dims, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(dims, dtype)


@pytest.mark.parametrize(
    ("expected", "kw"),
    [
        ("cudnn", {"mask": Causal()}),
        ("cudnn", {}),
        ("cudnn", {"mask": Causal() & Window(100, None)}),
        ("cudnn", {"mask": Window(100, 0)}),
        ("xla", {"mask": Causal(), "soft_cap": 30.0}),
        ("xla", {"mask": Causal(), "return_lse": True}),
        ("xla", {"mask": Causal(1)}),
        ("xla", {"mask": Window(5, 5)}),
        ("xla", {"mask": Causal(), "q_offset": 3}),
        ("xla", {"mask": Causal() & Sinks(4)}),
        ("xla", {"mask": Causal(), "sinks": shape(8)}),
        ("xla", {"mask": Causal(), "platform": "cpu"}),
        ("xla", {"mask": Causal(), "platform": "tpu"}),
    ],
)
def test_choice(expected, kw):
    q = shape(1, 4096, 8, 64)
    choice = choose(q, q, q, **({"platform": "gpu"} | kw))
    assert choice.name == expected
    assert len(choice.reason) > 10
    one = shape(1, 1, 8, 64)
    assert choose(one, q, q, platform="cpu").name == "xla"
    assert choose(one, q, q, platform="tpu").name == "reference"
    assert choose(shape(1, 99, 8, 64), shape(1, 99, 8, 64), q, platform="cpu").name == "reference"


def test_named_implementations_refuse_with_a_reason():
    q, k, v = qkv()
    for name in ("cudnn", "tokamax"):
        with pytest.raises(NotImplementedError, match="GPU"):
            dense_attention(q, k, v, implementation=name)
    with pytest.raises(ValueError, match="reference, xla, cudnn, tokamax"):
        dense_attention(q, k, v, implementation="xal")
    half, odd = shape(1, 8, 2, 64), shape(1, 8, 2, 12)
    gpu = functools.partial(choose, implementation="cudnn", platform="gpu")
    for reason, args, kw in [
        ("soft cap", (half,) * 3, {"soft_cap": 1.0}),
        ("sinks", (half,) * 3, {"sinks": shape(2)}),
        ("lse", (half,) * 3, {"return_lse": True}),
        ("multiple of 8", (odd,) * 3, {}),
        ("one type", (half, half, shape(1, 8, 2, 64, dtype=jnp.float32)), {}),
        ("HeadSplit", (half,) * 3, {"mask": HeadSplit((Causal(), Full()))}),
        ("q_offset=0", (half,) * 3, {"mask": Causal(), "q_offset": 1}),
        ("even lengths", (shape(1, 7, 2, 64),) * 3, {"bias": shape(1, 1, 7, 7)}),
    ]:
        with pytest.raises(NotImplementedError, match=reason):
            gpu(*args, **kw)


@pytest.fixture
def unchecked():
    """Shapes not checked by jaxtyping, as outside of the tests."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize(
    ("message", "shapes", "kw"),
    [
        ("multiple of the 2", ((1, 5, 3, 8), (1, 6, 2, 8), (1, 6, 2, 8)), {}),
        ("head width", ((1, 5, 4, 8), (1, 6, 2, 7), (1, 6, 2, 8)), {}),
        ("length and heads", ((1, 5, 4, 8), (1, 6, 2, 8), (1, 7, 2, 8)), {}),
        ("length and heads", ((1, 5, 4, 8), (1, 6, 2, 8), (1, 6, 4, 8)), {}),
        ("the batch", ((2, 5, 4, 8), (1, 6, 2, 8), (1, 6, 2, 8)), {}),
        ("4 axes|length, heads", ((5, 4, 8), (6, 2, 8), (6, 2, 8)), {}),
        ("mask of shape", ((1, 5, 4, 8), (1, 6, 2, 8), (1, 6, 2, 8)), {"mask": (5, 5)}),
        ("mask of shape", ((1, 5, 4, 8), (1, 6, 2, 8), (1, 6, 2, 8)), {"mask": (1, 2, 5, 6)}),
        ("bias of shape", ((1, 5, 4, 8), (1, 6, 2, 8), (1, 6, 2, 8)), {"bias": (1, 1, 6, 5)}),
        ("bias of shape", ((1, 5, 4, 8), (1, 6, 2, 8), (1, 6, 2, 8)), {"bias": (5, 6)}),
        ("sinks of shape", ((1, 5, 4, 8), (1, 6, 2, 8), (1, 6, 2, 8)), {"sinks": (2,)}),
        ("soft_cap=-1", ((1, 5, 4, 8), (1, 6, 2, 8), (1, 6, 2, 8)), {"soft_cap": -1.0}),
        ("scale=nan", ((1, 5, 4, 8), (1, 6, 2, 8), (1, 6, 2, 8)), {"scale": float("nan")}),
    ],
)
def test_complaints(message, shapes, kw, unchecked):
    kw = {
        n: jnp.ones(x, bool if n == "mask" else jnp.float32) if isinstance(x, tuple) else x
        for n, x in kw.items()
    }
    with pytest.raises(ValueError, match=message):
        dense_attention(*(jnp.ones(s) for s in shapes), **kw)


def test_masks_for_other_batches_or_heads(unchecked):
    q, k, v = qkv()
    with pytest.raises(ValueError, match="3 sequences"):
        dense_attention(q, k, v, mask=Prefix(jnp.array([1, 2, 3])))
    with pytest.raises(ValueError, match="2 heads"):
        dense_attention(q, k, v, mask=HeadSplit((Causal(), Full())))
    with pytest.raises(ValueError, match="bool"):
        dense_attention(q, k, v, mask=jnp.ones((37, 45)))


# ------------------------------------------------------------------------------------------ spec


@pytest.mark.parametrize(
    ("field", "kw"),
    [
        ("window=-1", {"window": -1}),
        ("sinks=-2", {"window": 3, "sinks": -2}),
        ("sinks=4", {"sinks": 4}),
        ("soft_cap=0", {"soft_cap": 0.0}),
        ("scale=inf", {"scale": float("inf")}),
        ("implementation='fast'", {"implementation": "fast"}),
    ],
)
def test_spec_validates(field, kw):
    with pytest.raises(ValueError, match=field):
        Dense(**kw)


def test_window_with_sinks():
    q, k, v = qkv(T=40, S=40)
    spec = Dense(window=6, sinks=2)
    i, j = np.arange(40)[:, None], np.arange(40)[None]
    allowed = (j <= i) & ((j >= i - 6) | (j < 2))
    close(spec(q, k, v, mask=Causal()), dense_attention(q, k, v, mask=jnp.asarray(allowed)))
    assert spec.cost(40, 40, 4, 8, 8) == 2 * 16 * 4 * allowed.sum()
    assert Dense().cost(10, 40, 4, 8, 8) == 2 * 16 * 4 * np.tri(40)[30:].sum()
    assert not spec.exact_when(40)
    assert spec.exact_when(7)
    o = spec(q[:, 39:], k, v, mask=Causal(), q_offset=jnp.array([39, 39]))
    close(o, spec(q, k, v, mask=Causal())[:, 39:])
