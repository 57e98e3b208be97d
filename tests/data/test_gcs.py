"""Reading a store on gs:// through TensorStore, from a server on the loopback that speaks enough of its protocol.

The manifest is not part of this: etils reads it through TensorFlow or gcsfs, which have no such switch or are not
installed.
"""

import http.server
import json
import subprocess
import sys
import threading
import urllib.parse

import numpy as np
import pytest

READ = """
import json, sys
import numpy as np
from etils import epath
from lemur_jax.data.manifest import read_manifest
from lemur_jax.data.rows import ConcatRows
from lemur_jax.data.store import TokenStore

store = TokenStore(epath.Path("gs://bucket/stores/a/train"), read_manifest(sys.argv[1]))
rows = ConcatRows(store, 4096)
indices = np.array(json.loads(sys.argv[2]))
np.savez(sys.argv[3], names=store.document_ids(np.array([7, 3])), **rows.read(indices))
"""


@pytest.fixture
def server(tmp_path):
    """Serves the files in tmp_path as the objects `stores/...` of a bucket; notes what is asked for."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            name = urllib.parse.unquote(urllib.parse.urlparse(self.path).path.partition("/b/bucket/o/")[2])
            file = tmp_path / name.removeprefix("stores/")
            asked.append((name, self.headers.get("Range", "")))
            if not name or not file.is_file():
                self.send_error(404)
                return
            data = file.read_bytes()
            start, _, stop = self.headers.get("Range", "").removeprefix("bytes=").partition("-")
            first = int(start) if start else len(data) - int(stop) if stop else 0
            last = int(stop) + 1 if start and stop else len(data)
            self.send_response(206 if "Range" in self.headers else 200)
            self.send_header("Content-Range", f"bytes {first}-{min(last, len(data)) - 1}/{len(data)}")
            self.send_header("Content-Length", str(len(data[first:last])))
            self.send_header("x-goog-generation", "1")
            self.end_headers()
            self.wfile.write(data[first:last])

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}", asked
        listening.shutdown()


def test_a_store_on_gs_is_read_by_parts_of_its_files(make_store, tmp_path, server, monkeypatch):
    address, asked = server
    documents = [np.random.default_rng(i).integers(0, 1000, 5000) for i in range(200)]
    store = make_store(documents)
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", address)
    monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")
    rows = [200, 3, 77]
    command = [sys.executable, "-c", READ, str(store.path), json.dumps(rows), str(tmp_path / "read.npz")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    from lemur_jax.data.rows import ConcatRows

    with np.load(tmp_path / "read.npz") as read:
        assert read["names"].tolist() == ["doc-7", "doc-3"]
        for key, values in ConcatRows(store, 4096).read(np.array(rows)).items():
            np.testing.assert_array_equal(read[key], values)
    # Not whole files: of the tokens the index of the shard, and for each row the one or two chunks that it lies in.
    of_tokens = [part for name, part in asked if "/tokens/c/" in name]
    assert of_tokens
    assert all(of_tokens)
    assert len(of_tokens) <= 1 + 2 * len(rows)
