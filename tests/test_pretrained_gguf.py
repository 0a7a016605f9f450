"""GGUF: every family, every quantisation, the tokenizer inside, and files that are no good."""

import gguf
import numpy as np
import pytest
from gguf_files import words, write_gguf
from pretrained_models import ids, logits, torch_logits, torch_model

from causal_jax.errors import InputError
from causal_jax.gguf_file import open_gguf
from causal_jax.models.pretrained import load
from causal_jax.positions import Llama3

KINDS = gguf.GGMLQuantizationType


@pytest.mark.parametrize(
    "name", ["llama2_biases", "llama3", "qwen2", "qwen3", "gpt2", "gpt_neox", "gpt_neox_sequential"]
)
def test_every_family_gives_the_logits_of_the_model_it_was_converted_from(name, tmp_path):
    theirs = torch_model(name)
    ours, tokenizer = load(write_gguf(tmp_path / "m.gguf", theirs))
    assert tokenizer is not None
    assert tokenizer.vocab == 61
    tokens = ids(2, 21)
    reference = torch_logits(theirs, tokens)
    np.testing.assert_allclose(logits(ours, tokens), reference, atol=1e-4, rtol=0)


def test_gemma2(tmp_path):
    theirs = torch_model("gemma2", query_pre_attn_scalar=16)  # files do not say it: head_dim
    ours, _ = load(write_gguf(tmp_path / "m.gguf", theirs))
    tokens = ids(2, 21)
    np.testing.assert_allclose(
        logits(ours, tokens), torch_logits(theirs, tokens), atol=1e-4, rtol=0
    )


