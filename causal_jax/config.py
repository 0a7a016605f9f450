"""A config is a frozen dataclass in a Python file: load it, change single fields, write it as JSON.

    load("configs/quickstart.py:smoke", ["--config.steps", "10", "--config.optimizer.lr=1e-3"])

A config file defines `get_config()` or `get_config(arg)` and returns a frozen dataclass, usually a
`causal_jax.training.recipe.Recipe`. What follows the colon is handed to it (usual: a smoke mode).
A run folder is a config too: its `config.json` is read back.

Overrides are dotted: every field of every nested dataclass can be set, tuples by index
(`--config.model.attention.0.window 64`). A field that holds a registered variant takes the name of
another (`--config.optimizer muon`) and starts from that one's defaults. All changes to a dataclass
are made at once, so fields that only make sense together can be changed together. tyro parses each
value from its field's annotation; finding the field is done here, so that a mistake is
reported with the nearest field and `None` or a variant needs no sub-command.
"""

import contextlib
import dataclasses
import difflib
import inspect
import io
import json
import re
import sys
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from causal_jax.errors import InputError
from causal_jax.registry import Registry
from causal_jax.typed_json import (
    differences,
    fingerprint,
    from_json,
    import_file,
    is_config,
    short,
    to_json,
)

__all__ = [
    "differences",
    "fields",
    "fingerprint",
    "from_json",
    "help_text",
    "load",
    "name_of",
    "override",
    "take_words",
    "to_json",
]


def load(spec: str, overrides: Sequence[str] = (), *, prefix: str = "config") -> Any:
    """Read a config file (or a run folder) and apply command-line overrides.

    Args:
        spec: `path/to/file.py`, `path/to/file.py:arg`, or a folder that holds `config.json`.
        overrides: command-line words such as `["--config.steps", "10", "--config.a.b=2"]`.
        prefix: the word in front of the first dot.

    Returns:
        The frozen dataclass, with the overrides applied.

    Raises:
        InputError: no such file, no `get_config`, an unknown field (with the nearest one), a value
            that does not fit its field.
    """
    cfg = _load_folder(Path(spec)) if Path(spec).is_dir() else _load_file(spec)
    return override(cfg, overrides, prefix=prefix)


def name_of(spec: str) -> str:
    """A short name for a config: `configs/quickstart.py:smoke` is `quickstart-smoke`."""
    path, arg = _split(spec)
    return re.sub(r"[^\w.=-]+", "-", path.stem + (f"-{arg}" if arg else ""))


def take_words(
    argv: Sequence[str], prefix: str = "config"
) -> tuple[str | None, list[str], list[str]]:
    """Sort command-line words into the config's address, its overrides, and everything else.

    Returns:
        (the value of `--config` or None, the words of `--config.a.b ...`, the remaining words).
    """
    spec, mine, rest, target = None, [], [], None
    for i, word in enumerate(argv):
        if word == f"--{prefix}":
            if i + 1 == len(argv) or argv[i + 1].startswith("--"):
                raise InputError(f"--{prefix} needs a value: a config file or a run folder")
            target = "spec"
        elif word.startswith(f"--{prefix}="):
            spec, target = word.split("=", 1)[1], None
        elif word.startswith(f"--{prefix}."):
            mine.append(word)
            target = "mine"
        elif word.startswith("--"):
            rest.append(word)
            target = "rest"
        elif target == "spec":
            spec, target = word, None
        else:
            (mine if target == "mine" else rest).append(word)
    return spec, mine, rest


def _split(spec: str) -> tuple[Path, str | None]:
    head, mark, arg = spec.partition(".py:")
    return (Path(head + ".py"), arg) if mark else (Path(spec), None)


def _load_folder(folder: Path) -> Any:
    path = folder / "config.json"
    if not path.exists():
        raise InputError(
            f"--config {folder}: the folder holds no config.json, so it is not a run folder"
        )
    try:
        return from_json(json.loads(path.read_text()))
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise InputError(
            f"{path} is not readable as JSON ({e}); give the original config file"
        ) from e


