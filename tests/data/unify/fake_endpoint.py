"""A local server that speaks as much of the OpenAI interface as a test needs."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FakeEndpoint:
    """Answers each chat with what `reply` makes of it, after the given failures.

    Args:
        reply: from the messages to a text, or to a whole body.
        failures: pairs of a status and headers that the first requests are answered with.
    """

    def __init__(self, reply, failures=()):
        self.bodies = []
        self.keys = []
        self._reply = reply
        self._failures = list(failures)
        self._lock = threading.Lock()

    def answer(self, body, key):
        with self._lock:
            self.bodies.append(body)
            self.keys.append(key)
            if self._failures:
                return self._failures.pop(0), {"error": "busy"}
        text = self._reply(body["messages"])
        if not isinstance(text, str):
            return 200, text
        return 200, {"choices": [{"message": {"role": "assistant", "content": text}}]}

    @contextmanager
    def address(self):
        """Serve until the block ends."""
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                raw = self.rfile.read(int(self.headers["Content-Length"]))
                status, answer = 404, {"error": f"no {self.path}"}
                if self.path == "/v1/chat/completions":
                    key = self.headers.get("Authorization")
                    status, answer = endpoint.answer(json.loads(raw), key)
                content = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/v1"
        finally:
            server.shutdown()
            server.server_close()
            thread.join()