def test_llama31_scaling_is_read_from_its_table_of_divisors(tmp_path):
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    theirs = torch_model("llama31", rope_parameters=rope)
    ours, _ = load(write_gguf(tmp_path / "m.gguf", theirs))
    assert ours.spec.rotary is not None
    assert ours.spec.rotary.scaling == Llama3(8.0, 1.0, 4.0, 8192)
    odd = torch_model("llama31")  # scaled from 16 positions: no Llama 3.1
    with pytest.raises(InputError, match=r"rope_freqs\.weight is not the scaling"):
        load(write_gguf(tmp_path / "odd.gguf", odd))


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_quantised_weights_equal_transformers_on_the_same_file(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    small = torch_model("llama2", vocab_size=64, intermediate_size=64, hidden_size=64)
    write_gguf(tmp_path / "m.gguf", small, KINDS[kind])
    ours, _ = load(tmp_path / "m.gguf", scan=False)
    read = transformers.AutoModelForCausalLM.from_pretrained
    theirs = read(tmp_path, gguf_file="m.gguf", dtype="float32")
    assert open_gguf(tmp_path / "m.gguf").tensors["blk.1.ffn_up.weight"].kind == kind
    up = theirs.get_parameter("model.layers.1.mlp.up_proj.weight").detach().numpy()
    np.testing.assert_array_equal(ours.stack.blocks[1][0].mlp.up.kernel[...][0], up.T)
    q = theirs.get_parameter("model.layers.1.self_attn.q_proj.weight").detach().numpy()
    np.testing.assert_array_equal(ours.stack.blocks[1][0].attention.q.kernel[...][0], q.T)


def test_k_quants_by_hand(tmp_path):
    """Q4_K and Q6_K against the layout in ggml's sources, entry by entry."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(tmp_path / "k.gguf", "llama")
    blocks = {
        "Q4_K": rng.integers(0, 256, (5, 2 * 144), dtype=np.uint8),
        "Q6_K": rng.integers(0, 256, (5, 2 * 210), dtype=np.uint8),
    }
    for row in blocks["Q4_K"].reshape(-1, 144):
        row[:4] = np.array([0.01, 0.02], np.float16).view(np.uint8)
    for row in blocks["Q6_K"].reshape(-1, 210):
        row[208:] = np.array([0.01], np.float16).view(np.uint8)
    for kind, data in blocks.items():
        writer.add_tensor(kind, data, raw_dtype=KINDS[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = open_gguf(tmp_path / "k.gguf")
    for kind, by_hand in (("Q4_K", _q4_k), ("Q6_K", _q6_k)):
        assert file.tensors[kind].shape == (5, 512)
        size = len(blocks[kind][0]) // 2
        want = [by_hand(b) for b in blocks[kind].reshape(-1, size)]
        np.testing.assert_allclose(
            file.tensors[kind].rows(1, 4), np.reshape(want, (5, 512))[1:4], rtol=1e-6, atol=1e-6
        )


def _q4_k(block):
    d, least = (float(x) for x in block[:4].view(np.float16))
    scales, nibbles = block[4:16].astype(int), block[16:].astype(int)
    out = []
    for j in range(8):
        if j < 4:
            sc, m = scales[j] & 63, scales[j + 4] & 63
        else:
            sc = (scales[j + 4] & 15) | ((scales[j - 4] >> 6) << 4)
            m = (scales[j + 4] >> 4) | ((scales[j] >> 6) << 4)
        part = nibbles[32 * (j // 2) : 32 * (j // 2) + 32]
        out += [d * sc * (n >> 4 if j % 2 else n & 15) - least * m for n in part]
    return out


def _q6_k(block):
    low, high = block[:128].astype(int), block[128:192].astype(int)
    scales, d = block[192:208].view(np.int8).astype(int), float(block[208:].view(np.float16)[0])
    out = np.zeros(256)
    for half in range(2):
        for i in range(32):
            a, b, h = low[64 * half + i], low[64 * half + 32 + i], high[32 * half + i]
            quads = [a & 15 | (h & 3) << 4, b & 15 | (h >> 2 & 3) << 4]
            quads += [a >> 4 | (h >> 4 & 3) << 4, b >> 4 | (h >> 6) << 4]
            for k, q in enumerate(quads):
                scale = scales[8 * half + 2 * k + i // 16]
                out[128 * half + 32 * k + i] = d * scale * (q - 32)
    return out


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("gguf") / "good.gguf", torch_model("llama2"))


def test_truncated_files(good, tmp_path):
    data = good.read_bytes()
    for keep in (3, 4, 8, 20, 300, len(data) // 3, len(data) // 2, len(data) - 100):
        path = tmp_path / f"{keep}.gguf"
        path.write_bytes(data[:keep])
        with pytest.raises(InputError, match=r"truncated or damaged|not a GGUF"):
            load(path)


def test_damaged_files(good, tmp_path):
    data = bytearray(good.read_bytes())
    path = tmp_path / "m.gguf"
    path.write_bytes(b"PK\x03\x04" + data[4:])
    with pytest.raises(InputError, match="not a GGUF file"):
        load(path)
    for at in (4, 8, 16, 24):  # version, number of tensors, number of keys, length of the first
        path.write_bytes(data[:at] + b"\xff\xff\xff\x7f" + data[at + 4 :])
        with pytest.raises(InputError, match="damaged"):
            load(path)


def test_what_does_not_belong(tmp_path):
    model, path = torch_model("llama2"), tmp_path / "m.gguf"
    with pytest.raises(InputError, match=r"unknown architecture 'mamba' \(known: .*llama"):
        load(write_gguf(path, model, architecture="mamba"))
    tokens = {"tokenizer.ggml.tokens": words(61) + ["more", "words"]}
    with pytest.raises(InputError, match="the tokenizer has 63 ids, the model 61"):
        load(write_gguf(path, model, **tokens))
    with pytest.raises(InputError, match=r"tokenizer.ggml.pre='klingon' is not known here"):
        load(write_gguf(path, model, **{"tokenizer.ggml.pre": "klingon"}))
    with pytest.raises(InputError, match="tokenizer 'bert' is not supported"):
        load(write_gguf(path, model, **{"tokenizer.ggml.model": "bert"}))
    with pytest.raises(InputError, match="the id 99 of a mark"):
        load(write_gguf(path, model, **{"tokenizer.ggml.eos_token_id": 99}))
    with pytest.raises(InputError, match=r"num_hidden_layers is missing"):
        load(write_gguf(path, model, block_count=None))
    with pytest.raises(InputError, match=r"no part of this model: blk\.2\.") as e:
        load(write_gguf(path, model, block_count=2))
    assert "(9 in all)" in str(e.value)
    with pytest.raises(InputError, match=r"shapes that differ .*mlp/gate/kernel \(32, 48\), exp"):
        load(write_gguf(path, model, feed_forward_length=40))
    with pytest.raises(InputError, match="rope scaling 'longrope' is not supported"):
        load(write_gguf(path, model, **{"rope.scaling.type": "longrope"}))
    with pytest.raises(InputError, match="makes no model: kv_heads must divide heads"):
        load(write_gguf(path, model, **{"attention.head_count_kv": 3}))
