"""A server on this machine that speaks as much of the hub's API as `huggingface_hub` needs to download a model."""

import contextlib
import hashlib
import http.server
import json
import threading
import urllib.parse

SHA = "a" * 40


@contextlib.contextmanager
def serve_hub(repositories, gated=(), cut=()):
    """Serves directories; yields the address (for HF_ENDPOINT) and the list of requests (method, path, range).

    Args:
      repositories: "ORG/NAME" or "datasets/ORG/NAME" -> directory; its only revision is `main`, also known as `v1`.
      gated: names that nobody may download.
      cut: names of files whose first download breaks off in the middle.
    """
    requests, broken = [], set()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def answer(self, status, body=b"", headers=(), length=None):
            self.send_response(status)
            for key, value in {
                "Content-Length": len(body) if length is None else length,
                **dict(headers),
            }.items():
                self.send_header(key, str(value))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_GET(self):
            path = urllib.parse.urlparse(urllib.parse.unquote(self.path)).path
            requests.append((self.command, path, self.headers.get("Range")))
            parts = path.strip("/").split("/")
            api = parts[0] == "api"
            of_dataset = parts[api] == "datasets"
            parts = parts[2 if api else of_dataset :]
            name = "datasets/" * of_dataset + "/".join(parts[:2])
            revision = parts[3] if len(parts) > 3 else "main"
            if name not in repositories:
                return self.answer(404, headers={"X-Error-Code": "RepoNotFound"})
            if revision not in ("main", "v1", SHA):
                return self.answer(404, headers={"X-Error-Code": "RevisionNotFound"})
            root = repositories[name]
            files = {str(f.relative_to(root)): f.read_bytes() for f in root.rglob("*") if f.is_file()}
            if api and parts[2:3] == ["tree"]:
                tree = [{"type": "file", "path": key, "size": len(files[key]), "oid": SHA} for key in files]
                return self.answer(200, json.dumps(tree).encode(), {"Content-Type": "application/json"})
            if api:
                siblings = [{"rfilename": key} for key in files]
                found = {"id": name, "sha": SHA, "siblings": siblings, "private": False}
                return self.answer(200, json.dumps(found).encode(), {"Content-Type": "application/json"})
            if name in gated:
                return self.answer(403, headers={"X-Error-Code": "GatedRepo"})
            self.send_file("/".join(parts[4:]), files)

        do_HEAD = do_GET

        def send_file(self, file, files):
            if file not in files:
                return self.answer(404, headers={"X-Error-Code": "EntryNotFound"})
            body = files[file]
            headers = {
                "X-Repo-Commit": SHA,
                "ETag": f'"{hashlib.sha256(body).hexdigest()}"',
                "Accept-Ranges": "bytes",
            }
            if self.command == "GET" and file in cut and file not in broken:
                broken.add(file)
                self.answer(200, body[: len(body) // 2], headers, length=len(body))
                self.close_connection = True
                return
            if requested := self.headers.get("Range"):
                first = int(requested.removeprefix("bytes=").partition("-")[0])
                headers["Content-Range"] = f"bytes {first}-{len(body) - 1}/{len(body)}"
                return self.answer(206, body[first:], headers)
            self.answer(200, body, headers)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
