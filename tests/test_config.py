"""Config files, overrides, help and JSON."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from causal_jax import config
from causal_jax.attention import Dense
from causal_jax.data import Text
from causal_jax.errors import InputError
from causal_jax.models.decoder import Decoder
from causal_jax.positions import Linear
from causal_jax.training.optimizer import SGD, AdamW, Muon, Schedule
from causal_jax.training.recipe import Recipe, Sample


@dataclasses.dataclass(frozen=True)
class Inner:
    """The inner part.

    Attributes:
        size: how large. low, high: the range, in metres.
    """

    size: int = 3
    low: float = 0.0
    high: float = 1.0
    name: str = "x"  # what it is called

    def __post_init__(self):
        if self.low > self.high:
            raise ValueError(f"low must not exceed high, got {self.low} > {self.high}")


@dataclasses.dataclass(frozen=True)
class Outer:
    """The whole."""

    inner: Inner = Inner()
    maybe: Inner | None = None
    parts: tuple[Inner, ...] = (Inner(), Inner(size=4))
    numbers: tuple[int, ...] = (1, 2)
    pair: tuple[float, str] = (0.5, "a")
    kind: Literal["a", "b"] = "a"
    flag: bool = False
    limit: int | None = 7
    free: Any = None


CASES = {
    "space": (["--config.inner.size", "5"], lambda c: c.inner.size == 5),
    "equals": (["--config.inner.size=5"], lambda c: c.inner.size == 5),
    "negative": (["--config.inner.low", "-2.5"], lambda c: c.inner.low == -2.5),
    "two of one dataclass": (
        ["--config.inner.low", "5", "--config.inner.high", "9"],
        lambda c: (c.inner.low, c.inner.high) == (5.0, 9.0),
    ),
    "tuple member": (["--config.parts.1.size", "9"], lambda c: [p.size for p in c.parts] == [3, 9]),
    "tuple by words": (["--config.numbers", "4", "5", "6"], lambda c: c.numbers == (4, 5, 6)),
    "tuple by commas": (["--config.numbers=4,5,6"], lambda c: c.numbers == (4, 5, 6)),
    "empty tuple": (["--config.numbers"], lambda c: c.numbers == ()),
    "mixed tuple": (["--config.pair", "0.25", "b"], lambda c: c.pair == (0.25, "b")),
    "literal": (["--config.kind", "b"], lambda c: c.kind == "b"),
    "bool": (["--config.flag", "True"], lambda c: c.flag is True),
    "bare bool": (["--config.flag"], lambda c: c.flag is True),
    "none": (["--config.limit", "none"], lambda c: c.limit is None),
    "into none": (["--config.maybe.size", "8"], lambda c: c.maybe == Inner(size=8)),
    "text with dashes": (["--config.inner.name=--x y"], lambda c: c.inner.name == "--x y"),
    "empty text": (["--config.inner.name="], lambda c: c.inner.name == ""),
    "last one counts": (["--config.limit=1", "--config.limit=2"], lambda c: c.limit == 2),
}


@pytest.mark.parametrize("case", CASES, ids=[c.replace(" ", "-") for c in CASES])
def test_an_override_changes_its_field_and_nothing_else(case):
    words, holds = CASES[case]
    before = Outer()
    after = config.override(before, words)
    assert holds(after)
    assert before == Outer()
    changed = {f.split(".")[0] for f, *_ in config.differences(_json(before), _json(after))}
    assert changed == {words[0].split(".")[1].split("=")[0]}


def _json(cfg):
    return {k: v for k, v in config.to_json(cfg).items() if k != "type"}


REFUSED = {
    "unknown field": (["--config.inner.siz", "5"], "config.inner.siz", "config.inner.size"),
    "elsewhere": (["--config.high", "5"], "config.high", "config.inner.high"),
    "not an int": (["--config.inner.size", "many"], "config.inner.size", "'many'", "int"),
    "float for int": (["--config.inner.size", "1.5"], "config.inner.size", "'1.5'"),
    "not a choice": (["--config.kind", "c"], "config.kind", "'c'", "'a'"),
    "no value": (["--config.inner.size"], "config.inner.size", "int"),
    "too many values": (["--config.inner.size", "1", "2"], "config.inner.size", "1 2"),
    "not a bool": (["--config.flag", "maybe"], "config.flag", "maybe"),
    "below a number": (["--config.limit.x", "1"], "config.limit", "x"),
    "tuple index": (["--config.parts.2.size", "1"], "config.parts.2"),
    "two refused together": (["--config.inner.low", "3"], "config.inner.low = 3.0", "3.0 > 1.0"),
    "double dot": (["--config.inner..size", "1"], "missing between the dots"),
}


@pytest.mark.parametrize("case", REFUSED, ids=[c.replace(" ", "-") for c in REFUSED])
def test_a_bad_override_is_refused_by_field_and_value(case):
    words, *parts = REFUSED[case]
    with pytest.raises(InputError) as e:
        config.override(Outer(), words)
    for part in parts:
        assert part in str(e.value)
    assert "─" not in str(e.value)
    assert "---" not in str(e.value)


def test_variants_by_name():
    recipe = Recipe(model=Decoder())
    changed = config.override(recipe, ["--config.optimizer", "muon", "--config.optimizer.lr=0.01"])
    assert changed.optimizer == Muon(lr=0.01)
    assert config.override(recipe, ["--config.optimizer=sgd"]).optimizer == SGD()
    changed = config.override(recipe, ["--config.model.attention.0.window", "64"])
    assert changed.model.attention == (Dense(window=64),)
    assert config.override(recipe, ["--config.sample.prompt", "Hi"]).sample == Sample(prompt="Hi")
    assert config.override(recipe, ["--config.sample", "sample"]).sample == Sample()
    assert config.override(recipe, ["--config.model.rotary", "None"]).model.rotary is None
    changed = config.override(recipe, ["--config.model.attention", "dense", "dense"])
    assert changed.model.attention == (Dense(), Dense())
    changed = config.override(
        recipe, ["--config.data.source=text", "--config.data.source.path=a.txt"]
    )
    assert changed.data.source == Text(path="a.txt")
    scaling = ["--config.model.rotary.scaling", "linear", "--config.model.rotary.scaling.factor=4"]
    assert config.override(recipe, scaling).model.rotary.scaling == Linear(factor=4.0)
    with pytest.raises(InputError, match=r"scaling = 'linear' also needs .*scaling.factor"):
        config.override(recipe, scaling[:2])
    with pytest.raises(
        InputError, match=r"no field 'factor'; name a variant first: linear, llama3"
    ):
        config.override(recipe, scaling[2:])
    with pytest.raises(InputError, match=r"a Data has no variants; set its fields"):
        config.override(recipe, ["--config.data", "x"])
    with pytest.raises(InputError, match=r"config.optimizer = 'moon'.*did you mean 'muon'"):
        config.override(recipe, ["--config.optimizer", "moon"])
    with pytest.raises(InputError, match=r"config.optimizer.momentum.*AdamW"):
        config.override(recipe, ["--config.optimizer.momentum", "0.5"])


def _file(tmp_path: Path, text: str) -> str:
    path = tmp_path / "one.py"
    path.write_text(text)
    return str(path)


GOOD = """
import dataclasses

