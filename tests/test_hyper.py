"""HyperAttention against its formula: exact cases, causality, unbiasedness, gradients, masks."""

import dataclasses
import functools
import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from causal_jax.attention import _hyper_problem, attention, dense_attention
from causal_jax.attention._lsh import angular_lsh, lsh_rank, ordered
from causal_jax.attention.hyper import HyperAttention, approx_d_reference, hyper_attention
from causal_jax.errors import InputError
from causal_jax.masks import Causal, Documents, Prefix, Window

KEY = jax.random.key(3)


def qkv(B=1, T=64, N=2, H=8, K=None, S=None, seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    shapes = ((B, T, N, H), (B, S or T, K or N, H), (B, S or T, K or N, H))
    return [jnp.asarray(rng.standard_normal(s), dtype) for s in shapes]


def hyper(**kw):
    """Jitted (q, k, v) -> (o, lse) on small blocks."""
    small = {"key": KEY, "block_size": 8, "sample_size": 6, "min_seq_len": 16, "return_lse": True}
    return jax.jit(lambda q, k, v: hyper_attention(q, k, v, **small | kw))


def dense(**kw):
    kw = {"return_lse": True, "implementation": "reference"} | kw
    return jax.jit(lambda q, k, v: dense_attention(q, k, v, **kw))


def close(a, b, tol=2e-5):
    np.testing.assert_allclose(a, b, atol=tol, rtol=tol)


def both_close(a, b, tol=2e-5):
    close(a[0], b[0], tol)
    close(a[1], b[1], 2e-6)


@pytest.mark.parametrize("r", [1, 2, 3, 7, 16])
def test_neighbours_in_rank_differ_in_one_bit(r):
    codes = jnp.arange(2**r, dtype=jnp.int32)
    ranks = np.asarray(ordered(codes, "rank"))
    visited = np.argsort(ranks)
    assert sorted(ranks) == list(range(2**r))
    assert all(int(a ^ b).bit_count() == 1 for a, b in itertools.pairwise(visited))
    if r == 3:
        assert list(visited) == [0, 1, 3, 2, 6, 7, 5, 4]


def test_collisions_follow_the_angle():
    r, draws = 3, 4000
    x = jnp.asarray([1.0, 0.0, 0.0])
    y = jnp.asarray([np.cos(0.6), np.sin(0.6), 0.0])
    proj = jax.vmap(lambda k: angular_lsh(k, 3, r))(jax.random.split(KEY, draws))
    same = jax.vmap(lambda w: lsh_rank(x[None], w) == lsh_rank(y[None], w))(proj)
    assert abs(float(same.mean()) - (1 - 0.6 / np.pi) ** r) < 0.02


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("mask", "T", "S", "K"),
    [(Causal(), 64, None, 2), (Causal(), 61, None, 1), (None, 64, None, 2), (None, 24, 40, 1)],
)
def test_one_block_is_dense(mask, T, S, K, strict):
    x = qkv(T=T, S=S, K=K)
    f = hyper(mask=mask, block_size=64, causal_strict=strict)
    both_close(f(*x), dense(mask=mask)(*x))


def test_short_sequences_take_the_exact_path():
    x = qkv(T=16)
    exact = dense(implementation=None)
    for f, mask in (
        (hyper(min_seq_len=17), None),
        (hyper(min_seq_len=16, mask=Causal()), Causal()),
    ):
        want = dense(mask=mask, implementation=None)(*x) if mask else exact(*x)
        jax.tree.map(np.testing.assert_array_equal, f(*x), want)
    changed = hyper(min_seq_len=16)(*x)  # not below min_seq_len: approximate without a mask
    assert jnp.abs(changed[0] - exact(*x)[0]).max() > 1e-2