def _load_file(spec: str) -> Any:
    path, arg = _split(spec)
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.py")], n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise InputError(f"--config {spec}: no such file{hint}")
    module = import_file(path)
    get_config = getattr(module, "get_config", None)
    if not callable(get_config):
        raise InputError(f"{path} defines no function get_config()")
    takes_arg = bool(inspect.signature(get_config).parameters)
    if arg is not None and not takes_arg:
        raise InputError(f"--config {spec}: {path} takes no argument after the colon, got {arg!r}")
    try:
        cfg = get_config(arg) if arg is not None else get_config()
    except InputError:
        raise
    except (ValueError, KeyError, TypeError) as e:
        raise InputError(f"{spec}: get_config failed: {type(e).__name__}: {e}") from e
    if not is_config(cfg):
        raise InputError(
            f"{spec}: get_config returned {type(cfg).__name__}; a dataclass instance is needed"
        )
    return cfg


def override(cfg: Any, words: Sequence[str], *, prefix: str = "config") -> Any:
    """Apply `--config.a.b V` and `--config.a.b=V` to a config; the config itself is not changed."""
    tree: dict[str, Any] = {}
    for path, values in _overrides(words, prefix):
        node = tree
        for part in path.split("."):
            node = node.setdefault(part, {})
        node[""] = values  # "" holds the words given for the field itself
    return _rebuild(cfg, tree, prefix, cfg) if tree else cfg


def _overrides(words: Sequence[str], prefix: str) -> Iterator[tuple[str, list[str]]]:
    start, path, values = f"--{prefix}.", None, []
    for word in words:
        if word.startswith("--"):
            if path is not None:
                yield path, values
            if not word.startswith(start):
                raise InputError(f"{word}: overrides start with {start}")
            path, equals, value = word[len(start) :].partition("=")
            values = [value] if equals else []
            if not all(path.split(".")):
                raise InputError(f"{word}: a field name is missing between the dots")
        elif path is None:
            raise InputError(f"{word!r}: a value without a field in front of it")
        else:
            values.append(word)
    if path is not None:
        yield path, values


def _rebuild(obj: Any, tree: dict[str, Any], path: str, root: Any) -> Any:
    """A copy of `obj` (dataclass or tuple) changed by `tree`, one replace per dataclass."""
    hints = _hints(type(obj)) if is_config(obj) else {}
    names = list(hints) if hints else [str(i) for i in range(len(obj))]
    changes = {}
    for name, below in tree.items():
        here = f"{path}.{name}"
        if name not in names:
            raise InputError(_unknown(here, names, obj, root, path))
        hint = hints.get(name, Any)
        value, below = getattr(obj, name) if hints else obj[int(name)], dict(below)
        words = below.pop("", None)
        variants = _variants(hint, value)
        if words is not None and variants and not (_strip_none(hint)[1] and _is_none(words)):
            value = _variant(here, variants, words, below, root)
        elif words is not None:
            value = _parse(here, hint, value, words)
        elif value is None and len(variants) == 1:
            value = _variant(here, variants, [*variants], below, root)
        if below:
            if not (is_config(value) or isinstance(value, tuple)):
                which = f"; name a variant first: {', '.join(variants)}" if variants else ""
                raise InputError(
                    f"{here} is {value!r}: it has no field {next(iter(below))!r}{which}"
                )
            value = _rebuild(value, below, here, root)
        changes[name] = value
    if not hints:
        return tuple(changes.get(str(i), v) for i, v in enumerate(obj))
    try:
        return dataclasses.replace(obj, **changes)
    except (ValueError, TypeError) as e:
        given = ", ".join(f"{path}.{k} = {short(v)}" for k, v in changes.items())
        raise InputError(f"{given}: {e}") from e


