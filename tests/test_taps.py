"""Taps on a small real decoder: what is read, changed and differentiated; off costs nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from causal_jax.taps import OFF, Edit, grad_sites, run, site, sites

L, B, T, D, N, K, H, F, V = 3, 2, 7, 16, 4, 2, 4, 24, 11

LAYER_SITES = [
    *("resid_pre", "q", "k", "v", "attn.mask", "attn.bias", "attn.scores", "attn.pattern"),
    *("attn.z", "attn_out", "resid_mid", "mlp_act", "mlp_out", "resid_post"),
]


def close(a, b, tol=2e-5):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=tol, atol=tol)


# ---- the decoder


def make_params(layers=L):
    shapes = {
        **{"wq": (D, N, H), "wk": (D, K, H), "wv": (D, K, H), "wo": (N, H, D)},
        **{"up": (D, F), "down": (F, D)},
    }
    keys = iter(jax.random.split(jax.random.key(0), len(shapes) + 2))
    draw = lambda *shape: jax.random.normal(next(keys), shape) * 0.4  # noqa: E731
    return {
        "embed": draw(V, D),
        "out": draw(D, V),
        "layers": {name: draw(layers, *shape) for name, shape in shapes.items()},
    }


def norm(x):
    return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)


def attend(q, k, v, tap):
    mask = jnp.tril(jnp.ones((q.shape[1], k.shape[1]), bool))
    if not any(tap.wants(s) for s in ("mask", "bias", "scores", "pattern")):
        return tap("z", jax.nn.dot_product_attention(q, k, v, is_causal=True))
    mask = tap("mask", jnp.broadcast_to(mask, (q.shape[0], q.shape[2], *mask.shape)))
    bias = tap("bias", jnp.zeros(mask.shape)) if tap.wants("bias") else None
    if not (tap.wants("scores") or tap.wants("pattern")):
        return tap("z", jax.nn.dot_product_attention(q, k, v, bias=bias, mask=mask))
    k, v = (jnp.repeat(a, q.shape[2] // a.shape[2], axis=2) for a in (k, v))
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) * q.shape[-1] ** -0.5
    scores = tap("scores", scores if bias is None else scores + bias)
    pattern = tap("pattern", jax.nn.softmax(jnp.where(mask, scores, -1e30), axis=-1))
    return tap("z", jnp.einsum("bnts,bsnh->btnh", pattern, v))


def layer(x, p, tap):
    x = tap("resid_pre", x)
    h = norm(x)
    q, k, v = (
        tap(name, jnp.einsum("btd,dnh->btnh", h, p[w]))
        for name, w in (("q", "wq"), ("k", "wk"), ("v", "wv"))
    )
    z = attend(q, k, v, tap.scope("attn"))
    x = tap("resid_mid", x + tap("attn_out", jnp.einsum("btnh,nhd->btd", z, p["wo"])))
    act = tap("mlp_act", jax.nn.gelu(norm(x) @ p["up"]))
    return tap("resid_post", x + tap("mlp_out", act @ p["down"])), None


def decoder(params, ids, *, tap=OFF, **loop):
    x = tap("embed", params["embed"].at[ids].get(out_sharding=out_spec(ids)))
    x, _ = tap.loop(layer, x, params["layers"], **loop)
    return tap("logits", tap("final", norm(x)) @ params["out"])


def out_spec(ids):
    """The lookup's sharding must be said on explicit meshes."""
    sharding = jax.typeof(ids).sharding
    return P(*sharding.spec, None) if sharding.mesh.explicit_axes else None


def plain(params, ids, *, scan=True):
    """The decoder of someone who never heard of taps."""

    def body(x, p):
        h = norm(x)
        q, k, v = (jnp.einsum("btd,dnh->btnh", h, p[w]) for w in ("wq", "wk", "wv"))
        jnp.tril(jnp.ones((q.shape[1], k.shape[1]), bool))
        z = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + jnp.einsum("btnh,nhd->btd", z, p["wo"])
        return x + jax.nn.gelu(norm(x) @ p["up"]) @ p["down"], None

    x = params["embed"][ids]
    if scan:
        x, _ = lax.scan(body, x, params["layers"])
    else:
        for i in range(L):
            x, _ = body(x, {name: a[i] for name, a in params["layers"].items()})
    return norm(x) @ params["out"]


