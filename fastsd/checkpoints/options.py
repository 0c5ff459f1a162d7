"""Foreign configs: the options that a class reads, its defaults, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastsd.errors import CheckpointError


@dataclass(frozen=True)
class Fixed:
    """An option that fastsd implements for some values only.

    default: what the class takes where a config is silent. allowed: the values that are
    implemented, by default that one. advice: what to do about another.
    """

    default: Any
    allowed: tuple[Any, ...] = ()
    advice: str = ""

    def check(self, name: str, value: Any) -> None:
        """Refuse a value that is not implemented."""
        allowed = self.allowed or (self.default,)
        if value not in allowed and not (value is None and False in allowed):
            shown = " or ".join(map(repr, allowed))
            raise CheckpointError(
                f"{name} = {value!r} is not supported, only {shown}"
                + (f"; {self.advice}" if self.advice else "")
            )


@dataclass(frozen=True)
class Options:
    """The options of one class. reads: name -> default; fixed: those not free to choose.

    A config's other entries are ignored, as diffusers ignores them: training scripts leave theirs.
    """

    reads: Mapping[str, Any]
    fixed: Mapping[str, Fixed]

    def read(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the value of every option in `reads`; refuse a config that asks for the rest."""
        for name, choice in self.fixed.items():
            choice.check(name, _uniform(config.get(name, choice.default)))
        return {
            name: _checked(name, config.get(name, default), default)
            for name, default in self.reads.items()
        }

    def write(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return a config of the `values` that the class reads, and of the fixed ones."""
        fixed = {
            name: choice.allowed[0] if choice.allowed else choice.default
            for name, choice in self.fixed.items()
            if choice.default != -float("inf")  # not JSON
        }
        return fixed | {name: values[name] for name in self.reads if name in values}


def _checked(name: str, value: Any, default: Any) -> Any:
    """Return a value of the default's kind, or for numbers a list of one a level; refuse others."""
    if isinstance(default, bool) and value is None:
        return False
    if isinstance(default, bool) or default is None:
        fits = default is None or isinstance(value, bool)
    elif isinstance(default, (int, float)):
        entries = value if isinstance(value, list) else [value]
        fits = all(isinstance(n, (int, float)) and not isinstance(n, bool) for n in entries)
    else:
        fits = isinstance(value, type(default))
    if not fits:
        raise CheckpointError(f"{name} = {value!r} makes no sense; it is usually {default!r}")
    return value


def _uniform(value: Any) -> Any:
    """Return the entry that a list repeats (one a level), or the value itself."""
    if isinstance(value, list) and value and all(entry == value[0] for entry in value):
        return value[0]
    return value
