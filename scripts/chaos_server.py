"""A model server for scripts/chaos.py: the completions API, with replies that follow from the prompt alone.

    python scripts/chaos_server.py PORT

`transformers serve` can't stop at a string with the tokenizers of the demo's models.
"""

from __future__ import annotations

import json
import sys
import time
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ACTIONS = ("look", "inventory", "go to cabinet 1", "go to desk 1", "open fridge 1")
SECONDS = 0.1
"""How long a reply takes."""


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self._answer({"status": "ok"})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        time.sleep(SECONDS)
        text = f" {ACTIONS[zlib.crc32(asked['prompt'].encode()) % len(ACTIONS)]}"
        counts = {"prompt_tokens": len(asked["prompt"].split()), "completion_tokens": len(text.split())}
        self._answer({"id": "0", "object": "text_completion", "created": 0, "model": asked["model"],
                      "choices": [{"index": 0, "text": text, "finish_reason": "stop", "logprobs": None}],
                      "usage": counts | {"total_tokens": sum(counts.values())}})

    def _answer(self, value: object) -> None:
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *about: object) -> None:
        """Nothing is logged."""


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