unrolled = functools.partial(decoder, scan=False)
PARAMS = make_params()
IDS = jax.random.randint(jax.random.key(1), (B, T), 0, V)
OTHER = jax.random.randint(jax.random.key(2), (B, T), 0, V)
LOOPS = pytest.mark.parametrize("model", [decoder, unrolled], ids=["scan", "unrolled"])


def loss_of(logits):
    return jnp.sum(jax.nn.log_softmax(logits[:, -1])[:, 3])


def double(x):
    return x * 2


def go(model, params, ids, **kw):
    """`run`, a scanned model compiled as one program (quicker than piece by piece)."""
    if model is unrolled:
        return run(model, params, ids, **kw)
    return jax.jit(lambda params, ids: run(model, params, ids, **kw))(params, ids)


@pytest.fixture(autouse=True, scope="module")
def quick_compiles():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


# ---- 1. off costs nothing


@pytest.mark.parametrize("scan", [True, False])
def test_off_traces_the_untapped_program(scan):
    tapped = jax.make_jaxpr(functools.partial(decoder, scan=scan))(PARAMS, IDS)
    assert str(tapped) == str(jax.make_jaxpr(functools.partial(plain, scan=scan))(PARAMS, IDS))


def test_off_traces_the_untapped_program_under_remat_and_grad():
    policy = jax.checkpoint_policies.dots_saveable
    body = lambda x, p: (jnp.sin(x @ p), x.sum())  # noqa: E731

    def tapped(x, ps):
        x, ys = OFF.loop(lambda x, p, tap: body(x, p), x, ps, remat=policy)
        return x.sum() + ys.sum()

    def untapped(x, ps):
        x, ys = lax.scan(jax.checkpoint(body, policy=policy, prevent_cse=False), x, ps)
        return x.sum() + ys.sum()

    args = jnp.ones((3, 3)), jnp.ones((2, 3, 3))
    assert str(jax.make_jaxpr(jax.grad(tapped))(*args)) == str(
        jax.make_jaxpr(jax.grad(untapped))(*args)
    )


def test_run_without_requests_is_the_model():
    out, acts = run(decoder, PARAMS, IDS)
    assert acts == {}
    assert (out == decoder(PARAMS, IDS)).all()
    assert not OFF.wants("resid_post")
    assert OFF.scope("attn") is OFF


# ---- 2. reading, scan == unrolled


def test_sites_lists_everything_without_computing():
    shapes = sites(decoder, PARAMS, jax.ShapeDtypeStruct((B, T), jnp.int32))
    assert list(shapes) == ["embed", *LAYER_SITES, "final", "logits"]  # in the order of the model
    assert shapes["resid_post"].shape == (L, B, T, D)
    assert shapes["attn.pattern"].shape == (L, B, N, T, T)
    assert shapes["k"].shape == (L, B, T, K, H)
    assert shapes["attn.mask"].dtype == bool
    assert shapes == sites(unrolled, PARAMS, IDS)


def test_scan_and_unrolled_read_the_same():
    out, acts = go(decoder, PARAMS, IDS, capture="*")
    out_u, acts_u = go(unrolled, PARAMS, IDS, capture="*")
    close(out, out_u)
    close(out, decoder(PARAMS, IDS))
    assert set(acts) == set(acts_u) == {"embed", *LAYER_SITES, "final", "logits"}
    for name, a in acts.items():
        close(a, acts_u[name])
    close(acts["resid_post"][:-1], acts["resid_pre"][1:], 0)
    close(acts["resid_mid"] + acts["mlp_out"], acts["resid_post"], 1e-6)
    close(acts["attn.pattern"].sum(-1), np.ones((L, B, N, T)), 1e-6)
    close(norm(acts["resid_post"][-1]), acts["final"], 1e-6)


@LOOPS
def test_capture_shows_the_value_after_the_edits_in_order(model):
    ones, twice = site("attn_out", layer=2).set(1.0), site("attn_out", layer=2).mul(2.0)
    a = go(model, PARAMS, IDS, edits=[ones, twice], capture=["attn_out", "resid_mid", "resid_pre"])[
        1
    ]
    assert (a["attn_out"][2] == 2).all()
    assert not (a["attn_out"][1] == 2).any()
    close(a["resid_pre"][2] + 2, a["resid_mid"][2], 0)
    b = go(model, PARAMS, IDS, edits=[twice, [ones]], capture="attn_out")[1]
    assert (b["attn_out"][2] == 1).all()


