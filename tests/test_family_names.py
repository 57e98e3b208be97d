"""Nothing but the table of families and the presets knows a family's name: a model is its specification."""

import ast
import pathlib
import re

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lemur_jax.convert.families import FAMILIES

PACKAGE = pathlib.Path(__file__).parents[1] / "lemur_jax"
# GGUF files have names of their own for architectures; tokenizers are known by their files and not by a model.
# "llama3" is also the name of a way to scale rotary angles.
NAME = re.compile(r"^_?(llama|mistral|mixtral|qwen|olmo|gemma|phi)[124-9]*$", re.IGNORECASE)
KNOWS = {"convert/families.py", "models/presets.py", "convert/gguf.py"}


def test_only_the_table_knows_names():
    names = {family.model_type for family in FAMILIES}
    names |= {MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name] for name in names}
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        if str(path.relative_to(PACKAGE)) in KNOWS or path.parent.name == "text":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            text = (
                node.value
                if isinstance(node, ast.Constant)
                else getattr(node, "id", getattr(node, "name", ""))
            )
            compared = isinstance(text, str) and (text in names or NAME.search(text) is not None)
            if compared:
                found.append(f"{path.relative_to(PACKAGE)}:{node.lineno} {text}")
    assert not found, "\n".join(found)
