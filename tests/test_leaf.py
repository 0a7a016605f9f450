"""LeaF: sensitivities, confounders, pruning, the objective."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from causal_jax.data.counterfactual import (
    before_answer,
    pick_run,
    prune,
    run_numbers,
    split_response,
)
from causal_jax.data.tasks.hinted_sum import DIGIT, HintedSum
from causal_jax.errors import InputError
from causal_jax.interp.confounders import (
    Rule,
    confounder_score,
    find,
    min_max,
    select,
    sensitivity,
    token_plot,
)
from causal_jax.models.decoder import Decoder
from causal_jax.models.pair import Pair, pair_of
from causal_jax.objectives.distil import Distil, divergence
from causal_jax.objectives.leaf import Leaf
from causal_jax.taps import run, site

TASK = HintedSum(length=9, rho=0.9, absent=0.3)
SPEC = Decoder(vocab=TASK.vocab, layers=1, width=16, heads=2, context=32)
ROWS = {k: jnp.asarray(v) for k, v in TASK.batch(3, range(4)).items()}
NAMES = ("tokens", "targets", "weights", "segments", "positions")
PLAIN = {k: ROWS[k] for k in NAMES}


@pytest.fixture(scope="module")
def pair():
    return Pair(vocab=TASK.vocab, student=SPEC, teacher=SPEC).build(jax.random.key(0))


def row_loss(model, rows, edits=()):
    """[B] mean -log p of each row's answer."""
    where = {n: rows[n] for n in ("segments", "positions")}
    logits, _ = run(model, rows["tokens"], edits=edits, **where)
    hit = jnp.take_along_axis(jax.nn.log_softmax(logits), rows["targets"][..., None], -1)[..., 0]
    return -(hit * rows["weights"]).sum(1) / rows["weights"].sum(1)


def test_sensitivity_equals_finite_differences(pair):
    g = jax.jit(lambda rows: sensitivity(pair.student, rows))(PLAIN)
    gradient = jax.grad(lambda e: row_loss(pair.student, PLAIN, site("embed").add(e)).sum())(
        jnp.zeros((*ROWS["tokens"].shape, SPEC.width))
    )
    np.testing.assert_allclose(g, jnp.linalg.norm(gradient, axis=-1), rtol=1e-4, atol=1e-7)
    direction = jax.random.normal(jax.random.key(5), gradient.shape)
    h = 1e-4
    both = [row_loss(pair.student, PLAIN, site("embed").add(s * h * direction)) for s in (1, -1)]
    along = (gradient * direction).sum((1, 2))
    np.testing.assert_allclose((both[0] - both[1]) / (2 * h), along, rtol=2e-2, atol=2e-3)


def test_padding_in_front_changes_nothing(pair):
    def padded(x, fill):
        return jnp.pad(x, ((0, 0), (3, 0)), constant_values=fill)

    wide = {n: padded(x, -1 if n == "segments" else 0) for n, x in PLAIN.items()}
    span = ROWS["span"] > 0
    ghat = [
        jax.jit(lambda r, s: min_max(sensitivity(pair.student, r), s))(rows, mask)
        for rows, mask in ((PLAIN, span), (wide, padded(span, False)))
    ]
    np.testing.assert_allclose(ghat[1][:, 3:], ghat[0], atol=1e-5)
    assert not np.asarray(before_answer(wide)[:, :3]).any()
    assert not np.asarray(find(pair.teacher, pair.student, wide).chosen[:, :3]).any()


def test_scores_are_scaled_and_alike_models_prune_nothing(pair):
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(x, jnp.float32) for x in rng.random((2, 3, 8)))
    span = jnp.asarray(rng.random((3, 8)) > 0.3)
    np.testing.assert_allclose(min_max(7 * a, span), min_max(a, span), atol=1e-6)
    score, differs = confounder_score(min_max(a, span), min_max(b, span), span)
    inside = np.where(span, score, np.nan)
    np.testing.assert_allclose(np.nanmin(inside, 1), 0.0)
    np.testing.assert_allclose(np.nanmax(inside, 1), 1.0)
    assert differs.all()
    share = 0.3
    chosen = select(score, span, Rule(share=share, cap=0.5))
    for row in range(3):
        tau = min(np.quantile(inside[row][np.asarray(span[row])], share), 0.5)
        np.testing.assert_array_equal(chosen[row], np.asarray(span[row]) & (score[row] <= tau))
    fixed = select(score, span, Rule(rule="fixed", tau=0.2))
    np.testing.assert_array_equal(fixed, span & (score <= 0.2))
    found = find(pair.student, pair.student, PLAIN)
    assert not np.asarray(found.chosen).any()
    assert not np.asarray(found.score).any()