@LOOPS
def test_a_reducer_runs_in_place_and_the_exact_name_wins(model):
    last = lambda p: {"top": p[:, :, -1].argmax(-1)}  # noqa: E731
    _, full = go(model, PARAMS, IDS, capture="attn.pattern")
    _, acts = go(model, PARAMS, IDS, capture={"attn.*": None, "attn.pattern": last})
    assert acts["attn.pattern"]["top"].shape == (L, B, N)
    assert (acts["attn.pattern"]["top"] == full["attn.pattern"][:, :, :, -1].argmax(-1)).all()
    assert acts["attn.z"].shape == (L, B, T, N, H)


def test_wants_is_static_and_chooses_the_path():
    asked = []

    def body(x, _, tap):
        asked.append((tap.wants("a"), tap.scope("s").wants("b"), tap.wants("c")))
        return tap.scope("s")("b", tap("a", x)), None

    def model(x, *, scan, tap=OFF):
        return tap.loop(body, x, None, length=2, scan=scan)[0]

    edit = site("s.b", layer=1).add(1.0)
    run(model, jnp.zeros(2), scan=True, edits=[edit], capture=["a"])
    assert asked == [(True, True, False)]
    asked.clear()
    run(model, jnp.zeros(2), scan=False, edits=[edit], capture=["a"])
    assert asked == [(True, False, False), (True, True, False)]  # layer 0 keeps its fast path


# ---- 3. patching and causality


@LOOPS
def test_patching_the_last_layer_restores_the_clean_answer(model):
    clean, acts = run(model, PARAMS, IDS, capture="resid_post")
    bad = model(PARAMS, OTHER)
    patch = site("resid_post", layer=L - 1).at[:, -1].set(acts["resid_post"][-1, :, -1])
    out = run(model, PARAMS, OTHER, edits=patch)[0]
    assert (out[:, -1] == clean[:, -1]).all()
    assert (out[:, :-1] == bad[:, :-1]).all()


@LOOPS
def test_what_comes_later_changes_nothing_before(model):
    edit = site("resid_post", layer=range(1, 3)).at[:, 4:].add(3.0)
    out, base = run(model, PARAMS, IDS, edits=edit)[0], model(PARAMS, IDS)
    assert (out[:, :4] == base[:, :4]).all()
    assert (jnp.abs(out[:, 4:] - base[:, 4:]).max(-1) > 1e-3).all()


def test_path_patching_moves_the_stream_by_what_the_sender_writes():
    _, clean = go(decoder, PARAMS, IDS, capture=["attn.z"])
    _, bad = go(decoder, PARAMS, OTHER, capture=["attn.z", "mlp_out", "resid_post"])
    freeze = [
        site("attn.z").set(bad["attn.z"], per="layer"),
        site("mlp_out").set(bad["mlp_out"], per="layer"),
    ]
    send = site("attn.z", layer=1).at[:, :, 2].set(clean["attn.z"][1, :, :, 2])
    _, sent = go(decoder, PARAMS, OTHER, edits=[freeze, send], capture="resid_post")
    moved = (clean["attn.z"] - bad["attn.z"])[1, :, :, 2] @ PARAMS["layers"]["wo"][1, 2]
    close(sent["resid_post"][-1] - bad["resid_post"][-1], moved, 1e-4)


# ---- 4. sweeps


def test_a_sweep_over_layers_and_positions_is_one_vmap():
    clean = go(decoder, PARAMS, IDS, capture="resid_post")[1]["resid_post"]

    @jax.jit
    def at(l, p):
        edit = site("resid_post", layer=l).at[:, p].set(clean[l, :, p])
        return loss_of(run(decoder, PARAMS, OTHER, edits=edit)[0])

    grid = jax.jit(jax.vmap(jax.vmap(at, (None, 0)), (0, None)))(jnp.arange(L), jnp.arange(T))
    for l, p in ((0, 0), (1, T - 1), (L - 1, 3)):
        close(grid[l, p], at(l, p), 1e-4)


