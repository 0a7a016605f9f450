"""Distillation: divergences and their gradients by closed form, transfers, the frozen teacher."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import make_run, random_batch

from causal_jax.errors import InputError
from causal_jax.models.decoder import Decoder
from causal_jax.models.pair import Pair, pair_of
from causal_jax.objectives.distil import (
    Distil,
    attention_transfer_loss,
    divergence,
    hidden_transfer_loss,
    pattern_transfer_loss,
)
from causal_jax.objectives.next_token import NextToken
from causal_jax.paths import named_leaves
from causal_jax.training.optimizer import SGD, Schedule
from causal_jax.training.sharding import MeshSpec, make_mesh, put_batch
from causal_jax.training.state import shardings_of

KEY = jax.random.key(3)
KINDS = ("forward", "reverse", "js")
SMALL = Decoder(layers=1, width=16, heads=2, context=32)
LARGE = Decoder(layers=2, width=32, heads=2, context=32)
PAIR = Pair(vocab=17, student=SMALL, teacher=LARGE)
ALIKE = Pair(vocab=17, student=SMALL, teacher=SMALL)


def logits(seed=0, shape=(3, 5)):
    return [
        jnp.asarray(x, jnp.float32)
        for x in 3 * np.random.default_rng(seed).normal(size=(2, *shape))
    ]


def softmax64(x, temperature):
    e = np.exp(np.asarray(x, np.float64) / temperature)
    return e / e.sum(-1, keepdims=True)


def expected(kind, s, t, temperature, mix):
    """(value, gradient by the student's logits), in float64 from the definitions."""
    p, q = softmax64(t, temperature), softmax64(s, temperature)
    if kind == "forward":
        value, dq = p * np.log(p / q), -p / q
    elif kind == "reverse":
        value, dq = q * np.log(q / p), np.log(q / p) + 1
    else:
        m = mix * p + (1 - mix) * q
        value = mix * p * np.log(p / m) + (1 - mix) * q * np.log(q / m)
        dq = (1 - mix) * np.log(q / m)  # the terms of dm cancel up to a constant
    gradient = q * (dq - (q * dq).sum(-1, keepdims=True)) / temperature
    return temperature**2 * value.sum(-1), temperature**2 * gradient


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("kind", KINDS)
def test_divergence_and_gradient_equal_the_closed_forms(kind, temperature):
    s, t = logits()
    how = {"kind": kind, "temperature": temperature, "mix": 0.3}
    value, gradient = expected(kind, s, t, temperature, 0.3)
    np.testing.assert_allclose(divergence(s, t, **how), value, rtol=2e-5, atol=1e-6)
    got = jax.grad(lambda s: divergence(s, t, **how).sum())(s)
    np.testing.assert_allclose(got, gradient, rtol=2e-4, atol=2e-6)
    if kind == "forward":  # tau (p_S - p_T), the form of the papers
        closed = temperature * (softmax64(s, temperature) - softmax64(t, temperature))
        np.testing.assert_allclose(got, closed, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_ruled_out_id_takes_no_part(kind):
    s, t = logits()
    wide = [jnp.pad(x, ((0, 0), (0, 1)), constant_values=-jnp.inf) for x in (s, t)]
    np.testing.assert_allclose(divergence(*wide, kind=kind), divergence(s, t, kind=kind), rtol=1e-6)
    gradient = jax.grad(lambda s: divergence(s, wide[1], kind=kind).sum())(wide[0])
    assert np.isfinite(gradient).all()
    assert (gradient[:, -1] == 0).all()
    np.testing.assert_allclose(divergence(s, s, kind=kind), 0.0, atol=2e-7)  # rounding of m


def test_bad_divergence():
    s, t = logits()
    with pytest.raises(InputError, match="one vocabulary"):
        divergence(s, t[:, :4])
    with pytest.raises(InputError, match="kind='backward'"):
        divergence(s, t, kind="backward")


def test_transfers_are_masked_means():
    rng = np.random.default_rng(1)
    a, b = (jnp.asarray(x, jnp.float32) for x in rng.normal(size=(2, 3, 2, 5, 2, 4)))
    weights = jnp.asarray([[1, 0, 1, 1, 0], [0, 0, 0, 1, 0]], jnp.float32)
    gap = (np.asarray(a) - np.asarray(b)) ** 2
    on = np.asarray(weights, bool)
    np.testing.assert_allclose(attention_transfer_loss(a, b), gap.mean(), rtol=1e-6)
    rows = gap.mean((0, 3, 4))
    np.testing.assert_allclose(attention_transfer_loss(a, b, weights), rows[on].mean(), rtol=1e-6)
    flat = a.reshape(3, 2, 5, 8), b.reshape(3, 2, 5, 8)
    np.testing.assert_allclose(hidden_transfer_loss(*flat, weights), rows[on].mean(), rtol=1e-6)
    gradient = jax.grad(attention_transfer_loss)(a, b, weights)
    closed = 2 * (a - b) * weights[None, :, :, None, None] / (on.sum() * 3 * 2 * 4)
    np.testing.assert_allclose(gradient, closed, rtol=1e-5, atol=1e-8)


def test_pattern_transfer():
    rng = np.random.default_rng(2)
    causal = np.tril(np.ones((5, 5)))
    a, b = (
        (p := np.exp(x) * causal) / p.sum(-1, keepdims=True)
        for x in rng.normal(size=(2, 1, 2, 3, 5, 5))
    )
    a[:, :, :, 0] = b[:, :, :, 0] = 0.0  # a row that sees nothing
    with np.errstate(divide="ignore", invalid="ignore"):
        rows = np.nan_to_num(b * np.log(b / a)).sum(-1).mean((0, 2))
    weights = jnp.asarray([[1, 1, 0, 1, 0], [1, 0, 0, 0, 1]], jnp.float32)
    a, b = jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)
    got, gradient = jax.value_and_grad(pattern_transfer_loss)(a, b, weights)
    np.testing.assert_allclose(got, rows[np.asarray(weights, bool)].mean(), rtol=1e-5)
    assert np.isfinite(gradient).all()


@pytest.fixture(scope="module")
def pair():
    return PAIR.build(jax.random.key(0))


def batch(rows=2, length=9):
    return {k: jnp.asarray(v) for k, v in random_batch(rows, length, 17).items()}


def loss_of(objective, model, data=None):
    graph, params = nnx.split(model)
    data = batch() if data is None else data

    @jax.jit
    def f(params):
        return objective.loss(nnx.merge(graph, params), data, None)

    return f, params


@pytest.mark.parametrize("kind", KINDS)
def test_objective_equals_a_loop_over_tokens(pair, kind):
    data = batch()
    f, params = loss_of(Distil(kind=kind, temperature=2.0, labels=0.5), pair, data)
    value, metrics = f(params)
    s, t = pair.student(data["tokens"]), pair.teacher(data["tokens"])
    total = nll = 0.0
    rows, places = np.nonzero(np.asarray(data["weights"]))
    for b, j in zip(rows, places):
        total += expected(kind, s[b, j], t[b, j], 2.0, 0.5)[0]
        nll -= np.log(softmax64(s[b, j], 1.0)[data["targets"][b, j]])
    np.testing.assert_allclose(value, (total + 0.5 * nll) / len(rows), rtol=1e-4)
    np.testing.assert_allclose(metrics["divergence"][0], total, rtol=1e-4)
    np.testing.assert_allclose(metrics["loss"][0], nll, rtol=1e-4)
    assert metrics["loss"][1] == len(rows)


def refused(objective, model, why):
    f, params = loss_of(objective, model)
    with pytest.raises(InputError, match=why):
        f(params)


def test_student_that_is_its_teacher_has_nothing_to_learn():
    model = ALIKE.build(jax.random.key(0))
    model = pair_of(model.student, model.student)
    f, params = loss_of(Distil(hidden=1.0, attention=1.0), model)
    (value, metrics), gradient = jax.value_and_grad(f, has_aux=True)(params)
    assert abs(value) < 1e-6
    assert metrics["agreement"][0] == metrics["agreement"][1]
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(gradient)) < 1e-6


