"""Images at addresses: from real servers on loopback, which the default refuses as private."""

from __future__ import annotations

import json
import pickle
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from helpers.hostile_images import encoded, jpeg_of_scans
from PIL import Image

from vigos.data.decode import BadImage, ImageLimits
from vigos.data.download import fetch_image, is_public
from vigos.data.examples import BadExample, load_rows

PICTURE = encoded(Image.new("RGB", (32, 32), "red"))
QUICK = ImageLimits(max_bytes=2**20, download_seconds=1.0)


class Server(ThreadingHTTPServer):
    """Serves pictures and mischief by path; `seen` lists (path, Host) of what was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.seen: list[tuple[str, str]] = []
        self.over = threading.Event()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.server.seen.append((self.path, self.headers["Host"]))
        kind, _, rest = self.path[1:].partition("/")
        try:
            getattr(self, f"_{kind}")(rest)
        except (BrokenPipeError, ConnectionResetError):  # it was refused while it was sent
            self.close_connection = True

    def answer(self, status: int, body: bytes = b"", length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body) if length is None else length)} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def drip(self, data: bytes) -> None:
        """A byte now and then, until the test is over."""
        self.wfile.write(data)
        while not self.server.over.wait(0.05):
            self.wfile.write(b"x")
            self.wfile.flush()

    def _picture(self, _: str) -> None:
        self.answer(200, PICTURE)

    def _unmeasured(self, _: str) -> None:
        self.wfile.write(b"HTTP/1.0 200 OK\r\n\r\n" + PICTURE)

    def _scans(self, _: str) -> None:
        self.answer(200, jpeg_of_scans((8000, 8000), 2000))

    def _page(self, _: str) -> None:
        self.answer(200, b"<html>sign in</html>")

    def _missing(self, _: str) -> None:
        self.answer(404)

    def _cut(self, _: str) -> None:
        self.answer(200, PICTURE, length=len(PICTURE) + 100)

    def _hop(self, rest: str) -> None:
        """hop/3: three redirects to the picture; hop/http://…: one to there."""
        to = rest if not rest.isdigit() else f"/hop/{int(rest) - 1}" if int(rest) > 1 else "/picture"
        self.answer(302, Location=to)

    def _endless(self, _: str) -> None:
        self.wfile.write(b"HTTP/1.0 200 OK\r\n\r\n")
        while not self.server.over.is_set():
            self.wfile.write(bytes(2**16))

    def _drips(self, where: str) -> None:
        self.drip(
            {"status": b"HTTP/1.0 20", "headers": b"HTTP/1.0 200 OK\r\nX: ", "body": b"HTTP/1.0 200 OK\r\n\r\n"}[where]
        )


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.over.set()
    made.shutdown()
    made.server_close()


def loopback(address: str) -> bool:
    return address == "127.0.0.1"


def fetched(url: str, limits: ImageLimits = QUICK) -> bytes:
    return fetch_image(url, limits, allowed=loopback)


def reason_of(url: str, limits: ImageLimits = QUICK, **options: Any) -> str:
    with pytest.raises(BadImage) as caught:
        fetch_image(url, limits, **({"allowed": loopback} | options))
    assert url in caught.value.detail
    return caught.value.reason


# --- Where to ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", ["8.8.8.8", "193.0.6.139", "2606:4700:4700::1111", "2a00:1450:4001::200e"])
def test_public_addresses(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0", "127.0.0.1", "127.8.9.10", "10.1.2.3", "172.16.0.1", "192.168.1.1", "100.64.0.1", "198.18.0.1",
        "169.254.1.1", "224.0.0.1", "239.1.1.1", "240.0.0.1", "255.255.255.255", "192.0.2.1", "203.0.113.7",
        "192.88.99.1", "::", "::1", "fe80::1", "fe80::1%eth0", "fc00::1", "fd12::1", "fec0::1", "ff02::1", "ff0e::1",
        "2001:db8::1", "3fff::1",
        # IPv4 in disguise: mapped, compatible, translated, 6to4, Teredo
        "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:8.8.8.8", "::127.0.0.1", "64:ff9b::7f00:1", "64:ff9b:1::7f00:1",
        "2002:7f00:1::", "2001:0:7f00:1::",
        # what clouds configure their machines by: most of them, AWS over IPv6, Alibaba, Oracle, Azure
        "169.254.169.254", "fd00:ec2::254", "100.100.100.200", "192.0.0.192", "168.63.129.16",
    ],
)  # fmt: skip
def test_other_addresses(address: str) -> None:
    assert not is_public(address)


def test_loopback_is_refused_before_it_hears_of_it(server: Server) -> None:
    port = server.server_port
    hosts = ["127.0.0.1", "localhost", "2130706433", "127.1", "0x7f.0.0.1", "0.0.0.0", "[::1]", "[::ffff:127.0.0.1]"]
    for host in hosts:
        assert reason_of(f"http://{host}:{port}/picture", allowed=is_public) == "private_address", host
    assert server.seen == []
    assert fetched(f"{server.url}/picture") == PICTURE  # the server is well


@pytest.mark.parametrize(
    "url",
    ["file:///etc/hostname", "ftp://example.org/a.png", "gopher://example.org/", "http://", "http:///a.png",
     "http://me:secret@127.0.0.1/a.png", "http://me@127.0.0.1/a.png"],
)  # fmt: skip
def test_addresses_that_are_not_read(url: str) -> None:
    assert reason_of(url) == "remote_image"


