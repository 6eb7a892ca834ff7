"""A server whose answers make no sense, never end, or come a byte at a time: `/<behaviour>/v1/…`.

python tests/helpers/hostile_server.py answer.json      # a good answer, to spoil; prints the port
"""

from __future__ import annotations

import copy
import gzip
import json
import sys
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

Spoil = Callable[[dict[str, Any]], Any]


def field(*path: Any) -> Callable[[Any], Spoil]:
    """Sets what lies at a path of the answer; Ellipsis deletes it."""

    def spoiled(value: Any) -> Spoil:
        def spoil(answer: dict[str, Any]) -> Any:
            place: Any = answer
            for key in path[:-1]:
                place = place[key]
            if value is ...:
                del place[path[-1]]
            else:
                place[path[-1]] = value
            return answer

        return spoil

    return spoiled


def first(name: str, value: Any) -> Spoil:
    return field("choices", 0, name)(value)


SENSELESS: dict[str, Spoil] = {
    "list": lambda a: [a], "null": lambda a: None, "text": lambda a: "ok",
    "no-choices": field("choices")(...), "choices-mapping": field("choices")({"0": 1}),
    "choice-text": field("choices", 0)("text"), "one-missing": lambda a: a | {"choices": a["choices"][:1]},
    "one-more": lambda a: a | {"choices": a["choices"] * 2}, "index-twice": first("index", 1),
    "index-text": first("index", "0"), "index-true": first("index", True), "ids-text": first("token_ids", "1, 2"),
    "ids-floats": first("token_ids", [1.0, 2.0]), "ids-bools": first("token_ids", [True, False]),
    "ids-negative": first("token_ids", [-1, 2]), "ids-beyond": first("token_ids", [2**30, 2]),
    "ids-huge": first("token_ids", [10**30, 2]), "ids-nested": first("token_ids", [[1], [2]]),
    "too-many-tokens": lambda a: first("token_ids", [5] * 30_000)(a) | {"usage": {"completion_tokens": 30_002}},
    "finish-number": first("finish_reason", 7), "finish-null": first("finish_reason", None),
    "no-usage": field("usage")(...), "usage-lies": field("usage", "completion_tokens")(10**9),
    "usage-true": field("usage", "completion_tokens")(True), "prompt-text": field("prompt_token_ids")("1 2"),
    "prompt-huge": field("prompt_token_ids")([10**30]), "logprobs-nan": first("logprobs", float("nan")),
    "logprobs-infinite": first("logprobs", [float("-inf")]),
}  # fmt: skip
RAW = {
    "deep": b"[" * 200_000, "not-utf8": b'{"choices": "\xff\xfe"}', "long-number": b'{"usage": ' + b"9" * 5000 + b"}",
    "empty": b"", "html": b"<html>a proxy's page</html>", "cut": b'{"choices": [{"index": 0, "tok',
}  # fmt: skip


def slowly(data: bytes, pause: float = 0.05) -> Iterator[bytes]:
    for byte in data:
        time.sleep(pause)
        yield bytes([byte])


def endless(part: bytes) -> Iterator[bytes]:
    while True:
        yield part


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
CHUNK = b"10000\r\n" + b" " * 2**16 + b"\r\n"
STREAMS: dict[str, Callable[[], Iterator[bytes]]] = {
    "slow-headers": lambda: slowly(HEAD * 9),
    "silent": lambda: iter([HEAD + b"Content-Length: 999\r\n\r\n"]),
    "slow-bytes": lambda: (p for p in [HEAD + b"Content-Length: 999\r\n\r\n", *[b" "] * 999] if not time.sleep(0.05)),
    "slow-without-length": lambda: (p for p in [HEAD + b"\r\n", *[b" "] * 999] if not time.sleep(0.05)),
    "slow-chunks": lambda: (
        p for p in [HEAD + b"Transfer-Encoding: chunked\r\n\r\n", *[b"1\r\n \r\n"] * 999] if not time.sleep(0.05)
    ),
    "continues": lambda: (p for p in endless(b"HTTP/1.1 100 Continue\r\n\r\n") if not time.sleep(0.01)),
    "endless": lambda: (p for part in ([HEAD + b"Transfer-Encoding: chunked\r\n\r\n"], endless(CHUNK)) for p in part),
    "endless-error": lambda: (
        p for part in ([b"HTTP/1.1 503 Busy\r\nConnection: close\r\n\r\n"], endless(b"x" * 2**16)) for p in part
    ),
    "endless-header": lambda: (p for part in ([HEAD + b"X: "], endless(b"x" * 2**16)) for p in part),
    "many-headers": lambda: (p for part in ([HEAD], endless(b"X: y\r\n")) for p in part),
    "bomb": lambda: iter(
        [HEAD + b"Content-Encoding: gzip\r\nConnection: close\r\n\r\n", gzip.compress(b" " * 10**7, 1)]
    ),
    "redirect": lambda: iter([b"HTTP/1.1 307 Elsewhere\r\nLocation: http://127.0.0.1:9/\r\nContent-Length: 0\r\n\r\n"]),
    "no-http": lambda: iter([b"220 mail ready\r\n"]),
    "nothing": lambda: iter([]),
    "half": lambda: iter([HEAD + b"Content-Length: 999\r\nConnection: close\r\n\r\n{"]),
}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.answer()

    def answer(self) -> None:
        name = self.path.split("/")[1]
        if name in STREAMS:
            self.close_connection = True
            try:
                for part in STREAMS[name]():
                    self.wfile.write(part)
                if name == "silent":
                    time.sleep(30)
            except OSError:  # whoever asked has gone
                pass
            return
        status, data = 200, RAW.get(name)
        if name == "repeats-the-key":
            status, data = 400, f"your {self.headers['Authorization']} is wrong\x1b[2J".encode()
        if data is None:
            data = json.dumps(SENSELESS.get(name, lambda a: a)(copy.deepcopy(GOOD))).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


if __name__ == "__main__":
    GOOD: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()