def test_pieces_change_nothing(pair, monkeypatch):
    f, params = loss_of(Distil(), pair)
    whole = jax.value_and_grad(f, has_aux=True)(params)
    monkeypatch.setattr("causal_jax.objectives.distil.piece_length", lambda *_: 4)
    g, _ = loss_of(Distil(), pair)
    pieces = jax.value_and_grad(g, has_aux=True)(params)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(pieces)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_the_teacher_gets_no_gradient(pair):
    spec = dataclasses.replace(PAIR, bridge=True)
    model = spec.build(jax.random.key(0))
    every = Distil(hidden=1.0, attention=1.0, layers=((0, 1),), labels=1.0)
    refused(every, model, "heads of equal number and width")
    f, params = loss_of(dataclasses.replace(every, attention=0.0), model)
    (_, metrics), gradient = jax.jit(jax.value_and_grad(f, has_aux=True))(params)
    assert {"loss", "accuracy", "divergence", "agreement", "hidden"} == set(metrics)
    for path, leaf in nnx.to_flat_state(gradient):
        assert (np.abs(leaf[...]).max() == 0.0) == (path[0] == "teacher"), path


def test_bad_pairs():
    with pytest.raises(InputError, match="one vocabulary"):
        Pair(
            student=dataclasses.replace(SMALL, vocab=17),
            teacher=dataclasses.replace(LARGE, vocab=18),
        )
    assert dataclasses.replace(Pair(student=SMALL, teacher=LARGE), vocab=9).teacher.vocab == 9
    plain = dataclasses.replace(SMALL, vocab=17).build(jax.random.key(0))
    with pytest.raises(InputError, match="needs a teacher"):
        Distil().loss(plain, batch(), None)
    refused(Distil(hidden=1.0), PAIR.build(jax.random.key(0)), "1 layers and the teacher 2")
    for layers, why in (((1, 1), r"outside 0\.\.0"), ((0, 1), "bridge = True")):
        refused(Distil(hidden=1.0, layers=(layers,)), PAIR.build(jax.random.key(0)), why)
    for field in (
        {"temperature": 0.0},
        {"mix": 1.0},
        {"logits": 0.0},
    ):
        with pytest.raises(InputError, match=next(iter(field))):
            Distil(**field)


