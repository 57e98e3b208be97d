"""No private name of another library is used, except for JAX's coordination client, in one file."""

import ast
import pathlib

PACKAGE = pathlib.Path(__file__).parents[1] / "lemur_jax"
EXCEPTIONS = {"cluster/coordination.py"}
# Documented parts of the standard library and of named tuples.
PUBLIC = {"_exit", "_replace", "_asdict", "_fields", "_make"}


def is_private(name):
    return name.startswith("_") and not name.startswith("__") and name not in PUBLIC and name != "_"


def own_names(tree):
    """Names that classes of the module define: methods, attributes of their bodies, and what methods set on `self`."""
    for owner in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
        for node in owner.body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                yield node.name
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                yield node.target.id
        for node in ast.walk(owner):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
                yield node.attr


def is_self(node):
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def private_names(tree):
    """(line, name) of private imports, and of private attributes of what the module's classes did not define."""
    own = set(own_names(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("lemur_jax"):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            yield from ((node.lineno, name) for name in names if is_private(name))
        elif isinstance(node, ast.Import):
            names = [part for alias in node.names for part in alias.name.split(".")]
            yield from ((node.lineno, name) for name in names if is_private(name))
        elif (
            isinstance(node, ast.Attribute)
            and is_private(node.attr)
            and node.attr not in own
            and not is_self(node.value)
        ):
            yield node.lineno, ast.unparse(node)


def test_no_private_name_of_another_library_is_used():
    found = [
        f"{path.relative_to(PACKAGE)}:{line} {name}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if str(path.relative_to(PACKAGE)) not in EXCEPTIONS
        for line, name in private_names(ast.parse(path.read_text()))
    ]
    assert not found, "\n".join(found)


def test_private_names_are_seen():
    code = "from jax._src import x\nimport a._b\nfrom a import _c\ny.z._d = 1\nself._e\nos._exit(0)\n"
    code += "def _f():\n    y._f\nclass A:\n    def g(self, other):\n        self._h = other._h\n"
    names = [name for _, name in private_names(ast.parse(code))]
    assert names == ["_src", "_b", "_c", "y.z._d", "y._f"]
