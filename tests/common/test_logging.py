"""The terminal's handler: streams, prefixes, and readers that disconnect."""

import io
import logging
import os
import sys

from lemur_jax.common.logging import TerminalHandler, setup

logger = logging.getLogger("lemur_jax.made_up")


def test_info_goes_to_standard_output_and_warnings_to_standard_error(capsys):
    setup()
    setup()  # adds no second handler
    logger.info("step %d", 3)
    logger.warning("disk is slow")
    out, err = capsys.readouterr()
    assert out == "step 3\n"
    assert err == "warning: disk is slow\n"
    package = logging.getLogger("lemur_jax")
    package.handlers = [handler for handler in package.handlers if not isinstance(handler, TerminalHandler)]


def test_what_the_encoding_of_the_terminal_lacks_is_escaped(monkeypatch):
    with io.TextIOWrapper(io.BytesIO(), "ascii") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        setup()
        logging.getLogger("lemur_jax").handlers.pop()
        print("data 1 × fsdp 1")
        stream.flush()
        assert stream.buffer.getvalue() == b"data 1 \\xd7 fsdp 1\n"


def test_a_reader_that_disconnects_does_not_raise(monkeypatch):
    read, write = os.pipe()
    os.close(read)
    with open(write, "w", buffering=1) as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        handler = TerminalHandler()
        record = logging.LogRecord("lemur_jax", logging.INFO, __file__, 1, "line", None, None)
        handler.emit(record)
        handler.emit(record)
        assert os.fstat(write).st_rdev == os.stat(os.devnull).st_rdev  # later lines are discarded
