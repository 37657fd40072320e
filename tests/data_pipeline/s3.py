"""An S3-compatible server on loopback that can be told to fail: 500s, connections dropped in mid-answer, death."""

import random
import socket
import threading

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from moto.server import MotoRequestHandler
from werkzeug.serving import make_server


class FlakyS3:
    """Serves until `stop()`. Of the requests that read something, one in `fail_every` fails (0: none, 1: all).

    After `reads_left` more of them (None: never) the server is dead: it drops every connection, the first one in
    mid-answer.
    """

    def __init__(self):
        self.fail_every = 0
        self.reads_left: int | None = None
        self.num_reads = self.num_failures = 0
        self._lock, self._random = threading.Lock(), random.Random(0)
        self._app = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True, request_handler=MotoRequestHandler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def stop(self):
        self._server.shutdown()
        self._thread.join()

    def _answer(self, environ, start_response):
        if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            return self._app(environ, start_response)
        if self.reads_left is not None:
            with self._lock:
                self.reads_left -= 1
                left = self.reads_left
            if left == -1:
                return self._half_of(b"".join(self._app(environ, start_response)), environ["werkzeug.socket"])
            if left < 0:
                environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
                raise ConnectionAbortedError("dropped on purpose")
        with self._lock:
            self.num_reads += 1
            fails = self.fail_every and (not self.num_failures or self._random.random() < 1 / self.fail_every)
            self.num_failures += bool(fails)
            kind = self.num_failures % 2
        if not fails:
            return self._app(environ, start_response)
        if kind or environ["REQUEST_METHOD"] == "HEAD":
            start_response("500 Internal Server Error", [("Content-Length", "0")])
            return []
        body = b"".join(self._app(environ, start_response))
        return self._half_of(body, environ["werkzeug.socket"])

    @staticmethod
    def _half_of(body, connection):
        yield body[: len(body) // 2]
        connection.shutdown(socket.SHUT_RDWR)
        raise ConnectionAbortedError("dropped on purpose")
