"""The model card, and that no secret is in it."""

import json
import re
import sys
from types import SimpleNamespace

import pytest

from common.export import hide_secrets, write_model_card
from common.flags import Flags


def card(folder, monkeypatch, teacher: str) -> str:
    monkeypatch.setattr(sys, "argv", ["train.py", "--hub_token", "hf_secret", "--seed", "3"])
    args = Flags(output_dir=str(folder), hub_token="hf_secret", seed=3, sizes=[(64, 32)], pretrained_teacher_model=None)
    write_model_card(args, teacher=teacher, title="LCM of x", tags=["lcm"], usage="import x\n", results="| a |\n\n")
    assert args.hub_token == "hf_secret"  # the card takes nothing away
    return (folder / "README.md").read_text()


def test_the_card_tells_how_to_use_and_how_it_was_trained(tmp_path, monkeypatch):
    text = card(tmp_path, monkeypatch, "owner/name")
    assert text.startswith('---\nlibrary_name: diffusers\nbase_model: owner/name\ntags: ["lcm"]\n---\n\n# LCM of x\n')
    assert "```python\nimport x\n```" in text and "| a |" in text and "![samples](samples.png)" in text
    assert "accelerate launch train.py --hub_token '***' --seed 3" in text
    settings = json.loads(re.search(r"```json\n(.*?)\n```", text, re.DOTALL)[1])
    assert settings == {
        "output_dir": str(tmp_path), "seed": 3, "sizes": [[64, 32]], "pretrained_teacher_model": None
    }  # fmt: skip
    assert "hf_secret" not in text


def test_a_teacher_in_a_folder_is_no_base_model(tmp_path, monkeypatch):
    assert "base_model" not in card(tmp_path, monkeypatch, str(tmp_path))


def test_a_webhooks_url_is_not_in_the_card(tmp_path, monkeypatch):
    (tmp_path / "hook.json").write_text('{"webhook_url": "https://secret"}')
    args = SimpleNamespace(output_dir=str(tmp_path), webhook_config=str(tmp_path / "hook.json"))
    monkeypatch.setattr(sys, "argv", ["train.py"])
    write_model_card(args, teacher="a/b", title="", tags=[], usage="", results="")
    text = (tmp_path / "README.md").read_text()
    assert "hook.json" in text and "https://secret" not in text


@pytest.mark.parametrize("words", ["--hub_token hf_x", "--hub_token=hf_x", "--hub_tok hf_x", "--hub_t=hf_x"])
def test_the_cards_command_has_no_token(words):
    hidden = hide_secrets(["train.py", *words.split(), "--seed", "1"])
    assert "hf_x" not in " ".join(hidden) and hidden[-2:] == ["--seed", "1"]
