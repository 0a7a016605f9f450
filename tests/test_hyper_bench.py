"""`bench hyper`: the peer computes the paper's algorithm; the group runs and says what it timed."""

import jax.numpy as jnp
import numpy as np
import pytest

from causal_jax.attention import dense_attention
from causal_jax.bench import main
from causal_jax.bench.hyper import TorchHyper
from causal_jax.masks import Causal


def test_the_torch_peer_is_exact_with_one_block():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((1, 64, 2, 8), np.float32) for _ in range(3)]
    planes = torch.randn(8, 7, generator=torch.manual_seed(0))
    peer = TorchHyper(torch, planes, block_size=32, sample_size=8, min_seq_len=32)
    o, _ = peer.causal(*(torch.from_numpy(x.swapaxes(1, 2).copy()) for x in arrays))
    ours = [jnp.asarray(x) for x in arrays]
    want = dense_attention(*ours, mask=Causal(), implementation="reference")
    np.testing.assert_allclose(o.numpy().swapaxes(1, 2), want, atol=2e-6)


def test_the_group_runs(capsys, tmp_path):
    words = "--seq 96 --heads 2 --head_dim 8 --block_size 16 --sample_size 8 --min_seq_len 32"
    rest = ["--bwd", "--repeats", "1", "--out", str(tmp_path)]
    assert main(["hyper", *words.split(), *rest]) == 0
    said = capsys.readouterr().out
    for name in ("strict", "faithful", "exact", "torch", "forward+backward", "vs exact"):
        assert name in said
    assert (tmp_path / "bench.jsonl").read_text().count("\n") == 8
    assert main(["hyper", "--names", "strickt"]) == 2
    assert "did you mean 'strict'" in capsys.readouterr().err
