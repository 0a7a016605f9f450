"""Prompts and batches, tables of means, attribution and lens, pages and pictures."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from causal_jax.data.tokenizers import BPE, Bytes
from causal_jax.data.tokenizers.ids import IdTokenizer
from causal_jax.errors import InputError
from causal_jax.interp import (
    attribution,
    cama,
    in_chunk,
    knock_out,
    logit_difference,
    logit_lens,
    mean_table,
    pad,
    patch,
    steer,
    token_page,
    tokenize,
)
from causal_jax.interp.html import save_page
from causal_jax.interp.plots import attention, save, token_strip
from causal_jax.taps import run, site
from tests.tiny_decoder import SPEC, B, D, L, N, T, close, go, ids, model, two

BYTES = Bytes().train([])
TEXT = "The capital of Fránce is París, the capital."


def test_a_phrase_is_found_byte_by_byte():
    prompt = tokenize(BYTES, TEXT)
    where = prompt.find("Fránce")
    assert bytes(prompt.ids[where].tolist()).decode() == "Fránce"
    assert where[0] == 1 + len(b"The capital of ")  # bos in front
    assert prompt.find("capital", occurrence=-1)[-1] == len(prompt.ids) - 2
    assert tokenize(BYTES, TEXT, bos=False).find("The").tolist() == [0, 1, 2]


def test_a_phrase_is_found_in_tokens_that_are_no_words():
    tokenizer = BPE(vocab=300).train([TEXT * 4, "capitals of the capital"])
    prompt = tokenize(tokenizer, TEXT)
    where = prompt.find("Fránce")
    held = b"".join(tokenizer.pieces[i] for i in prompt.ids[where])
    assert "Fránce".encode() in held
    assert "Fránce".encode() not in b"".join(tokenizer.pieces[i] for i in prompt.ids[where[1:]])
    assert "Fránce".encode() not in b"".join(tokenizer.pieces[i] for i in prompt.ids[where[:-1]])
    assert tokenize(IdTokenizer(31), "3 17 5").find("17").tolist() == [1]


def test_a_phrase_that_is_not_there_or_there_twice_is_refused():
    prompt = tokenize(BYTES, TEXT)
    for phrase, occurrence, message in (
        ("Rome", None, "does not occur"),
        ("", None, "does not occur"),
        ("capital", None, "occurs 2 times"),
        ("capital", 2, "occurs 2 times"),
    ):
        with pytest.raises(InputError, match=message):
            prompt.find(phrase, occurrence)


def test_patching_a_padded_batch_is_patching_each_prompt():
    rows = [np.asarray(ids(0)[0]), np.asarray(ids(1)[0, :5])]
    batch = pad(rows)
    place = batch.place([[2, 3], -1])
    assert place.sum() == 3
    assert place[1, -1]
    v = jax.random.normal(jax.random.key(0), (D,))
    f = jax.jit(lambda tokens, edits, kw: run(model(), tokens, edits=edits, **kw)[0])
    together = f(batch.tokens, steer(v, layer=1, position=place), batch.inputs())
    for row, where in zip((0, 1), ([2, 3], -1)):
        alone = f(jnp.asarray(rows[row])[None], steer(v, layer=1, position=where), {})
        close(together[row, int(batch.start[row]) :], alone[0])
    assert np.asarray(batch.real()).sum() == 14
    with pytest.raises(InputError, match="prompt 1 has 5 tokens"):
        batch.place([0, 5])
    with pytest.raises(InputError, match="the batch has 2"):
        batch.place([0])
    with pytest.raises(InputError, match="at least one"):
        pad([rows[0], []])


def test_behind_a_cache_positions_are_translated():
    graph, params = nnx.split(model())
    place = np.zeros((B, T), bool)
    place[0, 6] = place[1, 2] = True
    v = jax.random.normal(jax.random.key(0), (D,))
    # a knock-out of keys: their places are those of the cache; queries are translated
    cut = functools.partial(knock_out, layer=0, head=1, key=[1, 3])

    @jax.jit
    def whole(params, tokens):
        edits = [steer(v, layer=1, position=place), cut(query=place)]
        return run(nnx.merge(graph, params), tokens, edits=edits)[0]

    @jax.jit
    def in_parts(params, tokens):
        m = nnx.merge(graph, params)
        cache, logits = m.init_cache(B, 12), []
        for start, stop in ((0, 5), (5, 8), (8, 9)):
            here = in_chunk(place, cache.length, stop - start)
            edits = [steer(v, layer=1, position=here), cut(query=here)]
            (out, cache), _ = run(m.extend, tokens[:, start:stop], cache, edits=edits)
            logits.append(out)
        return jnp.concatenate(logits, 1)

    close(whole(params, ids(0)), in_parts(params, ids(0)))
    assert not np.allclose(whole(params, ids(0)), go(ids(0), (), ())[0])


def test_in_a_decoding_step_a_query_keeps_its_own_key():
    graph, params = nnx.split(model())

    @jax.jit
    def step(params, tokens):
        m = nnx.merge(graph, params)
        _, cache = m.extend(tokens[:, :6], m.init_cache(B, 12))
        edits = knock_out(layer=0)
        _, acts = run(m.extend, tokens[:, 6:7], cache, edits=edits, capture="attn.pattern")
        return acts["attn.pattern"][0]

    assert (np.asarray(step(params, ids(0))) == np.eye(12)[6]).all()


def test_a_mean_table_is_the_mean_over_prompts_that_share_token_and_position():
    prompts = np.random.default_rng(0).integers(0, 4, (50, 6))
    table = mean_table(model(), prompts, chunk=16)
    acts = jax.jit(lambda x: run(model(), x, capture=["resid_post"])[1]["resid_post"])(prompts)
    for t, token in ((0, 1), (3, 2), (5, 0)):
        mine = prompts[:, t] == token
        row = int(table.rows[t, token])
        assert int(table.counts[row]) == mine.sum()
        close(table.values[:, row], np.asarray(acts)[:, mine, t].mean(1), 1e-5)
    assert int(table.counts.sum()) == prompts.size
    plain = mean_table(model(), prompts, by="position", site="attn.z", chunk=50)
    assert plain.values.shape == (L, 6, N, 4)
    parity = mean_table(model(), prompts, by=np.arange(31) % 2)
    assert parity.values.shape == (L, 12, D)
    close(parity.of(jnp.asarray(prompts))[:, 0, 2], parity.of(jnp.asarray(prompts + 2))[:, 0, 2])


def test_context_aware_means():
    prompts = np.random.default_rng(0).integers(0, 4, (50, T))
    one = mean_table(model(), prompts[:1])
    f = jax.jit(
        lambda x, e: run(model(), x, edits=e, capture=["resid_post"])[1]["resid_post"],
    )
    other = int(np.flatnonzero(prompts[1:, 7] == prompts[0, 7])[0]) + 1
    prompts[[1, other]] = prompts[[other, 1]]
    x = jnp.asarray(prompts[:2])
    plain = f(x, ())
    close(f(x[:1], cama(one, 2, x[:1])), f(x[:1], ()))  # of one prompt: the identity
    table = mean_table(model(), prompts)
    acts = f(x, cama(table, 2, x))
    close(acts[1, :, 0], plain[1, :, 0])  # the first position sees nothing but itself
    same = np.flatnonzero(prompts[0] == prompts[1])
    close(acts[1, 0, same], acts[1, 1, same], 1e-6)
    assert np.abs(plain[1, 0, 7] - plain[1, 1, 7]).max() > 1e-3
    assert cama(table, 0, x) == []
    traced = jax.jit(lambda depth: run(model(), x, edits=cama(table, depth, x))[0])
    close(traced(0), f_logits(x, ()))
    close(traced(2), f_logits(x, cama(table, 2, x)))
    with pytest.raises(InputError, match="token 9 was never seen at position 4"):
        cama(table, 1, x.at[1, 4].set(9))
    with pytest.raises(InputError, match=r"depth=4 is outside 0\.\.3"):
        cama(table, 4, x)
    with pytest.raises(InputError, match="table of 'resid_post'"):
        cama(mean_table(model(), prompts[:2], site="attn_out"), 1, x[:1])
    with pytest.raises(InputError, match="by='words'"):
        mean_table(model(), prompts, by="words")


@jax.jit
def f_logits(x, edits):
    return run(model(), x, edits=edits)[0]


def test_attribution_is_the_derivative_of_the_patch():
    clean, bad = two()
    metric = functools.partial(logit_difference, right=3, wrong=jnp.array([5, 9]))

    @jax.jit
    def scores(clean):
        return attribution(metric, model(), ids(1), clean=clean, at=["attn.z", "resid_post"])

    got = scores(clean)
    assert got["attn.z"].shape == (L, B, T, N)
    assert got["resid_post"].shape == (L, B, T)
    h = 1e-2
    for layer, row, position, head in ((0, 0, 3, 1), (1, 1, 8, 2), (2, 0, 8, 3)):
        gap = (clean["attn.z"] - bad["attn.z"])[layer, row, position, head]
        at = site("attn.z", layer=layer).at[row, position, head]
        up, down = (metric(f_logits(ids(1), [at.add(s * gap)])) for s in (h, -h))
        assert abs((up - down) / (2 * h) - got["attn.z"][layer, row, position, head]) < 2e-3
    with pytest.raises(InputError, match=r"clean\['attn.z'\] is missing"):
        attribution(metric, model(), ids(1), clean={})


def test_the_lens_on_the_last_layer_is_the_model():
    clean, _ = two()
    lens = jax.jit(lambda x: logit_lens(model(), x))(clean["resid_post"])
    assert lens.shape == (L, B, T, SPEC.vocab)
    close(lens[-1], clean["logits"])
    top = jax.jit(lambda x: logit_lens(model(), x, lambda z: z.argmax(-1)))(clean["resid_post"])
    np.testing.assert_array_equal(top, lens.argmax(-1))


def test_logit_difference_reads_each_row_where_it_is_told():
    logits = jnp.arange(2 * 3 * 4.0).reshape(2, 3, 4) ** 2
    want = (logits[0, 2, 1] - logits[0, 2, 0] + logits[1, 0, 3] - logits[1, 0, 0]) / 2
    got = logit_difference(logits, jnp.array([1, 3]), 0, jnp.array([-1, 0]))
    close(got, want)


def test_pages_and_pictures_are_written(tmp_path):
    tokens = ["<bos>", "a<b", "\n", " $x_", "é"]
    page = token_page(tokens, {"effect": [0, -1, 2, 0.5, float("nan")], "weight": range(5)})
    save_page(page, tmp_path / "sub" / "page.html")
    text = (tmp_path / "sub" / "page.html").read_text()
    assert text.count("<span ") == 10
    assert "a&lt;b" in text
    assert "http" not in text
    assert 'title="2: 2"' in text
    for name, figure in {
        "strip": token_strip(tokens * 5, np.linspace(-1, 1, 25)),
        "pattern": attention(two()[0]["attn.pattern"][0, 0, 0], ["a"] * T, title="a head"),
    }.items():
        save(figure, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 2000
    with pytest.raises(InputError, match="5 tokens"):
        token_page(tokens, [1.0])
    with pytest.raises(InputError, match="3 labels for 9"):
        attention(np.eye(9), ["a"] * 3)


def test_patch_by_phrase_end_to_end():
    """The whole way: text, phrase, patch; only positions from the phrase on can change."""
    tokenizer = IdTokenizer(31)
    clean, bad = tokenize(tokenizer, "1 2 3 4 5"), tokenize(tokenizer, "1 2 9 4 5")
    where = bad.find("9")
    acts = run(model(), jnp.asarray(clean.ids)[None], capture=["resid_post"])[1]
    out = f_logits(jnp.asarray(bad.ids)[None], patch(acts, layer=0, position=where))
    plain = f_logits(jnp.asarray(bad.ids)[None], ())
    close(out[:, :2], plain[:, :2], 1e-6)
    close(out[:, 2], f_logits(jnp.asarray(clean.ids)[None], ())[:, 2])
