"""The contract of memories: chunks equal the recurrence, cuts, documents, padding, causality."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from causal_jax import taps
from causal_jax.memory import _frames, memories
from causal_jax.memory._state import join

QUICK = ("delta-0", "last_layer-0", "deep-0", "deep-1", "deep-2")  # compiling is most of the time
CASES = [
    pytest.param(
        name,
        case,
        id=f"{name}-{number}",
        marks=() if f"{name}-{number}" in QUICK else pytest.mark.slow,
    )
    for name in memories.names()
    for number, case in enumerate(memories.cases(name, "test"))
]
every_case = pytest.mark.parametrize(("name", "case"), CASES)
TWO = [c for c in CASES if c.id in ("delta-0", "deep-1")]
some_cases = pytest.mark.parametrize(
    ("name", "case"),
    [
        pytest.param(*c.values, id=c.id, marks=() if c in TWO else pytest.mark.slow)
        for c in CASES
        if c.id in QUICK
    ],
)


class Problem:
    """A memory of a case, parameters with a start that is not zero, and a sequence."""

    def __init__(self, name, case):
        self.memory = memories[name](**case.spec)
        self.B, self.T, N, H = case.shape
        self.params = self.memory.init(jax.random.key(0), width=N * H, heads=N)
        stir = lambda w: w + 0.1 * jax.random.normal(jax.random.key(3), w.shape)  # noqa: E731
        self.params["memory"] = jax.tree.map(stir, self.params["memory"])
        self.x = jax.random.normal(jax.random.key(1), (self.B, self.T, N * H))
        first = [0] * 5 + [1] * (self.T - 7) + [-1] * 2
        self.segments = jnp.array([first, [0] * self.T][: self.B])
        self.call = jax.jit(self.memory, static_argnames=("implementation", "aligned"))


pytestmark = pytest.mark.filterwarnings("ignore:theta_max")


def far(a, b):
    """Largest difference of two trees, over their largest entry."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    pairs = [(np.asarray(x, np.float64), np.asarray(y, np.float64)) for x, y in pairs]
    return max(np.abs(x - y).max(initial=0) / max(1, np.abs(y).max(initial=0)) for x, y in pairs)


@every_case
def test_chunks_are_the_recurrence(name, case):
    p = Problem(name, case)
    store = jax.random.bernoulli(jax.random.key(5), 0.8, (p.B, p.T))

    @functools.partial(jax.jit, static_argnums=2)
    def both(params, x, implementation):
        def loss(params, x):
            y, state = p.memory(
                params, x, segments=p.segments, store=store, implementation=implementation
            )
            ends = jax.tree.leaves((state.weights, state.momentum))
            return jnp.sum(jnp.sin(y)) + sum(jnp.sum(jnp.sin(3 * w)) for w in ends), (y, state)

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)

    (grads, out), (true_grads, true) = (both(p.params, p.x, i) for i in ("chunked", "reference"))
    assert far(out, true) < 1e-5
    assert far(grads, true_grads) < 3e-5


@some_cases
def test_cut_anywhere_and_token_by_token(name, case):
    p = Problem(name, case)
    y, end = p.call(p.params, p.x, segments=p.segments)
    state, parts = p.memory.init_state(p.params, p.B), []
    for a, b in [*zip(range(6), range(1, 7)), (6, p.T)]:
        part, state = p.call(p.params, p.x[:, a:b], state, segments=p.segments[:, a:b])
        parts.append(part)
    live = (p.segments >= 0)[..., None]
    assert far(jnp.where(live, jnp.concatenate(parts, 1), 0), jnp.where(live, y, 0)) < 1e-5
    assert far(state, end) < 1e-5


def test_without_an_anchor_pieces_of_a_run_are_the_whole(monkeypatch):
    p = Problem("deep", memories.cases("deep", "test")[3])
    whole = p.call(p.params, p.x, segments=p.segments, implementation="reference")
    monkeypatch.setattr(_frames, "SEGMENT", 8)
    call = jax.jit(lambda *a, **kw: p.memory(*a, **kw))  # traced anew: the size is read then
    y, state = call(p.params, p.x, segments=p.segments)
    first, middle = call(p.params, p.x[:, :6], segments=p.segments[:, :6])
    rest, _ = call(p.params, p.x[:, 6:], middle, segments=p.segments[:, 6:])
    assert far((y, state), whole) < 1e-5
    live = (p.segments >= 0)[..., None]
    assert far(jnp.concatenate([first, rest], 1) * live, whole[0] * live) < 1e-5


@every_case
def test_the_future_changes_nothing(name, case):
    p = Problem(name, case)
    before, _ = p.call(p.params, p.x)
    t = p.T // 2
    after, _ = p.call(p.params, p.x.at[:, t:].set(3 * p.x[:, ::-1][:, t:] + 1))
    np.testing.assert_array_equal(before[:, :t], after[:, :t])
    assert jnp.abs(before[:, t:] - after[:, t:]).max() > 1e-2


@some_cases
def test_documents_are_separate_and_padding_is_nothing(name, case):
    p = Problem(name, case)
    # the second document begins on the border of a chunk
    border = p.memory.anchor if p.memory.anchor not in (None, 1) else 5
    rows = jnp.where(jnp.arange(p.T) < border, 0, 1).at[-3:].set(-1)
    segments = jnp.broadcast_to(rows[None], (p.B, p.T))
    poisoned = p.x.at[:, -3:].set(jnp.nan)

    def loss(x, segments):
        y, state = p.memory(p.params, x, segments=segments)
        return jnp.sum(jnp.sin(y)), (y, state)

    f = jax.jit(jax.grad(loss, has_aux=True))
    grads, (y, state) = f(poisoned, segments)
    assert not jnp.any(y[:, -3:])
    assert not jnp.any(grads[:, -3:])
    assert jnp.all(state.bad == -1)
    first, _ = p.call(p.params, p.x[:, :border])
    second, end = p.call(p.params, p.x[:, border:-3])
    assert far(y[:, :-3], jnp.concatenate([first, second], 1)) < 1e-5
    assert far(state.weights, end.weights) < 1e-5
    assert jnp.any(grads[:, : p.T - 3])