@pytest.mark.parametrize("order", ["rank", "gray", "binary"])
def test_without_samples_it_is_block_attention_in_sorted_order(order):
    q, k, v = qkv(T=64, N=1)
    proj = angular_lsh(KEY, 8, 5)
    got = hyper(sample_size=0, key=None, proj=proj, order=order)(q, k, v)
    place = [
        np.argsort(np.argsort(lsh_rank(x[0, :, 0], proj, order), kind="stable")) for x in (q, k)
    ]
    mask = jnp.asarray(place[0][:, None] // 8 == place[1][None] // 8)
    both_close(got, dense(mask=mask)(q, k, v))


def test_strict_blocks_are_those_of_the_querys_own_rank():
    q, k, v = qkv(T=32, N=1)
    proj = angular_lsh(KEY, 8, 4)
    args = {"sample_size": 0, "key": None, "proj": proj, "block_size": 4, "min_seq_len": 16}
    got = hyper(mask=Causal(), **args)(q, k, v)
    rank_q, rank_k = (np.asarray(lsh_rank(x[0, :, 0], proj)) for x in (q[:, 16:], k[:, :16]))
    order = np.argsort(rank_k, kind="stable")
    mask = np.tril(np.ones((32, 32), bool)) & (np.arange(32)[:, None] // 16 == np.arange(32) // 16)
    for t, rank in enumerate(rank_q):
        first, last = (np.searchsorted(rank_k[order], rank, side) for side in ("left", "right"))
        at = min(first + int((t + 0.5) / 16 * (last - first)), 15)
        mask[16 + t, order[at // 4 * 4 : at // 4 * 4 + 4]] = True
    both_close(got, dense(mask=jnp.asarray(mask))(q, k, v))


def test_the_samples_estimate_the_denominator():
    q, k, v = qkv(T=64, N=2, seed=4)
    lse = jax.jit(jax.vmap(lambda key: hyper(key=key, sample_size=16)(0.5 * q, k, v)[1]))
    ratio = jnp.exp(lse(jax.random.split(KEY, 400)) - dense()(0.5 * q, k, v)[1][None])
    assert abs(float(ratio.mean()) - 1) < 0.02


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("T", [64, 61])
def test_values_of_the_future_never_leak(T, strict):
    q, k, v = qkv(T=T, K=1)
    f = hyper(mask=Causal(), causal_strict=strict)
    before = f(q, k, v)
    t = T // 2 + 3
    later = [x.at[:, t:].set(3 * x[:, t:] + 1) for x in (k, v)]
    after = f(q, *later)
    for a, b in zip(before, after):
        np.testing.assert_array_equal(a[:, :t], b[:, :t])
    grads = jax.jit(jax.grad(lambda k, v: jnp.sum(f(q, k, v)[0][:, :t] ** 2), (0, 1)))(k, v)
    assert not any(jnp.any(g[:, t:]) for g in grads)
    assert all(jnp.any(g[:, :t]) for g in grads)


def test_only_the_strict_form_is_causal_in_the_queries():
    q, k, v = qkv(T=128, N=1)
    t = 100
    other = q.at[:, t:].set(-q[:, ::-1][:, t:])
    for strict in (True, False):
        f = hyper(mask=Causal(), causal_strict=strict, sample_size=0)
        changed = jnp.any(f(q, k, v)[0][:, :t] != f(other, k, v)[0][:, :t])
        assert bool(changed) != strict


def test_order_of_the_keys_does_not_matter():
    q, k, v = qkv(T=64, N=1)
    proj = angular_lsh(KEY, 8, 28)  # so many bits that no two keys share a code
    assert len(set(np.asarray(lsh_rank(k[0, :, 0], proj)).tolist())) == 64
    f = hyper(sample_size=0, key=None, proj=proj)
    shuffle = np.random.default_rng(0).permutation(64)
    both_close(f(q, k, v), f(q, k[:, shuffle], v[:, shuffle]))


@pytest.mark.parametrize("mask", [None, Causal()])
@pytest.mark.parametrize("strict", [True, False])
def test_own_backward_pass_is_autodiff_of_the_reference(mask, strict):
    x = qkv(B=2, T=44, N=4, K=2)

    def loss(implementation):
        f = hyper(mask=mask, causal_strict=strict, implementation=implementation)
        return lambda *a: sum(jnp.sum(jnp.sin(y)) for y in f(*a))  # lse has a cotangent too

    ours, theirs = (jax.jit(jax.grad(loss(n), (0, 1, 2)))(*x) for n in ("xla", "reference"))
    jax.tree.map(functools.partial(close, tol=1e-4), ours, theirs)


def test_same_key_same_result():
    x = qkv()
    f = jax.jit(lambda key, *a: hyper_attention(*a, key=key, block_size=8, min_seq_len=8))
    a, b, other = (f(jax.random.key(n), *x) for n in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert jnp.any(a != other)
    seeded = HyperAttention(block_size=8, min_seq_len=8, seed=0)
    np.testing.assert_array_equal(jax.jit(seeded)(*x), a)
    assert not seeded.needs_key
    assert HyperAttention().needs_key


@pytest.mark.parametrize("mask", [Causal(), None])
def test_grouped_queries_read_their_own_head(mask):
    """As many folded heads as there are: with one block it must be the dense result, and here the
    estimate must stay near it when block and samples cover nearly all keys."""
    q, k, v = qkv(B=2, T=48, N=6, K=2)
    f = hyper(mask=mask, block_size=16, sample_size=4096, min_seq_len=12)
    o, lse = f(q, k, v)
    want, want_lse = dense(mask=mask)(q, k, v)
    assert float(jnp.abs(o - want).max()) < 0.15
    assert float(jnp.abs(lse - want_lse).max()) < 0.15


@pytest.mark.parametrize(
    ("strict", "rest"),
    [
        (True, Documents(jnp.asarray([[0] * 20 + [1] * 44, [0] * 50 + [1] * 14]))),
        (False, Window(20, 0)),
        (True, Prefix(jnp.asarray([64, 40]))),
        (False, jnp.asarray(np.random.default_rng(1).random((2, 1, 64, 64)) < 0.7)),
    ],
    ids=["documents", "window", "prefix", "dense"],
)
def test_masks_are_honoured_pair_by_pair(rest, strict):
    """With samples without end the estimate becomes the masked softmax itself."""
    q, k, v = qkv(B=2, T=64, N=2, seed=2)
    mask = Causal() & rest
    f = hyper(mask=mask, causal_strict=strict, sample_size=8192, min_seq_len=16, block_size=16)
    o, lse = f(q, k, v)
    want, want_lse = dense(mask=mask)(q, k, v)
    seen = want_lse > -jnp.inf
    np.testing.assert_array_equal(seen, lse > -jnp.inf)
    assert float(jnp.abs(jnp.where(seen, lse - want_lse, 0)).max()) < 0.15
    assert float(jnp.abs(o - want).max()) < 0.15


def test_what_padding_holds_does_not_matter():
    q, k, v = qkv(B=2, T=64)
    length = jnp.asarray([64, 45])
    junk = jnp.where((jnp.arange(64)[None] >= length[:, None])[..., None, None], jnp.nan, 0.0)
    f = hyper(mask=Causal(), kv_length=length)

    def loss(q, k, v):
        return jnp.sum(jnp.sin(f(q, k, v)[0]))

    grad = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
    jax.tree.map(np.testing.assert_array_equal, grad(q, k, v), grad(q, k + junk, v + junk))


@pytest.mark.slow
def test_centred_hashing_sees_past_a_common_mean():
    """A huge mean puts all keys into one bucket; without it the matching key is found again."""
    rng = np.random.default_rng(0)
    k = rng.standard_normal((1, 256, 1, 16)) * 2
    q = k[:, rng.permutation(256)]
    k, q, v = (jnp.asarray(x, jnp.float32) for x in (k + 30, q, rng.standard_normal(k.shape)))
    want = dense()(q, k, v)[0]
    error = {
        center: float(jnp.linalg.norm(hyper(center=center, sample_size=16)(q, k, v)[0] - want))
        for center in (False, True)
    }
    assert error[True] < 0.7 * error[False]


@pytest.mark.slow
def test_half_precision_stays_near():
    x = qkv(T=64, dtype=jnp.bfloat16)
    o, lse = hyper(mask=Causal())(*x)
    exact, exact_lse = hyper(mask=Causal())(*(a.astype(jnp.float32) for a in x))
    assert o.dtype == jnp.bfloat16
    assert lse.dtype == jnp.float32
    close(o.astype(jnp.float32), exact, 3e-2)
    close(lse, exact_lse, 1e-2)


def test_queries_of_a_cache_are_served_exactly():
    q, k, v = qkv(T=16, S=64)
    f = hyper(mask=Causal(), q_offset=48)
    both_close(f(q, k, v), dense(mask=Causal(), q_offset=48)(q, k, v))


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"block_size": -1}, "block_size=-1"),
        ({"block_size": 0, "sample_size": 0}, "set one of them"),
        ({"sample_size": -1}, "sample_size=-1"),
        ({"lsh_num_projs": -1}, "lsh_num_projs=-1"),
        ({"min_seq_len": 0}, "min_seq_len=0"),
        ({"order": "gry"}, "order='gry'"),
        ({"key": None}, "give key="),
        ({"lsh_num_projs": 31}, "at most 30"),
        ({"implementation": "pallas"}, "expected None or one of reference"),
    ],
)
def test_bad_input(wrong, match):
    with pytest.raises(InputError, match=match):
        hyper(**wrong)(*qkv())
    fields = {f.name for f in dataclasses.fields(HyperAttention)}
    if wrong.keys() <= fields and "30" not in match:
        with pytest.raises(InputError, match=match):
            attention["hyper"](**wrong)


def test_rows_move_alike_for_every_kind_of_device(monkeypatch):
    """On a CPU rows are counted through all of an array, elsewhere inside their batch and head."""
    B, T, K, G, D, m = 2, 5, 3, 2, 4, 12
    rng = np.random.default_rng(0)
    rows, slots = np.full((B, K, m), T * G), np.full((B, T, K, G), m)
    for b, k in np.ndindex(B, K):  # some rows move, each to a slot of its own
        row, slot = rng.permutation(T * G)[:7], rng.permutation(m)[:7]
        rows[b, k, slot] = row
        slots[b, row // G, k, row % G] = slot
    x, y = (jnp.asarray(rng.normal(size=n)) for n in ((B, T, K, G, D), (B, K, m, D)))
    moved = np.zeros(y.shape, np.float32)
    for b, k, i in zip(*np.nonzero(rows < T * G)):
        moved[b, k, i] = x[b, rows[b, k, i] // G, k, rows[b, k, i] % G]
    at, to = jnp.asarray(rows, jnp.int32), jnp.asarray(slots, jnp.int32)

    def both():
        there, pull = jax.vjp(lambda x: _hyper_problem.move(x, at, to), x)
        back, push = jax.vjp(lambda y: _hyper_problem.move_back(y, to, at), y)
        return there, *pull(y), back, *push(x)

    here = both()
    np.testing.assert_array_equal(here[0], moved)
    np.testing.assert_array_equal(here[1], here[2])  # a gradient is the way back
    monkeypatch.setattr(_hyper_problem, "target", lambda: "tpu")
    for a, b in zip(here, both(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_samples_alone():
    q, k, v = qkv(T=64, N=2, seed=4)
    lse = jax.jit(jax.vmap(lambda key: hyper(key=key, block_size=0, sample_size=16)(q, k, v)[1]))
    ratio = jnp.exp(lse(jax.random.split(KEY, 400)) - dense()(q, k, v)[1][None])
    assert abs(float(ratio.mean()) - 1) < 0.02
    o, _ = hyper(block_size=0, sample_size=20000)(q, k, v)
    close(o, dense()(q, k, v)[0], 0.1)


def test_planted_match_table():
    """The card's table: relative errors of 128 keys per query, each way of spending them."""
    from causal_jax.papers.hyper_attention import HyperAttentionPaper, _planted

    errors = {k: v.mean(0) for k, v in _planted(HyperAttentionPaper(seeds=3)).items()}
    table = {
        "hyper": (0.178, 0.269, 0.312),
        "blocks alone": (0.383, 0.405, 0.425),
        "samples alone": (0.482, 0.476, 0.457),
        "doubled": (0.122, 0.216, 0.259),
    }
    for name, want in table.items():
        np.testing.assert_allclose(errors[name], want, atol=0.03)
    best = np.minimum(errors["blocks alone"], errors["samples alone"])
    assert np.all(errors["hyper"] <= np.array([0.75, 0.75, 0.80]) * best)
    assert np.all(errors["doubled"] < errors["hyper"])


def test_the_theory_s_denominators():
    q, k = (x[0, :, 0] * 0.5 for x in qkv(T=48, S=64, H=4)[:2])
    mask = (jnp.arange(48)[:, None] // 12) == (jnp.arange(64)[None] // 16)
    a = np.exp(np.asarray(q, np.float64) @ np.asarray(k, np.float64).T)
    exact, inside = a.sum(1), np.where(mask, a, 0).sum(1)
    run = jax.jit(approx_d_reference, static_argnums=(3, 4, 5))
    close(run(q, k, jnp.ones_like(mask), 8, 4.0, 0.5, KEY), exact, 1e-4)  # nothing is estimated
    free = jax.vmap(lambda key: run(q, k, mask, 16, 1e9, float("inf"), key))
    drawn = np.asarray(free(jax.random.split(KEY, 512)))
    assert abs((drawn / exact).mean() - 1) < 0.02  # unbiased
    # m = T looks at all rows: the floor is the heaviest unmasked row over kappa
    floored = run(q, k, mask, 48, 1.0, 1e-6, KEY)
    close(floored, inside + (exact - inside).max(), 1e-4)
    kappa = float((exact - inside).max() / (exact - inside).min())
    capped = run(q, k, mask, 16, kappa, 0.5, KEY)
    assert (capped <= run(q, k, mask, 16, kappa, float("inf"), KEY) + 1e-4).all()
    assert (capped >= inside - 1e-4).all()
    with pytest.raises(InputError, match=r"kappa=0\.5"):
        approx_d_reference(q, k, mask, 16, 0.5, 0.5, KEY)
    with pytest.raises(InputError, match="expected"):
        inspect.unwrap(approx_d_reference)(q, k, mask.T, 16, 2.0, 0.5, KEY)  # unchecked, as users
