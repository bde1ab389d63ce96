"""A server that answers as scripted, well or badly, over real sockets, and records what arrived.

`with Faults() as server:` then `server.script(Answer(status=503), Answer({"data": []}))`.
"""

import json
import os
import socket
import struct
import sys
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

wait = threading.Event().wait  # time.sleep, which a test may replace for the client


@dataclass
class Answer:
    """body: JSON-able, or bytes as they are. delay: seconds until the answer. action: 'reset' or
    'close' (without an answer), 'truncate' (the body), 'drip' (a byte each `pause` seconds)."""

    body: object = field(default_factory=dict)
    status: int = 200
    headers: dict = field(default_factory=dict)
    delay: float = 0.0
    action: str | None = None
    pause: float = 0.0


def deliver(handler, answer):
    """Give an answer on the connection of a request handler, or break the connection."""
    handler.close_connection = answer.action in ("reset", "close", "truncate")
    if answer.action == "reset":
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(handler.connection.detach())
    elif answer.action != "close":
        body = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
        length = len(body) + (50 if answer.action == "truncate" else 0)
        handler.send_response(answer.status)
        for name, value in {"Content-Length": length, **answer.headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        step = 1 if answer.action == "drip" else len(body) or 1
        for i in range(0, len(body), step):
            handler.wfile.write(body[i : i + step])
            handler.wfile.flush()
            wait(answer.pause)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # one packet an answer: headers and body apart would wait 40 ms for each other
    log_message = staticmethod(lambda *args: None)

    def do_GET(self):
        deliver(self, self.server.faults.receive(self))

    do_POST = do_GET


class Server(ThreadingHTTPServer):
    def handle_error(self, *request):
        if not isinstance(sys.exc_info()[1], OSError):  # a client need not wait for the end
            super().handle_error(*request)


class Faults:
    """The server; it runs inside a `with` block. requests: what arrived, each with `method`, `path`
    (raw), `headers`, `raw` (the body's bytes), `body` (its JSON, None without one) and `time`.
    most: the highest number of requests in flight at once."""

    def __init__(self):
        self.scripts = {"": [Answer({"error": "nothing is scripted"}, 501)]}
        self.requests, self.most, self.now = [], 0, 0
        self.lock = threading.Lock()

    def script(self, *answers, prefix=""):
        """The next answers, the last one for good; the longest prefix of a path counts."""
        self.scripts[prefix] = list(answers)

    def receive(self, request):
        """Record a request; its answer, once that is due."""
        record = SimpleNamespace(path=request.path, headers=request.headers, time=time.monotonic())
        record.method = request.command
        record.raw = request.rfile.read(int(request.headers.get("Content-Length", 0)))
        record.body = json.loads(record.raw or b"null")
        with self.lock:
            self.requests.append(record)
            self.now += 1
            self.most = max(self.most, self.now)
            script = self.scripts[max(filter(request.path.startswith, self.scripts), key=len)]
            answer = script.pop(0) if len(script) > 1 else script[0]
        wait(answer.delay)
        with self.lock:  # before the answer is sent: the next request may come at once
            self.now -= 1
        return answer

    def __enter__(self):
        self.server = Server(("127.0.0.1", 0), Handler)
        self.server.faults, self.url = self, f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.002,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()


def dead_address():
    """A URL where nothing listens any more."""
    with Faults() as server:
        return server.url
