"""Swapped attention, adapters, partial freezing: weights stay where they belong."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tiny import NEXT, compiled, random_batch  # noqa: F401

from causal_jax.attention import Dense
from causal_jax.errors import InputError
from causal_jax.models.decoder import Decoder
from causal_jax.nn.lora import LoRA
from causal_jax.paths import combine, named_leaves, partition
from causal_jax.surgery import add_lora, merge_lora, rebuilt, swap_attention
from causal_jax.taps import run
from causal_jax.training import state, step
from causal_jax.training.optimizer import AdamW, Muon
from causal_jax.training.recipe import Recipe
from causal_jax.training.sharding import MeshSpec, make_mesh, put_batch
from tests.tiny_decoder import close, ids

SPEC = Decoder(vocab=31, layers=6, width=16, heads=4, kv_heads=2, context=32)
SHORT = Dense(window=2)
T = 9


@pytest.fixture(scope="module")
def model():
    graph = nnx.split(nnx.eval_shape(lambda: SPEC.build(jax.random.key(0))))[0]
    return nnx.merge(graph, jax.jit(lambda: nnx.split(SPEC.build(jax.random.key(0)))[1])())


def logits(model, tokens=None):
    graph, params = nnx.split(model)
    call = jax.jit(lambda params, tokens: nnx.merge(graph, params)(tokens))
    return call(params, ids(0) if tokens is None else tokens)


def layer_by_layer(model, specs, tokens):
    """The same blocks one after another in Python, each with its spec: no stack, no scan."""
    apart = model.unstacked()
    for (block,), spec in zip(apart.stack.blocks, specs):
        block.attention.spec = spec
    return logits(apart, tokens)


def scans(model):
    return [(s.start, len(s.specs), s.repeats) for s in model.stack.segments]


@pytest.mark.parametrize(
    ("specs", "want"),
    [
        ({range(0, 6, 2): SHORT}, [(0, 2, 3)]),  # a period of two, one scan
        ({2: SHORT}, [(0, 1, 2), (2, 1, 1), (3, 1, 3)]),
        ({(4, 5): SHORT}, [(0, 1, 4), (4, 1, 2)]),
        ({None: SHORT}, [(0, 1, 6)]),
    ],
)
def test_swapped_layers_keep_their_weights_and_share_scans(model, specs, want):
    swapped = swap_attention(model, specs)
    assert scans(swapped) == want
    each = [Dense()] * 6
    for layers, spec in specs.items():
        for layer in range(6) if layers is None else (layers,) if layers == 2 else layers:
            each[layer] = spec
    assert swapped.spec.layer_specs() == tuple(each)
    close(logits(swapped), layer_by_layer(model, each, ids(0)))
    assert not np.allclose(logits(swapped), logits(model))
    back = swap_attention(swapped, {None: Dense()})
    assert back.spec == model.spec
    for name, leaf in named_leaves(nnx.split(back)[1]).items():
        np.testing.assert_array_equal(leaf, named_leaves(nnx.split(model)[1])[name])


def test_the_model_given_stays_as_it_is_and_whole_stacks_are_not_copied(model):
    before = nnx.split(model)
    swapped = swap_attention(model, {None: SHORT})
    assert nnx.split(model)[0] == before[0]
    mine, its = (named_leaves(nnx.split(m)[1]) for m in (model, swapped))
    assert all(mine[name] is its[name] for name in mine)


def test_a_swapped_model_decodes_as_it_reads(model):
    swapped = swap_attention(model, {range(1, 6, 2): SHORT})
    graph, params = nnx.split(swapped)

    @jax.jit
    def in_parts(params, tokens):
        m = nnx.merge(graph, params)
        one, cache = m.extend(tokens[:, :5], m.init_cache(2, 12))
        return jnp.concatenate([one, m.extend(tokens[:, 5:], cache)[0]], axis=1)

    close(in_parts(params, ids(0)), logits(swapped))


def test_what_a_model_cannot_take_is_refused(model):
    @dataclasses.dataclass(frozen=True)
    class Full(Dense):
        patterns = frozenset({"self-full"})

    @dataclasses.dataclass(frozen=True)
    class Random(Dense):
        needs_key = True

    @dataclasses.dataclass(frozen=True)
    class Picky(Dense):
        def __call__(self, q, k, v, **kw):
            raise InputError(f"head width {q.shape[-1]}: expected a multiple of 64")

    for specs, message in (
        ({7: SHORT}, r"layer 7 is outside 0\.\.5"),
        ({-1: SHORT}, "layer -1 is outside"),
        ({range(0, 3): SHORT, 2: Dense()}, "layer 2 is named twice"),
        ({0: "dense"}, "no attention spec"),
        ({0: Full()}, "cannot serve a causal decoder"),
        ({0: Random()}, "gives its attention no key"),
        ({0: Picky()}, "expected a multiple of 64"),
    ):
        with pytest.raises(InputError, match=message):
            swap_attention(model, specs)
    with pytest.raises(InputError, match="needs a DecoderModel"):
        swap_attention(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), {0: SHORT})
    with pytest.raises(InputError, match="6 layers cannot become 5"):
        rebuilt(model, dataclasses.replace(SPEC, layers=5))
    with pytest.raises(InputError, match="cannot become"):
        rebuilt(model, dataclasses.replace(SPEC, hidden=128))


def test_parameters_that_only_the_new_model_has_are_drawn(model):
    spec = dataclasses.replace(SPEC, qk_norm=True)
    with pytest.raises(InputError, match="attention/k_norm/scale, attention/q_norm/scale"):
        rebuilt(model, spec)
    got = named_leaves(nnx.split(rebuilt(model, spec, jax.random.key(0)))[1])
    assert got["stack/blocks/0/0/attention/q_norm/scale"].shape == (6, 4)
    old = named_leaves(nnx.split(model)[1])
    assert all(got[name] is old[name] for name in old)


def test_adapters_change_nothing_until_trained_and_merge_exactly(model):
    lora = LoRA(rank=3, alpha=6.0, targets=r"attention/(q|o)$|mlp/down$")
    adapted = add_lora(model, lora, jax.random.key(1))
    close(logits(adapted), logits(model), 1e-6)
    names = named_leaves(nnx.split(adapted)[1])
    assert names["stack/blocks/0/0/attention/q/lora_a"].shape == (6, 16, 3)
    assert names["stack/blocks/0/0/mlp/down/lora_b"].shape == (6, 3, 16)
    assert sum("lora_" in n for n in names) == 6
    graph, params = nnx.split(adapted)
    keys = iter(jax.random.split(jax.random.key(2), 99))
    moved = jax.tree_util.tree_map_with_path(
        lambda path, x: (
            x + 0.3 * jax.random.normal(next(keys), x.shape) if "lora_" in str(path) else x
        ),
        params,
    )
    adapted = nnx.merge(graph, moved)
    merged = merge_lora(adapted)
    assert merged.spec == model.spec
    close(logits(merged), logits(adapted))
    assert not np.allclose(logits(merged), logits(model))
    # other attention in some layers: the adapters go with their layers
    both = swap_attention(adapted, {1: SHORT, 4: SHORT})
    close(logits(both), logits(swap_attention(merged, {1: SHORT, 4: SHORT})))
    acts = run(adapted, ids(0), capture=["q"])[1]
    close(acts["q"], run(merged, ids(0), capture=["q"])[1]["q"], 1e-4)


def test_wrong_adapters_are_refused(model):
    with pytest.raises(InputError, match="names no linear map: attention/k, attention/o"):
        add_lora(model, LoRA(targets="kernel"), jax.random.key(0))
    with pytest.raises(InputError, match="no adapters"):
        merge_lora(model)
    adapted = add_lora(model, LoRA(), jax.random.key(0))
    with pytest.raises(InputError, match="merge_lora first"):
        add_lora(adapted, LoRA(), jax.random.key(0))
    with pytest.raises(InputError, match=r"lora\.rank must be at least 1"):
        LoRA(rank=0)
    with pytest.raises(InputError, match="not a regular expression"):
        LoRA(targets="(")


def test_a_tree_is_parted_by_name_and_put_together_again(model):
    params = nnx.split(model)[1]
    chosen, rest = partition(r"mlp/|table$", params)
    assert all("mlp" in n or n.endswith("table") for n in named_leaves(chosen))
    assert len(jax.tree.leaves(chosen)) + len(jax.tree.leaves(rest)) == len(jax.tree.leaves(params))
    whole = combine(chosen, rest)
    assert jax.tree.structure(whole) == jax.tree.structure(params)
    assert all(a is b for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(params)))
    with pytest.raises(InputError, match=r"trainable = 'mpl' matches no parameter; names: embed/"):
        partition("mpl", params, "trainable")


@pytest.mark.parametrize(
    ("optimizer", "accumulate"), [(AdamW(lr=1e-2), 2), (Muon(matrices=r"lora_"), 1)]
)
def test_only_what_is_trainable_moves_and_has_moments(optimizer, accumulate):
    spec = dataclasses.replace(SPEC, layers=2, lora=LoRA(rank=2), context=16)
    mesh = make_mesh(MeshSpec(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        tx = optimizer.transformation()
        abstract, _ = state.abstract_state(spec, tx, mesh, ema=True, trainable="lora_")
        now = state.new_state(spec, tx, abstract, 0, trainable="lora_")
        advance = step.make_step(
            state.graph_of(spec), NEXT, optimizer, abstract, mesh, steps=100,
            trainable="lora_", accumulate=accumulate, ema=0.9,
        )  # fmt: skip
        before = {n: np.asarray(x) for n, x in named_leaves(now["params"]).items()}
        losses = []
        for _ in range(4):
            now, report = advance(now, put_batch(mesh, random_batch(8, 16, 31)), jax.random.key(0))
            total, count = report["metrics"]["loss"]
            losses.append(float(total / count))
    after = {n: np.asarray(x) for n, x in named_leaves(now["params"]).items()}
    for name in before:
        assert np.array_equal(before[name], after[name]) == ("lora_" not in name), name
        assert np.array_equal(named_leaves(now["ema"])[name], before[name]) == ("lora_" not in name)
    assert losses[-1] < losses[0]
    moments = {n.split("/stack/")[1] for n in named_leaves(now["opt"]) if "/stack/" in n}
    assert moments == {n.split("stack/")[1] for n in before if "lora_" in n}


def test_frozen_parameters_do_not_change_the_step_of_the_others():
    """Clipping aside, what is trained moves as if everything were."""
    spec = dataclasses.replace(SPEC, layers=2, context=16)
    optimizer = AdamW(lr=1e-2, clip=None, weight_decay=0.0)
    mesh = make_mesh(MeshSpec(data=1))
    batch, pattern = random_batch(4, 16, 31), "mlp/"
    results = {}
    with jax.set_mesh(mesh):
        for trainable in ("", pattern):
            tx = optimizer.transformation()
            abstract, _ = state.abstract_state(spec, tx, mesh, trainable=trainable)
            now = state.new_state(spec, tx, abstract, 0, trainable=trainable)
            advance = step.make_step(
                state.graph_of(spec), NEXT, optimizer, abstract, mesh, steps=10, trainable=trainable
            )
            now, _ = advance(now, put_batch(mesh, batch), jax.random.key(0))
            results[trainable] = named_leaves(now["params"])
    for name, leaf in results[pattern].items():
        if pattern in name:
            close(leaf, results[""][name], 1e-6)


def test_a_recipe_refuses_what_is_no_pattern():
    with pytest.raises(InputError, match=r"trainable = '\(' is not a regular expression"):
        Recipe(model=SPEC, trainable="(")
    with pytest.raises(InputError, match="trainable = 'lora_' matches no parameter"):
        state.init_state(SPEC, optax.sgd(0.1), jax.random.key(0), trainable="lora_")


def test_adapters_are_trained_by_the_command_and_read_back(tmp_path):
    """train with model.lora and trainable; the run folder gives the adapted model back."""
    from causal_jax.data.pipeline import Data
    from causal_jax.data.tokenizers import Bytes
    from causal_jax.training.loop import train
    from causal_jax.training.recipe import Checkpoints, Evaluation
    from causal_jax.training.run import load_run

    recipe = Recipe(
        model=Decoder(layers=2, width=16, heads=2, context=32, lora=LoRA(rank=2)),
        data=Data(tokenizer=Bytes(), context=32, batch=8),
        steps=2,
        trainable="lora_",
        evaluation=Evaluation(every=0, final_batches=0),
        checkpoint=Checkpoints(every=0),
        workdir=str(tmp_path / "run"),
    )
    end = train(recipe)
    back = load_run(tmp_path / "run")
    assert back.model.spec.lora == LoRA(rank=2)
    mine = named_leaves(nnx.split(back.model)[1])
    for name, leaf in named_leaves(end.state["params"]).items():
        np.testing.assert_array_equal(mine[name], leaf)
    assert any("lora_b" in n and np.abs(x).max() > 0 for n, x in mine.items())
