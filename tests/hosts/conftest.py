"""The project that every test of several hosts trains."""

import pytest

from tests.helpers.hosts import Project


@pytest.fixture(scope="session")
def hosts_project(tmp_path_factory) -> Project:
    return Project(tmp_path_factory.mktemp("hosts"))
