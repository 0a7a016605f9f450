"""Sources: real builders, real files, the exact held-out part, and what is said of bad input."""

import importlib.util
import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from causal_jax.data.sources import Code, Corpus, Source, Synthetic, Text, Tfds, hold_out, sources
from causal_jax.data.sources.corpus import chapters
from causal_jax.data.tasks.needle import Needle
from causal_jax.errors import InputError


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("CAUSAL_JAX_CACHE", str(folder))
        yield folder


def test_every_kind_is_registered_and_has_defaults():
    assert set(sources.names()) >= {"code", "corpus", "task", "text", "tfds"}
    for name in sources.names():
        assert isinstance(sources[name](), Source)


# --- held out ---------------------------------------------------------------------------------


@given(
    texts=st.lists(st.text(alphabet="ab\né🙂", max_size=30), max_size=8),
    fraction=st.floats(0, 0.95),
)
def test_hold_out_cuts_the_last_part_at_a_line_end(texts, fraction):
    train, held = hold_out(texts, fraction)
    whole = "".join(texts)
    assert "".join(train) + "".join(held) == whole
    assert all(train) and all(held)  # noqa: PT018
    size = len(whole.encode())
    wanted = size - int(size * fraction)
    got = len("".join(train).encode())
    # The cut is at `wanted`, or behind it by the rest of a line or of a character.
    assert got >= min(wanted, size)
    rest = "".join(train).encode()[wanted:]
    assert b"\n" not in rest[:-1]
    if fraction == 0:
        assert held == []


def test_hold_out_divides_one_document():
    train, held = hold_out(["a" * 49 + "\n", "b" * 38 + "\n" + "c" * 10 + "\n"], 0.12)
    assert train == ["a" * 49 + "\n", "b" * 38 + "\n"]
    assert held == ["c" * 10 + "\n"]
    assert hold_out(["x" * 100], 0.1) == (["x" * 90], ["x" * 10])  # no line to end


# --- embedded texts ---------------------------------------------------------------------------


def test_corpus_is_a_real_builder_in_array_record(cache):
    import tensorflow_datasets as tfds

    builder = Corpus().builder()
    assert isinstance(builder, tfds.core.DatasetBuilder)
    assert builder.info.file_format.value == "array_record"
    assert builder.data_path.is_relative_to(cache)
    again = tfds.builder("language_reference", data_dir=builder.data_path.parent.parent)
    assert again.as_data_source(split="train")[0]["title"] == b'The "assert" statement'


def test_corpus_holds_out_its_last_tenth():
    train, held = (Corpus().documents(split) for split in ("train", "validation"))
    whole = "".join(chapters())
    assert "".join(train) + "".join(held) == whole
    size = len(whole.encode())
    assert 400_000 < size < 1_000_000
    assert 0.098 < len("".join(held).encode()) / size <= 0.1
    assert train[0].startswith('The "assert" statement')
    assert list(train[1:3]) == [train[1], train[2]]
    assert train[-1] == list(train)[-1]
    with pytest.raises(IndexError):
        train[len(train)]


def test_corpus_can_hold_out_nothing():
    assert list(Corpus(held_out=0.0).documents("validation")) == []
    assert "".join(Corpus(held_out=0.0).documents("train")) == "".join(chapters())


def test_code_is_bounded_and_always_the_same():
    code = Code(megabytes=0.2)
    train, held = (list(code.documents(split)) for split in ("train", "validation"))
    size = len("".join(train + held).encode())
    assert 0.15e6 < size <= 0.2e6
    assert 0.05 < len("".join(held).encode()) / size <= 0.1
    assert code.fingerprint() == Code(megabytes=0.2).fingerprint()
    assert code.fingerprint() != Code(megabytes=0.1).fingerprint()
    assert any("import " in text for text in train)


def test_tensorflow_stays_out(cache):
    code = (
        "import sys; from causal_jax.data import Corpus, Data;"
        "p = Data(source=Corpus(held_out=0.2), context=32).prepare(process=(0, 1));"
        "next(iter(p.train)); len(p.validation());"
        "print('tensorflow' in sys.modules, 'torch' in sys.modules)"
    )
    env = {"CAUSAL_JAX_CACHE": str(cache), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "False False\n"  # and nothing else is printed


# --- tensorflow-datasets by name ----------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(cache):
    path = Corpus().builder().data_path
    return str(path.parent.parent)


def test_tfds_reads_a_prepared_set_by_name(prepared):
    named = Tfds(name="language_reference", data_dir=prepared)
    assert list(named.documents("train")) == list(Corpus().documents("train"))
    part = Tfds(name="language_reference", data_dir=prepared, train="train[:50%]")
    assert len(part.documents("train")) < len(named.documents("train"))
    assert named.fingerprint() == Tfds(name="language_reference", data_dir=prepared).fingerprint()
    assert named.fingerprint() != part.fingerprint()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": ""}, "Tfds.name is empty"),
        ({"name": "tiny_shakespear"}, "did you mean 'tiny_shakespeare'"),
        ({"field": "txt"}, "Tfds.field is 'txt'; language_reference has: .*text"),
        ({"train": "trian"}, "Tfds.train is 'trian'; .* has the splits: .*train"),
        ({"train": "train[:x%]"}, r"Tfds.train is 'train\[:x%\]'"),
    ],
)
def test_tfds_says_what_is_wrong(prepared, fields, message):
    with pytest.raises(InputError, match=message):
        Tfds(**{"name": "language_reference", "data_dir": prepared} | fields).documents("train")


