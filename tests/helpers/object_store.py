"""gs://bucket without Google: a server of this process."""

import http
import os
import re
import socket

import pytest


@pytest.fixture
def emulator(monkeypatch):
    """The environment in which gs://bucket is a server of this process."""
    server = pytest.importorskip("gcp_storage_emulator.server", reason="needs the extra test")
    pytest.importorskip("gcsfs", reason="needs the extra test")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = server.create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket")
    storage = running._storage
    plain, plain_download = server.Request.get_header, server.objects.download

    # What the emulator does not know: ranges counted from the end, the header with the generation, and moves.
    def get_header(request, name, default=None):
        value = plain(request, name, default)
        if name == "range" and (last := re.fullmatch(r"bytes=-(\d+)", value or "")):
            file = storage.get_file(request.params["bucket_name"], request.params["object_id"])
            value = f"bytes={max(0, len(file) - int(last[1]))}-"
        return value

    def download(request, response, storage, *arguments, **options):
        response["x-goog-generation"] = "1"
        plain_download(request, response, storage, *arguments, **options)

    def move(request, response, storage, *arguments, **options):
        bucket, source = request.params["bucket_name"], request.params["object_id"]
        request.params["dest_bucket_name"] = bucket
        try:
            storage.get_file(bucket, source)
        except Exception:  # a directory, which is no object
            response.status = http.HTTPStatus.NOT_FOUND
            return
        server.objects.copy(request, response, storage, *arguments, **options)
        storage.delete_file(bucket, source)

    place = r"/b/(?P<bucket_name>[-.\w]+)/o/(?P<object_id>.*[^/]+)/moveTo/o/(?P<dest_object_id>.*[^/]+)$"
    monkeypatch.setattr(server, "HANDLERS", ((f"^/storage/v1{place}", {"POST": move}), *server.HANDLERS))
    monkeypatch.setattr(server.objects, "download", download)
    monkeypatch.setattr(server.Request, "get_header", get_header)
    address = f"http://127.0.0.1:{port}"
    with running:
        yield os.environ | {
            "STORAGE_EMULATOR_HOST": address,  # gcsfs, through which etils goes without TensorFlow
            "EPATH_USE_TF": "0",
            "TENSORSTORE_GCS_HTTP_URL": address,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
        }
