"""Plug-in folders: a decorator registers, the first look-up imports the folder; no list to edit."""

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from causal_jax.errors import InputError

C = TypeVar("C", bound=type)


class Registry:
    """Named classes of one kind, found in the modules of one package (`_private` modules excepted).

    Args:
        kind: what is registered, for error messages ("attention").
        package: dotted name of the folder whose modules register themselves.
    """

    def __init__(self, kind: str, package: str):
        self.kind, self.package = kind, package
        self._classes: dict[str, type] = {}
        self._cases: dict[str, tuple] = {}
        self._discovered = False

    def register(self, name: str, cases: Iterable[Any] = ()) -> Callable[[C], C]:
        """Class decorator: make the class known as `name`, with its test and benchmark cases."""

        def wrap(cls: C) -> C:
            known = self._classes.get(name)
            # A reloaded module registers its class again under the same qualified name: that is
            # fine.
            if known is not None and _path(known) != _path(cls):
                raise ValueError(f"{self.kind} {name!r} is registered twice: {known} and {cls}")
            self._classes[name], self._cases[name] = cls, tuple(cases)
            return cls

        return wrap

    def names(self) -> tuple[str, ...]:
        """All registered names, sorted."""
        self._discover()
        return tuple(sorted(self._classes))

    def __getitem__(self, name: str) -> type:
        self._discover()
        if name not in self._classes:
            near = difflib.get_close_matches(name, self._classes, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            known = ", ".join(self.names())
            raise InputError(f"unknown {self.kind} {name!r}{hint} (known: {known})")
        return self._classes[name]

    def cases(self, name: str, tag: str | None = None) -> tuple:
        """The cases of `name`, or those that carry `tag`."""
        self[name]
        return tuple(c for c in self._cases[name] if tag is None or tag in c.tags)

    def name_of(self, item: Any) -> str:
        """The name under which a class, or the class of an instance, is registered."""
        self._discover()
        cls = item if isinstance(item, type) else type(item)
        for name, known in self._classes.items():
            if known is cls:
                return name
        raise KeyError(f"{cls} is not a registered {self.kind}")

    def _discover(self) -> None:
        if self._discovered:
            return
        self._discovered = True  # before the imports, which may look things up themselves
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__):
            if not module.name.startswith("_"):
                importlib.import_module(f"{self.package}.{module.name}")


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
