"""A cloud for `launch/pod.sh`: a `gcloud` that writes down its calls and fails where the test says so."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]

# A fake `gcloud`. The first rule answers whose words ("when") are in the command and that is not used up ("times"):
# output "out", exit status "code"; "hang" never ends; "meet" waits until that many calls have the rule's words.
# A command without a rule succeeds without output.
FAKE = """
import json, os, sys, time
home = os.environ["FAKE"]
words = " ".join(sys.argv[1:])
with open(home + "/calls", "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
rules = json.load(open(home + "/rules"))
for rule in rules:
    if rule["when"] in words and rule.get("times", 1) != 0:
        deadline = time.time() + 30
        while open(home + "/calls").read().count(rule["when"]) < rule.get("meet", 0):
            assert time.time() < deadline
            time.sleep(0.05)
        rule["times"] = rule.get("times", 1) - 1
        if rule["times"] >= 0:
            json.dump(rules, open(home + "/rules", "w"))
        if rule.get("hang"):
            time.sleep(60)
        # At once, as several write into one pipe.
        (sys.stderr if rule.get("code") else sys.stdout).write(rule.get("out", "") + "\\n")
        sys.exit(rule.get("code", 0))
"""

SETTINGS = """
RUN=test-run
CONFIG=configs/lemur_7b_pretrain.py
WORKDIR=gs://bucket/run
PROJECT=some-project
ZONE=some-zone
ACCELERATOR=v4-16
RUNTIME=some-image
POLL_SECONDS=0
SSH_SECONDS=5
"""


def executable(path: pathlib.Path, text: str) -> None:
    """Writes a program."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


class Pod:
    def __init__(self, home: pathlib.Path):
        self.home = home
        executable(home / "bin" / "gcloud", f"#!{sys.executable}\n{FAKE}")
        self.settings("")

    def settings(self, more: str) -> None:
        """Writes the settings of a run, and `more` below them."""
        (self.home / "settings.sh").write_text(SETTINGS + more)

    def __call__(self, *words: str, rules=()) -> subprocess.CompletedProcess:
        (self.home / "rules").write_text(json.dumps([*rules]))
        (self.home / "calls").write_text("")
        path = f"{self.home}/bin:{os.environ['PATH']}"
        return subprocess.run(
            ["bash", "launch/pod.sh", *words, "--settings", str(self.home / "settings.sh")],
            cwd=ROOT,
            env={**os.environ, "PATH": path, "FAKE": str(self.home)},
            capture_output=True,
            text=True,
            timeout=120,
        )

    def calls(self, having: str = "") -> list[list[str]]:
        calls = map(json.loads, (self.home / "calls").read_text().splitlines())
        return [call for call in calls if having in " ".join(call)]

    def steps(self) -> list[str]:
        """What was done to the slice, in one word each."""
        names = {
            "queued-resources create": "create",
            "queued-resources delete": "delete",
            "test-run:lemur-code.tar.gz": "push",
            "worker.sh setup": "setup",
            "worker.sh start": "start",
            "worker.sh stop": "stop",
        }
        lines = [" ".join(call) for call in self.calls()]
        return [word for line in lines for text, word in names.items() if text in line]


@pytest.fixture
def pod(tmp_path):
    return Pod(tmp_path)