def test_a_pair_is_its_student(pair):
    data = batch()
    value, _ = loss_of(NextToken(), pair, data)[0](nnx.split(pair)[1])
    alone, _ = loss_of(NextToken(), pair.student, data)[0](nnx.split(pair.student)[1])
    np.testing.assert_allclose(value, alone, rtol=1e-6)


def _two_steps(spec, mesh_spec):
    mesh = make_mesh(mesh_spec)
    # not Adam, which divides by the gradient: near 0 it would make rounding large
    optimizer = SGD(lr=0.1, schedule=Schedule("constant", warmup=0))
    with jax.set_mesh(mesh):
        now, step, abstract = make_run(
            spec, optimizer, mesh, objective=Distil(hidden=1.0), ema=0.9,
            trainable=r"^(?!teacher/)",
        )  # fmt: skip
        for seed in range(2):
            now, _ = step(now, put_batch(mesh, random_batch(4, 8, spec.vocab, seed)), KEY)
        places = jax.tree.map(
            lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), now, shardings_of(abstract)
        )
    assert all(jax.tree.leaves(places))
    return named_leaves(now["params"]), named_leaves(now["ema"])


@pytest.mark.slow
@pytest.mark.parametrize("where", ["cut", "host"])
def test_the_teacher_is_cut_over_devices_or_rests_on_the_host(where):
    student = dataclasses.replace(SMALL, layers=2)
    spec = Pair(vocab=16, student=student, teacher=LARGE, bridge=True)
    want, _ = _two_steps(spec, MeshSpec(data=1))
    spec = dataclasses.replace(spec, offload=where == "host")
    got, average = _two_steps(spec, MeshSpec(data=1, fsdp=2, tensor=2))
    for name, value in got.items():
        np.testing.assert_allclose(np.asarray(value), np.asarray(want[name]), atol=2e-5)
        if name.startswith("teacher/"):
            on = {value.sharding.memory_kind, average[name].sharding.memory_kind}
            assert on == {"pinned_host" if where == "host" else "device"}
    cut = got["teacher/stack/blocks/0/0/mlp/up/kernel"]
    assert cut.addressable_shards[0].data.size * 4 == cut.size