def test_protected_ids_and_the_answer_are_never_chosen(pair):
    rule = Rule(share=1.0, cap=1.0, protect=(2, 3, 4))
    found = find(pair.teacher, pair.student, PLAIN, rule, ROWS["span"] > 0)
    chosen, tokens = np.asarray(found.chosen), np.asarray(ROWS["tokens"])
    assert chosen.any()
    assert not chosen[(tokens <= 4)].any()
    with pytest.raises(InputError, match="protect"):
        select(found.score, found.span, rule)


def test_search_over_a_batch_equals_row_by_row(pair):
    search = jax.jit(lambda rows: find(pair.teacher, pair.student, rows))
    whole = search(PLAIN)
    for row in range(4):
        alone = search({n: x[row : row + 1] for n, x in PLAIN.items()})
        for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(whole)):
            np.testing.assert_allclose(a[0], b[row], atol=1e-5)


def test_runs_and_pruning_rebuild_the_prompt():
    rng = np.random.default_rng(1)
    chosen = (rng.random(ROWS["tokens"].shape) < 0.5) & (np.asarray(ROWS["span"]) > 0)
    numbers = np.asarray(run_numbers(jnp.asarray(chosen)))
    for row, line in enumerate(np.asarray(ROWS["tokens"])):
        starts = np.flatnonzero(np.diff(np.pad(chosen[row].astype(int), (1, 0))) == 1)
        assert numbers[row].max(initial=0) == len(starts)
        for number in range(1, len(starts) + 1):
            gone = numbers == number
            out = prune(PLAIN, jnp.asarray(gone))
            at = np.flatnonzero(gone[row])
            assert (np.diff(at) == 1).all()
            rest = np.asarray(out["tokens"][row])[: len(line) - len(at)]
            np.testing.assert_array_equal(np.insert(rest, at[0], line[at]), line)
            asked = np.asarray(out["weights"][row]) > 0
            assert np.asarray(out["targets"][row])[asked] >= DIGIT
            assert asked.sum() == 1
    union = prune(PLAIN, jnp.asarray(chosen))
    assert int((union["segments"] < 0).sum()) == chosen.sum()
    np.testing.assert_array_equal(prune(PLAIN, jnp.zeros_like(chosen))["tokens"], ROWS["tokens"])
    drawn = {int(numbers[0][np.asarray(pick_run(jnp.asarray(numbers), jax.random.key(i)))[0]][0])
             for i in range(20)} if numbers[0].max() > 0 else {0}  # fmt: skip
    assert drawn <= set(range(numbers[0].max() + 1))


def test_the_token_before_the_answer_may_go():
    rows = {
        "tokens": jnp.array([[7, 8, 9, 1]]), "targets": jnp.array([[8, 9, 1, 5]]),
        "weights": jnp.array([[0.0, 0, 0, 1]]), "segments": jnp.zeros((1, 4), jnp.int32),
        "positions": jnp.arange(4, dtype=jnp.int32)[None],
    }  # fmt: skip
    out = prune(rows, jnp.array([[False, False, False, True]]))
    assert out["tokens"][0, :3].tolist() == [7, 8, 9]
    assert out["weights"].tolist() == [[0, 0, 1, 0]]
    assert int(out["targets"][0, 2]) == 5


def test_split_response():
    weights = jnp.array([[0.0, 1, 1, 1, 1, 1, 0], [0, 0, 1, 1, 0, 0, 0]])
    first, second = (split_response(weights, p, 2) for p in (0, 1))
    assert first.tolist() == [[0, 1, 1, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0, 0]]
    np.testing.assert_array_equal(first + second, weights)
    with pytest.raises(InputError, match="part = 2"):
        split_response(weights, 2, 2)


