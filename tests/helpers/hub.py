"""A server on this machine that speaks as much of the hub's API as `huggingface_hub` needs to download a model."""

import contextlib
import dataclasses
import hashlib
import http.server
import json
import threading
import urllib.parse

SHA = "a" * 40
JSON = {"Content-Type": "application/json"}


@dataclasses.dataclass
class _Hub:
    repositories: dict
    gated: tuple
    cut: set  # files whose next download breaks off
    requests: list


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        hub = self.server.hub
        path = urllib.parse.urlparse(urllib.parse.unquote(self.path)).path
        hub.requests.append((self.command, path, self.headers.get("Range")))
        parts = path.strip("/").split("/")
        api = parts[0] == "api"
        of_dataset = parts[api] == "datasets"
        parts = parts[2 if api else of_dataset :]
        name = "datasets/" * of_dataset + "/".join(parts[:2])
        if name not in hub.repositories:
            return self._answer(404, headers={"X-Error-Code": "RepoNotFound"})
        if (parts[3] if len(parts) > 3 else "main") not in ("main", "v1", SHA):
            return self._answer(404, headers={"X-Error-Code": "RevisionNotFound"})
        root = hub.repositories[name]
        files = {str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*") if file.is_file()}
        if api:
            found = self._tree(files) if parts[2:3] == ["tree"] else self._info(name, files)
            return self._answer(200, json.dumps(found).encode(), JSON)
        if name in hub.gated:
            return self._answer(403, headers={"X-Error-Code": "GatedRepo"})
        return self._file("/".join(parts[4:]), files)

    do_HEAD = do_GET

    def _tree(self, files):
        return [{"type": "file", "path": name, "size": len(body), "oid": SHA} for name, body in files.items()]

    def _info(self, name, files):
        return {"id": name, "sha": SHA, "siblings": [{"rfilename": file} for file in files], "private": False}

    def _file(self, file, files):
        if file not in files:
            return self._answer(404, headers={"X-Error-Code": "EntryNotFound"})
        body, digest = files[file], hashlib.sha256(files[file]).hexdigest()
        headers = {"X-Repo-Commit": SHA, "ETag": f'"{digest}"', "Accept-Ranges": "bytes"}
        if self.command == "GET" and file in self.server.hub.cut:
            self.server.hub.cut.remove(file)
            self.close_connection = True
            return self._answer(200, body[: len(body) // 2], headers, length=len(body))
        if requested := self.headers.get("Range"):
            first = int(requested.removeprefix("bytes=").partition("-")[0])
            headers["Content-Range"] = f"bytes {first}-{len(body) - 1}/{len(body)}"
            return self._answer(206, body[first:], headers)
        return self._answer(200, body, headers)

    def _answer(self, status, body=b"", headers=(), length=None):
        self.send_response(status)
        length = len(body) if length is None else length
        for key, value in {"Content-Length": length, **dict(headers)}.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextlib.contextmanager
def serve_hub(repositories, gated=(), cut=()):
    """Serves directories; yields the address (for HF_ENDPOINT) and the list of requests (method, path, range).

    Args:
      repositories: "ORG/NAME" or "datasets/ORG/NAME" -> directory; its only revision is `main`, also known as `v1`.
      gated: names that nobody may download.
      cut: names of files whose first download breaks off in the middle.
    """
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.hub = _Hub(repositories=dict(repositories), gated=tuple(gated), cut=set(cut), requests=[])
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", server.hub.requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
