import pytest

from tests.darwin.making import made, raw_files, recipe


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A folder with raw files."""
    folder = tmp_path_factory.mktemp("darwin")
    raw_files(folder / "raw")
    return folder


@pytest.fixture(scope="session")
def corpus(folder):
    """The corpus that the recipe makes of them."""
    return made(recipe(folder))
