"""`lemur train --profile`: a trace that opens, of the steps that were asked for, in which the host never waits."""

import gzip
import json
import os
import re
import subprocess
import sys

import pytest

from lemur_jax.common.errors import UserError
from lemur_jax.telemetry.profiler import check_steps, parse_steps


def events(directory):
    """The events of the only trace."""
    (path,) = directory.glob("plugins/profile/*/*.trace.json.gz")
    (binary,) = directory.glob("plugins/profile/*/*.xplane.pb")
    assert binary.read_bytes()
    return json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]


def steps_in(found):
    return sorted(int(each["args"]["step_num"]) for each in found if "step_num" in each.get("args", {}))


def python(*words, cwd=None):
    """In a process of its own: a trace beside TensorFlow, which other tests import, can end the process."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, *words], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def trace(project, tmp_path_factory):
    """Steps 4 to 8 of a run that logs every 6 steps."""
    workdir = tmp_path_factory.mktemp("profiled") / "run"
    words = f"-m lemur_jax train --config config.py --workdir {workdir} --virtual-devices 1 --profile 4:9"
    options = "train.steps=12 log.every_steps=6 checkpoint.every_steps=12 eval.every_steps=0"
    python(*words.split(), *(f"--config.{option}" for option in options.split()), cwd=project)
    return events(workdir / "profile")


def test_the_trace_holds_the_steps_asked_for(trace):
    assert steps_in(trace) == [4, 5, 6, 7, 8]


def test_between_two_steps_the_host_does_not_wait(trace):
    """Nothing is read back but at step 6, a log step, and after step 9, where the trace ends."""
    marked = [each for each in trace if "step_num" in each.get("args", {})]
    spans = {int(each["args"]["step_num"]): (each["ts"], each["ts"] + each["dur"]) for each in marked}
    read = re.compile(r" (_value|__array__|device_get|block_until_ready)$")
    waits = [
        each["ts"]
        for each in trace
        if each.get("tid") == marked[0]["tid"] and read.search(each.get("name", ""))
    ]
    during = {step for step, (start, end) in spans.items() for moment in waits if start <= moment < end}
    assert during == {5}  # the step counter is 6 when step 5 is done


TRACED = """
import sys
import jax, jax.numpy as jnp, numpy as np
from etils import epath
from lemur_jax.telemetry.profiler import trace_steps
double = jax.jit(lambda x: 2 * x)
for start, stop, end in ((4, 9, 6), (0, 0, 6), (1, 5, 7)):
    state = jnp.ones(4)
    pairs = ((step, np.ones(4)) for step in range(3, end))
    target = epath.Path(sys.argv[1]) / f"{start}-{end}"
    for _, batch in trace_steps(pairs, range(start, stop), target, finish=lambda: None):
        state = double(state) + batch
"""


def test_an_unfinished_range_is_kept_and_others_leave_no_trace(tmp_path):
    python("-c", TRACED, str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["4-6"]
    assert steps_in(events(tmp_path / "4-6")) == [4, 5]


@pytest.mark.parametrize("text", ["", "10", "13:10", "10:10", "-1:3", "a:b", "1:2:3"])
def test_what_is_no_range_is_refused(text):
    with pytest.raises(UserError, match="write it as 10:13"):
        parse_steps(text)


def test_steps_beyond_the_run_are_refused():
    check_steps(range(10, 13), 13)
    with pytest.raises(UserError, match=r"--profile 10:13 goes beyond config.train.steps 12"):
        check_steps(range(10, 13), 12)