def _parse(path: str, hint: Any, old: Any, words: list[str]) -> Any:
    """The value that the command-line words mean for a field annotated with `hint`."""
    if hint is Any and old is not None:
        hint = type(old)
    bare, optional = _strip_none(hint)
    given = " ".join(words)
    if optional and _is_none(words):
        return None
    if isinstance(bare, type) and dataclasses.is_dataclass(bare):
        raise InputError(f"{path} = {given!r}: a {bare.__name__} has no variants; set its fields")
    members = _variants(typing.get_args(bare)[0]) if typing.get_origin(bare) is tuple else {}
    if members:
        return tuple(_variant(path, members, [word], {}, None) for word in words)
    if bare is bool and not words:
        return True
    if bare is str and len(words) == 1:
        return words[0]
    if typing.get_origin(bare) is tuple and len(words) == 1 and "," in words[0]:
        words = [w for w in words[0].split(",") if w]
    try:
        return _tyro(hint, words)
    except (ValueError, TypeError) as e:
        raise InputError(f"{path} = {given!r}: expected {_type_name(hint)} ({e})") from e


def _is_none(words: list[str]) -> bool:
    return [word.lower() for word in words] == ["none"]


def _tyro(hint: Any, words: list[str]) -> Any:
    """Let tyro parse words by annotation; its printed complaint becomes a ValueError."""
    import tyro

    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            return tyro.cli(hint, args=words, prog="value")
    except SystemExit as e:
        text = err.getvalue() or out.getvalue()
        lines = [x.strip(" │╭╮╰╯─|+-") for x in text.splitlines()]
        lines = [x for x in lines if x]  # the first is a title
        reason = lines[1] if len(lines) > 1 else "not a value of that type"
        raise ValueError(reason.removeprefix("Error parsing ")) from e


