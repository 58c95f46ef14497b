import pytest

from tests.darwin.making import made, raw_files, recipe
from tests.darwin.model_server import serving


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


@pytest.fixture(scope="module")
def server():
    """A server of OpenAI's API whose model is a function, and whose faults are chosen."""
    with serving() as server:
        yield server


@pytest.fixture(scope="session")
def tiny_url(tmp_path_factory):
    """A trained tiny model behind our own server."""
    from tests.darwin import tiny_model

    run = tiny_model.write_run(tmp_path_factory.mktemp("tiny") / "model")
    with tiny_model.served(run) as url:
        yield url
