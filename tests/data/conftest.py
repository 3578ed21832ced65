"""Shards and folders of pictures that several tests of common/data/ read."""

import pytest

from tests.data.helpers import (
    parse,
    picture,
    quadrants,
)
from tests.helpers import encoded, write_shard


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("order")
    content = [{"png": encoded(picture()), "txt": f"sample {i}".encode()} for i in range(64)]
    return [str(write_shard(folder / f"{s}.tar", content[s * 8 : s * 8 + 8])) for s in range(8)]


@pytest.fixture()
def folder(tmp_path):
    """Images (height, width) of several sizes, two of them in a subfolder."""
    root = tmp_path / "images"
    (root / "sub").mkdir(parents=True)
    for name, size in {"wide_one": (300, 600), "tall_one": (600, 300), "sub/square_one": (400, 400), "sub/tiny_one": (60, 60)}.items():  # fmt: skip  # noqa: E501
        quadrants(*size).save(root / f"{name}.png")
        (root / f"{name}.txt").write_text(f"first of {name}\n\n  second of {name}\n")
    (root / "notes.md").write_text("not an image")
    return root


@pytest.fixture()
def refused(capsys):
    def message(*words) -> str:
        with pytest.raises(SystemExit) as stop:
            parse(*words)
        assert stop.value.code == 2
        return capsys.readouterr().err.splitlines()[-1]

    return message
