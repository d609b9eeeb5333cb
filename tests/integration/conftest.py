"""What the tests of whole runs share."""

from pathlib import Path

import pytest
from support.tiny_data import write_dataset


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of the width of the small decoder; read only, but for its manifest."""
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder, n_features=16, bins=(80, 140))
    return folder
