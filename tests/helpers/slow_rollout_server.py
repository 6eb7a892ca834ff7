"""The server of `rollout_server_process.py` with a clock and a temper: `/<behaviour>[,<behaviour>…]/v1/…`.

    delay-0.3      every completion takes 0.3 s longer
    dies-at-7      the process ends at the seventh request for completions
    hangs-at-7     from the seventh on there is no answer
    refuses-at-7   from the seventh on the answer is 400

GET / also tells, in the order in which they came, each request for completions: adapter, seed, begin, end (seconds).
"""

from __future__ import annotations

import io
import json
import os
import sys
import threading
import time
from http.server import ThreadingHTTPServer
from typing import Any

from helpers.rollout_server_process import ADAPTERS, Handler

ASKED: list[dict[str, Any]] = []
LOCK = threading.Lock()


class Slow(Handler):
    def do_GET(self) -> None:
        if self.path == "/":
            return self.reply(200, {"asked": ASKED, "adapters": ADAPTERS})
        super().do_GET()

    def do_POST(self) -> None:
        if not self.path.endswith("chat/completions"):
            return super().do_POST()
        data = self.rfile.read(int(self.headers["Content-Length"]))
        self.rfile = io.BytesIO(data)
        body = json.loads(data)
        words = self.path.strip("/").partition("/v1/")[0].split(",")
        behaviours = dict(word.rsplit("-", 1) for word in words if "-" in word)
        entry = {"model": body["model"], "seed": body["seed"], "begin": time.time(), "end": None, "path": self.path}
        with LOCK:
            ASKED.append(entry)
            count = sum(e["path"] == self.path for e in ASKED)

        def past(behaviour: str) -> bool:
            return count >= int(behaviours.get(behaviour, sys.maxsize))

        if past("dies-at"):
            os._exit(1)
        if past("hangs-at"):
            time.sleep(600)
        if past("refuses-at"):
            return self.reply(400, {"error": "enough of it"})
        time.sleep(float(behaviours.get("delay", 0)))
        super().do_POST()
        entry["end"] = time.time()


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    print(server.server_port, flush=True)
    sys.stdout.close()
    server.serve_forever()
