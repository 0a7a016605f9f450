"""Tokenizers: every text comes back exactly, in whole characters, from a folder alone."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from causal_jax.data.tokenizers import BPE, Bytes, Ids, load_tokenizer, tokenizers
from causal_jax.errors import InputError

TEXT = (
    "The import statement combines two operations; it searches for the named module, then it "
    "binds the results. Größe, naïve, 数学は楽しい, 🙂🙃. <|eos|> </s> \r\n\tthe the the\n"
) * 30

KINDS = {"byte": Bytes(), "bpe": BPE(vocab=320)}
TRAINED = {name: spec.train([TEXT]) for name, spec in KINDS.items()}


@pytest.fixture(params=KINDS)
def tokenizer(request):
    return TRAINED[request.param]


def test_every_kind_is_registered():
    assert {"byte", "bpe", "ids"} <= set(tokenizers.names())
    assert tokenizers["bpe"] is BPE


@pytest.mark.parametrize("name", KINDS)
@given(text=st.text())
def test_any_text_comes_back_exactly(name, text):
    tokenizer = TRAINED[name]
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert tokenizer.decode(ids) == text
    assert tokenizer.piece_bytes()[ids].sum() == len(text.encode())
    (many,) = tokenizer.encode_documents([text])
    np.testing.assert_array_equal(many, ids)


@pytest.mark.parametrize("name", KINDS)
@given(ids=st.lists(st.integers(0, 257)))
def test_streaming_gives_the_same_text_for_any_ids(name, ids):
    tokenizer = TRAINED[name]
    stream = tokenizer.decode_stream()
    assert "".join([stream.push(i) for i in ids] + [stream.flush()]) == tokenizer.decode(ids)


@pytest.mark.parametrize("name", KINDS)
@given(text=st.text(alphabet="aé数🙂\u200d\n"))
def test_streaming_never_shows_a_broken_character(name, text):
    tokenizer = TRAINED[name]
    stream, shown = tokenizer.decode_stream(), ""
    for i in tokenizer.encode(text):
        shown += stream.push(int(i))
        assert text.startswith(shown)
    assert shown == text
    assert stream.flush() == ""


def test_bytes_that_are_no_character_are_replaced_when_known():
    stream = TRAINED["byte"].decode_stream()
    assert stream.push(0xE2) == ""  # may still become a character
    assert stream.push(0x41) == "\ufffdA"
    assert stream.push(0xF0) == ""
    assert stream.flush() == "\ufffd"
    assert stream.push(0x41) == "A"  # ready again


def test_marks_are_ids_and_never_text(tokenizer):
    assert {tokenizer.bos, tokenizer.eos} == {tokenizer.vocab - 2, tokenizer.vocab - 1}
    for look_alike in ("<|eos|>", "</s>", "<|bos|>", "[UNK]", "<unk>"):
        ids = tokenizer.encode(look_alike)
        assert not {tokenizer.bos, tokenizer.eos} & set(ids.tolist())
        assert tokenizer.decode(ids) == look_alike
    assert tokenizer.decode([tokenizer.bos, *tokenizer.encode("a"), tokenizer.eos]) == "a"


def test_a_folder_alone_gives_the_tokenizer_back(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer")
    again = load_tokenizer(tmp_path / "tokenizer")
    assert again.fingerprint() == tokenizer.fingerprint()
    assert again.spec() == tokenizer.spec()
    assert (again.bos, again.eos, again.vocab) == (tokenizer.bos, tokenizer.eos, tokenizer.vocab)
    np.testing.assert_array_equal(again.encode(TEXT), tokenizer.encode(TEXT))


def test_a_damaged_or_missing_tokenizer_is_an_input_error(tokenizer, tmp_path):
    with pytest.raises(InputError, match=r"no tokenizer in .*tokenizer\.json is missing"):
        load_tokenizer(tmp_path)
    tokenizer.save(tmp_path)
    whole = (tmp_path / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="is not a saved tokenizer"):
        load_tokenizer(tmp_path)
    other = whole.replace(tokenizer.fingerprint(), "0" * 64)
    (tmp_path / "tokenizer.json").write_text(other)
    with pytest.raises(InputError, match="does not match its own fingerprint"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text(whole.replace('"kind": "b', '"kind": "x'))
    with pytest.raises(InputError, match="unknown tokenizer 'x"):
        load_tokenizer(tmp_path)


def test_a_bpe_file_without_its_model_is_an_input_error(tmp_path):
    TRAINED["bpe"].save(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(path.read_text().replace('"model": {', '"mode": {', 1))
    with pytest.raises(InputError, match="is damaged"):
        load_tokenizer(tmp_path)


def test_bpe_learns_what_is_frequent_and_keeps_to_its_size():
    tokenizer = TRAINED["bpe"]
    assert tokenizer.vocab == 320
    assert b" the" in tokenizer.pieces
    assert len(tokenizer.encode(TEXT)) < len(TEXT.encode()) / 2
    small = BPE(vocab=1000).train(["abab"])
    assert small.vocab < 270  # a small text has few pairs to merge


def test_bpe_training_is_the_same_in_every_process():
    code = (
        "import sys; from causal_jax.data.tokenizers import BPE;"
        "print(BPE(vocab=700).train([sys.argv[1], sys.argv[1][::-1]]).fingerprint())"
    )
    prints = {
        subprocess.run(
            [sys.executable, "-c", code, TEXT[:2000]],
            env={
                "PYTHONHASHSEED": seed,
                "TOKENIZERS_PARALLELISM": parallel,
                "JAX_PLATFORMS": "cpu",
            },
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed, parallel in (("1", "true"), ("2", "true"), ("3", "false"))
    }
    assert len(prints) == 1
    here = BPE(vocab=700).train([TEXT[:2000], TEXT[:2000][::-1]])
    assert prints == {here.fingerprint() + "\n"}


def test_fingerprints_tell_tokenizers_apart():
    other = BPE(vocab=320).train([TEXT.upper()])
    assert len({t.fingerprint() for t in (*TRAINED.values(), other)}) == 3


def test_text_without_utf8_is_refused_with_its_place(tokenizer):
    with pytest.raises(InputError, match=r"character 2 is the lone surrogate U\+D800"):
        tokenizer.encode("ab\ud800")
    with pytest.raises(InputError, match="lone surrogate"):
        BPE().train(["\udfff"])


def test_bpe_without_its_package_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(InputError, match=r'pip install "causal_jax\[data\]"'):
        BPE().train(["a"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BPE(vocab=257), "BPE.vocab is 257; at least 258"),
        (lambda: BPE(min_count=0), "BPE.min_count is 0"),
        (lambda: Ids(vocab=0), "Ids.vocab is 0"),
    ],
)
def test_impossible_sizes_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_ids_are_numbers_in_text(tmp_path):
    tokenizer = Ids(20).train([])
    np.testing.assert_array_equal(tokenizer.encode(" 3 17\n5"), [3, 17, 5])
    assert tokenizer.decode([3, 17, 5]) == "3 17 5 "
    assert tokenizer.bos is tokenizer.eos is None
    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path).vocab == 20
    for word in ("20", "-1", "x"):
        with pytest.raises(InputError, match="is no id of this model; write numbers from 0 to 19"):
            tokenizer.encode(f"1 {word}")
