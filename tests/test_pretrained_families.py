"""Every family: logits and greedy generation of tiny random models equal those of transformers."""

import numpy as np
import pytest
from pretrained_models import VARIANTS, ids, logits, torch_greedy, torch_logits, torch_model

from causal_jax.generate import Sampling, generate
from causal_jax.models.pretrained import families, load, save

# Compiling the cached steps is most of the time: one variant of each family does it.
WRITERS = ("llama31", "mistral", "qwen2_windows", "qwen3", "gemma2", "gpt2", "gpt_neox")


@pytest.fixture(params=VARIANTS, scope="module")
def pair(request, tmp_path_factory):
    """(theirs, the folder they saved, the variant)."""
    theirs = torch_model(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)
    return theirs, folder, request.param


def test_logits(pair):
    theirs, folder, _ = pair
    ours, tokenizer = load(folder)
    assert tokenizer is None
    tokens = ids(2, 21)
    reference = torch_logits(theirs, tokens)
    assert reference.std() > 0.1  # a model that says nothing would agree with anything
    np.testing.assert_allclose(logits(ours, tokens), reference, atol=1e-4, rtol=0)


def test_greedy_generation_with_the_cache(pair):
    theirs, folder, name = pair
    if name not in WRITERS:
        pytest.skip("one variant of each family generates")
    tokens = ids(2, 21)
    made = generate(load(folder)[0], list(tokens), max_tokens=20, sampling=Sampling(0.0))
    np.testing.assert_array_equal(
        np.stack([m.tokens for m in made]), torch_greedy(theirs, tokens, 20)
    )


def test_saved_again_transformers_reads_the_same(pair, tmp_path):
    theirs, folder, name = pair
    ours = load(folder, scan=name.startswith("llama"))[0]
    again = type(theirs).from_pretrained(save(tmp_path / "out", ours), attn_implementation="eager")
    assert dict(again.named_parameters()).keys() == dict(theirs.named_parameters()).keys()
    for path, value in theirs.named_parameters():
        np.testing.assert_allclose(
            again.get_parameter(path).detach(), value.detach(), atol=1e-6, rtol=0, err_msg=path
        )
    tokens = ids(1, 21)
    got, wanted = torch_logits(again.eval(), tokens), torch_logits(theirs, tokens)
    np.testing.assert_allclose(got, wanted, atol=2e-5, rtol=0)


def test_every_family_is_tested():
    assert {kind for kind, _ in VARIANTS.values()} == set(families.names())
    assert {VARIANTS[name][0] for name in WRITERS} == set(families.names())
