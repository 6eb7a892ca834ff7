"""Requests to servers that may be slow, gone, talkative or wrong: in bounded time and memory, tried again or refused.

    client = Client("http://localhost:8000/v1", key="…", timeout=60.0)
    names = client.ask("models", read=lambda answer: [model["id"] for model in answer["data"]])

`requests` bounds each wait of a socket; here the whole answer has a deadline, and a size. Nothing is decompressed, so a
small answer cannot become a large one. Transient failures are retried: lost connections, statuses 408, 429 and 5xx,
and answers that `read` refuses with `UnusableAnswer`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

import requests
import requests.auth
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import HTTPError

from vigos.system.text import printable

logger = logging.getLogger(__name__)

RETRYABLE = (408, 429, 500, 502, 503, 504)
MAX_BYTES = 2**24  # of an answer
_MAX_WAIT = 60.0  # seconds that a server may ask to wait for before the next try
_SHOWN = 300  # characters of an answer in a message


class ServerError(Exception):
    """Raised with one line for a request that failed for good.

    Attributes:
        status: of a refusal; None where nothing usable came at all.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class UnusableAnswer(Exception):
    """Raised for an answer in place of which another try may give a better one."""


class _Timed:
    """A connection that is cut when an answer takes longer, as a whole, than its time-out for one wait."""

    def getresponse(self: Any) -> Any:
        """Return the answer, with a clock running that `timer` stops."""
        connected = self.sock
        timer = threading.Timer(self.timeout, _cut, (connected,))
        timer.daemon = True
        timer.start()
        try:
            response = super().getresponse()  # type: ignore[misc]
        except BaseException:
            timer.cancel()
            raise
        response.timer = timer
        return response


def _cut(connected: socket.socket) -> None:
    with contextlib.suppress(OSError):
        socket.socket.shutdown(connected, socket.SHUT_RDWR)


class _TimedHTTP(_Timed, HTTPConnection):
    pass


class _TimedHTTPS(_Timed, HTTPSConnection):
    pass


class _HTTPPool(HTTPConnectionPool):
    ConnectionCls = _TimedHTTP  # type: ignore[assignment]


class _HTTPSPool(HTTPSConnectionPool):
    ConnectionCls = _TimedHTTPS  # type: ignore[assignment]


class _Adapter(HTTPAdapter):
    """The adapter of `requests` with connections that have a deadline, through proxies too."""

    def get_connection_with_tls_context(self, *args: Any, **kwargs: Any) -> Any:
        """Return the pool for a request."""
        for manager in (self.poolmanager, *self.proxy_manager.values()):
            manager.pool_classes_by_scheme = {"http": _HTTPPool, "https": _HTTPSPool}
        return super().get_connection_with_tls_context(*args, **kwargs)


class _Bearer(requests.auth.AuthBase):
    """The key of this server; with it or without, none that ~/.netrc holds for the host."""

    def __init__(self, key: str | None) -> None:
        self._key = key

    def __call__(self, request: Any) -> Any:
        """Add the header to a request."""
        if self._key:
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request


class Client:
    """Ask one server.

    Args:
        url: checked by `vigos.system.secrets.server_address`.
        key: sent as a bearer token.
        timeout: seconds for one try, from connecting to the last byte of the answer.
        retries: further tries after a transient failure.
        pause: seconds before the third try, doubled for each further one; the second follows at once.
        connections: kept open at most.
    """

    def __init__(
        self, url: str, *, key: str | None, timeout: float, retries: int, pause: float = 1.0, connections: int = 1
    ) -> None:
        self.url, self.timeout, self.retries, self.pause = url, timeout, retries, pause
        self._session = requests.Session()
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, _Adapter(pool_maxsize=connections, max_retries=0))
        self._session.headers["Accept-Encoding"] = "identity"
        self._session.auth = _Bearer(key)

    def ask(self, path: str, body: Any = None, read: Callable[[Any], Any] | None = None) -> Any:
        """Post (without a body: get); return what `read` makes of the JSON, or without it the answer's bytes.

        Raises:
            ServerError: a status that is no success, or no usable answer in any of the tries.
        """
        where, failure, wait, status = f"{self.url}/{path}", "", 0.0, None
        for attempt in range(self.retries + 1):
            time.sleep(max(wait, self.pause * 2 ** (attempt - 2) if attempt > 1 else 0.0))
            try:
                status, data, wait = self._once(where, body)
                if 200 <= status < 300:
                    return data if read is None else read(parsed_answer(data))
                failure = f"status {status}: {_shown(data)}"
                if status not in RETRYABLE:
                    raise ServerError(printable(f"{where} refused: {failure}"), status)
            except UnusableAnswer as error:
                failure, status = str(error), None
            except (requests.RequestException, HTTPError, OSError) as error:
                failure, status, wait = f"{type(error).__name__}: {error}", None, 0.0
            failure = printable(failure)
            logger.warning("%s: %s; try %d of %d", where, failure, attempt + 1, self.retries + 1)
        raise ServerError(f"{where} failed {self.retries + 1} times, last with {failure}", status)

    def _once(self, where: str, body: Any) -> tuple[int, bytes, float]:
        """Return status, content and the seconds that the server asks to wait for."""
        method, begun, answer = "GET" if body is None else "POST", time.monotonic(), None
        parts, size = [], 0
        try:
            answer = self._session.request(
                method, where, json=body, timeout=self.timeout, stream=True, allow_redirects=False
            )
            if (coding := answer.headers.get("Content-Encoding", "identity")) != "identity":
                raise UnusableAnswer(f"an answer in {coding[:40]!r}, which was not asked for")
            while part := answer.raw.read(2**16, decode_content=False):
                parts.append(part)
                size += len(part)
                if size > MAX_BYTES:
                    raise UnusableAnswer(f"an answer of more than {MAX_BYTES} bytes")
        except (requests.RequestException, HTTPError, OSError) as error:
            if time.monotonic() - begun >= self.timeout:
                raise UnusableAnswer(f"no whole answer within {self.timeout:g} s") from error
            raise
        finally:
            if answer is not None:
                answer.raw.timer.cancel()
                answer.close()
        if time.monotonic() - begun >= self.timeout:  # one without a length seems whole where it was cut
            raise UnusableAnswer(f"no whole answer within {self.timeout:g} s")
        asked = answer.headers.get("Retry-After", "")
        return answer.status_code, b"".join(parts), min(float(asked), _MAX_WAIT) if asked.isdecimal() else 0.0


def parsed_answer(data: bytes) -> Any:
    """Return the JSON of an answer. Raises UnusableAnswer, also for NaN and infinities, which are no JSON."""
    try:
        return json.loads(data, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise UnusableAnswer(f"no JSON ({type(error).__name__}: {error}): {_shown(data)}") from error


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number")


def _shown(data: bytes) -> str:
    return data[: 4 * _SHOWN].decode("utf-8", "replace")[:_SHOWN]
