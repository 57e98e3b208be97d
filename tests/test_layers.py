"""Imports go down the layers only, and TensorFlow stays in one file."""

import ast
import graphlib
import pathlib
import subprocess
import sys

PACKAGE = pathlib.Path(__file__).parents[1] / "lemur_jax"

# Top to bottom, as in docs/architecture.md. Packages of one layer may use each other's public names.
LAYERS = [
    {"cli", "__main__"},
    {"rl", "sweep", "report", "evals", "plan", "agents"},
    {"train", "infer"},
    {"convert", "checkpoint", "telemetry"},
    {"models", "prepare"},
    {"data", "text"},
    {"cluster", "parallel", "config", "common"},
]
TENSORFLOW = {"tensorflow", "seqio", "tensorflow_datasets", "tensorflow_text"}


def layer_of(package):
    """`PACKAGE.config`, the section of the config that a package owns, is in the lowest layer."""
    return next((number for number, names in enumerate(LAYERS) if package in names), len(LAYERS) - 1)


def imports(path):
    """(module, imported names) of every import statement, those inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "", [alias.name for alias in node.names]


def files():
    for path in sorted(PACKAGE.rglob("*.py")):
        relative = path.relative_to(PACKAGE)
        if relative.name not in ("__init__.py", "__main__.py") or len(relative.parts) > 1:
            yield path, relative


def test_imports_go_down_and_take_public_names():
    breaches = []
    for path, relative in files():
        package = relative.parts[0].removesuffix(".py")
        if relative.parts[1:] == ("config.py",):
            package += ".config"
        for module, names in imports(path):
            parts = module.split(".")
            if parts[0] != "lemur_jax" or len(parts) < 2:
                continue
            other = parts[1]
            if parts[2:] == ["config"]:
                other += ".config"
            if layer_of(other) < layer_of(package):
                breaches.append(f"{relative} imports {module}, which is above it")
            if other != package and any(name.startswith("_") for name in names + parts[2:]):
                breaches.append(f"{relative} imports a private name of {module}")
    assert not breaches, "\n".join(breaches)


def test_no_module_imports_one_that_imports_it():
    modules = {".".join(("lemur_jax", *relative.with_suffix("").parts)): path for path, relative in files()}
    waits = {}
    for name, path in modules.items():
        found = {f"{module}.{one}" for module, names in imports(path) for one in [*names, ""]}
        waits[name] = {one.rstrip(".") for one in found} & modules.keys()
    try:
        cycle: list[str] = []
        graphlib.TopologicalSorter(waits).prepare()
    except graphlib.CycleError as error:
        cycle = error.args[1]
    assert not cycle, " imports ".join(reversed(cycle))


def test_tensorflow_is_imported_in_one_file_alone():
    found = {
        str(relative)
        for path, relative in files()
        for module, _ in imports(path)
        if module.split(".")[0] in TENSORFLOW
    }
    assert found == {"prepare/tasks.py"}


def test_only_preparing_needs_the_extra_prepare():
    code = (
        "import sys\n"
        f"for name in {sorted(TENSORFLOW | {'pyarrow', 'rensa'})}: sys.modules[name] = None\n"
        "import lemur_jax.cli, lemur_jax.train.loop, lemur_jax.infer.chat, lemur_jax.infer.smoke\n"
        "import lemur_jax.convert.import_hf, lemur_jax.convert.export_hf, lemur_jax.report.page\n"
        "import lemur_jax.plan.plan, lemur_jax.data.inspect\n"
        "sys.exit(lemur_jax.cli.main(['prepare', '--config', 'configs/quickstart_base.py']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "lemur prepare: preparing data needs pyarrow: pip install 'lemur_jax[prepare]'\n"
