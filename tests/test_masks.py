"""Masks: statuses are sound, maps cover, static and traced agree, bad input is named."""

import numpy as np
import pytest

from causal_jax import masks as M


@pytest.mark.parametrize(
    "mask", [M.Causal(), M.streaming(6, 2), M.Documents(np.arange(40) // 7)], ids=str
)
def test_block_map_covers_the_mask(mask):
    dense = np.asarray(mask.to_dense(40))
    assert (np.asarray(mask.block_map(40, 40, 8, 6).to_dense()) | ~dense).all()
