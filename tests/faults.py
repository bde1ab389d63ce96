"""A server for the tests that answers as scripted, well or badly, over real sockets, and records what arrived.

    with Faults() as server:
        server.script(Answer(status=503), Answer({"data": []}))  # in this order; the last one repeats
        ...  # requests to server.url
        assert len(server.requests) == 2
"""
import json
import os
import socket
import struct
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace


@dataclass
class Answer:
    """body: JSON-able, or bytes sent as they are. delay: seconds until the answer. action: None, 'reset' or 'close'
    (the connection, without an answer), 'truncate' (less than Content-Length says) or 'drip' (a byte at a time)."""
    body: object = field(default_factory=dict)
    status: int = 200
    headers: dict = field(default_factory=dict)
    delay: float = 0.0
    action: str | None = None


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # one packet an answer: headers and body apart would wait 40 ms for each other

    def log_message(self, *args):
        pass

    def do_GET(self):
        answer = self.server.faults.receive(self, self.rfile.read(int(self.headers.get("Content-Length", 0))))
        self.close_connection = answer.action in ("reset", "close", "truncate")
        if answer.action == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())
        elif answer.action != "close":
            self.write(answer)

    do_POST = do_GET

    def write(self, answer):
        body = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
        self.send_response(answer.status)
        self.send_header("Content-Length", str(len(body) + (50 if answer.action == "truncate" else 0)))
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.end_headers()
        for part in (body[i:i + 1] for i in range(len(body))) if answer.action == "drip" else [body]:
            self.wfile.write(part)
            self.wfile.flush()


class Faults:
    """The server; it runs inside a `with` block. requests: what arrived, each with `method`, `path` (raw), `headers`,
    `body` (JSON, None without one) and `time`. most: the highest number of requests in flight at once."""

    def __init__(self):
        self.scripts, self.requests = {"": [Answer({"error": "nothing is scripted"}, 501)]}, []
        self.most, self._now, self._lock = 0, 0, threading.Lock()

    def script(self, *answers, prefix=""):
        """Replace the answers to paths that start with `prefix`; the longest prefix counts."""
        self.scripts[prefix] = list(answers)

    def receive(self, request, data):
        """Record a request; its answer, once that is due."""
        with self._lock:
            self.requests.append(SimpleNamespace(method=request.command, path=request.path, headers=request.headers,
                                                 body=json.loads(data or b"null"), time=time.monotonic()))
            self._now += 1
            self.most = max(self.most, self._now)
            script = self.scripts[max((p for p in self.scripts if request.path.startswith(p)), key=len)]
            answer = script.pop(0) if len(script) > 1 else script[0]
        threading.Event().wait(answer.delay)  # not time.sleep, which a test may replace
        with self._lock:  # before the answer is sent: the next request may come as soon as the client has it
            self._now -= 1
        return answer

    def __enter__(self):
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
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