@dataclasses.dataclass(frozen=True)
class Mine:
    a: int = 1
    b: str = "x"

def get_config(arg="plain"):
    if arg not in ("plain", "smoke"):
        raise ValueError(f"no such mode {arg!r}; plain or smoke")
    return Mine(a=1 if arg == "plain" else 2)
"""


def test_load_a_file_with_and_without_argument(tmp_path):
    path = _file(tmp_path, GOOD)
    assert config.load(path).a == 1
    assert config.load(f"{path}:smoke").a == 2
    assert config.load(f"{path}:smoke", ["--config.b", "y"]).b == "y"
    assert config.name_of(f"{path}:smoke,x=1") == "one-smoke-x=1"
    with pytest.raises(InputError, match="no such mode 'fast'"):
        config.load(f"{path}:fast")


def test_a_run_folder_is_a_config(tmp_path):
    cfg = config.load(_file(tmp_path, GOOD) + ":smoke")
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps(config.to_json(cfg)))
    assert config.load(str(run)) == cfg
    assert config.load(str(run), ["--config.a", "5"]).a == 5
    # a class of the config file is found again by another process
    code = f"from causal_jax import config; print(config.load({str(run)!r}).a)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "2"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "defines no function get_config"),
        ("def get_config():\n    return 3", "returned int"),
        ("def get_config(:", "line 1: SyntaxError"),
        ("import nothing_of_that_name", "line 1: ModuleNotFoundError"),
        ("\n\nx = 1 / 0\n", "line 3: ZeroDivisionError"),
        ("def get_config():\n    return {}['a']", "get_config failed: KeyError"),
    ],
)
def test_a_config_file_that_does_not_work(tmp_path, text, message):
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        config.load(_file(tmp_path, text))


def test_a_config_that_is_not_there(tmp_path):
    path = _file(tmp_path, "def get_config():\n    return 1")
    with pytest.raises(InputError, match=r"no such file; did you mean .*one\.py"):
        config.load(path.replace("one.py", "onee.py"))
    with pytest.raises(InputError, match="takes no argument"):
        config.load(path + ":smoke")
    with pytest.raises(InputError, match=r"no config\.json"):
        config.load(str(tmp_path))
    (tmp_path / "config.json").write_text('{"type": ')
    with pytest.raises(InputError, match="not readable as JSON"):
        config.load(str(tmp_path))


def test_words_of_the_command_line_are_sorted():
    words = ["--config", "f.py:x", "--config.a", "1", "2", "--flag", "v", "--config.b=3"]
    assert config.take_words(words) == (
        "f.py:x",
        ["--config.a", "1", "2", "--config.b=3"],
        ["--flag", "v"],
    )
    assert config.take_words(["--config=f.py"])[0] == "f.py"
    with pytest.raises(InputError, match="--config needs a value"):
        config.take_words(["--config", "--config.a", "1"])


def test_help_names_every_field_with_value_and_meaning():
    text = config.help_text(Outer())
    assert "--config.inner.size int = 3\n        how large." in text
    assert "--config.inner.high float = 1.0\n        the range, in metres." in text
    assert "--config.inner.name str = 'x'\n        what it is called" in text
    assert "--config.parts.1.size int = 4" in text
    assert "--config.kind {a,b} = 'a'" in text
    text = config.help_text(Recipe(model=Decoder()))
    assert "--config.optimizer: AdamW [adamw | muon | sgd]" in text
    for path, *_ in config.fields(Recipe(model=Decoder())):
        assert f"--config.{path}" in text
    undocumented = [
        line
        for line, below in zip(text.splitlines(), text.splitlines()[1:])
        if line.startswith("  --config.") and not below.startswith("        ")
    ]
    others = ("  --config.model.", "  --config.data.")
    assert not [line for line in undocumented if not line.startswith(others)]


@given(
    st.builds(
        Outer,
        inner=st.builds(
            Inner,
            size=st.integers(),
            low=st.floats(max_value=0.0),
            high=st.floats(min_value=0.0),
            name=st.text(),
        ),
        maybe=st.none() | st.just(Inner()),
        numbers=st.lists(st.integers(), max_size=3).map(tuple),
        flag=st.booleans(),
        limit=st.none() | st.integers(),
        free=st.none() | st.just(Schedule()) | st.dictionaries(st.text(), st.integers()),
    )
)
def test_json_is_exact(cfg):
    text = json.dumps(config.to_json(cfg))
    back = config.from_json(json.loads(text))
    assert back == cfg
    assert config.fingerprint(back) == config.fingerprint(cfg)


def test_json_keeps_types_and_specials():
    recipe = Recipe(
        model=Decoder(attention=(Dense(), Dense(window=3))),
        optimizer=AdamW(lr=1.0),
        sample=Sample(),
    )
    assert config.from_json(json.loads(json.dumps(config.to_json(recipe)))) == recipe
    for value in (math.inf, -math.inf, Path("a/b"), len, (1, (2.0, None)), True):
        back = config.from_json(json.loads(json.dumps(config.to_json(value))))
        assert back == value
        assert type(back) is type(value)
    assert math.isnan(config.from_json(config.to_json(math.nan)))


def test_json_refuses_what_it_cannot_hold():
    with pytest.raises(InputError, match=r"config.free is a object"):
        config.to_json(Outer(free=object()))
    with pytest.raises(InputError, match=r"config.free: .*lambda.* no importable name"):
        config.to_json(Outer(free=lambda: 0))
    good = config.to_json(Outer())
    with pytest.raises(InputError, match=r"unknown field config.limi of .*did you mean limit"):
        config.from_json(good | {"limi": 3})
    with pytest.raises(InputError, match="cannot be imported"):
        config.from_json(good | {"type": "causal_jax.nowhere:Outer"})
    with pytest.raises(InputError, match="not a dataclass"):
        config.from_json({"type": "os:getcwd"})
    with pytest.raises(InputError, match=r"config.inner: low must not exceed"):
        config.from_json(good | {"inner": good["inner"] | {"low": 5.0}})


def test_missing_fields_take_their_defaults():
    old = config.to_json(Outer(limit=3))
    del old["kind"]
    assert config.from_json(old) == Outer(limit=3)


def test_fingerprint_is_the_same_in_another_process():
    code = (
        "from causal_jax import config; from causal_jax.models.decoder import Decoder;"
        "print(config.fingerprint(Decoder(layers=3)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == config.fingerprint(Decoder(layers=3))
    assert config.fingerprint(Decoder(layers=3)) != config.fingerprint(Decoder(layers=4))


def test_differences_name_the_path():
    a, b = config.to_json(Outer()), config.to_json(Outer(inner=Inner(size=4), numbers=(1, 3)))
    assert config.differences(a, b) == [("inner.size", 3, 4), ("numbers.1", 2, 3)]
