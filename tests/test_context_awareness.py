"""Attention by role: meter, score, steering; the world they are measured in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoder import L, close, go, ids

from causal_jax.data.tasks.knowledge_world import (
    ASK,
    ASSISTANT,
    BOS,
    IND,
    USER,
    KnowledgeWorld,
)
from causal_jax.errors import InputError
from causal_jax.interp.allocation import (
    allocation,
    context_dependency,
    retrieval_head,
    role_mass,
    steer_attention,
)

B, N, T = 2, 4, 9
USERS = jnp.asarray(np.isin(np.arange(T), [2, 3, 5]))[None].repeat(B, 0)


def pattern(seed=0):
    x = np.exp(np.random.default_rng(seed).normal(size=(B, N, T, T))) * np.tril(np.ones((T, T)))
    return jnp.asarray(x / x.sum(-1, keepdims=True), jnp.float32)


def test_score_equals_a_triple_loop():
    p, responses = pattern(), np.zeros((B, 2, T), bool)
    responses[:, 0, 4], responses[:, 1, 6:8] = True, True
    got = context_dependency(p, USERS, jnp.asarray(responses))
    for b in range(B):
        for m in range(2):
            tokens = np.flatnonzero(responses[b, m])
            total = 0.0
            for y in tokens:
                total += max(sum(float(p[b, h, y, x]) for x in (2, 3, 5)) for h in range(N))
            np.testing.assert_allclose(got[b, m], total / len(tokens), rtol=1e-5)
    close(context_dependency(p[:, ::-1], USERS, jnp.asarray(responses)), got)
    # what comes later changes nothing: earlier turns see none of it
    later = USERS.at[:, 8].set(True)
    close(context_dependency(p, later, jnp.asarray(responses)), got)


def test_score_at_its_ends():
    on_user = jnp.zeros((1, 2, T, T)).at[0, 1, 6, 2].set(1.0).at[0, :, 7, 0].set(1.0)
    responses = jnp.asarray(np.eye(T, dtype=bool)[None, 6:8])
    assert context_dependency(on_user, USERS[:1], responses).tolist() == [[1.0, 0.0]]


def test_allocation_sums_to_one_and_leaves_the_template_out():
    p, query = pattern(), jnp.array([8, 7])
    head = retrieval_head(p, USERS, query)
    mass = role_mass(p, USERS)
    assert [int(h) for h in head] == [int(mass[b, :, q].argmax()) for b, q in enumerate((8, 7))]
    bos = jnp.asarray(np.arange(T) == 0)[None].repeat(B, 0)
    assistant = jnp.asarray(np.arange(T) >= 6)[None].repeat(B, 0)
    found = allocation(p, USERS, assistant, bos, query, head)
    close(found.user + found.assistant + found.bos, np.ones(B))
    template = ~(USERS | bos | assistant)
    without = jnp.where(template[:, None, None], 0.0, p)
    without = without / without.sum(-1, keepdims=True)
    close(found.user, role_mass(without, USERS)[jnp.arange(B), head, query])


@pytest.mark.parametrize("alpha", [0.9, 0.3, 1e-30])
def test_steering_multiplies_and_renormalises(alpha):
    tokens = ids()
    keep = np.isin(np.arange(T), [2, 3, 5])[None].repeat(B, 0)
    layer = 0  # later layers read other residual streams
    before = np.asarray(go(tokens)[1]["attn.pattern"][layer])
    after = go(tokens, steer_attention(jnp.asarray(keep), alpha))[1]["attn.pattern"][layer]
    expected = before * np.where(keep, 1.0, alpha)[:, None, None]
    expected = expected / np.maximum(expected.sum(-1, keepdims=True), 1e-38)
    first = np.argmax(keep[0])
    close(np.asarray(after)[:, :, first:], expected[:, :, first:], 1e-5)
    close(np.asarray(after)[:, :, :first], before[:, :, :first])  # rows without a user key
    assert (np.triu(np.asarray(after), 1) == 0).all()


def test_steering_by_one_is_the_identity_and_can_be_narrowed():
    tokens = ids()
    plain = go(tokens)
    close(go(tokens, steer_attention(USERS, 1.0))[0], plain[0])
    one = go(tokens, steer_attention(USERS, 0.5, layer=0, head=2))[1]["attn.pattern"][0]
    before = plain[1]["attn.pattern"][0]
    close(np.delete(one, 2, 1), np.delete(before, 2, 1))
    odds = (one / (1 - one))[:, 2, 8, 2:4] / (before / (1 - before))[:, 2, 8, 2:4]
    assert (np.asarray(odds) > 1).all()
    assert L == 3


def test_bad_steering():
    for alpha in (0.0, 1.5, -1.0):
        with pytest.raises(InputError, match="alpha"):
            steer_attention(USERS, alpha)
    with pytest.raises(InputError, match="keep has 20 keys"):
        go(ids(), steer_attention(jnp.ones((B, 20), bool), 0.5))


def test_reading_asks_facts_of_the_row_and_answers_them():
    world = KnowledgeWorld(facts=3)
    tokens, answers = (np.asarray(x) for x in world.reading(jax.random.key(0), 5))
    assert tokens.shape == answers.shape == (5, 1 + 3 * 3 + 6 * 3)
    for row, asked in zip(tokens, answers):
        told = dict(row[1:10].reshape(3, 3)[:, :2])
        questions = row[10:].reshape(6, 3)
        assert (questions[:, 0] == ASK).all()
        assert [told[e] for e in questions[:, 1]] == questions[:, 2].tolist()
        assert asked.nonzero()[0].tolist() == list(range(12, 28, 3))
    many = np.asarray(world.reading(jax.random.key(1), 300)[0])[:, 1:10:3]
    different = [len(set(row)) for row in many.tolist()]
    assert all(80 <= different.count(n) <= 120 for n in (1, 2, 3))  # all as likely


def test_the_world():
    world, key = KnowledgeWorld(facts=3), jax.random.key(0)
    chat = world.sample(key, 50, contradict=0.5, indicator=True)
    bare = world.sample(key, 50, contradict=0.5, template=False)
    assert chat.tokens.shape == (50, world.length)
    names = 7 + world.attributes
    for tokens, start, answer, user in zip(*map(np.asarray, jax.tree.leaves(chat))):
        line = tokens[start:].tolist()
        assert line[:2] == [BOS, USER]
        assert line[-2:] == [IND, ASSISTANT]
        facts = {line[i]: line[i + 1] for i in range(2, 2 + 9, 3)}
        assert facts[line[-3]] == answer
        assert user.sum() == 3 * 3 + 2
        known = {e: 7 + int(world.known(jnp.array(e - names))) for e in facts}
        assert all(facts[e] == k for e, k in known.items()) or all(
            facts[e] != k for e, k in known.items()
        )
    np.testing.assert_array_equal(chat.answer, bare.answer)
    assert not np.isin(np.asarray(bare.tokens), [USER, ASSISTANT, IND]).any()
    closed = world.sample(key, 20, contradict=1.0, closed=1.0)
    assert (np.asarray(closed.user.sum(1)) == 2).all()
    entity = np.asarray(closed.tokens)[:, -2] - names
    np.testing.assert_array_equal(closed.answer, 7 + world.known(jnp.asarray(entity)))
    for field in ({"facts": 0}, {"attributes": 1}):
        with pytest.raises(InputError, match=next(iter(field))):
            KnowledgeWorld(**field)
