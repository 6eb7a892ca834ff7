"""An image from an address that a dataset names, and nothing that only this machine can reach.

Datasets are written by strangers. An address in one may point at services inside the network it is read in: a router, a
database, the endpoint that hands a cloud machine its credentials. So only public addresses are spoken to, and what was
checked is what is connected to: a name is resolved once, and the connection goes to the addresses that came back, not
to the name again, which may mean another one by then.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING
from urllib.parse import urljoin

from vigos.data.decode import BadImage, ImageLimits

if TYPE_CHECKING:
    from urllib3.connection import HTTPConnection
    from urllib3.util import Url

MAX_REDIRECTS = 3
_REDIRECTS = (301, 302, 303, 307, 308)
_PIECE = 2**16

# Public in the registries, and yet of this machine's own network or a way around the check.
_REFUSED = [
    ipaddress.ip_network(network)
    for network in (
        "168.63.129.16/32",  # what Azure's machines are configured by
        "192.0.0.0/24",  # protocol assignments; 192.0.0.192 hands out credentials in Oracle's cloud
        "192.88.99.0/24",  # relays of 6to4
        "2002::/16",  # 6to4: an IPv4 address in disguise
        "3fff::/20",  # documentation
    )
]
_UNICAST = ipaddress.ip_network("2000::/3")  # all that is in use of IPv6


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the open internet."""
    ip = ipaddress.ip_address(address)
    if not ip.is_global or ip.is_multicast or ip.is_reserved or (ip.version == 6 and ip not in _UNICAST):
        return False
    return not any(ip in network for network in _REFUSED if network.version == ip.version)


def fetch_image(url: str, limits: ImageLimits, *, allowed: Callable[[str], bool] = is_public) -> bytes:
    """The bytes at `url`; what they are is for the decoder to say.

    Directly, not through a proxy, which would resolve the name a second time. Resolving a name takes as long as the
    system's resolver allows, and counts.

    Args:
        url: http or https, without a user name.
        limits: max_bytes and download_seconds.
        allowed: whether an IP address may be connected to.

    Raises:
        BadImage: "remote_image" (not such an address), "private_address", "download_failed", "too_many_bytes" or
            "download_too_slow".
    """
    import urllib3.exceptions

    deadline = time.monotonic() + limits.download_seconds
    where = url
    try:
        for _ in range(MAX_REDIRECTS + 1):
            parts = _parsed(where)
            found = _get(parts, _addresses(parts, allowed), limits, deadline)
            if isinstance(found, bytes):
                return found
            where = urljoin(where, found)
    except BadImage as error:
        beside = "" if where == url else f" (redirected from {url})"
        raise BadImage(error.reason, f"{where}{beside}: {error.detail}") from error
    except (urllib3.exceptions.HTTPError, http.client.HTTPException, OSError, ValueError) as error:
        if time.monotonic() >= deadline:
            raise _too_slow(url, limits) from error
        raise BadImage("download_failed", f"{where}: {error}") from error
    raise BadImage("download_failed", f"{url}: more than {MAX_REDIRECTS} redirects")


def _parsed(url: str) -> Url:
    from urllib3.util import parse_url

    parts = parse_url(url)
    if parts.scheme not in ("http", "https"):
        raise BadImage("remote_image", "only http and https are read")
    if parts.auth or not parts.host:
        raise BadImage("remote_image", "an address needs a host, and no user name or password")
    return parts


def _addresses(parts: Url, allowed: Callable[[str], bool]) -> list[str]:
    """The IP addresses of the host, every one of which is allowed."""
    assert parts.host is not None
    found = socket.getaddrinfo(parts.host.strip("[]"), parts.port, type=socket.SOCK_STREAM)
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    if refused := [address for address in addresses if not allowed(address)]:
        raise BadImage("private_address", f"{parts.host} is {', '.join(refused)}, which is not a public address")
    return addresses


def _get(parts: Url, addresses: Sequence[str], limits: ImageLimits, deadline: float) -> bytes | str:
    """The body, or where a redirect leads."""
    connection = _connect(parts, addresses, deadline)
    # A server that sends a byte now and then keeps within every time-out of a socket, which is for one wait.
    guard = threading.Timer(max(0.0, deadline - time.monotonic()), _shut, [connection.sock])
    guard.daemon = True
    guard.start()
    try:
        headers = {"Host": parts.netloc or "", "Accept": "image/*", "Accept-Encoding": "identity"}
        connection.request("GET", parts.request_uri, headers=headers, preload_content=False, decode_content=False)
        response = connection.getresponse()
        if response.status in _REDIRECTS and (location := response.headers.get("Location")):
            return location
        if response.status != 200:
            raise BadImage("download_failed", f"the server answers {response.status}")
        body = bytearray()
        while piece := response.read1(_PIECE):
            body += piece
            if len(body) > limits.max_bytes:
                raise BadImage("too_many_bytes", f"more than max_bytes = {limits.max_bytes}")
        if time.monotonic() >= deadline:  # a connection that was shut reads like one that ended
            raise TimeoutError("the connection was shut")
        return bytes(body)
    finally:
        guard.cancel()
        connection.close()


def _connect(parts: Url, addresses: Sequence[str], deadline: float) -> HTTPConnection:
    """A connection to the first of the addresses that takes one; certificates are checked against the host's name."""
    import certifi
    import urllib3.exceptions
    from urllib3.connection import HTTPConnection, HTTPSConnection

    failure: Exception = TimeoutError("no time left to connect")
    for address in addresses:
        seconds = deadline - time.monotonic()
        if seconds <= 0:
            break
        if parts.scheme == "http":
            connection = HTTPConnection(address, parts.port or 80, timeout=seconds)
        else:
            context = ssl.create_default_context()
            context.load_verify_locations(certifi.where())
            host = (parts.host or "").strip("[]")
            connection = HTTPSConnection(
                address, parts.port or 443, timeout=seconds, ssl_context=context, server_hostname=host,
                assert_hostname=host,
            )  # fmt: skip
        try:
            connection.connect()
            return connection
        except (urllib3.exceptions.HTTPError, OSError) as error:
            connection.close()
            failure = error
    raise failure


def _shut(sock: socket.socket) -> None:
    try:
        socket.socket.shutdown(sock, socket.SHUT_RDWR)  # whoever reads from it reads an end
    except OSError:  # closed meanwhile
        return


def _too_slow(url: str, limits: ImageLimits) -> BadImage:
    return BadImage("download_too_slow", f"{url} takes more than download_seconds = {limits.download_seconds}")
