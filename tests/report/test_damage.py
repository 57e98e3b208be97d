"""500 damaged workdirs: `lemur report` writes its page or says in one line why not, and never a traceback."""

import random
import shutil

import pytest

from lemur_jax.common.errors import UserError
from lemur_jax.report import write_report

CASES = 500


def damage(random_, path):
    data = bytearray(path.read_bytes())
    at = random_.randrange(len(data))
    kind = random_.choice(("flip", "cut", "insert", "replace"))
    if kind == "flip":
        data[at] ^= 1 << random_.randrange(8)
    elif kind == "cut":
        del data[at:]
    elif kind == "insert":
        data[at:at] = random_.choice((b"\x00", b"\xff", b"\n", b"{", b"null\n", b"[1]\n", b'{"step": "x"}\n'))
    else:
        lines = bytes(data).split(b"\n")
        values = (b"null", b"1e999", b'"x"', b"[]", b"{}", b"-1", b"10" * 200)
        line = random_.randrange(len(lines))
        head, colon, tail = lines[line].partition(b": ")
        rest = tail[tail.find(b",") :] if b"," in tail else tail[-1:]
        lines[line] = head + colon + random_.choice(values) + rest
        data = b"\n".join(lines)
    path.write_bytes(bytes(data))
    return kind


@pytest.mark.slow
def test_500_damaged_workdirs(stages, tmp_path):
    random_, written, refused = random.Random(0), 0, []
    for case in range(CASES):
        copies = [shutil.copytree(stage, tmp_path / f"copy_{stage.name}") for stage in stages]
        file = random_.choice(copies) / random_.choice(("metrics.jsonl", "metrics.jsonl", "config.json"))
        what = (case, file.name, damage(random_, file))
        try:
            write_report(copies, tmp_path / "page.html")
            written += 1
        except UserError as error:
            refused.append(str(error))
        except Exception as error:
            raise AssertionError(what) from error
        for copy in copies:
            shutil.rmtree(copy)
    assert written > CASES // 2
    assert refused
    assert not any("\n" in message for message in refused)
