"""Tokenizers of pretrained models: read from both kinds of file, equal to their makers' own."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pretrained_models import need_smollm2

from causal_jax.data import Data, Text, prepare
from causal_jax.data.tokenizers import Pretrained, PretrainedTokenizer, load_tokenizer
from causal_jax.data.tokenizers._gguf import gguf_tokenizer
from causal_jax.data.tokenizers.pretrained import read_tokenizer_json
from causal_jax.errors import InputError
from causal_jax.models.pretrained import resolve

TEXT = (
    "The import statement combines two operations; it searches for the named module, then binds "
    "the results. Größe, naïve, 数学は楽しい, 🙂🙃. 2024 and 31415926\r\n\tthe  the   the\n"
) * 20


@pytest.fixture(scope="module")
def smollm2():
    need_smollm2()
    return Pretrained("smollm2").train([])


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """(sentencepiece's own model, the metadata of a GGUF file with the same vocabulary)."""
    spm = pytest.importorskip("sentencepiece")
    stem = tmp_path_factory.mktemp("spm") / "m"
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.split("\n")), model_prefix=str(stem), vocab_size=420,
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, character_coverage=0.98, minloglevel=2,
    )  # fmt: skip
    model = spm.SentencePieceProcessor(model_file=str(stem) + ".model")
    size = range(model.get_piece_size())

    def kind(i):
        byte, control, unknown = model.is_byte(i), model.is_control(i), model.is_unknown(i)
        return 6 if byte else 3 if control else 2 if unknown else 1

    return model, {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [model.id_to_piece(i) for i in size],
        "tokenizer.ggml.scores": [model.get_score(i) for i in size],
        "tokenizer.ggml.token_type": [kind(i) for i in size],
        "tokenizer.ggml.bos_token_id": model.bos_id(),
        "tokenizer.ggml.eos_token_id": model.eos_id(),
        "tokenizer.ggml.unknown_token_id": model.unk_id(),
    }


def test_sentencepiece_from_gguf_equals_sentencepiece(pieces):
    theirs, metadata = pieces
    ours = gguf_tokenizer(metadata, "test")
    assert (ours.bos, ours.eos) == (theirs.bos_id(), theirs.eos_id())
    for text in (TEXT, "the results", " two  spaces", "", "x", "Größe 🙂 ₿", "a\n\nb", "<0x0A>"):
        ids = ours.encode(text)
        assert ids.tolist() == theirs.encode(text), text
        assert ours.decode(ids) == text
        stream = ours.decode_stream()
        assert "".join([stream.push(i) for i in ids] + [stream.flush()]) == text


def test_a_continuation_keeps_its_space(pieces):
    ours = gguf_tokenizer(pieces[1], "test")
    ids = ours.encode("the results").tolist()
    start = len(ours.encode("the"))
    stream = ours.decode_stream()
    for i in [ours.bos, *ids[:start]]:
        stream.push(i)
    assert "".join(stream.push(i) for i in ids[start:]) == " results"


def test_smollm2(smollm2):
    assert (smollm2.vocab, smollm2.bos, smollm2.eos) == (49152, None, 2)
    ids = smollm2.encode("The year 2024")
    # Digits stand alone, a word carries its space.
    assert [smollm2.decode([i]) for i in ids] == ["The", " year", " ", "2", "0", "2", "4"]
    assert smollm2.decode(smollm2.encode(TEXT)) == TEXT
    (many,) = smollm2.encode_documents([TEXT])
    np.testing.assert_array_equal(many, smollm2.encode(TEXT))


@given(text=st.text())
def test_text_comes_back_exactly_where_the_vocabulary_has_its_bytes(smollm2, text):
    known = {p for p in smollm2.pieces if len(p) == 1}
    assert 230 < len(known) < 256  # SmolLM2 cannot write every byte; what it cannot is left out
    if all(bytes([b]) in known for b in text.encode()):
        assert smollm2.decode(smollm2.encode(text)) == text


def test_marks_are_text_outside_a_chat(smollm2):
    ids = smollm2.encode("<|im_end|>")
    assert 2 not in ids
    assert smollm2.decode(ids) == "<|im_end|>"
    chat = smollm2.chat([{"role": "user", "content": "Hello <|im_end|>"}]).tolist()
    assert chat[:2] == [1, 9690]  # <|im_start|> system
    assert smollm2.decode(chat).endswith("user\nHello \nassistant\n")
    without = smollm2.chat([{"role": "user", "content": "Hello"}], reply=False)
    assert smollm2.decode(without).endswith("user\nHello\n")


def test_a_folder_keeps_everything(smollm2, tmp_path):
    smollm2.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert isinstance(again, PretrainedTokenizer)
    assert again.marks == smollm2.marks
    assert again.pieces == smollm2.pieces
    assert again.fingerprint() == smollm2.fingerprint()
    np.testing.assert_array_equal(again.encode(TEXT), smollm2.encode(TEXT))


def test_transformers_reads_what_is_exported(smollm2, pieces, tmp_path):
    transformers = pytest.importorskip("transformers")
    for name, ours in {"smollm2": smollm2, "spm": gguf_tokenizer(pieces[1], "test")}.items():
        folder = tmp_path / name
        folder.mkdir()
        ours.export(folder)
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        front = [] if ours.bos is None else [ours.bos]
        assert theirs(TEXT)["input_ids"] == [*front, *ours.encode(TEXT)]
        assert theirs.eos_token_id == ours.eos
        again = read_tokenizer_json(folder)
        assert (again.bos, again.eos, again.pieces) == (ours.bos, ours.eos, ours.pieces)
        assert again.chat_template == ours.chat_template
    chat = [{"role": "user", "content": "Hi"}]
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "smollm2")
    rendered = theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert rendered == smollm2.chat(chat).tolist()


def test_stops_and_marks_of_a_folder(smollm2, tmp_path):
    smollm2.export(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))
    assert read_tokenizer_json(tmp_path).stop_tokens == (2, 0)
    (tmp_path / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(InputError, match=r"tokenizer\.json cannot be read"):
        read_tokenizer_json(tmp_path)
    with pytest.raises(InputError, match=r"tokenizer\.json is missing"):
        read_tokenizer_json(tmp_path / "none")


def test_training_text_without_a_bos_has_eos_in_front(smollm2, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("The first line of a text that is long enough. " * 8)
    text, tokenizer = Text(str(path), held_out=0.0), Pretrained("smollm2")
    data = Data(source=text, tokenizer=tokenizer, context=16, batch=1, shuffle=False)
    prepared = prepare(data, tmp_path / "run")
    batch = next(iter(prepared.train))
    assert batch["tokens"][0, 0] == smollm2.eos
    first = smollm2.encode(path.read_text())[:15]
    np.testing.assert_array_equal(batch["tokens"][0, 1:], first)
    assert prepared.tokenizer.fingerprint() == smollm2.fingerprint()


def test_chats_that_cannot_be(pieces):
    with pytest.raises(InputError, match="no chat template"):
        gguf_tokenizer(pieces[1], "test").chat([{"role": "user", "content": "Hi"}])
    template = "{{ raise_exception('roles must alternate') }}"
    strict = gguf_tokenizer({**pieces[1], "tokenizer.chat_template": template}, "test")
    with pytest.raises(InputError, match="the chat template refuses: roles must alternate"):
        strict.chat([{"role": "user", "content": "Hi"}])


def test_smollm2_lies_in_a_wheel():
    need_smollm2()
    assert resolve("smollm2").name == "SmolLM2-135M-Instruct.Q4_1.gguf"
