"""A real HTTP judge: right if the answer holds the reference's letters in any case; misbehaves by its path."""

from __future__ import annotations

import json
import re
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SEEN: dict[str, int] = {}


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        behaviour = self.path.split("/")[1]
        SEEN[behaviour] = count = SEEN.get(behaviour, 0) + 1
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        asked = body["messages"][0]["content"]
        found = re.search(r"Reference:\n(.*)\n\nAnswer:\n(.*)\n\nReply", asked, re.DOTALL)
        assert found
        reference, answer = found.groups()
        status, said = 200, "Incorrect." if reference.lower() not in answer.lower() else "Correct."
        if behaviour == "hangs":
            time.sleep(5)
        if behaviour == "busy" and count == 1:
            status = 503
        if behaviour == "refuses":
            status, said = 401, f"{self.headers['Authorization']} is nobody's; try {count}"
        if behaviour == "headers":
            status, said = (
                401,
                " ".join(f"{k}={v}" for k, v in self.headers.items() if k.lower()[:4] in ("auth", "open")),
            )
        if behaviour == "thinks":
            words = f"<think> {'Is this incorrect or correct? ' * 20} </think> {said}".split()
            said = " ".join(words[: body["max_tokens"]])
        if behaviour == "undecided" or (behaviour == "sometimes" and count % 2):
            said = "Either correct or incorrect."
        content = json.dumps({"choices": [{"message": {"content": said}}]}).encode()
        content = b"<html>" if behaviour == "garbage" else b"{}" if behaviour == "empty" else content
        self.send_response(status)
        self.send_header("Content-Type", "text/html" if behaviour == "garbage" else "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()
