"""Stores of tensors: whole or not at all, checked, and named by what shaped their records."""

import os
from argparse import Namespace

import pytest
import torch

from common import cache
from common.cache import TensorStore, identity, text_key, weights_identity


@pytest.mark.parametrize("compress", [False, True])
def test_store(tmp_path, compress):
    store = TensorStore(tmp_path, compress)
    tensors = {"a": torch.randn(3, 4).bfloat16(), "b": torch.arange(6)}
    store.put("key", tensors)
    assert "key" in store and store.get("key")["b"].tolist() == tensors["b"].tolist()
    store.flush()
    (tmp_path / "half.part").write_bytes(b"unfinished")
    again = TensorStore(tmp_path).get("key")
    assert torch.equal(again["a"], tensors["a"]) and torch.equal(again["b"], tensors["b"])
    assert TensorStore(tmp_path).get("other") is None
    assert text_key("a") != text_key("b") and identity(x=1) != identity(x=2)
    assert not list(tmp_path.glob("*.part.safetensors"))


def test_a_record_that_was_made_again_is_the_one_that_counts(tmp_path, monkeypatch, capsys):
    """Whatever the names of the files."""
    for first, second in (("a", "b"), ("b", "a")):
        store = TensorStore(tmp_path / first)
        for name in (first, second):
            monkeypatch.setattr(cache.uuid, "uuid4", lambda name=name: Namespace(hex=name))
            store.put("key", {"x": torch.ones(100)})
            store.flush()
            if name == first:
                path = tmp_path / first / f"{first}.safetensors"
                data = bytearray(path.read_bytes())
                data[-8] ^= 0xFF
                path.write_bytes(data)
                os.utime(path, (1, 1))  # a file system's clock may be coarser than this test
                assert TensorStore(tmp_path / first).get("key") is None
        capsys.readouterr()
        assert TensorStore(tmp_path / first).get("key")["x"].sum() == 100
        assert "damaged" not in capsys.readouterr().out


def test_a_variant_has_a_name_of_its_own(tmp_path):
    """In one folder may be the files of several, which differ by rounding."""
    (tmp_path / "vae").mkdir()
    for model in (str(tmp_path), "somebody/model"):
        names = [weights_identity(model, "vae", None, variant) for variant in (None, "fp16")]
        assert names[0] != names[1] and names[0] == weights_identity(model, "vae", None)
