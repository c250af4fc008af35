"""Who may ask: names of the server that requests are for, bearer tokens, and bodies as they are."""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from serving.errors import InputError

# Probes of a cluster ask by address and without a token.
HEALTH_ROUTES = frozenset(("/healthz", "/readyz"))
LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "::1")
MIN_TOKEN_LENGTH = 16

Headers = list[tuple[bytes, bytes]]


@dataclass(frozen=True)
class Refusal:
    """Why a request is refused before its body is read."""

    status: int
    message: str
    headers: Headers = field(default_factory=list)


@dataclass(frozen=True)
class Access:
    """The rules; both are off by default. Health routes are open to everybody.

    Args:
        hosts: names that a request's Host may have, without ports; "*.example.com" takes every name below. None takes all. On loopback
            this keeps pages of other origins out, whose name was made to point here (DNS rebinding).
        tokens: `Authorization: Bearer TOKEN` has to hold one of them; empty: none is needed.
    """

    hosts: tuple[str, ...] | None = None
    tokens: tuple[str, ...] = field(default=(), repr=False)

    def refusal(self, scope: Any) -> Refusal | None:
        """Why the request of an ASGI scope is refused; None where it is taken."""
        values = dict(scope["headers"])
        encoding = values.get(b"content-encoding", b"").strip().lower()
        if encoding not in (b"", b"identity"):
            return Refusal(
                415,
                f"content-encoding is {encoding.decode('latin-1')!r:.60}; send the body as it is",
                [(b"accept-encoding", b"identity")],
            )
        if scope["path"] in HEALTH_ROUTES:
            return None
        hosts = [value for name, value in scope["headers"] if name == b"host"]
        if self.hosts is not None and not (len(hosts) == 1 and takes_host(hosts[0].decode("latin-1"), self.hosts)):
            shown = b", ".join(hosts).decode("latin-1")
            return Refusal(400, f"host is {shown!r:.80}, which is no name of this server; --allow-host adds one")
        if self.tokens and not self._has_token(values.get(b"authorization", b"")):
            return Refusal(
                401, "no valid token; send the header Authorization: Bearer TOKEN", [(b"www-authenticate", b"Bearer")]
            )
        return None

    def _has_token(self, authorization: bytes) -> bool:
        scheme, _, token = authorization.partition(b" ")
        # All are compared, each in a time that does not tell how much of it was right.
        equal = [hmac.compare_digest(token.strip(), known.encode()) for known in self.tokens]
        return scheme.lower() == b"bearer" and any(equal)


def takes_host(host: str, allowed: Sequence[str]) -> bool:
    """Whether a Host header, with or without a port, names one of the allowed hosts."""
    name = host.strip().lower()
    if name.startswith("["):
        name, bracket, port = name[1:].partition("]")
        if not bracket or (port and not port.startswith(":")):
            return False
    else:
        name, _, port = name.partition(":")
        if ":" in port:
            return False
    name = name.removesuffix(".")
    return any(name == a or (a.startswith("*.") and name.endswith(a[1:])) for a in map(str.lower, allowed))


def read_tokens(path: Path) -> tuple[str, ...]:
    """The tokens of a file, one a line; empty lines and lines with `#` in front are left out.

    Raises:
        InputError: the file cannot be read, has no token, or one that is too short or not of visible ASCII characters.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    numbered = [(n, line.strip()) for n, line in enumerate(lines, 1)]
    tokens = [(n, line) for n, line in numbered if line and not line.startswith("#")]
    for n, token in tokens:
        if len(token) < MIN_TOKEN_LENGTH or not all("!" <= c <= "~" for c in token):
            raise InputError(
                f"{path}, line {n}: a token has at least {MIN_TOKEN_LENGTH} visible ASCII characters; "
                "make one with `openssl rand -hex 32`"
            )
    if not tokens:
        raise InputError(f"{path}: holds no token; make one with `openssl rand -hex 32`")
    return tuple(token for _, token in tokens)