def test_redirects_are_checked_like_the_first_address(server: Server) -> None:
    assert fetched(f"{server.url}/hop/3") == PICTURE
    assert len(server.seen) == 4
    assert reason_of(f"{server.url}/hop/4") == "download_failed"
    for to, reason in {
        f"http://127.0.0.2:{server.server_port}/picture": "private_address",
        "http://169.254.169.254/latest/meta-data": "private_address",
        "//127.0.0.2/picture": "private_address",
        "file:///etc/hostname": "remote_image",
    }.items():
        server.seen.clear()
        assert reason_of(f"{server.url}/hop/{to}") == reason
        assert len(server.seen) == 1


def test_a_name_is_resolved_once(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name server that answers with an allowed address first and with another one after that gains nothing."""
    original, asked = socket.getaddrinfo, []

    def rebinding(host: str, port: int, *rest: Any, **options: Any) -> Any:
        asked.append(host)
        if host == "pictures.test":
            host = "127.0.0.1" if asked.count(host) == 1 else "127.0.0.2"
        return original(host, port, *rest, **options)

    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    assert fetched(f"http://pictures.test:{server.server_port}/picture") == PICTURE
    assert asked.count("pictures.test") == 1
    assert server.seen == [("/picture", f"pictures.test:{server.server_port}")]
    assert reason_of(f"http://pictures.test:{server.server_port}/picture") == "private_address"
    assert len(server.seen) == 1


def test_every_address_of_a_name_must_be_allowed(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, server.server_port)) for a in ("127.0.0.1", "10.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: entries)
    assert reason_of(f"http://two.test:{server.server_port}/picture") == "private_address"
    assert server.seen == []


# --- How much, how long -----------------------------------------------------------------------------------------------


def test_what_servers_answer(server: Server) -> None:
    assert fetched(f"{server.url}/unmeasured") == PICTURE
    assert reason_of(f"{server.url}/missing") == "download_failed"
    assert reason_of(f"{server.url}/cut") == "download_failed"
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
    assert reason_of(f"http://127.0.0.1:{port}/picture") == "download_failed"
    assert reason_of("http://no-such-name.invalid/picture") == "download_failed"
    assert reason_of("http://" + "a" * 300 + ".test/picture") == "download_failed"


@pytest.mark.slow
def test_downloads_end(server: Server) -> None:
    assert fetched(f"{server.url}/picture", replace(QUICK, max_bytes=len(PICTURE))) == PICTURE
    assert reason_of(f"{server.url}/picture", replace(QUICK, max_bytes=len(PICTURE) - 1)) == "too_many_bytes"
    assert reason_of(f"{server.url}/endless") == "too_many_bytes"
    with socket.create_server(("127.0.0.1", 0)) as silent:
        slow = [f"{server.url}/drips/{part}" for part in ("status", "headers", "body")]
        for url in (*slow, f"http://127.0.0.1:{silent.getsockname()[1]}/silent"):
            start = time.monotonic()
            assert reason_of(url) == "download_too_slow", url
            assert 0.9 < time.monotonic() - start < 5


# --- https ------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes its certificate with openssl")
def test_certificates_are_checked_against_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(certificate)],
        check=True, capture_output=True,
    )  # fmt: skip
    server = Server()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)

    def both(address: str) -> bool:
        return address in ("127.0.0.1", "::1")

    try:
        url = f"https://localhost:{server.server_port}/picture"
        assert reason_of(url, allowed=both) == "download_failed"  # nobody vouches for it
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert fetch_image(url, QUICK, allowed=both) == PICTURE
        assert reason_of(url.replace("localhost", "127.0.0.1"), allowed=both) == "download_failed"  # not its name
    finally:
        server.shutdown()
        server.server_close()


# --- Rows -------------------------------------------------------------------------------------------------------------


def test_rows_with_addresses(server: Server, tmp_path: Path) -> None:
    paths = ("picture", "page", "missing", "scans")
    records = [
        {"problem": "p", "answer": "a", "problem_id": path, "images": [f"{server.url}/{path}"]} for path in paths
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, records)))

    off = load_rows(tmp_path / "rows.jsonl")
    with pytest.raises(BadExample, match=r"row picture: remote_image: .* set allow_remote_images to fetch them"):
        off[0]
    on = load_rows(tmp_path / "rows.jsonl", allow_remote_images=True)
    with pytest.raises(
        BadExample, match=r"row picture: private_address: .*127\.0\.0\.1, which is not a public address"
    ):
        on[0]
    assert server.seen == []

    limits = ImageLimits(decode_seconds=0.2)
    assert pickle.loads(pickle.dumps(on.reader)) == on.reader  # for workers of the data loader that are not forked
    images = replace(on.reader.images, fetch=partial(fetch_image, allowed=loopback), limits=limits)
    reader = replace(on.reader, images=images)
    found = [type(on)(on.records, reader, "return")[i] for i in range(4)]
    assert found[0]["images"][0].getpixel((3, 3)) == (255, 0, 0)
    assert [row.reason for row in found[1:]] == ["unreadable_image", "download_failed", "decode_too_slow"]


def test_the_command_line_allows_it(tmp_path: Path) -> None:
    from vigos.cli import Source, parse_run
    from vigos.launch import build_trainer

    good = {"problem": "p", "answer": "a", "problem_id": "good"}
    (tmp_path / "rows.jsonl").write_text(
        json.dumps(good | {"images": []}) + "\n" + json.dumps(good | {"images": ["http://127.0.0.1/a.png"]})
    )
    flags = ["--model", "builtin", "--data", str(tmp_path / "rows.jsonl"), "--output-dir", str(tmp_path), "--use_cpu"]
    for more, reason in (([], "remote_image"), (["--allow-remote-images", "true"], "private_address")):
        source, config = parse_run(None, [*flags, *more])
        assert isinstance(source, Source)
        row = build_trainer(source, config).train_dataset[1]
        assert isinstance(row, BadExample)
        assert row.reason == reason
