"""Taps in loops of every form, and every way to ask for the wrong thing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from causal_jax.errors import InputError
from causal_jax.taps import OFF, grad_sites, run, site, sites

L, B, D, STEPS = 4, 2, 3, 3


def close(a, b, tol=2e-5):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=tol, atol=tol)


def cell(x, w, tap):
    """A layer."""
    x = tap("resid_pre", x)
    z = tap("z", jnp.tanh(x @ w))
    return tap("resid_post", x + z), z.sum()


def roll(x, w, tap):
    """A layer of another kind: it has no site z."""
    x = tap("resid_pre", x)
    return tap("resid_post", x + jnp.roll(x, 1, axis=-1) @ w), None


def stack(ws, x, *, tap=OFF, **loop):
    return tap.loop(cell, tap("embed", x), ws, **loop)[0]


unrolled = functools.partial(stack, scan=False)
WS = jax.random.normal(jax.random.key(0), (6, D, D)) * 0.5
W4 = WS[:L]
X = jax.random.normal(jax.random.key(1), (B, D))
LOOPS = pytest.mark.parametrize("model", [stack, unrolled], ids=["scan", "unrolled"])


# ---- selections


@LOOPS
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize(
    ("selection", "on"),
    [
        (2, [2]),
        (np.int64(2), [2]),
        (range(1, 3), [1, 2]),
        ([0, 3], [0, 3]),
        ([], []),
        (np.array([True, False, False, True]), [0, 3]),
        (jnp.array([False, True, False, False]), [1]),
        (jnp.array([1, 2]), [1, 2]),
        (jnp.array(3), [3]),
    ],
    ids=str,
)
def test_when_selects_turns(model, jit, selection, on):
    edit = site("z", layer=selection).set(7.0)
    f = lambda e: run(model, W4, X, edits=[e], capture={"z": all_sevens})[1]["z"]  # noqa: E731
    hits = (jax.jit(f) if jit else f)(edit)
    assert np.flatnonzero(hits).tolist() == on


def all_sevens(x):
    return (x == 7).all()


def test_a_traced_selection_outside_the_loop_is_never_on():
    f = jax.jit(lambda l: run(stack, W4, X, edits=site("z", layer=l).set(7.0))[0])
    close(f(9), stack(W4, X))
    close(f(-1), stack(W4, X))


# ---- periods and segments


def mixed(ws, x, *, tap=OFF, scan=True, remat=None, unroll=1):
    """Six layers: [cell, roll] twice, then two cells."""
    x = tap("embed", x)
    kw = {"scan": scan, "remat": remat, "unroll": unroll}
    x, ys = tap.loop((cell, roll), x, (ws[0:4:2], ws[1:4:2]), **kw)
    assert ys[0].shape == (2,)
    assert ys[1] is None
    return tap.loop(cell, x, ws[4:], start=4, **kw)[0]


def by_hand(ws, x, *, tap=OFF):
    """The same six layers as a loop of six different bodies."""
    bodies = (cell, roll, cell, roll, cell, cell)
    return tap.loop(bodies, tap("embed", x), tuple(ws[i : i + 1] for i in range(6)), scan=False)[0]


MIXED_EDITS = [
    site("resid_pre").add(jnp.arange(6.0)[:, None] * 0.1, per="layer"),
    site("resid_post", layer=[1, 4]).at[:, 2].mul(0.5),
    site("z", layer=np.array([True, False, True, False, False, True])).at[:, 1].set(0.0),
]


@pytest.mark.parametrize(
    "kw",
    [{}, {"scan": False}, {"remat": "full"}, {"scan": False, "remat": "full"}, {"unroll": 2}],
    ids=str,
)
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_periods_and_segments_equal_the_layers_one_by_one(kw, jit):
    model = functools.partial(mixed, **kw)
    assert sites(model, WS, X) == sites(by_hand, WS, X)
    get = lambda m, e: run(m, WS, X, edits=e, capture=["resid_*", "z"])  # noqa: E731
    jitted = jax.jit(get, static_argnums=0) if jit else get
    (out, acts), (want, acts_want) = jitted(model, MIXED_EDITS), get(by_hand, MIXED_EDITS)
    close(out, want)
    assert acts["resid_post"].shape == (6, B, D)
    assert acts["z"].shape == (4, B, D)  # layers 0, 2, 4, 5 have it
    assert set(acts) == set(acts_want)
    for name in acts:
        close(acts[name], acts_want[name])


@pytest.mark.parametrize("scan", [True, False])
def test_grad_sites_in_periods_and_segments(scan):
    model = functools.partial(mixed, scan=scan)
    at = ["z", "resid_post"]
    got, want = (grad_sites(lambda y: (y**2).sum(), m, WS, X, at=at) for m in (model, by_hand))
    assert got[2]["z"].shape == (4, B, D)
    for name in at:
        close(got[1][name], want[1][name])
        close(got[2][name], want[2][name])
        assert (jnp.abs(got[2][name]).max((1, 2)) > 0).all()
    close(got[2]["resid_post"][-1], 2 * model(WS, X))


@pytest.mark.parametrize("scan", [True, False])
def test_a_period_in_a_single_repeat(scan):
    def model(ws, x, *, tap=OFF):
        return tap.loop((cell, roll), x, (ws[:1], ws[1:2]), scan=scan)[0]

    per = site("resid_post").add(jnp.array([1.0, 2.0])[:, None], per="layer")
    out, acts = run(model, WS, X, edits=per, capture=["resid_post", "z"])
    assert acts["resid_post"].shape == (2, B, D)
    assert acts["z"].shape == (1, B, D)
    first = X + jnp.tanh(X @ WS[0]) + 1
    close(out, first + jnp.roll(first, 1, axis=-1) @ WS[1] + 2)


def test_off_periods_are_a_plain_scan_of_the_bodies():
    def plain(x, xs):
        def body(x, xs):
            x, y = cell(x, xs[0], OFF)
            x, _ = roll(x, xs[1], OFF)
            return x, (y, None)

        return lax.scan(body, x, xs)

    tapped = lambda x, xs: OFF.loop((cell, roll), x, xs)  # noqa: E731
    args = X, (WS[:2], WS[2:4])
    assert str(jax.make_jaxpr(tapped)(*args)) == str(jax.make_jaxpr(plain)(*args))


def test_off_unrolled_loops_are_a_plain_python_loop():
    def plain(x, ws):
        ys = []
        for i in range(3):
            x, y = cell(x, ws[i], OFF)
            ys.append(y)
        return x, jnp.stack(ys)

    tapped = lambda x, ws: OFF.loop(cell, x, ws, scan=False)  # noqa: E731
    assert str(jax.make_jaxpr(tapped)(X, WS[:3])) == str(jax.make_jaxpr(plain)(X, WS[:3]))


@LOOPS
def test_grad_sites_at_the_edited_value(model):
    cut = site("resid_post", layer=2).mul(0.0)
    _, acts, grads = grad_sites(jnp.sum, model, W4, X, at="resid_post", edits=cut)
    assert (acts["resid_post"][2] == 0).all()
    assert (grads["resid_post"][:2] == 0).all()  # nothing before the cut matters
    assert (jnp.abs(grads["resid_post"][2:]) > 0).all()


def test_a_nan_in_an_idle_layer_needs_the_cond_gate():
    def loss(ws, gate):
        edit = site("z", layer=1).apply(nan_slope_at_layer_3, gate=gate)
        return run(stack, ws, X, edits=edit)[0].sum()

    ws = W4.at[3].set(0.0)
    assert np.isnan(jax.grad(loss)(ws, "where")[3]).any()  # the documented price of `where`
    want = jax.grad(lambda ws: unrolled(ws, X).sum())(ws)
    close(jax.grad(loss)(ws, "cond")[3], want[3])


def nan_slope_at_layer_3(x):  # where tanh(x @ 0) = 0
    return x + 0 * jnp.sqrt(jnp.abs(x))


# ---- explicit meshes: the edited value takes the activation's sharding


def double(x):
    return 2 * x


def forget(x):  # a value without sharding
    return jnp.arange(float(x.size)).reshape(x.shape)


@pytest.mark.parametrize(
    "spec", [P("a", None), P(None, "b"), P("a", "b"), P(None, ("a", "b"))], ids=str
)
def test_edits_on_an_explicit_mesh(spec):
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
    x, payload = jnp.arange(32.0).reshape(4, 8), jnp.ones((2, 4, 8))

    def model(x, *, tap=OFF):
        return tap.loop(lambda x, _, tap: (tap("x", x), None), x, None, length=2)[0]

    edits = [
        site("x", layer=1).set(payload[0, 0]),
        site("x", layer=0).at[:, 2].set(payload[0, :, 0]),
        site("x", layer=0).at[1].mul(3.0),
        site("x", layer=1).at[np.array([0, 2]), np.array([1, 7])].add(2.0),
        site("x").add(payload, per="layer"),
        site("x", layer=1).apply(jnp.negative),
        site("x", layer=1).at[2:].apply(double),
        site("x", layer=0).apply(forget),
    ]
    want = run(model, x, edits=edits, capture="x")
    edits[4] = site("x").add(
        jax.device_put(payload, NamedSharding(mesh, P(None, "b", "a"))), per="layer"
    )
    with jax.set_mesh(mesh):
        local = jax.device_put(x, NamedSharding(mesh, spec))
        got = jax.jit(lambda x, e: run(model, x, edits=e, capture="x"))(local, edits)
        grad = jax.jit(lambda x: grad_sites(lambda y: (y**2).sum(), model, x, at="x"))(local)[2][
            "x"
        ]
    jax.tree.map(close, got, want)
    assert got[0].sharding.spec == spec
    assert grad.sharding.spec == P(None, *spec)
    close(grad, 2 * jnp.stack([x, x]))


# ---- nesting and scopes


def decode(ws, x, *, tap=OFF, scan=True, steps_scan=True):
    """A loop over steps around the loop over layers."""

    def step(x, _, tap):
        y = tap("logits", stack(ws, x, tap=tap, scan=scan))
        return jnp.sin(y), y

    return tap.loop(step, x, None, axis="step", length=STEPS, scan=steps_scan)[1]


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("steps_scan", [True, False])
def test_nested_loops(scan, steps_scan):
    v = jnp.zeros((STEPS, L, B, D)).at[1, 2, :, -1].set(4.0)
    model = functools.partial(decode, scan=scan, steps_scan=steps_scan)
    both = site("resid_post", step=1, layer=2).at[:, -1].add(4.0)
    per = site("resid_post").add(v, per=("step", "layer"))
    swapped = site("resid_post").add(jnp.swapaxes(v, 0, 1), per=("layer", "step"))
    half = site("resid_post", step=range(1, 2)).add(v[1], per="layer")
    base, acts = run(model, W4, X, capture=["resid_post", "logits", "embed"])
    assert acts["resid_post"].shape == (STEPS, L, B, D)
    close(acts["resid_post"][:, -1], acts["logits"], 0)
    close(acts["embed"][1:], jnp.sin(base[:-1]), 1e-6)
    want, want_acts = run(model, W4, X, edits=both, capture="resid_post")
    close(want[0], base[0], 0)
    assert (jnp.abs(want[1:] - base[1:]).max((1, 2)) > 1e-2).all()
    for edit in (per, swapped, half):
        out, acts = run(model, W4, X, edits=edit, capture="resid_post")
        close(out, want)
        close(acts["resid_post"], want_acts["resid_post"])
    grads = grad_sites(lambda y: y[1].sum(), model, W4, X, at="resid_post")[2]["resid_post"]
    assert grads.shape == (STEPS, L, B, D)
    close(grads[2], jnp.zeros((L, B, D)), 0)
    close(grads[1, -1], jnp.ones((B, D)), 0)
    assert (jnp.abs(grads[0]).max((1, 2)) > 0).all()


def pair(ws, x, *, tap=OFF):
    """An encoder of two layers and a decoder of four, under their own names."""
    enc, dec = tap.scope("enc"), tap.scope("dec")
    return stack(ws[2:], stack(ws[:2], x, tap=enc), tap=dec)


def test_scopes_tell_two_stacks_apart():
    out, acts = run(pair, WS, X, capture="*.resid_post")
    assert {n: a.shape[0] for n, a in acts.items()} == {"enc.resid_post": 2, "dec.resid_post": 4}
    edits = [
        site("enc.z", layer=1).mul(1.0),
        site("enc.z").add(jnp.zeros((2, 1, 1)), per="layer"),
        site("dec.z").add(jnp.zeros((4, 1, 1)), per="layer"),
    ]
    close(run(pair, WS, X, edits=edits)[0], out)
    with pytest.raises(InputError, match=r"'dec.z'.*payload \[\[2\]\]"):
        run(pair, WS, X, edits=site("dec.z").add(jnp.zeros(2), per="layer"))
    with pytest.raises(InputError, match=r"'enc.z'.*payload \[4\].*2 turns"):
        run(pair, WS, X, edits=site("enc.z").add(jnp.zeros(4), per="layer"))
    with pytest.raises(InputError, match=r"'enc.z'.*layer=3.*0..1"):
        run(pair, WS, X, edits=site("enc.z", layer=3).mul(1.0))


def test_one_pattern_edits_many_sites():
    out, acts = run(pair, WS, X, edits=site("*.z", layer=1).set(0.0), capture="*.z")
    assert (acts["enc.z"][1] == 0).all()
    assert (acts["dec.z"][1] == 0).all()
    assert (jnp.abs(acts["dec.z"][0]) > 0).all()
    assert np.isfinite(out).all()


# ---- errors: each names the site


def probe(ws, x, *, tap=OFF, scan=True):
    """A stack with a bool site, and one that exists only while somebody wants it."""

    def body(x, w, tap):
        keep = tap("attn.keep", jnp.ones(x.shape, bool))
        x, y = cell(jnp.where(keep, x, 0.0), w, tap)
        return tap("attn.dense", x) if tap.wants("attn.dense") else x, y

    return tap("final", tap.loop(body, tap("embed", x), ws, scan=scan)[0])


def traced(*edits, capture=(), scan=True):
    return jax.eval_shape(lambda: run(probe, W4, X, edits=edits, capture=capture, scan=scan))


def halve(x):
    return x[:1]


def low(x):
    return x.astype(jnp.bfloat16)


SPAN = np.s_[:, jnp.array(0) : jnp.array(2)]
REQUESTS = {
    "unknown site": (lambda: site("resid_pots").add(1.0), "'resid_pots'.*nearest: resid_post"),
    "shape": (lambda: site("z").apply(halve), r"'z' is float32\[2, 3\].*made it float32\[1, 3\]"),
    "dtype": (lambda: site("z").apply(low), r"'z'.*made it bfloat16"),
    "payload": (lambda: site("z").set(jnp.ones(5)), r"'z'.*\[5\] does not fit"),
    "payload at": (lambda: site("z").at[:, 1].set(jnp.ones(5)), r"'z'.*\.set"),
    "payload dtype": (lambda: site("attn.keep").set(0.5), "'attn.keep' holds bool"),
    "axes": (lambda: site("final").at[0, 0, 0].set(0.0), "'final'.*takes 3 axes"),
    "outside": (lambda: site("final").at[:, D].set(0.0), "'final': index 3 .*axis 1"),
    "outside list": (lambda: site("z").at[..., [0, -4]].set(0.0), "'z': index .* axis 1"),
    "apply on span": (lambda: site("z").at[SPAN].apply(low), "'z': apply cannot"),
    "not in the loop": (lambda: site("embed", layer=1).add(1.0), "'embed'.*no loop over 'layer'"),
    "no such loop": (lambda: site("z", step=1).add(1.0), "'z'.*no loop over 'step'"),
    "per no loop": (lambda: site("embed").add(jnp.ones(4), per="layer"), "'embed'.*'layer'"),
    "per never entered": (lambda: site("z").add(jnp.ones(4), per="step"), "'z'.*over 'step'"),
    "per short": (lambda: site("z").add(jnp.ones(3), per="layer"), r"'z': payload \[\[3\]\]"),
    "per long": (lambda: site("z").add(jnp.ones(9), per="layer"), r"'z'.*\[9\].*4 turns"),
    "late layer": (lambda: site("z", layer=L).add(1.0), "'z': layer=4 is outside 0..3"),
    "late layers": (lambda: site("z", layer=[1, 9]).add(1.0), "'z'.*outside 0..3"),
    "mask": (lambda: site("z", layer=np.ones(3, bool)).add(1.0), "'z'.*3 entries for 4"),
    "unfinished": (lambda: site("z", layer=1), "'z'.*is no Edit; finish it"),
    "no edit": (lambda: 3, "3 is no Edit"),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_a_wrong_request_is_an_error(name):
    edit, message = REQUESTS[name]
    with pytest.raises(InputError, match=f"(?s){message}"):
        traced(edit())


def test_a_layer_out_of_range_is_named_even_where_its_site_never_came_up():
    edit = site("attn.dense", layer=L).add(1.0)  # unrolled, no layer ever wanted it
    with pytest.raises(InputError, match=r"'attn.dense': layer=4 is outside 0..3"):
        traced(edit, scan=False)


@pytest.mark.parametrize(
    ("capture", "message"),
    [
        (["z", "resid_mid"], "'resid_mid'.*nearest: resid_"),
        ({"zzz*": None}, r"'zzz\*'.*nearest: none; sites: embed.*attn.dense, final"),
        ("attn.kep", "'attn.kep'.*nearest: attn.keep"),
    ],
)
def test_an_unknown_capture_is_an_error(capture, message):
    with pytest.raises(InputError, match=message):
        traced(capture=capture)


BUILDS = {
    "index": (lambda: site("q").at[True].set(0.0), "'q': True is no index"),
    "step": (lambda: site("q").at[:: jnp.array(2)].set(0.0), "'q'.*no step"),
    "per scalar": (lambda: site("q").add(1.0, per="layer"), "'q'.*axes in front"),
    "negative": (lambda: site("q", layer=-1), "'q': layer=-1 is negative"),
    "float": (lambda: site("q", layer=1.0), "'q': layer=1.0 is no selection"),
    "bool": (lambda: site("q", layer=True), "'q'.*no selection"),
    "slice": (lambda: site("q", layer=slice(2)), "'q'.*no selection"),
    "rank 2": (lambda: site("q", layer=np.zeros((1, 1), int)), "'q'.*no selection"),
    "gate": (lambda: site("q").add(1.0, gate="maybe"), "'q': gate='maybe'"),
    "function": (lambda: site("q").apply(3.0), "'q': apply needs a function"),
    "no gradient": (
        lambda: grad_sites(jnp.sum, probe, W4, X, at="attn.keep"),
        "'attn.keep' holds bool",
    ),
    "remat": (lambda: stack(W4, X, remat="some"), "remat='some': use None, 'full', 'dots'"),
    "length": (lambda: stack(W4, X, length=3), "leading axes"),
    "no length": (lambda: OFF.loop(cell, X, None), "leading axes"),
    "no turns": (lambda: stack(WS[:0], X), "leading axes"),
    "period": (lambda: OFF.loop((cell, roll), X, (W4,)), "2 bodies need a tuple of 2"),
}


@pytest.mark.parametrize("name", BUILDS)
def test_a_malformed_call_is_an_error(name):
    act, message = BUILDS[name]
    with pytest.raises(InputError, match=message):
        act()


def test_a_site_visited_twice_is_an_error():
    def visit(x, _, tap):
        return tap("a", x), None

    def twice(x, *, tap=OFF):
        return tap("a", tap("a", x))

    def two_loops(x, *, tap=OFF, start=0):
        x, _ = tap.loop(visit, x, None, length=2)
        return tap.loop(visit, x, None, length=2, start=start)[0]

    def other_loops(x, *, tap=OFF):
        x, _ = tap.loop(visit, x, None, length=2)
        return tap.loop(visit, x, None, length=2, axis="step")[0]

    def nested(x, *, tap=OFF):
        inner = lambda x, _, tap: tap.loop(visit, x, None, length=2)  # noqa: E731
        return tap.loop(inner, x, None, length=2)[0]

    assert (twice(X) == X).all()
    for model in (twice, two_loops, functools.partial(two_loops, start=1), other_loops):
        with pytest.raises(InputError, match="'a' is visited twice"):
            run(model, X, edits=site("a").add(1.0))
    for start in (2, 5):  # a gap is fine: the layers between lack the site
        assert run(two_loops, X, start=start, capture="a")[1]["a"].shape == (4, B, D)
    nested(X)
    with pytest.raises(InputError, match="'layer' inside 'layer'"):
        run(nested, X, capture="a")


def test_layers_that_differ_in_shape_need_a_reducer():
    def model(x, *, tap=OFF):
        bodies = tuple(lambda x, _, tap, n=n: (x + tap("a", x[:n]).sum(), None) for n in (1, 2))
        return tap.loop(bodies, x, (None, None), length=3)[0]

    with pytest.raises(InputError, match="'a' differs between layers"):
        run(model, X, capture="a")
    assert run(model, X, capture={"a": jnp.sum})[1]["a"].shape == (6,)


def test_low_precision_activations_stay_low():
    model = lambda x, *, tap=OFF: tap("x", x)  # noqa: E731
    x = jnp.ones((2, 3), jnp.bfloat16)
    for edit in (site("x").add(jnp.float32(0.5)), site("x").at[:, 1].mul(np.ones(2, np.float32))):
        assert run(model, x, edits=edit)[0].dtype == jnp.bfloat16
    ints = run(model, jnp.arange(3), edits=site("x").at[1].set(7))[0]
    assert ints.tolist() == [0, 7, 2]
