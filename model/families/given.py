"""The values of a config.json that somebody else wrote, read with types, bounds and refusals."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from model.config import ConfigError


class Given:
    """A JSON object whose readers name the key in every refusal. A key that is null is absent."""

    def __init__(self, values: Mapping[str, Any], tensors: Collection[str] = ()) -> None:
        self._values = {key: value for key, value in values.items() if value is not None}
        self.tensors = tensors  # names of what the weights hold: some parts are there or not

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def get(self, key: str, default: Any = None) -> Any:
        """As it stands."""
        return self._values.get(key, default)

    def whole(self, key: str, default: int | None = None) -> int:
        """A whole number; the default, if there is one, where the key is absent."""
        value = self._value(key, default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise ConfigError(f"{key}: {value!r} is not a whole number")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._value(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ConfigError(f"{key}: {value!r} is not a number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise ConfigError(f"{key}: {value!r} is not true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self._value(key, default)
        if not isinstance(value, str):
            raise ConfigError(f"{key}: {value!r} is not a string")
        return value

    def choice(self, key: str, choices: Mapping[str, Any], default: str) -> Any:
        """What a word stands for; a word that is none of the choices is not supported."""
        value = self.text(key, default)
        if value not in choices:
            raise ConfigError(f"{key}: {value!r} is not supported; there are {', '.join(choices)}")
        return choices[value]

    def ids(self, key: str) -> list[int]:
        """A token id or a list of them, in a list; empty where the key is absent."""
        value = self.get(key, [])
        ids = value if isinstance(value, list) else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            raise ConfigError(f"{key}: {value!r} is not a token id")
        return ids

    def id(self, key: str) -> int | None:
        """One token id, or none."""
        ids = self.ids(key)
        return ids[0] if ids else None

    def items(self) -> list[tuple[str, Any]]:
        return list(self._values.items())

    def inner(self, key: str) -> Given:
        """The object at a key; an empty one where it is absent."""
        value = self.get(key, {})
        if not isinstance(value, dict):
            raise ConfigError(f"{key}: {value!r} is not an object")
        return Given(value, self.tensors)

    def demand(self, **only: Any) -> None:
        """Refuse every key that is there with another value than the one supported."""
        for key, value in only.items():
            if key in self._values and self._values[key] != value:
                raise ConfigError(f"{key}: {self._values[key]!r} is not supported, only {value!r}")

    def holds(self, *endings: str) -> bool:
        """Is there a tensor whose name ends so, for each of the endings?"""
        return all(any(name.endswith(ending) for name in self.tensors) for ending in endings)

    def _value(self, key: str, default: Any) -> Any:
        if key in self._values:
            return self._values[key]
        if default is None:
            raise ConfigError(f"missing key: {key}")
        return default