@pytest.mark.parametrize("gate", ["where", "cond"])
def test_vmap_over_an_edit_pytree_equals_single_runs(gate):
    edits = [
        site("resid_mid", layer=l).at[:, p].add(jnp.full(D, v), gate=gate)
        for l, p, v in ((0, 1, 0.5), (1, 2, -1.0), (2, 6, 2.0))
    ]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *edits)
    assert isinstance(stacked, Edit)
    one = jax.jit(lambda e: run(decoder, PARAMS, IDS, edits=[e])[0])
    for a, e in zip(jax.vmap(one)(stacked), edits):
        close(a, one(e), 1e-4)


# ---- 5. knock-out


@LOOPS
def test_knock_out_is_exact_and_both_paths_agree(model):
    cut = site("attn.mask", layer=1).at[:, 2, 5, 3].set(False)
    fast, _ = go(model, PARAMS, IDS, edits=cut)
    dense, acts = go(model, PARAMS, IDS, edits=cut, capture=["attn.pattern", "attn.mask"])
    close(fast, dense)
    pattern = acts["attn.pattern"]
    assert (pattern[1, :, 2, 5, 3] == 0).all()
    assert (pattern[0, :, 2, 5, 3] > 0).all()
    close(pattern.sum(-1), np.ones((L, B, N, T)), 1e-6)
    assert np.argwhere(acts["attn.mask"] != jnp.tril(jnp.ones((1, 1, 1, T, T), bool))).tolist() == [
        [1, 0, 2, 5, 3],
        [1, 1, 2, 5, 3],
    ]
    assert np.isfinite(fast).all()


def test_a_span_with_traced_bounds_equals_a_static_slice():
    def out(k0, k1):
        edits = site("attn.mask").at[..., 3:, k0:k1].set(False)
        return run(decoder, PARAMS, IDS, edits=edits, capture={"attn.mask": None})

    want, traced = jax.jit(out, static_argnums=(0, 1))(1, 3), jax.jit(out)(1, 3)
    close(traced[0], want[0])
    assert (traced[1]["attn.mask"] == want[1]["attn.mask"]).all()
    many = jax.vmap(lambda a: out(a, a + 2)[0])(jnp.arange(2))
    close(many[1], want[0])
    one = lambda x, *, tap=OFF: tap("x", x)  # noqa: E731
    cut = jax.jit(lambda x, b: run(one, x, edits=site("x").at[:, b:].set(0.0))[0])
    assert (cut(jnp.ones((2, 5)), -2) == jnp.array([[1, 1, 1, 0, 0]] * 2)).all()


# ---- 6. subspaces, the `.at` forms


def subspace(x, source, proj):
    return x + (source - x) @ proj


@LOOPS
def test_subspace_patch_changes_the_subspace_and_nothing_else(model):
    basis = jnp.linalg.qr(jax.random.normal(jax.random.key(5), (D, 2)))[0]
    proj = basis @ basis.T
    _, src = go(model, PARAMS, IDS, capture="resid_post")
    _, old = go(model, PARAMS, OTHER, capture="resid_post")
    edit = site("resid_post", layer=2).apply(subspace, src["resid_post"][2], proj)
    _, new = go(model, PARAMS, OTHER, edits=edit, capture="resid_post")
    x, s, o = new["resid_post"][2], src["resid_post"][2], old["resid_post"][2]
    close(x @ proj, s @ proj, 1e-5)
    close(x - x @ proj, o - o @ proj, 1e-5)


INDICES = [
    np.s_[:, 2],
    np.s_[:, jnp.array([1, 3])],
    np.s_[..., 3],
    np.s_[..., None, 1:5:2],
    np.s_[0],
    np.s_[1, ..., :3],
    np.s_[:, [0, 4], 2:],
    np.s_[np.arange(B)[:, None], np.array([[1, 2], [3, 4]])],
    np.s_[np.arange(B * T).reshape(B, T) % 3 == 0],
]


@pytest.mark.parametrize("op", ["set", "add", "mul", "apply"])
@pytest.mark.parametrize("index", INDICES, ids=map(str, range(len(INDICES))))
def test_at_means_what_jax_means(index, op):
    x = jax.random.normal(jax.random.key(3), (B, T, D))
    model = lambda x, *, tap=OFF: tap("x", x)  # noqa: E731
    at = site("x").at[index]
    at_jax = index
    if isinstance(index, tuple):  # lists are allowed here, in jax no more
        at_jax = tuple(np.asarray(i) if isinstance(i, list) else i for i in index)
    if op == "apply":
        got, want = at.apply(double), x.at[at_jax].set(x[at_jax] * 2)
    else:
        got, want = getattr(at, op)(3.0), getattr(x.at[at_jax], op)(3.0)
    close(run(model, x, edits=got)[0], want, 0)


