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
import sys
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace


@dataclass
class Answer:
    """body: JSON-able, or bytes sent as they are. delay: seconds until the answer. action: None, 'reset' or 'close'
    (the connection, without an answer), 'truncate' (less than Content-Length says), 'drip' (a byte at a time) or
    'chunks' (the same in chunked encoding). pause: seconds after each byte of these two."""
    body: object = field(default_factory=dict)
    status: int = 200
    headers: dict = field(default_factory=dict)
    delay: float = 0.0
    action: str | None = None
    pause: float = 0.0


def wait(seconds):
    """time.sleep, which a test may replace for the client."""
    threading.Event().wait(seconds)


def deliver(handler, answer):
    """Give an answer on the connection of a request handler, or break the connection, as its `action` says."""
    handler.close_connection = answer.action in ("reset", "close", "truncate")
    if answer.action == "reset":
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(handler.connection.detach())
    elif answer.action != "close":
        write(handler, answer)


def write(handler, answer):
    body = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
    handler.send_response(answer.status)
    if answer.action == "chunks":
        handler.send_header("Transfer-Encoding", "chunked")
    else:
        handler.send_header("Content-Length", str(len(body) + (50 if answer.action == "truncate" else 0)))
    for name, value in answer.headers.items():
        handler.send_header(name, value)
    handler.end_headers()
    parts = [body[i:i + 1] for i in range(len(body))] if answer.action in ("drip", "chunks") else [body]
    if answer.action == "chunks":
        parts = [b"1\r\n%s\r\n" % part for part in parts] + [b"0\r\n\r\n"]
    for part in parts:
        handler.wfile.write(part)
        handler.wfile.flush()
        wait(answer.pause)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # one packet an answer: headers and body apart would wait 40 ms for each other

    def log_message(self, *args):
        pass

    def do_GET(self):
        deliver(self, self.server.faults.receive(self, self.rfile.read(int(self.headers.get("Content-Length", 0)))))

    do_POST = do_GET


class Server(ThreadingHTTPServer):
    def handle_error(self, *request):
        if not isinstance(sys.exc_info()[1], OSError):  # a client may well not wait for the end of an answer
            super().handle_error(*request)


class Faults:
    """The server; it runs inside a `with` block. requests: what arrived, each with `method`, `path` (raw), `headers`,
    `raw` (the bytes of the body), `body` (its JSON, None without one) and `time`. most: the highest number of requests
    in flight at once."""

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
                                                 raw=data, body=json.loads(data or b"null"), time=time.monotonic()))
            self._now += 1
            self.most = max(self.most, self._now)
            script = self.scripts[max((p for p in self.scripts if request.path.startswith(p)), key=len)]
            answer = script.pop(0) if len(script) > 1 else script[0]
        wait(answer.delay)
        with self._lock:  # before the answer is sent: the next request may come as soon as the client has it
            self._now -= 1
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
