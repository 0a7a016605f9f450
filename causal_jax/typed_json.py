"""Configs as JSON and back, exactly: every dataclass carries the place where its class is found.

    {"type": "causal_jax.training.recipe:Recipe", "steps": 100, "model": {"type": ...}, ...}

A class that a config file defines itself is found through that file: `"type": "/path/x.py:Class"`.
"""

import dataclasses
import difflib
import hashlib
import importlib
import importlib.util
import json
import math
import sys
import types
from pathlib import Path
from typing import Any

from causal_jax.errors import InputError

_FILES: dict[str, types.ModuleType] = {}  # config files already imported, by absolute path


def import_file(path: Path) -> types.ModuleType:
    """Import a Python file under a name of its own, once per process."""
    full = str(path.resolve())
    if full in _FILES:
        return _FILES[full]
    name = f"config_file_{path.stem}_{hashlib.sha256(full.encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, full)
    if spec is None or spec.loader is None:
        raise InputError(f"{path} cannot be imported as Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up while they are defined
    try:
        spec.loader.exec_module(module)
    except InputError:
        raise
    except Exception as e:  # whatever is wrong with it, it is the user's file
        del sys.modules[name]
        line = e.__traceback__
        while line is not None and line.tb_frame.f_code.co_filename != full:
            line = line.tb_next
        where = getattr(e, "lineno", None) or (line.tb_lineno if line else "?")
        raise InputError(f"{path}, line {where}: {type(e).__name__}: {e}") from e
    _FILES[full] = module
    return module


def to_json(cfg: Any, path: str = "config") -> Any:
    """A config as JSON values, each dataclass with its type.

    Exact: `from_json(to_json(c)) == c`; lists come back as tuples (frozen configs hold tuples).

    Raises:
        InputError: a value that JSON cannot hold exactly (an array, an object), named by its path.
    """
    if is_config(cfg):
        body = {
            f.name: to_json(getattr(cfg, f.name), f"{path}.{f.name}")
            for f in dataclasses.fields(cfg)
            if f.init
        }
        return {"type": _address(type(cfg), path), **body}
    if isinstance(cfg, float) and not math.isfinite(cfg):
        return {"type": "float", "value": str(cfg)}
    if cfg is None or isinstance(cfg, bool | int | float | str):
        return cfg
    if isinstance(cfg, tuple | list):
        return [to_json(v, f"{path}.{i}") for i, v in enumerate(cfg)]
    if isinstance(cfg, dict) and all(isinstance(k, str) for k in cfg):
        return {"type": "dict", "value": {k: to_json(v, f"{path}.{k}") for k, v in cfg.items()}}
    if isinstance(cfg, Path):
        return {"type": "path", "value": str(cfg)}
    if callable(cfg) and hasattr(cfg, "__qualname__"):
        return {"type": "name", "value": _address(cfg, path)}
    raise InputError(
        f"{path} is a {type(cfg).__name__}: a config holds numbers, text, tuples and dataclasses"
    )


def from_json(obj: Any, path: str = "config") -> Any:
    """The inverse of `to_json`; missing fields take defaults, unknown ones are an InputError."""
    if isinstance(obj, list):
        return tuple(from_json(v, f"{path}.{i}") for i, v in enumerate(obj))
    if not isinstance(obj, dict):
        return obj
    kind = obj.get("type")
    if not isinstance(kind, str):
        raise InputError(f"{path}: a JSON object without a type: {short(obj)}")
    if kind in _PLAIN:
        return _PLAIN[kind](obj["value"], path)
    cls = _find(kind, path)
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        raise InputError(f"{path}: {kind} is not a dataclass, so it is not a config")
    names = [f.name for f in dataclasses.fields(cls) if f.init]
    given = {k: v for k, v in obj.items() if k != "type"}
    for name in given:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise InputError(
                f"unknown field {path}.{name} of {kind}{hint} (written by another version?)"
            )
    try:
        return cls(**{k: from_json(v, f"{path}.{k}") for k, v in given.items()})
    except InputError:
        raise
    except (ValueError, TypeError) as e:
        raise InputError(f"{path}: {e}") from e


_PLAIN = {
    "float": lambda v, path: float(v),
    "dict": lambda v, path: {k: from_json(x, f"{path}.{k}") for k, x in v.items()},
    "path": lambda v, path: Path(v),
    "name": lambda v, path: _find(v, path),
}


def fingerprint(cfg: Any) -> str:
    """Twelve hex digits, the same for equal configs in every process and on every machine."""
    text = json.dumps(cfg if isinstance(cfg, dict) else to_json(cfg), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def differences(a: Any, b: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    """Where two JSON trees differ: (dotted path, value in a, value in b)."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = [*a, *(k for k in b if k not in a)]
        return [
            d for k in keys for d in differences(a.get(k), b.get(k), f"{path}.{k}" if path else k)
        ]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b)) for d in differences(x, y, f"{path}.{i}")]
    return [] if a == b and type(a) is type(b) else [(path, a, b)]


def _address(item: Any, path: str) -> str:
    """Where a class or function is found again: `module:Class`, or `file.py:Class`."""
    if "<" in item.__qualname__ or item.__module__ == "__main__":
        raise InputError(
            f"{path}: {item.__qualname__} has no importable name: define it at the top of a module"
        )
    for file, module in _FILES.items():
        if module.__name__ == item.__module__:
            return f"{file}:{item.__qualname__}"
    return f"{item.__module__}:{item.__qualname__}"


def _find(address: str, path: str) -> Any:
    where, _, name = address.rpartition(":")
    try:
        found: Any = (
            import_file(Path(where)) if where.endswith(".py") else importlib.import_module(where)
        )
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError, OSError) as e:
        raise InputError(f"{path}: {address} cannot be imported ({e})") from e
    return found


def is_config(value: Any) -> bool:
    """Whether this is a dataclass instance."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def short(value: Any) -> str:
    """A value for a message: a config by its class, everything else in at most 60 characters."""
    text = type(value).__name__ if is_config(value) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
