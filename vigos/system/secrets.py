"""Keys of servers: read from the environment, checked, and masked in whatever is shown or written."""

from __future__ import annotations

import json
import os
from urllib.parse import quote, urlsplit

_KNOWN: set[str] = set()
_SHORTEST = 4  # characters; to mask a shorter one would tear words apart
_PLAIN_WORD = 8  # letters: a shorter key of letters alone, "EMPTY" or "hidden", guards nothing, and pages hold the word


def api_key(variable: str) -> str | None:
    """Return the key in an environment variable, which is masked from then on; None where it is unset or empty.

    Raises:
        ValueError: a key that no header can hold, such as one with a line end; the message does not show it.
    """
    key = os.environ.get(variable, "")
    if not key:
        return None
    remember(key.strip())
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise ValueError(
            f"{variable} must be one word of printable ASCII, got {len(key)} characters with a space, a line end or "
            "something else among them"
        )
    return key


def remember(secret: str) -> None:
    """Mask this text from now on, also as JSON, as Python and as an address spell it."""
    if len(secret) >= (_PLAIN_WORD if secret.isalpha() else _SHORTEST):
        _KNOWN.update((secret, json.dumps(secret)[1:-1], repr(secret)[1:-1], quote(secret, safe="")))


def masked(text: str) -> str:
    """Return the text with every known key replaced by three stars."""
    for secret in sorted(_KNOWN, key=len, reverse=True):
        text = text.replace(secret, "***")
    return text


def server_address(address: str, name: str, variable: str) -> str:
    """Return a server's address without a slash at its end.

    Args:
        name: of the option, for messages.
        variable: environment variable that keys belong in.

    Raises:
        ValueError: no http address, or one that holds a key, a user, a query or white space.
    """
    try:
        parts = urlsplit(address)
        port = parts.port
    except ValueError as error:
        raise ValueError(f"{name} must be an address, got {masked(address)!r}: {error}") from error
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise ValueError(f"{name} must start with http:// or https:// and name a host, got {masked(address)!r}")
    if "@" in parts.netloc or parts.query or parts.fragment or not address.isprintable() or " " in address:
        remember(parts.password or "")
        shown = f"{parts.scheme}://{parts.hostname}"  # what stands around it may be the key
        raise ValueError(
            f"{name} must hold no user, key, query or white space: a key belongs in {variable}; got {shown}…"
        )
    return address.rstrip("/")
