"""Files that several unit tests write."""

import pytest


@pytest.fixture
def yaml_file(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "a.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write
