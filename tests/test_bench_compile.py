"""`bench compile`: reads the compiled program; the slow test really compiles."""

import json

import pytest

from causal_jax.bench import main
from causal_jax.bench.compile import vmem_of_kernels
from pallas_kernels import _testing

LINE = (
    '  %jvp_block_sparse_dq__.1 = bf16[1] custom-call(%x), custom_call_target="tpu_custom_call", '
    'backend_config={"scoped_memory_configs":[{"memory_space":"1","offset":"0","size":"67108864"}],'
    '"used_scoped_memory_configs":[{"memory_space":"1","offset":"0","size":"1187840"}]}'
)
needs_compiler = pytest.mark.skipif(
    _testing.no_tpu_compiler() is not None, reason=str(_testing.no_tpu_compiler())
)


def test_what_is_used_not_what_is_allowed():
    other = LINE.replace("block_sparse_dq", "lsh_attention_forward")
    found = vmem_of_kernels("\n".join(["%a = add", LINE, LINE.replace("1187840", "7"), other]))
    assert found == {"block_sparse_dq": 1187840, "lsh_attention_forward": 1187840}


@needs_compiler
def test_wrong_words(capsys):
    for words, told in (
        (["--topologies", "v9:2x2"], "unknown topology 'v9:2x2'"),
        (["--names", "flash"], "unknown kernel 'flash'"),
        (["--heads", "3", "--kv_heads", "2"], "must be a multiple"),
        (["--seq", "many"], "whole numbers"),
    ):
        assert main(["compile", *words]) == 2
        assert told in capsys.readouterr().err


@pytest.mark.slow
@needs_compiler
def test_both_kernels_compile(tmp_path, capsys):
    words = ["--topologies", "v5e:2x2", "--head_dims", "64", "--seq", "2048", "--block", "256"]
    assert main(["compile", *words, "--out", str(tmp_path)]) == 0
    records = [json.loads(line) for line in (tmp_path / "bench.jsonl").read_text().splitlines()]
    assert [r["name"] for r in records] == ["block_sparse"] * 2 + ["lsh_attention"] * 2
    assert not any("error" in r for r in records)
    both = records[1]["vmem"]
    assert set(both) == {"block_sparse_o", "block_sparse_dq", "block_sparse_dkv"}
    assert all(0 < x < 64 * 2**20 for x in both.values())
    assert "VMEM" in capsys.readouterr().out