def test_known_selections_leave_other_unrolled_layers_alone():
    model = functools.partial(unrolled, PARAMS)
    base = str(jax.make_jaxpr(model)(IDS))
    edited = str(jax.make_jaxpr(lambda i: run(model, i, edits=site("q", layer=2).set(0.0))[0])(IDS))
    assert edited.count("select_n") == base.count("select_n")


# ---- per payloads


@LOOPS
def test_per_layer_payload_equals_one_edit_per_layer(model):
    v = jax.random.normal(jax.random.key(7), (L, B, D))
    per = site("resid_mid", layer=[1, 2]).at[:, 3].add(v, per="layer")
    single = [site("resid_mid", layer=l).at[:, 3].add(v[l]) for l in (1, 2)]
    close(go(model, PARAMS, IDS, edits=per)[0], go(model, PARAMS, IDS, edits=single)[0])


def gradients(model, remat):
    v = jax.random.normal(jax.random.key(7), (L, B, T, D)) * 0.1
    cut = site("attn.mask", layer=1).at[:, 1, :, 0].set(False)

    def loss(v, params):
        edits = [site("resid_post").add(v, per="layer"), cut]
        out, acts = run(model, params, IDS, edits=edits, capture="mlp_act", remat=remat)
        return loss_of(out) + acts["mlp_act"].mean()

    return jax.jit(jax.grad(loss, (0, 1)))(v, PARAMS)


@pytest.fixture(scope="module")
def plain_gradients():
    return gradients(decoder, None)


@pytest.mark.parametrize(
    ("model", "remat"),
    [
        (unrolled, None),
        (decoder, "full"),
        (decoder, "dots"),
        (decoder, jax.checkpoint_policies.dots_saveable),
    ],
    ids=["unrolled", "scan-full", "scan-dots", "scan-policy"],
)
def test_gradients_through_edits_and_remat(model, remat, plain_gradients):
    got = gradients(model, remat)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(plain_gradients)):
        assert np.isfinite(a).all()
        close(a, b, 1e-4)
    assert got[0].shape == (L, B, T, D)
    assert (jnp.abs(got[0]).max((1, 2, 3)) > 0).all()


def test_per_payloads_are_scan_inputs():
    def loss(v):
        return loss_of(run(decoder, PARAMS, IDS, edits=site("resid_post").add(v, per="layer"))[0])

    jaxpr = jax.make_jaxpr(jax.grad(loss))(jnp.zeros((L, B, T, D)))
    backward = [e for e in jaxpr.eqns if e.primitive.name == "scan" and e.params["reverse"]]
    # a carry has the same shape inside and outside the body; what is stacked has one axis more
    stacked, carried = [], []
    for e in backward:
        for inside, outside in zip(e.params["jaxpr"].jaxpr.outvars, e.outvars, strict=True):
            same = inside.aval.shape == outside.aval.shape
            (carried if same else stacked).append(outside.aval.shape)
    assert (L, B, T, D) in stacked
    assert (L, B, T, D) not in carried


def scaled(tree, by):
    return jax.tree.map(lambda a: by * a, tree)


def site_gradients(model, ids, **kw):
    return jax.jit(lambda ids: grad_sites(loss_of, model, PARAMS, ids, **kw))(ids)


@LOOPS
def test_grad_sites_is_the_derivative(model):
    loss, acts, grads = site_gradients(model, IDS, at=["attn.z", "resid_post", "embed"])
    close(loss, loss_of(model(PARAMS, IDS)))
    assert {n: g.shape for n, g in grads.items()} == {n: a.shape for n, a in acts.items()}
    assert acts["attn.z"].shape == (L, B, T, N, H)

    @jax.jit
    def moved(steps):
        per = {"embed": ()}
        edits = [site(name).add(u, per=per.get(name, "layer")) for name, u in steps.items()]
        return loss_of(run(model, PARAMS, IDS, edits=edits)[0])

    for name in grads:
        u = {
            n: (n == name) * jax.random.normal(jax.random.key(11), g.shape)
            for n, g in grads.items()
        }
        up, down = moved(scaled(u, 1e-2)), moved(scaled(u, -1e-2))
        close((up - down) / 2e-2, jnp.vdot(grads[name], u[name]), 1e-2)