def value(objective, model, rows=ROWS, key=None):
    graph, params = nnx.split(model)
    return jax.jit(lambda p: objective.loss(nnx.merge(graph, p), rows, key))(params)


def test_objective(pair):
    plain, _ = value(Distil(), pair, PLAIN)
    np.testing.assert_allclose(value(Leaf(share=1.0), pair)[0], plain, rtol=1e-6)
    alike = pair_of(pair.student, pair.student)
    assert abs(value(Leaf(), alike)[0]) < 1e-6
    leaf = Leaf(share=0.3, rule=Rule(share=0.5))
    key = jax.random.key(2)
    pruned, chosen = leaf.counterfactual(pair, ROWS, key)
    assert np.asarray(chosen).any()
    other, _ = value(Distil(), pair, pruned)
    got, metrics = value(leaf, pair, key=key)
    np.testing.assert_allclose(got, 0.3 * plain + 0.7 * other, rtol=1e-5)
    assert metrics["loss"][1] == 4
    every, gone = dataclasses.replace(leaf, collective=True).counterfactual(pair, ROWS, key)
    found = find(pair.teacher, pair.student, PLAIN, leaf.rule, ROWS["span"] > 0)
    np.testing.assert_array_equal(gone, found.chosen)
    assert int((every["segments"] < 0).sum()) == int(found.chosen.sum())
    kept, chosen = dataclasses.replace(leaf, keep="both").counterfactual(pair, ROWS, key)
    unchanged = ~np.asarray(chosen).any(1)
    np.testing.assert_array_equal(
        np.asarray(kept["tokens"])[unchanged], np.asarray(ROWS["tokens"])[unchanged]
    )


def test_which_logits_matter():
    """The prediction of the first answer token counts, what follows the last does not."""
    rng = np.random.default_rng(0)
    s, t = (jnp.asarray(x, jnp.float32) for x in rng.normal(size=(2, 1, 6, 5)))
    weights = jnp.array([[0.0, 0, 1, 1, 1, 0]])  # prompt of three tokens, answer of three
    gradient = jax.grad(lambda s: (divergence(s, t) * weights).sum() / 3)(s)
    closed = (jax.nn.softmax(s) - jax.nn.softmax(t)) * weights[..., None] / 3
    np.testing.assert_allclose(gradient, closed, atol=1e-6)
    assert np.abs(gradient[0, 2]).max() > 0
    assert np.abs(gradient[0, 5]).max() == 0


def test_the_authors_positions(pair):
    late = {**PLAIN, "weights": jnp.pad(PLAIN["weights"][:, :-1], ((0, 0), (1, 0)))}
    got, _ = value(Leaf(share=1.0, shifted=False), pair)
    np.testing.assert_allclose(got, value(Distil(), pair, late)[0], rtol=1e-6)


def test_response_level_prunes_what_was_said_before(pair):
    rows = {k: np.array(v) for k, v in ROWS.items()}
    rows["weights"][:, -4:] = 1.0
    rows = {k: jnp.asarray(v) for k, v in rows.items()}
    got, metrics = value(
        Leaf(level="response", rule=Rule(share=0.5)), pair, rows, jax.random.key(0)
    )
    assert np.isfinite(got)
    assert metrics["loss"][1] == split_response(rows["weights"], 1, 2).sum()


def test_bad_settings(pair):
    for field in ({"share": 1.5}, {"parts": 1}, {"temperature": 0.0}):
        with pytest.raises(InputError, match=next(iter(field))):
            Leaf(**field)
    with pytest.raises(InputError, match="share"):
        Rule(share=-0.1)
    with pytest.raises(InputError, match="needs a teacher"):
        Leaf().loss(pair.student, ROWS, None)


def test_token_plot(pair):
    found = find(pair.teacher, pair.student, PLAIN, Rule(share=0.3), ROWS["span"] > 0)
    figure = token_plot(found, 0, [str(t) for t in np.asarray(ROWS["tokens"][0])])
    labels = [t.get_text() for t in figure.axes[0].get_xticklabels()]
    assert len(labels) == int(found.span[0].sum())
    assert sum("*" in text for text in labels) == int(found.chosen[0].sum())
