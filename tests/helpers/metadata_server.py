"""A server that answers as the metadata server of Google's machines does."""

import contextlib
import http.server
import threading
from urllib.parse import parse_qs, urlsplit

NOTHING = {"preempted": "FALSE", "maintenance-event": "NONE"}


@contextlib.contextmanager
def serving():
    with Metadata(NOTHING) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


class Metadata(http.server.ThreadingHTTPServer):
    """Waits for changes, tags values, and refuses who does not say that he means it."""

    daemon_threads = True

    def __init__(self, values):
        super().__init__(("127.0.0.1", 0), Handler)
        self.values, self.changed = dict(values), threading.Condition()
        self.asked, self.failing = [], 0

    @property
    def host(self):
        return f"127.0.0.1:{self.server_port}"

    def set(self, key, value):
        with self.changed:
            self.values[key] = value
            self.changed.notify_all()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        url = urlsplit(self.path)
        key, query = url.path.removeprefix("/computeMetadata/v1/instance/"), parse_qs(url.query)
        server = self.server
        with server.changed:
            server.asked.append(key)
            if self.headers["Metadata-Flavor"] != "Google" or key not in server.values:
                self.send_error(403 if key in server.values else 404)
                return
            if server.failing:
                server.failing -= 1
                self.send_error(503)
                return
            server.changed.wait_for(
                lambda: tag(server.values[key]) != query["last_etag"][0], float(query["timeout_sec"][0])
            )
            value = server.values[key]
        self.send_response(200)
        self.send_header("ETag", tag(value))
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(value.encode())

    def log_message(self, *_):
        pass


def tag(value):
    return f"{hash(value) & 0xFFFF:x}f"
