"""Folders, tables and datasets of the hub as sources of samples."""

import itertools
import json
import sys
from hashlib import blake2b

import pytest

from common.data.datasets import count_epoch
from common.data.sources import part_fingerprint, read_part
from tests.data.helpers import (
    parse,
    quadrants,
    samples_of,
    table_module,
)
from tests.helpers import encoded


def test_parts_of_a_folder_follow_from_its_names(tmp_path):
    found = []
    for place_of_it in ("here", "there"):
        (tmp_path / place_of_it).mkdir()
        for i in range(150):
            (tmp_path / place_of_it / f"{i}.png").write_bytes(b"x")
        parts = parse("--train_data_dir", tmp_path / place_of_it).data.datasets[0].parts
        found.append([part.files for part in parts])
    assert found[0] == found[1] and len(found[0]) == 50  # of three each
    assert sorted(name for part in found[0] for name, _ in part) == sorted(f"{i}.png" for i in range(150))
    neighbours = sum(len({int(name[0]) for name, _ in part}) == 1 for part in found[0])  # all of one first digit
    assert neighbours < 25  # mixed: an alphabetical split would have nearly all parts so
    before = [part_fingerprint(part) for part in parts]
    assert before == [part_fingerprint(part) for part in parts] and len(set(before)) == 50
    (tmp_path / "there" / "7.txt").write_text("a caption")
    changed = [a != b for a, b in zip(before, map(part_fingerprint, parts), strict=True)]
    assert sum(changed) == 1


def test_a_file_that_is_gone_is_a_fault(folder):
    run = parse("--train_data_dir", folder)
    (folder / "wide_one.png").unlink()
    causes = [
        members for part in run.data.datasets[0].parts for _, members in read_part(part) if isinstance(members, str)
    ]
    assert causes == ["unreadable file"]


def test_metadata_of_an_imagefolder(folder, refused):
    lines = [{"file_name": "wide_one.png", "text": "one\u2028line", "more": 1}, {"file_name": "gone.png", "text": "x"}]
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n\n")
    (folder / "sub" / "metadata.jsonl").write_text(json.dumps({"file_name": "square_one.png", "text": ["a", "b"]}))
    run = parse("--train_data_dir", folder)
    found = samples_of(run)
    assert found.keys() == {"wide_one", "square_one", "faults"} and found["wide_one"].caption == "one\u2028line"
    assert found["square_one"].captions == ["a", "b"]
    assert "no 'caption'" in refused("--train_data_dir", folder, "--caption_column", "caption")
    (folder / "metadata.jsonl").write_text("{broken")
    assert "metadata.jsonl, line 1" in refused("--train_data_dir", folder)


def test_parquet(tmp_path, refused):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    images = [{"bytes": encoded(quadrants(64, 96)), "path": None}, {"bytes": b"broken", "path": "x.png"}]
    images += [{"bytes": None, "path": "beside.png"}, {"bytes": None, "path": "gone.png"}]
    quadrants(32, 32).save(tmp_path / "beside.png")
    table = {"picture": images, "words": [["a", "b"], ["c"], ["d"], ["e"]], "other": [1, 2, 3, 4]}
    parquet.write_table(pa.table(table), tmp_path / "train.parquet", row_group_size=2)
    columns = ["--image_column", "picture", "--caption_column", "words", "--resolution", 64]
    for flag, source in itertools.product(
        ("--train_data_dir", "--dataset_name"), (tmp_path, tmp_path / "train.parquet")
    ):
        run = parse(flag, source, *columns)
        assert len(run.data.datasets[0].parts) == 2 and count_epoch(run.data.datasets) == 4
        found = samples_of(run)
        assert found.pop("faults") == {"broken image": 1, "empty image": 1}
        assert {(tuple(s.captions), s.size_ids[:2]) for s in found.values()} == {
            (("a", "b"), (64, 96)),
            (("d",), (32, 32)),
        }
    message = refused("--train_data_dir", tmp_path)
    assert "--image_column image" in message and "picture, words, other" in message


def test_a_package_that_is_missing_is_named(tmp_path, refused, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"x")
    for name in ("pyarrow", "pyarrow.parquet", "datasets"):
        monkeypatch.setitem(sys.modules, name, None)
    assert "pip install -r common/requirements.txt" in refused("--train_data_dir", tmp_path)
    assert "nobody/nothing is no local folder; from the hub: `pip install datasets`" in refused(
        "--dataset_name", "nobody/nothing"
    )


def test_a_dataset_of_the_hub(refused, monkeypatch):
    rows = [{"image": {"bytes": encoded(quadrants(8, 9 + i)), "path": None}, "text": f"{i}"} for i in range(130)]
    module = table_module(rows)
    monkeypatch.setitem(sys.modules, "datasets", module)
    run = parse("--dataset_name", "me/mine", "--dataset_config_name", "small", "--resolution", 64)
    assert module.asked == [(("me/mine", "small"), {"split": "train", "cache_dir": None})]
    parts = run.data.datasets[0].parts
    found = [members for part in parts for _, members in read_part(part)]
    assert [json.loads(members["json"])["caption"] for members in found] == [[f"{i}"] for i in range(130)]
    assert part_fingerprint(parts[1]) == blake2b(b"abc 3 3 image text", digest_size=8).hexdigest()  # as caches have it
    assert (
        count_epoch(run.data.datasets) == 130
        and len({part_fingerprint(part) for part in run.data.datasets[0].parts}) == 44
    )

    def fails(*_, **__):
        raise ConnectionError("no route\nto host")

    module.load_dataset = fails
    assert "me/mine cannot be loaded: ConnectionError: no route" in refused("--dataset_name", "me/mine")