def test_attribution_is_first_order_patching():
    clean = go(decoder, PARAMS, IDS, capture="attn.z")[1]["attn.z"]
    base, acts, grads = site_gradients(decoder, OTHER, at=["attn.z"])
    step = 1e-2 * (clean - acts["attn.z"])
    moved = (
        loss_of(go(decoder, PARAMS, OTHER, edits=site("attn.z").add(step, per="layer"))[0]) - base
    )
    close(moved, (step * grads["attn.z"]).sum(), 1e-3)


def test_training_an_edit():
    target = run(decoder, PARAMS, IDS)[0]

    def loss(edit):
        out = run(decoder, PARAMS, OTHER, edits=[edit])[0]
        return jnp.mean((out[:, -1] - target[:, -1]) ** 2)

    edit = site("resid_post", layer=np.array([2])).at[:, -1].add(jnp.zeros((B, D)))
    value = jax.jit(jax.value_and_grad(loss, allow_int=True))
    first = value(edit)[0]
    for _ in range(300):
        grad = value(edit)[1]
        edit = jax.tree.map(descend, edit, grad)
    assert value(edit)[0] < 0.1 * first


def descend(a, g):
    return a if g.dtype == jax.dtypes.float0 else a - g


# ---- 7, 9. jit


def test_edits_of_one_form_are_one_trace():
    traces = []

    @jax.jit
    def f(edits):
        traces.append(1)
        return run(decoder, PARAMS, IDS, edits=edits)[0]

    outs = [
        f([site("resid_post", layer=l).at[:, p].add(0.1 * l)]) for l in range(L) for p in range(3)
    ]
    assert len(traces) == 1
    want = run(decoder, PARAMS, IDS, edits=site("resid_post", layer=2).at[:, 1].add(0.2))[0]
    close(outs[7], want)
    f([site("q", layer=1).apply(double)])
    f([site("q", layer=2).apply(double)])
    assert len(traces) == 2
    f([site("q", layer=1).apply(lambda x: x * 2)])
    f([site("q", layer=1).apply(lambda x: x * 2)])
    assert len(traces) == 4  # a fresh lambda is a new program, as documented


# ---- 11. devices


EDITS = [
    site("resid_post", layer=1).at[:, 2].add(1.0),
    site("mlp_out", layer=range(2)).set(0.25),
    site("attn.mask", layer=0).at[..., 4:, 1:3].set(False),
    site("attn.z").add(jnp.full((L, N, 1), 0.1), per="layer"),
    site("q", layer=2).apply(double, gate="cond"),
]
MANY = jnp.concatenate([IDS, OTHER])


def read_and_differentiate(ids, edits):
    """(logits, activations), gradients."""
    both = run(decoder, PARAMS, ids, edits=edits, capture=["resid_post", "attn.z"])
    at = ["resid_post", "attn.z"]
    return both, grad_sites(loss_of, decoder, PARAMS, ids, at=at, edits=edits)[2]


@pytest.fixture(scope="module")
def unsharded():
    return jax.jit(read_and_differentiate)(MANY, EDITS)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_sharded_batch(kind, unsharded):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,), devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        ids = jax.device_put(MANY, NamedSharding(mesh, P("data")))
        compiled = jax.jit(read_and_differentiate).lower(ids, EDITS).compile()
        got = compiled(ids, EDITS)
    jax.tree.map(functools.partial(close, tol=1e-4), got, unsharded)
    (_, acts), grads = got
    for a in (*acts.values(), *grads.values()):
        assert a.sharding.spec[:2] == (None, "data")
    text = compiled.as_text()
    for collective in ("all-gather", "all-to-all", "collective-permute"):
        assert collective not in text


def test_shard_map(unsharded):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    f = lambda ids: run(decoder, PARAMS, ids, edits=EDITS, capture="resid_post")  # noqa: E731
    specs = P("data"), {"resid_post": P(None, "data")}
    out, acts = jax.jit(jax.shard_map(f, mesh=mesh, in_specs=P("data"), out_specs=specs))(MANY)
    (want, acts_want), _ = unsharded
    close(out, want)
    close(acts["resid_post"], acts_want["resid_post"])