@some_cases
def test_bfloat16_vmap_remat(name, case):
    p = Problem(name, case)
    y, _ = p.call(p.params, p.x)
    half, state = p.call(p.params, p.x.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    assert {w.dtype for w in state.weights.values()} == {jnp.dtype(jnp.float32)}
    assert jnp.abs(half - y).mean() < 0.03 * jnp.abs(y).mean() + 1e-3
    together = jax.jit(jax.vmap(lambda x: p.memory(p.params, x)[0]))(jnp.stack([p.x, 2 * p.x]))
    assert far(together[0], y) < 1e-5
    assert far(together[1], p.call(p.params, 2 * p.x)[0]) < 1e-5


@pytest.mark.parametrize(("name", "case"), TWO)
def test_sharded_is_unsharded(name, case):
    p = Problem(name, case)
    memory, params = p.memory, p.params
    x = jnp.concatenate([p.x, p.x + 1])
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    place = lambda a, *spec: jax.device_put(a, NamedSharding(mesh, PartitionSpec(*spec)))  # noqa: E731
    spread = {
        **params,
        **{n: place(params[n], None, "tensor") for n in ("q", "k", "v", "gate")},
        "o": place(params["o"], "tensor", None),
        "memory": jax.tree.map(lambda w: place(w, "tensor"), params["memory"]),
    }
    loss = lambda params, x: jnp.sum(jnp.sin(memory(params, x)[0]))  # noqa: E731
    grad = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    assert far(grad(spread, place(x, "data")), grad(params, x)) < 1e-4


@some_cases
def test_states_are_values(name, case, tmp_path):
    p = Problem(name, case)
    state = p.memory.init_state(p.params, p.B)
    state = p.memory.write(p.params, state, p.x)
    rows = [state.rows([i]) for i in range(p.B)]
    assert far(join(rows), state) == 0
    file = tmp_path / "state.npz"
    state.save(file)
    again = p.memory.load_state(p.params, file)
    assert far(again, state) == 0
    assert again.form == state.form
    y = p.memory.read(p.params, again, p.x)
    assert y.shape == p.x.shape
    assert jnp.all(jnp.isfinite(y))
    other = dataclasses.replace(p.memory, conv=2)
    with pytest.raises(ValueError, match="conv=4 \\(expected 2\\)"):
        other(p.params, p.x, state)


@some_cases
def test_bad_tokens_are_reported_or_skipped(name, case):
    p = Problem(name, case)
    memory = dataclasses.replace(p.memory, conv=0)
    params = p.memory.init(jax.random.key(0), width=p.x.shape[2], heads=case.shape[2])
    x = p.x.at[0, 7].set(jnp.inf)
    _, state = jax.jit(memory)(params, x)
    assert state.bad.tolist() == [7] + [-1] * (p.B - 1)
    with pytest.raises(ValueError, match="row 0: the surprise of the token at position 7"):
        state.check()
    careful = dataclasses.replace(memory, nonfinite="skip")
    _, skipped = jax.jit(careful)(params, x)
    store = jnp.ones((p.B, p.T), bool).at[0, 7].set(False)
    _, unstored = jax.jit(careful)(params, p.x, store=store)
    skipped.check()
    assert all(jnp.isfinite(w).all() for w in skipped.weights.values())
    if p.memory.gate_chunk == 1:  # else the gates of a finite token count in its chunk's mean
        assert far(skipped.weights, unstored.weights) < 1e-6


@some_cases
def test_taps(name, case):
    p = Problem(name, case)
    capture = ("surprise", "z", "theta")
    f = jax.jit(lambda x: taps.run(lambda x, tap: p.memory(p.params, x, tap=tap)[0], x,
                                   capture=capture))  # fmt: skip
    y, seen = f(p.x)
    assert far(y, p.call(p.params, p.x)[0]) < 1e-6
    assert seen["surprise"].shape == case.shape[:3]
    assert jnp.all(seen["surprise"] >= 0)
    assert jnp.all(seen["theta"] > 0)


def test_wrong_input():
    memory = memories["deep"](anchor=4)
    params = memory.init(jax.random.key(0), width=8, heads=2)
    x = jnp.ones((1, 4, 8))
    _, state = memory(params, x[:, :3])
    with pytest.raises(ValueError, match="aligned=True at position \\[3\\]"):
        memory(params, x, state, aligned=True)
    with pytest.raises(ValueError, match="implementation='fast'"):
        memory(params, x, implementation="fast")
    with pytest.raises(ValueError, match="anchor=4 \\(expected 8\\)"):
        memories["deep"](anchor=8)(params, x, state)
    with pytest.raises(ValueError, match="divisor of width=8"):
        memory.init(jax.random.key(0), width=8, heads=3)
    for wrong in ({"depth": 5}, {"gate_chunk": 3}, {"omega": 65}, {"clip": 0.0}, {"conv": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            memories["deep"](**wrong)


def test_a_step_size_beyond_the_bound_is_warned_of():
    with pytest.warns(UserWarning, match="theta_max=4 is above 2.99"):
        memories["delta"](theta_max=4.0).init(jax.random.key(0), width=8, heads=2)
