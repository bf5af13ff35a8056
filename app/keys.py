"""API keys: who may call, who may administer, and how much each may ask for.

A key is 256 random bits, so a plain SHA-256 of it is safe at rest: there is no dictionary to try, and a slow
hash would only be work that anybody could make the server do with every request.
"""

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

_PREFIX = "tk_"
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_HASH = re.compile(r"[0-9a-f]{64}")
_LIMIT = re.compile(r"(requests|characters)=([0-9]{1,12})")
_MAX_KEYS = 10_000  # every request is compared with all of them
_FORM = "NAME SHA256 [admin] [requests=PER_MINUTE] [characters=PER_MINUTE]"


class KeyFileError(Exception):
    """Keys that cannot be read; the message says where, and quotes no key."""


@dataclass(frozen=True)
class Key:
    """A known key. Limits are per minute: None takes the settings', 0 is none."""

    name: str
    digest: bytes = field(repr=False)
    admin: bool = False
    requests: int | None = None
    characters: int | None = None


class KeyRing:
    """All known keys. Empty: nobody needs one."""

    def __init__(self, keys: Iterable[Key] = ()) -> None:
        self._keys = tuple(keys)
        for name in ("name", "digest"):
            if len({getattr(key, name) for key in self._keys}) < len(self._keys):
                raise KeyFileError(f"two keys have the same {'name' if name == 'name' else 'hash'}")
        if len(self._keys) > _MAX_KEYS:
            raise KeyFileError(f"there are {len(self._keys)} keys, the limit is {_MAX_KEYS}")

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[Key]:
        return iter(self._keys)

    def find(self, given: str) -> Key | None:
        """The key that was given. How long this takes tells nothing of which keys there are."""
        digest, found = _digest(given), None
        for key in self._keys:
            if hmac.compare_digest(key.digest, digest):
                found = key
        return found


def make_key() -> str:
    """A new key of 256 random bits."""
    return _PREFIX + secrets.token_urlsafe(32)


def hash_key(key: str) -> str:
    """What is stored of a key, in hex."""
    return _digest(key).hex()


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def load_keys(file: Path | None, lines: str | None) -> KeyRing:
    """Keys from a file, and from lines in the environment, which may be parted by semicolons.

    Empty lines and those that begin with # are passed over. Raises KeyFileError: for a line that is no
    key, and for a source that was given but holds none, as that would leave the door open.
    """
    found: list[Key] = []
    if file is not None:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise KeyFileError(f"{file}: {error}") from None
        found += _parse_all(str(file), text.splitlines())
    if lines is not None:
        found += _parse_all("api_keys", re.split(r"[;\n]", lines))
    return KeyRing(found)


def _parse_all(source: str, lines: list[str]) -> list[Key]:
    found = []
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if text and not text.startswith("#"):
            found.append(_parse(f"{source}, line {number}", text.split()))
    if not found:
        raise KeyFileError(f"{source}: there is no key in it; write {_FORM}")
    return found


def _parse(where: str, words: list[str]) -> Key:
    if len(words) < 2 or not _NAME.fullmatch(words[0]) or not _HASH.fullmatch(words[1]):
        raise KeyFileError(f"{where}: not of the form {_FORM}; `python -m app key` makes such a line")
    limits: dict[str, int] = {}
    admin = False
    for word in words[2:]:
        limit = _LIMIT.fullmatch(word)
        if word == "admin":
            admin = True
        elif limit is not None:
            limits[limit[1]] = int(limit[2])
        else:
            raise KeyFileError(f"{where}: {word[:40]!r} is none of admin, requests=N, characters=N")
    return Key(words[0], bytes.fromhex(words[1]), admin, **limits)


def key_line(name: str, key: str, *, admin: bool = False) -> str:
    """The line of a key file for a key. Raises KeyFileError for a name that none could have."""
    if not _NAME.fullmatch(name):
        raise KeyFileError(f"name: {name[:80]!r} is not 1 to 64 of the characters A-Z a-z 0-9 . _ -")
    return " ".join([name, hash_key(key), *(["admin"] if admin else [])])
