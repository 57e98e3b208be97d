"""What the tests of inference share; each session compiles its programs once."""

import threading

import jax
import pytest
import uvicorn

from lemur_jax.infer.serve import application
from lemur_jax.infer.session import Session, load, make_session
from lemur_jax.models.presets import preset
from lemur_jax.parallel.mesh import parse_mesh
from tests.helpers.sessions import fresh_params, mesh_of


@pytest.fixture(scope="session")
def tiny_session() -> Session:
    """A random model of 512 ids on 4 devices, its logits spread out enough to sample from."""
    config = preset("tiny", max_position_embeddings=64)
    params = fresh_params(config)
    params["head"]["kernel"] *= 10
    return make_session(config, params, mesh_of("fsdp=2,tensor=2"), "float32")


@pytest.fixture(scope="module")
def session(chat_model):
    """The model of the served endpoint, on one device."""
    return load(chat_model, parse_mesh("fsdp=1"), "float32", devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def url(session):
    """Of an endpoint in a thread."""
    started = threading.Event()

    class Server(uvicorn.Server):
        async def startup(self, sockets=None):
            await super().startup(sockets)
            started.set()

    app = application(session, "tiny", ("127.0.0.1", "localhost"))
    server = Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    assert started.wait(60)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1"
    server.should_exit = True
    thread.join()
    app.state.worker.stop()
