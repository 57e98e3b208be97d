"""Errors that Orbax raises are not logged besides; all others are. What a failed save says: test_policies.py."""

import asyncio
import gc
import logging
import sys
import warnings
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from absl import logging as absl_logging

from lemur_jax.checkpoint import echoes
from lemur_jax.checkpoint.echoes import silence_echoes


def function(name: str, file: str, body: str):
    """A function of that name that seems to lie in that file."""
    scope = {"logging": absl_logging}
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    exec(compile(f"def {name}():\n{lines}\n", file, "exec"), scope)
    return scope[name]


FAIL = "raise ValueError('disk')"
LOG = f"try:\n    {FAIL}\nexcept ValueError:\n    logging.exception('failed')"


@pytest.mark.parametrize(
    ("file", "name", "heard"),
    [
        ("/site-packages/orbax/checkpoint/_src/futures/future.py", "run", False),
        ("/site-packages/orbax/checkpoint/_src/path/storage_backend.py", "delete", True),  # is not raised
        ("/home/me/future.py", "run", True),
    ],
)
def test_only_what_is_raised_too_is_left_out_of_the_log(caplog, file, name, heard):
    silence_echoes()
    with caplog.at_level(logging.ERROR, "absl"):
        function(name, file, LOG)()
    assert [record.getMessage() for record in caplog.records] == ["failed"] * heard


@pytest.mark.parametrize(
    ("file", "heard"),
    [("/site-packages/orbax/checkpoint/_src/serialization.py", False), ("/home/me/own.py", True)],
)
def test_only_futures_of_orbax_may_be_given_up(caplog, file, heard):
    async def lost():
        function("write", file, FAIL)()

    assert was_heard(caplog, lambda: asyncio.gather(lost()), "disk") == heard


@pytest.mark.parametrize(
    ("message", "heard"),
    [
        (
            'OUT_OF_RANGE: Error writing "layers.mlp.up/0.1.0" in OCDBT database at local file "/run/2/"',
            False,
        ),
        ("lost connection", True),
    ],
)
def test_writes_that_tensorstore_ended_may_be_given_up(caplog, message, heard):
    def lost():
        asyncio.get_running_loop().create_future().set_exception(ValueError(message))

    assert was_heard(caplog, lost, message) == heard


def was_heard(caplog, lose: Callable[[], object], message: str) -> bool:
    """Whether asyncio's log tells of a future with that error, given up by `lose` within a loop.

    Other futures are not asked for: whatever tests left behind in this process may be collected just now.
    """
    silence_echoes()

    async def main():
        lose()
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    with caplog.at_level(logging.ERROR, "asyncio"):
        asyncio.run(main())
        gc.collect()
    told = [record for record in caplog.records if "never retrieved" in record.getMessage()]
    return any(str(record.exc_info[1]) == message for record in told)


@pytest.mark.parametrize(
    ("file", "heard"),
    [("/site-packages/orbax/checkpoint/_src/serialization.py", False), ("/home/me/own.py", True)],
)
def test_only_coroutines_of_orbax_may_be_given_up(monkeypatch, file, heard):
    scope, found = {}, []
    exec(compile("async def read():\n    raise ValueError('disk')\n", file, "exec"), scope)
    monkeypatch.setattr(sys, "unraisablehook", found.append)
    echoes._listen.cache_clear()  # wraps that hook
    silence_echoes()
    coroutine = scope["read"]()
    sys.unraisablehook(SimpleNamespace(object=coroutine, exc_value=ValueError("disk")))
    coroutine.close()
    assert len(found) == heard


def test_who_keeps_warnings_keeps_no_arrays():
    """pytest does, and forgets our filters from test to test; the coroutine of a warning holds what it should write."""

    class Array:
        pass

    for _ in range(2):
        with warnings.catch_warnings(record=True) as kept:
            warnings.simplefilter("always")
            silence_echoes()
            give_up(Array())
            gc.collect()
            assert not kept
            assert not [found for found in gc.get_objects() if isinstance(found, Array)]


def give_up(array: object) -> None:
    async def write(array):
        raise AssertionError(array)

    write.__qualname__ = "_create_paths"
    coroutine = write(array)
    around = [coroutine]
    around.append(around)  # only the collector finds it
