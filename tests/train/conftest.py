"""A batch with uneven weights, shared by the tests of this directory."""

import pytest

from tests.helpers.tiny import rows


@pytest.fixture(scope="session")
def batch():
    return rows()
