import sys

import pytest


def _registered():
    """(registry, name) of each seqio task and mixture."""
    seqio = sys.modules.get("seqio")
    registries = (seqio.TaskRegistry, seqio.MixtureRegistry) if seqio else ()
    return {(registry, name) for registry in registries for name in registry.names()}


@pytest.fixture(autouse=True)
def forget_tasks():
    """Removes the tasks and mixtures that a test registers."""
    before = _registered()
    yield
    for registry, name in _registered() - before:
        registry.remove(name)
