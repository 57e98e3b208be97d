"""A model behind an OpenAI-compatible endpoint."""

import contextlib
import http.server
import json
import threading


@contextlib.contextmanager
def endpoint(answer):
    """The URL of a model; `answer` takes a request to the model's turn, or to (status, what is sent in its place)."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            found = answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            if isinstance(found, str):
                message = {"role": "assistant", "content": found}
                choice = {"index": 0, "finish_reason": "stop", "message": message}
                reply = {"id": "x", "object": "chat.completion", "created": 0, "model": "m"}
                found = 200, reply | {"choices": [choice]}
            self.send_response(found[0])
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(found[1]).encode())

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()
