"""What every group of a recipe's keys is made of: strictness, values handed over from Python, and short forms. Knows no key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainSerializer


@dataclass(frozen=True)
class Given:
    """A model, data set or function handed over from Python: a recipe holds it but cannot write it down."""

    value: Any

    def __str__(self) -> str:
        return f"<given from Python: {type(self.value).__name__}>"


def _none_is_a_word(value: Any) -> Any:
    return None if value == "none" else value


def _written(value: Any) -> Any:
    return str(value) if isinstance(value, Given) else value


def _opaque(value: Any) -> Any:
    """Text stays text; anything that is not text was given from Python."""
    if isinstance(value, Given) or value is None:
        return value
    if isinstance(value, str):
        if not value.strip():
            raise ValueError("is empty")
        if value.startswith("<given from Python"):
            raise ValueError("was given from Python in the run that wrote this; hand it over again with fz.train(...)")
        return value
    if _plain(value):
        raise ValueError("is not a text: a name, a file or a source")
    return Given(value)


def _plain(value: Any) -> bool:
    """Whether a recipe file could hold this value."""
    if isinstance(value, Mapping):
        return all(map(_plain, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(_plain, value))
    return isinstance(value, (str, int, float, bool))


NoneWord = BeforeValidator(_none_is_a_word)
Source = Annotated[Any, BeforeValidator(_opaque), PlainSerializer(_written)]


class Section(BaseModel):
    """A frozen group of keys that refuses unknown ones."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, populate_by_name=True, allow_inf_nan=False)


def short_for(key: str) -> Any:
    """Let a section be written as one word or number, which then is the value of `key`."""

    def lengthen(value: Any) -> Any:
        if isinstance(value, (str, int, float, list, tuple)) and not isinstance(value, bool):
            return {key: value}
        return value

    return BeforeValidator(lengthen)