def _variant(path: str, variants: dict, words: list[str], below: dict, root: Any) -> Any:
    """The variant called `words` at its defaults; fields that have none come from `below`."""
    name = " ".join(words)
    if name not in variants:
        near = difflib.get_close_matches(name, variants, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise InputError(f"{path} = {name!r}: no such variant{hint} (known: {', '.join(variants)})")
    cls, hints = variants[name], _hints(variants[name])
    needed = [
        f.name
        for f in dataclasses.fields(cls)
        if f.init and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    missing = [n for n in needed if "" not in below.get(n, {})]
    if missing:
        raise InputError(f"{path} = {name!r} also needs {path}.{missing[0]}")
    given = {n: _parse(f"{path}.{n}", hints[n], None, below.pop(n)[""]) for n in needed}
    try:
        return cls(**given)
    except (ValueError, TypeError) as e:
        raise InputError(f"{path} = {name!r}: {e}") from e


def _variants(hint: Any, value: Any = None) -> dict[str, type]:
    """What a field may hold, by name.

    Registered classes (a Registry lives beside a base class); the classes of a union or an Optional
    under their own names in small letters.
    """
    bare, optional = _strip_none(hint)
    united = typing.get_origin(bare) in (typing.Union, types.UnionType)
    bases = typing.get_args(bare) if united else (type(value) if bare is Any else bare,)
    found: dict[str, type] = {}
    for base in bases:
        if isinstance(base, type) and dataclasses.is_dataclass(base):
            alone = {base.__name__.lower(): base} if united or optional else {}
            found |= _registered(base) or alone
    return found


def _registered(base: type) -> dict[str, type]:
    for cls in reversed(base.__mro__[:-1]):
        module = sys.modules.get(cls.__module__)
        for value in list(vars(module).values()) if module else ():
            if isinstance(value, Registry):
                found = {n: value[n] for n in value.names() if issubclass(value[n], cls)}
                if found:
                    return found
    return {}


def _unknown(path: str, names: list[str], obj: Any, root: Any, parent: str) -> str:
    last, prefix = path.rsplit(".", 1)[1], parent.split(".")[0]
    everywhere = [f"{prefix}.{p}" for p, *_ in fields(root)]
    elsewhere = [p for p in everywhere if p.rsplit(".", 1)[1] == last]
    near = difflib.get_close_matches(last, names, n=1)
    best = (
        [f"{parent}.{near[0]}"]
        if near
        else elsewhere or difflib.get_close_matches(path, everywhere, n=1)
    )
    hint = f"; did you mean {best[0]}?" if best else ""
    kind = type(obj).__name__ if is_config(obj) else "positions"
    return f"unknown field {path}{hint} (of {kind}: {', '.join(names) or 'none'})"


def fields(cfg: Any, path: str = "") -> Iterator[tuple[str, Any, Any, str]]:
    """Every field of a config, depth first: (dotted path, annotation, value, what it means)."""
    if isinstance(cfg, tuple):
        for i, item in enumerate(cfg):
            if is_config(item):
                yield f"{path}{i}", type(item), item, _summary(type(item))
                yield from fields(item, f"{path}{i}.")
        return
    docs = _docs(type(cfg))
    for name, hint in _hints(type(cfg)).items():
        value = getattr(cfg, name)
        yield f"{path}{name}", hint, value, docs.get(name, "")
        if is_config(value) or isinstance(value, tuple):
            yield from fields(value, f"{path}{name}.")


def help_text(cfg: Any, *, prefix: str = "config") -> str:
    """All fields with type, present value and meaning, as lines for `--help`."""
    lines = [
        f"Fields of this {type(cfg).__name__} and their values (change: --{prefix}.FIELD VALUE):",
        "",
    ]
    for path, hint, value, doc in fields(cfg):
        if is_config(value):
            lines.append(f"  --{prefix}.{path}: {type(value).__name__}{_among(hint, value)}")
            doc = doc or _summary(type(value))
        else:
            kind = f"{_type_name(hint)}{_among(hint, value)}"
            lines.append(f"  --{prefix}.{path} {kind} = {short(value)}")
        if doc:
            lines.append(f"        {doc}")
    return "\n".join(lines)


def _among(hint: Any, value: Any) -> str:
    variants = _variants(hint, value)
    return f" [{' | '.join(variants)}]" if len(variants) > 1 else ""


def _summary(cls: type) -> str:
    # dataclasses invents a docstring "Name(field: ...)" where there is none
    doc = inspect.getdoc(cls) or ""
    return "" if doc.startswith(f"{cls.__name__}(") else doc.split("\n")[0]


def _docs(cls: type) -> dict[str, str]:
    """Field meanings: `name: meaning` or `a, b: meaning` in the docstring, else a comment."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        with contextlib.suppress(OSError, TypeError):
            for m in re.finditer(r"^ {4}(\w+): .*?#\s*(.+)$", inspect.getsource(base), re.M):
                found[m[1]] = m[2]
        text = " ".join(re.split(r"(?:Args|Attributes):\n", inspect.getdoc(base) or "")[1:]).split()
        name = "(?:" + "|".join(_hints(cls)) + ")"
        parts = re.split(rf"(?:^| )((?:{name}, )*{name}): ", " ".join(text))[1:]
        for names, meaning in zip(parts[::2], parts[1::2]):
            found |= dict.fromkeys(names.split(", "), meaning.strip())
    return found


def _hints(cls: type) -> dict[str, Any]:
    try:
        hints = typing.get_type_hints(cls)
    except Exception:  # an annotation that cannot be evaluated must not make the config unusable
        hints = {}
    return {f.name: hints.get(f.name, Any) for f in dataclasses.fields(cls) if f.init}


def _strip_none(hint: Any) -> tuple[Any, bool]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        args = [a for a in typing.get_args(hint) if a is not type(None)]
        bare = args[0] if len(args) == 1 else typing.Union[tuple(args)]  # noqa: UP007
        return bare, len(args) < len(typing.get_args(hint))
    return hint, False


def _type_name(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return "{" + ",".join(map(str, typing.get_args(hint))) + "}"
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return "|".join(_type_name(a) for a in typing.get_args(hint))
    if hint is type(None):
        return "none"
    return (
        hint.__name__
        if isinstance(hint, type) and not typing.get_args(hint)
        else str(hint).replace("typing.", "")
    )