def test_tfds_that_cannot_be_downloaded_says_so(tmp_path):
    # In a process of its own whose network leads nowhere, whatever the machine has.
    code = (
        "import sys; from causal_jax.data import Tfds\n"
        "from causal_jax.errors import InputError\n"
        "try: Tfds(name='tiny_shakespeare', data_dir=sys.argv[1]).documents('train')\n"
        "except InputError as e: print(e)"
    )
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTPS_PROXY"), "http://127.0.0.1:9")
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        env=nowhere | {"JAX_PLATFORMS": "cpu"},
    )
    if importlib.util.find_spec("importlib_resources"):
        assert "is not prepared under" in done.stdout, done.stderr
        assert "ProxyError" in done.stdout
        assert "Tfds.data_dir" in done.stdout
    else:  # which tensorflow-datasets 4.9 needs for it, and does not declare
        assert "needs the package importlib_resources to prepare it" in done.stdout


# --- your own text ------------------------------------------------------------------------------


def write(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def test_text_reads_a_file_as_it_stands(tmp_path):
    write(tmp_path, {"a.txt": "one\r\ntwo\u2028é\n"})
    assert Text(path=str(tmp_path / "a.txt"), held_out=0.0).documents("train") == [
        "one\r\ntwo\u2028é\n"
    ]


def test_text_reads_a_folder_in_the_order_of_its_paths(tmp_path):
    files = {
        "b/2.txt": "B",
        "a.txt": "A",
        "c.md": "C",
        ".hidden/x.txt": "X",
        "d.jsonl": '{"text": "D"}\n',
    }
    folder = str(write(tmp_path, files))
    assert Text(path=folder, held_out=0.0).documents("train") == ["A", "B", "C", "D"]
    assert Text(path=folder, held_out=0.0, pattern="*.txt").documents("train") == ["A", "B"]
    assert Text(path=folder + "/**/*.txt", held_out=0.0).documents("train") == ["A", "B"]


def test_json_lines_take_their_field(tmp_path):
    lines = [{"body": "one\u2028\n", "id": 1}, {"body": "two"}, {"body": ""}]
    content = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n\n"
    path = write(tmp_path, {"x.jsonl": content}) / "x.jsonl"
    text = Text(path=str(path), field="body", held_out=0.0)
    assert text.documents("train") == ["one\u2028\n", "two"]


def test_text_takes_its_validation_from_a_path_of_its_own(tmp_path):
    folder = write(tmp_path, {"train.txt": "A" * 50, "held.txt": "B" * 50})
    text = Text(path=str(folder / "train.txt"), validation=str(folder / "held.txt"))
    assert text.documents("train") == ["A" * 50]
    assert text.documents("validation") == ["B" * 50]


def test_the_fingerprint_follows_the_content(tmp_path):
    path = write(tmp_path, {"a.txt": "0123456789" * 5}) / "a.txt"
    text = Text(path=str(path))
    before = text.fingerprint()
    assert text.fingerprint() == before
    assert Text(path=str(path), held_out=0.2).fingerprint() != before
    path.write_text("0123456789" * 4 + "012345678X")
    assert text.fingerprint() != before


BAD_TEXT = {
    "missing": ({}, {"path": "no.txt"}, "there is no such file or folder"),
    "no path": ({}, {"path": None}, "Text.path is empty"),
    "empty file": ({"a.txt": ""}, {"path": "a.txt"}, "the file is empty"),
    "all empty": ({"a": "", "b": ""}, {"path": "."}, "all 2 files are empty"),
    "no file": ({".a": "x"}, {"path": "."}, r"no file '\*' in that folder"),
    "no match": ({"a": "x"}, {"path": "*.md"}, "no file matches the pattern"),
    "not utf-8": ({"a.txt": b"abc\xff"}, {"path": "a.txt"}, r"a\.txt: .*byte 3 is 0xff"),
    "not json": ({"a.jsonl": '{"text": "x"}\nx'}, {"path": "a.jsonl"}, "line 2: not JSON"),
    "no field": (
        {"a.jsonl": '{"text": "x"}\n{"body": "y"}'},
        {"path": "a.jsonl"},
        r"line 2: no text under 'text' \(the line has: body\)",
    ),
    "no object": ({"a.jsonl": "[1]"}, {"path": "a.jsonl"}, "the line has: a list"),
    "no text": ({"a.jsonl": '{"text": 3}'}, {"path": "a.jsonl"}, "line 1: no text under 'text'"),
}


@pytest.mark.parametrize("case", BAD_TEXT)
def test_text_says_what_is_wrong(case, tmp_path):
    files, fields, message = BAD_TEXT[case]
    write(tmp_path, files)
    path = "" if fields["path"] is None else str(tmp_path / fields["path"])
    with pytest.raises(InputError, match=message):
        Text(path=path).documents("train")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Text(held_out=1.0), "Text.held_out is 1.0; a fraction"),
        (lambda: Text(held_out=0.2, validation="x"), "give one of them"),
        (lambda: Corpus(held_out=-0.1), "Corpus.held_out is -0.1"),
        (lambda: Code(megabytes=0.0), "Code.megabytes is 0.0"),
        (lambda: Synthetic(validation_rows=0), "Synthetic.validation_rows is 0"),
        (lambda: Corpus().documents("test"), "split is 'test'; one of train, validation"),
        (lambda: Synthetic(task=Needle()).documents("train"), "it has no text documents"),
    ],
)
def test_impossible_fields_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_a_missing_package_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(InputError, match=r'pip install "causal_jax\[data\]"'):
        Corpus().documents("train")
