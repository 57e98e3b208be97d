"""500 damaged workdirs: `lemur report` writes its page or says in one line why not, and never a traceback."""

import random
import re
import shutil

import pytest

from lemur_jax.common.errors import UserError
from lemur_jax.report import write_report

CASES = 500


VALUES = (b"null", b"1e999", b'"x"', b"[]", b"{}", b"-1", b"10" * 200)
PIECES = (b"\x00", b"\xff", b"\n", b"{", b"null\n", b"[1]\n", b'{"step": "x"}\n')


def damage(random_, data):
    """One of: a flipped bit, a cut, a piece put in, another value in place of one."""
    at = random_.randrange(len(data))
    value = random_.choice(list(re.finditer(rb": ([^,}\n]+)", data)))
    return {
        "flip": data[:at] + bytes([data[at] ^ 1 << random_.randrange(8)]) + data[at + 1 :],
        "cut": data[:at],
        "insert": data[:at] + random_.choice(PIECES) + data[at:],
        "replace": data[: value.start(1)] + random_.choice(VALUES) + data[value.end(1) :],
    }


@pytest.mark.slow
def test_500_damaged_workdirs(stages, tmp_path):
    random_, written, refused = random.Random(0), 0, []
    for case in range(CASES):
        copies = [shutil.copytree(stage, tmp_path / f"copy_{stage.name}") for stage in stages]
        file = random_.choice(copies) / random_.choice(("metrics.jsonl", "metrics.jsonl", "config.json"))
        kind, content = random_.choice(list(damage(random_, file.read_bytes()).items()))
        file.write_bytes(content)
        try:
            write_report(copies, tmp_path / "page.html")
            written += 1
        except UserError as error:
            refused.append(str(error))
        except Exception as error:
            raise AssertionError((case, file.name, kind)) from error
        for copy in copies:
            shutil.rmtree(copy)
    assert written > CASES // 2
    assert refused
    assert not any("\n" in message for message in refused)
