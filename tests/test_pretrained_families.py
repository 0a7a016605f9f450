"""Every family: logits and greedy generation of tiny random models equal those of transformers."""

import numpy as np
import pytest
from pretrained_models import VARIANTS, ids, logits, torch_greedy, torch_logits, torch_model

from causal_jax.generate import Sampling, generate
from causal_jax.models.pretrained import families, load


@pytest.fixture(params=VARIANTS, scope="module")
def pair(request, tmp_path_factory):
    """(theirs, the folder they saved)."""
    theirs = torch_model(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)
    return theirs, folder


def test_logits_and_greedy_generation(pair):
    theirs, folder = pair
    ours, tokenizer = load(folder)
    assert tokenizer is None
    tokens = ids(2, 21)
    reference = torch_logits(theirs, tokens)
    assert reference.std() > 0.1  # a model that says nothing would agree with anything
    np.testing.assert_allclose(logits(ours, tokens), reference, atol=1e-4, rtol=0)
    made = generate(ours, list(tokens), max_tokens=20, sampling=Sampling(temperature=0.0))
    wanted = torch_greedy(theirs, tokens, 20)
    np.testing.assert_array_equal(np.stack([m.tokens for m in made]), wanted)


def test_every_family_is_tested():
    assert {kind for kind, _ in VARIANTS.values()} == set(families.names())
