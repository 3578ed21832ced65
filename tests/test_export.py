"""The model card without a secret in it, and a hub that says no."""

import json
import re
import sys
from types import SimpleNamespace

import huggingface_hub
import pytest

import train_lcm_distill_sd as script
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


@pytest.mark.parametrize("flag", ["--hub_token", "--hub_tok", "--hub_to", "--hub_t"])  # argparse takes abbreviations
@pytest.mark.parametrize("words", ["{} hf_x", "{}=hf_x"])
def test_the_cards_command_has_no_token(words, flag):
    hidden = hide_secrets(["train.py", *words.format(flag).split(), "--seed", "1"])
    assert "hf_x" not in " ".join(hidden) and hidden[-2:] == ["--seed", "1"]


def run(*flags):
    script.main(*script.parse_args([str(flag) for flag in flags]))


def test_a_hub_that_refuses_is_known_before_training(tmp_path, sd_teacher, small_shards, monkeypatch):
    def refuses(*_, **__):
        raise huggingface_hub.errors.OfflineModeIsEnabled("offline")

    monkeypatch.setattr(huggingface_hub, "create_repo", refuses)
    flags = ["--pretrained_teacher_model", sd_teacher, "--train_shards_path_or_url", small_shards / "00000.tar"]
    flags += ["--resolution", 32, "--output_dir", tmp_path / "out", "--push_to_hub", "--hub_model_id", "me/out"]
    with pytest.raises(SystemExit, match="--push_to_hub: cannot create me/out on the hub"):
        run(*flags)
    assert not list(tmp_path.glob("out/checkpoint-*"))
