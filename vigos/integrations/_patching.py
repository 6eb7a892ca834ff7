"""Replacing a function of an installed package: reversible, idempotent, and only if its signature is a known one."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

logger = logging.getLogger("vigos.integrations")
_said: set[str] = set()


class UnknownPeer(RuntimeError):
    """The installed package is not the one this drop-in was written for."""


def say_once(message: str) -> None:
    """Log at WARNING, which Python shows without any set-up; the same words a second time say nothing."""
    if message not in _said:
        _said.add(message)
        logger.warning(message)


def version_of(distribution: str) -> str | None:
    """Return the installed version, None if it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def described(function: Callable[..., Any]) -> str:
    """Return names, kinds and defaults of a function's parameters, without annotations: "(a, b=1, *, c)"."""
    signature = inspect.signature(function)
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))


def check_signature(function: Callable[..., Any], known: Sequence[str], where: str) -> None:
    """Raise UnknownPeer, naming what was found and what is known, unless the signature is one of `known`."""
    found = described(function)
    if found not in known:
        raise UnknownPeer(f"{where} has the signature {found}; vigos knows {' and '.join(known)}")


@dataclass(frozen=True)
class Target:
    """One function or class of a peer, where it is defined, and what takes its place.

    Attributes:
        owner: the module, or "module:Class" for an attribute of a class; or that module or class itself.
        name: the attribute.
        known: the signatures, as `described` writes them, that `make`'s result stands in for.
        make: given the peer's original, returns the replacement.
        package: modules of this package (and its submodules) that imported the original by name are changed too; ""
            searches every loaded module; None changes the owner alone.
    """

    owner: str | ModuleType | type
    name: str
    known: tuple[str, ...]
    make: Callable[[Any], Any]
    package: str | None = None

    def holder(self) -> ModuleType | type:
        """Return the owner itself, imported if it is named."""
        if not isinstance(self.owner, str):
            return self.owner
        module, _, cls = self.owner.partition(":")
        loaded = importlib.import_module(module)
        if not cls:
            return loaded
        if not hasattr(loaded, cls):
            raise UnknownPeer(f"{module} has no {cls}; vigos knows {cls}.{self.name} with {' or '.join(self.known)}")
        return getattr(loaded, cls)

    @property
    def path(self) -> str:
        """Return the dotted path, for messages."""
        if isinstance(self.owner, str):
            return f"{self.owner.replace(':', '.')}.{self.name}"
        prefix = f"{self.owner.__module__}." if isinstance(self.owner, type) else ""
        return f"{prefix}{self.owner.__name__}.{self.name}"

    def original(self) -> Any:
        """Return the peer's own function or class, its signature checked."""
        holder = self.holder()
        if self.name not in vars(holder):
            raise UnknownPeer(f"{self.path} does not exist; vigos knows it with {' or '.join(self.known)}")
        value = getattr(holder, self.name)
        check_signature(value, self.known, self.path)
        return value


@dataclass
class _Change:
    holder: ModuleType | type
    name: str
    before: Any  # as it stood in the holder's namespace: a staticmethod stays one
    after: Any


@dataclass
class Patch:
    """A set of targets that are replaced and put back together."""

    peer: str  # for messages: "trl 1.16.0"
    changes: list[_Change] = field(default_factory=list)
    replaced: tuple[str, ...] = ()

    @property
    def active(self) -> bool:
        """True while the replacements are in place."""
        return bool(self.changes)

    def apply(self, targets: Sequence[Target]) -> tuple[str, ...]:
        """Replace every target, or, if one is unknown, none. A second call changes nothing."""
        if self.active:
            return self.replaced
        originals = [target.original() for target in targets]
        for target, original in zip(targets, originals, strict=True):
            replacement = target.make(original)
            self._set(target.holder(), target.name, replacement)
            if target.package is not None:
                for module in _modules(target.package):
                    for name in [n for n, value in vars(module).items() if value is original]:
                        self._set(module, name, replacement)
        self.replaced = tuple(target.path for target in targets)
        say_once(f"vigos replaced in {self.peer}: {', '.join(self.replaced)}")
        return self.replaced

    def _set(self, holder: ModuleType | type, name: str, replacement: Any) -> None:
        before = vars(holder)[name]
        after = staticmethod(replacement) if isinstance(before, staticmethod) else replacement
        self.changes.append(_Change(holder, name, before, after))
        setattr(holder, name, after)

    def undo(self) -> None:
        """Put back what stood there, unless somebody else replaced it since."""
        for change in reversed(self.changes):
            if vars(change.holder).get(change.name) is change.after:
                setattr(change.holder, change.name, change.before)
            else:
                say_once(
                    f"vigos left {change.holder.__name__}.{change.name} of {self.peer} as it is: "
                    "something else replaced it since"
                )
        self.changes, self.replaced = [], ()

    @contextmanager
    def during(self, targets: Sequence[Target]) -> Iterator[tuple[str, ...]]:
        """Replace inside the block; a patch that was in place before it stays."""
        outer = self.active
        try:
            yield self.apply(targets)
        finally:
            if not outer:
                self.undo()


def _modules(package: str) -> list[ModuleType]:
    """Return the loaded modules of a package; all of them for "". Ours keep the originals they hold."""
    return [
        module
        for name, module in list(sys.modules.items())
        if isinstance(module, ModuleType)
        and (not package or name == package or name.startswith(f"{package}."))
        and not name.startswith("vigos.")
    ]
