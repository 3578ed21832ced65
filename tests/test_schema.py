"""The checker of settings that come from files."""

import pytest

from common.schema import Key, check_settings, read_json

KEYS = {"count": Key(int, 1), "share": Key(float, 0.0), "name": Key(str), "on": Key(bool), "kind": Key(("a", "b"))}


def test_what_keys_take_passes():
    check_settings({"count": 1, "share": 0, "name": "", "on": False, "kind": "b"}, KEYS, "file")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"coun": 1}, "file: unknown key 'coun', did you mean 'count'?"),
        ({"zzz": 1}, "file: unknown key 'zzz'"),
        ({"count": 0}, "file: count is 0, and must be at least 1"),
        ({"count": 1.5}, "file: count is 1.5, and must be of type int"),
        ({"count": True}, "file: count is True, and must be of type int"),
        ({"share": "1"}, "file: share is '1', and must be of type float"),
        ({"share": True}, "file: share is True, and must be of type float"),
        ({"share": -0.5}, "file: share is -0.5, and must be at least 0"),
        ({"name": 1}, "file: name is 1, and must be of type str"),
        ({"name": None}, "file: name is None, and must be of type str"),
        ({"on": 1}, "file: on is 1, and must be of type bool"),
        ({"kind": ["a"]}, "file: kind is ['a'], and must be one of a, b"),
    ],
)
def test_what_they_do_not_take_is_one_sentence(settings, sentence):
    with pytest.raises(ValueError) as error:
        check_settings(settings, KEYS, "file")
    assert str(error.value) == sentence


@pytest.mark.parametrize(
    ("text", "kind", "sentence"),
    [
        ("[1]", dict, "must be a JSON object"),
        ("1", (dict, list), "must be a JSON object or a list"),
        ("{", dict, "is not JSON: "),
    ],
)
def test_files_are_json_of_their_kind(text, kind, sentence, tmp_path):
    (tmp_path / "f.json").write_text(text)
    with pytest.raises(ValueError) as error:
        read_json(tmp_path / "f.json", kind)
    assert str(error.value).startswith(str(tmp_path / "f.json")) and sentence in str(error.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="no_such.json: No such file or directory"):
        read_json(tmp_path / "no_such.json")
