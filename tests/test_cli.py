"""The console command: quick help, and one clear line with exit code 2 for every mistake."""

import errno
import io
import itertools
import os
import resource
import signal
import subprocess
import sys

import pytest
from etils import epath

import lemur_jax
from lemur_jax import cli
from lemur_jax.cli import main

_, VERBS = cli._parser()

CONFIG = """
from lemur_jax.config import default_config
from lemur_jax.models.presets import preset

def get_config(arg=""):
    config = default_config(preset("tiny"))
    config.tokenizer.path = "no_tokenizer"
    return config
"""


TRAIN = "train --config c.py --workdir run"


def test_help_names_every_verb_and_answers_at_once():
    """Under a second of a processor: whatever it imports, JAX and TensorFlow are not among it."""
    seconds = [0.0]
    for _ in range(3):
        command = [sys.executable, "-m", "lemur_jax", "--help"]
        done = subprocess.run(command, capture_output=True, text=True)
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(used.ru_utime + used.ru_stime)
    assert all(verb in done.stdout for verb in VERBS)
    assert min(after - before for before, after in itertools.pairwise(seconds)) < 1


def test_a_process_starts_again_with_huge_pages_unless_told_otherwise(tmp_path, monkeypatch):
    """The words are the same, and the second start goes on; what a user has set stays.

    A mistake is one line: nothing that ends with the process adds one of its own.
    """
    (tmp_path / "c.py").write_text(CONFIG)
    read = "import os; from lemur_jax.__main__ import main; code = main(); print(os.environ['GLIBC_TUNABLES'], code)"
    for given, expected in (None, "glibc.malloc.hugetlb=1"), ("glibc.malloc.arena_max=2",) * 2:
        monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
        if given:
            monkeypatch.setenv("GLIBC_TUNABLES", given)
        command = [sys.executable, "-c", read, *TRAIN.split(), "--config.mesh.fsdp=3"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.stdout.split() == [expected, "2"]
        (line,) = done.stderr.splitlines()
        assert line.startswith("lemur train: mesh ")


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_has_an_example(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0
    assert f"lemur {verb}" in capsys.readouterr().out.split("example:")[1]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("train --config none.py --workdir run", "no config file none.py"),
        (f"{TRAIN} --config.train.stps=1", "did you mean 'train.steps'"),
        (f"{TRAIN} --config.train.steps=x", "train.steps"),
        (f"{TRAIN} --config.mesh.fsdp=3", "does not multiply"),
        ("train --config c.py --workdir run", "no_tokenizer"),
        (f"{TRAIN} --steps=1", "unknown argument --steps=1"),
        ("train --config c.py --workdir=", "--workdir is empty"),
        (f"{TRAIN} --config.log.every_steps=0", "log.every_steps is 0: it must be at least 1"),
        (f"{TRAIN} --config.distill.teacher=t --config.distill.top_k=9999999", "at most config.model.vocab"),
        (
            f"{TRAIN} --config.spikes.factor=2.0 --config.spikes.rollback_after=2 --config.checkpoint.keep=1",
            "set config.checkpoint.keep to at least 2",
        ),
        ("plan --config c.py --topology v5e-1 --batch 5", "--batch is for --mode generate"),
        ("plan --config c.py --topology v5e-1 --minutes 5", "--minutes is for --search"),
        ("plan --config c.py --topology v5e-3 --search", "unknown TPU slice 'v5e-3'"),
        ("plan --config c.py --topology v5e-1 --slices 0", "--slices is 0: it must be at least 1"),
        ("inspect no_store --config.train.steps=3", "--config.train.steps=3 is for a config"),
        ("inspect c.py --tokenizer t", "--tokenizer is for a store"),
        ("export-traces --traces t --output o --config.seed=3", "--config.seed=3 changes a config"),
        ("eval --checkpoint no_run --tasks mbpp --endpoint http://x", "has no effect without --agents"),
        ("eval --checkpoint no_run --tasks mbpp --agents nothing", "unknown environment 'nothing'"),
        ("plan --config c.py --topology v5e-1 --mode generate --hlo step.txt", "--hlo is for --mode train"),
        ("plan --config c.py --topology v5e-1 --json none/plan.json", "there is no directory none"),
        ("plan --config c.py --topology v5e-1 --hlo none/step.txt", "there is no directory none"),
        ("inspect no_store --html none/page.html", "there is no directory none"),
        ("eval --checkpoint no_run --tasks mbpp --json none/r.json", "there is no directory none"),
        ("eval --checkpoint no_run --tasks mbpp --json /usr", "--json /usr is a directory: name a file"),
        ("eval --checkpoint no_run --agents sql --html none/r.html", "there is no directory none"),
        ("report no_run --output none/r.html", "there is no directory none"),
        ("export-hf no_run out --adapter --verify", "--adapter writes the adapter alone"),
        ("export-hf no_run out --adapter --vocab-size 9", "--adapter writes the adapter alone"),
        ("prepare --config c.py --config.data.sources={'nope':{'share':1.0}}", "nope"),
        ("export-hf no_run out", "no_run"),
        ("import-hf no_dir out", "no_dir"),
        ("generate --checkpoint no_run --prompt x", "no_run"),
        ("smoke --checkpoint no_run --mesh fspd=2", "cannot read mesh"),
        ("checkpoints no_run", "no checkpoint directory at no_run"),
        ("inspect no_store", "no_store"),
        ("report no_run", "no_run"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(tmp_path, monkeypatch, capsys, words, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.py").write_text(CONFIG)
    assert main(words.split()) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"lemur {words.split()[0]}: ")
    assert expected in line
    assert {path.name for path in tmp_path.iterdir()} <= {"c.py", "__pycache__"}


def test_a_home_directory_is_no_directory_of_that_name(tmp_path, monkeypatch, capsys):
    """A shell leaves `~` alone in `--workdir=~/run`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["checkpoints", "~/run"]) == 2
    assert f"no checkpoint directory at {tmp_path}/run" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["train", "rl", "sweep", "doctor", "plan", "prepare", "inspect"])
def test_the_platform_is_settled_before_a_config_file_may_import_jax(verb, tmp_path, monkeypatch, capsys):
    order = []
    monkeypatch.setattr("lemur_jax.cluster.hosts.choose_platform", order.append)
    path = tmp_path / "c.py"
    path.write_text("def get_config(): raise ValueError('read')")
    words = [] if verb == "inspect" else ["--config"]
    words += [str(path), *(("--topology", "v5e-1") if verb == "plan" else ())]
    words += ["--workdir", "run", "--virtual-devices", "2"] if verb in ("train", "rl", "sweep") else []
    words += ["--workdir", "run"] if verb == "doctor" else []
    assert main([verb, *words]) == 2
    assert "ValueError: read" in capsys.readouterr().err
    assert order == [2 if verb in ("train", "rl", "sweep") else 0]


@pytest.mark.parametrize("words", ["generate --prompt a", "chat", "smoke", "serve", "eval --tasks humaneval"])
def test_the_platform_is_settled_before_jax_is_imported(words):
    program = (
        "import sys; from lemur_jax.cli import main; from lemur_jax.cluster import hosts\n"
        "hosts.choose_platform = lambda _: sys.exit('jax' in sys.modules)\nsys.exit(main())"
    )
    command = [sys.executable, "-c", program, *words.split(), "--checkpoint", "x"]
    assert subprocess.run(command).returncode == 0


@pytest.mark.parametrize(
    "words",
    [
        "checkpoints gs://bucket/run",
        "generate --checkpoint gs://bucket/run --prompt x",
        "import-hf gs://bucket/model out",
        "export-hf gs://bucket/run out",
    ],
)
def test_a_store_that_cannot_be_reached_is_one_line(words, tmp_path, monkeypatch, capsys):
    """As gcsfs does after half a minute of trying: `exists` raises, `is_dir` says no."""
    errors = pytest.importorskip("aiohttp", reason="needs the extra test")
    reached = []

    def exists(path):
        if not str(path).startswith("gs:"):
            return os.path.exists(path)
        reached.append(path)
        raise errors.ClientConnectionError("Connect call failed")

    place = type(epath.Path("gs://bucket/run"))
    monkeypatch.setattr(place, "exists", exists)
    monkeypatch.setattr(place, "is_dir", lambda path: False)
    monkeypatch.chdir(tmp_path)
    assert main(words.split()) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1
    assert "cannot be reached, or refuses: ClientConnectionError: Connect call failed" in error[0]
    assert len(reached) == 1
    assert not list(tmp_path.iterdir())


def raising(monkeypatch, error):
    """`lemur checkpoints`, whose first look at the directory raises this."""

    def look(path):
        raise error

    monkeypatch.setattr(epath.Path("run").__class__, "exists", look)
    return main(["checkpoints", "run"])


@pytest.mark.parametrize(
    "number", ["EACCES", "EPERM", "EROFS", "EMFILE", "ENOTDIR", "EISDIR", "EEXIST", "ENAMETOOLONG", "ELOOP"]
)
def test_a_file_system_that_refuses_is_one_line(number, monkeypatch, capsys):
    assert raising(monkeypatch, OSError(getattr(errno, number), "two\n\tlines", "gs://bucket/x")) == 2
    assert capsys.readouterr().err == "lemur checkpoints: two lines: gs://bucket/x\n"


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EDQUOT, "Disk quota exceeded", "runs/file"),
        # As Orbax passes on what TensorStore raises, over 150 lines.
        ValueError('RESOURCE_EXHAUSTED: Error writing "head":\nNo space left on device [' + "x" * 9999),
    ],
)
def test_a_full_disk_is_one_line(error, monkeypatch, capsys):
    assert raising(monkeypatch, error) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"lemur checkpoints: {type(error).__name__}: {str(error)[:20]}")
    assert "; free some space, or name another place" in said
    assert (len(said.splitlines()), len(said) < 700) == (1, True)


def test_a_reader_that_has_gone_ends_without_a_word(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert raising(monkeypatch, BrokenPipeError(errno.EPIPE, "Broken pipe")) == 128 + signal.SIGPIPE


@pytest.mark.parametrize(
    "error",
    [
        ZeroDivisionError(),
        FileNotFoundError(errno.ENOENT, "No such file or directory", "runs/file"),
        PermissionError(errno.EPERM, "Operation not permitted"),  # of a process, say
    ],
)
def test_other_errors_keep_their_traceback(error, monkeypatch):
    with pytest.raises(type(error)):
        raising(monkeypatch, error)


def test_bare_lemur_prints_help_and_unknown_verbs_name_the_nearest(capsys):
    assert main([]) == 0
    assert "VERB" in capsys.readouterr().out
    for word, meant in (("trian", "; did you mean 'train'?"), ("foo", ""), ("", "")):
        assert main([word, "--config", "c.py"]) == 2
        assert capsys.readouterr().err == f"lemur: there is no verb {word!r}{meant}; see lemur --help\n"


@pytest.mark.parametrize(
    ("words", "shown"), [("--version", f"lemur_jax {lemur_jax.__version__}\n"), ("plan --help", "(default: ")]
)
def test_version_and_defaults_are_shown(words, shown, capsys):
    with pytest.raises(SystemExit, match="0"):
        main(words.split())
    assert shown in capsys.readouterr().out


@pytest.mark.parametrize(("value", "colored"), [("", True), ("1", False)])
def test_no_color_is_heard_in_a_terminal(value, colored, make_store, monkeypatch, capsys):
    """https://no-color.org."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("NO_COLOR", value)
    assert main(["inspect", str(make_store([[7, 8]]).path)]) == 0
    assert ("\x1b" in capsys.readouterr().out) == colored
