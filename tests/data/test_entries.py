"""Dataset files as SimpleTuner's users have them: where samples and captions are, and what is not here."""

import json
import sys
import urllib.request
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from types import SimpleNamespace

import pytest

from common.data import sources
from common.data.datasets import count_epoch, plan_buckets
from common.data.encoder import SampleEncoder
from common.data.sources import part_fingerprint
from tests.data.helpers import Accelerator, backend, batches_of, entry, parse, quadrants, samples_of, table_module
from tests.helpers import encoded, write_shard


def opened(tmp_path, *entries, words=()):
    return parse("--data_backend_config", backend(tmp_path, *entries), *words)


def captions_of(run) -> dict:
    return {name: sample.captions for name, sample in samples_of(run).items() if name != "faults"}


# ---------------------------------------------------------------------------------------------------------------------
# What is not here
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (
            {"type": "aws", "aws_bucket_name": "b"},
            "type aws: not supported, use type webdataset, whose shards may be s3:",
        ),
        ({"type": "webshart", "source": "x"}, "type webshart: not supported, use type webdataset"),
        ({"dataset_type": "conditioning"}, "dataset_type conditioning: not supported"),
        ({"dataset_type": "image_embeds"}, "dataset_type image_embeds: not supported, use cache_dir_vae"),
        ({"dataset_type": "caption"}, "dataset_type caption: not supported, use --train_prompts"),
        ({"conditioning_data": "other"}, "conditioning_data: not supported"),
        ({"caption_shuffle": {"enable": True}}, "caption_shuffle: not supported"),
        ({"text_cache_disable": True}, "text_cache_disable: not supported"),
        ({"vae_cache_clear_each_epoch": True}, "vae_cache_clear_each_epoch: not supported, use --vae_cache_disable"),
        ({"minimum_aspect_ratio": 0.5}, "minimum_aspect_ratio: not supported"),
        ({"delete_unwanted_images": True}, "delete_unwanted_images: not supported"),
        ({"start_epoch": 2}, "start_epoch: not supported"),
        ({"train_batch_size": 4}, "train_batch_size: not supported, use --train_batch_size"),
        ({"video": {"num_frames": 81, "frame_interval": 25}}, "video: frame_interval: not supported"),
        ({"video": {"max_frames": 81}}, "max_frames: not supported"),
        ({"video": {"min_frames": 100}}, "has min_frames, and images have no frames"),
        ({"video": 81}, "video is 81, and must be an object of settings"),
        ({"huggingface": {"filter_func": {"collection": "x"}}}, "filter_func: not supported"),
        (
            {"caption_strategy": "csv"},
            "caption_strategy is 'csv', and must be one of textfile, filename, instanceprompt",
        ),
        ({"caption_strategy": "instanceprompt"}, "has no instance_prompt"),
        ({"caption_strategy": "parquet"}, "has no parquet"),
        ({"caption_strategy": "parquet", "parquet": {"path": "x"}}, "parquet has no filename_column"),
        ({"caption_strategy": "parquet", "parquet": {"pth": "x"}}, "unknown key 'pth', did you mean 'path'?"),
        ({"type": "huggingface"}, "has no dataset_name"),
        ({"type": "csv", "csv_file": "x.csv"}, "has no csv_caption_column"),
        ({"type": "csv", "csv_file": "no.csv", "csv_caption_column": "c"}, "no.csv"),
        ({"disabled": "true"}, "disabled is 'true', and must be of type bool"),
        ({"captions": "x"}, "unknown key 'captions'"),
    ],
)
def test_what_is_not_here_is_one_sentence(tmp_path, folder, refused, changes, named):
    message = refused("--data_backend_config", backend(tmp_path, entry(folder, **changes)))
    assert named in message and "multidatabackend.json: 'images'" in message and "mean 'caption_s" not in message
    assert "text_cache" not in message or message.endswith(named)  # nothing stands in for it: texts are always cached


def test_what_is_off_passes_and_what_has_no_effect_is_noted(tmp_path, folder):
    off = {"prepend_instance_prompt": False, "instance_prompt": None, "only_instance_prompt": False, "disable": False}
    off |= {"preserve_data_backend_cache": False, "vae_cache_clear_each_epoch": False, "start_epoch": 1}
    off |= {"conditioning_data": None, "skip_file_discovery": "vae metadata"}
    run = opened(tmp_path, entry(folder, **off))
    assert run.notes == [] and run.data.datasets[0].skip == ("vae", "metadata")
    (note,) = opened(tmp_path, entry(folder, text_embeds="texts", hash_filenames=True)).notes
    assert note.endswith("multidatabackend.json: 'images': not used here: text_embeds, hash_filenames")


def test_an_entry_that_is_disabled_may_be_of_any_kind(tmp_path, folder):
    cloud = {"id": "cloud", "type": "aws", "aws_bucket_name": "b"}
    for off in ({"disabled": True}, {"disable": True}):
        assert [dataset.id for dataset in opened(tmp_path, entry(folder), cloud | off).data.datasets] == ["images"]


# ---------------------------------------------------------------------------------------------------------------------
# Captions
# ---------------------------------------------------------------------------------------------------------------------


def test_one_caption_for_all_images_of_a_folder_and_of_shards(tmp_path, folder):
    shard = write_shard(tmp_path / "s.tar", [{"png": encoded(quadrants(64, 64)), "txt": b"its own"}, {"png": b"x"}])
    all_alike = {"caption_strategy": "instanceprompt", "instance_prompt": "a photo of sks"}
    run = opened(
        tmp_path, entry(folder, **all_alike), entry(str(shard), id="tar", type="webdataset", **all_alike)
    )  # fmt: skip
    assert set(map(tuple, captions_of(run).values())) == {("a photo of sks",)}
    assert samples_of(run)["faults"] == {"broken image": 1} and run.data.samples == 6
    assert opened(tmp_path, entry(folder, instance_prompt="x")).data.datasets[0].instance_prompt is None


def test_another_caption_for_all_fills_the_cache_of_texts_anew(tmp_path, folder):
    (dataset,) = opened(tmp_path, entry(folder)).data.datasets
    text = SimpleNamespace(folder=tmp_path)
    encoder = SampleEncoder(None, latents=None, text=text, vae_batch_size=1, device=None)
    prompts = [replace(dataset, instance_prompt=prompt) for prompt in (None, "one", "other")]
    assert len({encoder.done_name(each, dataset.parts[0]) for each in prompts}) == 3


def test_lines_of_a_text_stay_together_where_the_entry_says_so(tmp_path, folder):
    run = opened(tmp_path, entry(folder, disable_multiline_split=True))
    assert captions_of(run)["wide_one"] == ["first of wide_one\n\n  second of wide_one"]


def table_file(tmp_path, name: str, rows: list[dict]):
    if name.endswith(".parquet"):
        pa = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pa.Table.from_pylist(rows), tmp_path / name)
    else:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / name


@pytest.mark.parametrize("name", ["captions.parquet", "captions.jsonl"])
def test_captions_in_a_table(tmp_path, folder, refused, name):
    rows = [
        {"id": "wide_one", "long": "a wide one", "short": "wide", "tags": "w"},
        {"id": "sub/square_one", "long": "", "short": None, "tags": "square, red"},
        {"id": "gone", "long": "x", "short": "x", "tags": "x"},
    ]
    block = {"path": str(table_file(tmp_path, name, rows)), "filename_column": "id", "caption_column": "long"}
    block |= {"width_column": "w", "height_column": "h", "fallback_caption_column": "tags"}
    both = {"caption_strategy": "parquet", "metadata_backend": "parquet"}
    run = opened(tmp_path, entry(folder, parquet=block, **both))
    assert captions_of(run) == {"wide_one": ["a wide one"], "square_one": ["square, red"]}
    found = samples_of(run)
    assert found["faults"] == {"unreadable file": 1} and count_epoch(run.data.datasets) == 3

    # several columns are alternatives; names with extensions; the table beside the images
    for row in rows:
        row["id"] += ".png"
    table_file(folder, name, rows)
    block |= {"path": name, "caption_column": ["long", "short"], "identifier_includes_extension": True}
    run = opened(tmp_path, entry(folder, parquet=block, **both))
    assert captions_of(run) == {"wide_one": ["a wide one", "wide"], "square_one": ["square, red"]}
    rows[0]["id"] = "../secret.png"
    table_file(folder, name, rows)
    assert "../secret.png: must be a path inside this folder" in refused(
        "--data_backend_config", backend(tmp_path, entry(folder, parquet=block, **both))
    )
    bad = entry(folder, parquet=block | {"caption_column": 5}, **both)
    assert "caption_column is 5, and must be a column's name or a list" in refused(
        "--data_backend_config", backend(tmp_path, bad)
    )
    bad = entry(folder, parquet=block | {"caption_column": "text"}, **both)
    assert f"parquet: text: {folder}/{name} has id, long, short, tags" in refused(
        "--data_backend_config", backend(tmp_path, bad)
    )


def test_captions_in_a_list_of_json(tmp_path, folder, refused):
    """Or in its lines; what is neither is an error that says what is needed."""
    table, block = tmp_path / "captions.json", {"filename_column": "id", "caption_column": "text"}
    tabled = entry(folder, caption_strategy="parquet", parquet=block | {"path": str(tmp_path / "captions.json")})
    rows = [{"id": "wide_one", "text": "a wide one"}, {"id": "sub/square_one", "text": "a square"}]
    for text in (json.dumps(rows, indent=1), "\n".join(map(json.dumps, rows))):
        table.write_text(text)
        assert captions_of(opened(tmp_path, tabled)) == {"wide_one": ["a wide one"], "square_one": ["a square"]}
    for text in (json.dumps(rows[0], indent=1), json.dumps([rows]), "[1]", '"text"'):
        table.write_text(text)
        message = refused("--data_backend_config", backend(tmp_path, tabled))
        assert f"{table}: must be a JSON list of objects, or have an object in each line" in message


def test_a_name_without_extension_is_of_one_file_alone(tmp_path, folder, refused):
    quadrants(64, 64).save(folder / "wide_one.jpg")
    rows = [{"id": "sub/square_one", "text": "a square"}]
    block = {"path": str(table_file(tmp_path, "captions.jsonl", rows)), "filename_column": "id"}
    tabled = entry(folder, caption_strategy="parquet", parquet=block | {"caption_column": "text"})
    assert captions_of(opened(tmp_path, tabled)) == {"square_one": ["a square"]}  # which is not in doubt
    table_file(tmp_path, "captions.jsonl", [*rows, {"id": "wide_one", "text": "a wide one"}])
    message = refused("--data_backend_config", backend(tmp_path, tabled))
    assert "captions.jsonl: wide_one.jpg or wide_one.png: identifier_includes_extension must be true" in message


def test_metadata_of_a_folder_stays_inside_it(folder, refused):
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "../secret.png", "text": "x"}))
    assert "../secret.png: must be a path inside this folder" in refused("--train_data_dir", folder)


# ---------------------------------------------------------------------------------------------------------------------
# The hub, and CSV files
# ---------------------------------------------------------------------------------------------------------------------

HUB = {"id": "hub", "type": "huggingface", "dataset_name": "me/mine", "caption_strategy": "huggingface"}
HUB |= {"metadata_backend": "huggingface", "cache_dir": "files", "cache_dir_vae": "latents", "resolution": 64}


def test_a_dataset_of_the_hub(tmp_path, monkeypatch, refused):
    rows = [{"image": {"bytes": encoded(quadrants(64, 64 + i)), "path": None}, "text": f"{i}"} for i in range(3)]
    module = table_module([row | {"tags": ["a", ""]} for row in rows])
    monkeypatch.setitem(sys.modules, "datasets", module)
    monkeypatch.setattr(sys.modules["tests.data.helpers"].Table, "column_names", ["image", "text", "tags"])
    run = opened(tmp_path, HUB)
    assert module.asked == [(("me/mine", None), {"split": "train", "cache_dir": "files"})]
    assert sorted(captions_of(run).values()) == [["0"], ["1"], ["2"]] and run.data.samples == 3
    assert run.data.datasets[0].cache_dir_vae == "latents"
    assert opened(tmp_path, HUB | {"cache_dir_vae": None}).data.datasets[0].cache_dir_vae is None
    block = {"caption_column": ["text", "tags"], "config": "small", "width_column": "w"}
    run = opened(tmp_path, HUB | {"split": "validation", "revision": "v2", "huggingface": block})
    assert module.asked[-1] == (
        ("me/mine", "small"), {"split": "validation", "cache_dir": "files", "revision": "v2"}
    )  # fmt: skip
    assert sorted(captions_of(run).values()) == [["0", "a"], ["1", "a"], ["2", "a"]]
    message = refused("--data_backend_config", backend(tmp_path, HUB | {"image_column": "img"}))
    assert "'hub': image_column img: me/mine has image, text, tags" in message


class Pictures(BaseHTTPRequestHandler):
    def do_GET(self):  # noqa: N802
        self.server.asked.append(self.path)
        self.send_response(302 if self.path == "/away" else 200 if self.path in self.server.pictures else 404)
        self.send_header("Location", "file:///etc/passwd")
        self.end_headers()
        self.wfile.write(self.server.pictures.get(self.path, b""))

    def log_message(self, *_):
        pass


@pytest.fixture
def pictures(monkeypatch):
    """A server of pictures, {path: bytes}; what is fetched by https elsewhere is fetched by http here."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Pictures)
    server.pictures, server.asked = {}, []
    Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    yield server
    server.shutdown()


def csv_entry(tmp_path, text: str, **changes) -> dict:
    (tmp_path / "list").mkdir(exist_ok=True)
    (tmp_path / "list" / "list.csv").write_text(text, encoding="utf-8-sig")
    base = {"id": "list", "type": "csv", "csv_file": str(tmp_path / "list" / "list.csv"), "csv_caption_column": "text"}
    return base | {"caption_strategy": "csv", "csv_cache_dir": str(tmp_path / "kept"), "resolution": 64} | changes


def test_a_csv_file_of_addresses(tmp_path, pictures, monkeypatch, capsys):
    monkeypatch.setattr(sources, "HTTPS", urllib.request.build_opener())
    pictures.pictures = {"/a": encoded(quadrants(64, 96)), "/b.png": encoded(quadrants(64, 64))}
    rows = [f'{pictures.url}/a,"one, with a comma"', f"{pictures.url}/b.png,two", f"{pictures.url}/a,again"]
    rows += [f"{pictures.url}/gone?sesame,x", f"{pictures.url}/away,x"]
    run = opened(tmp_path, csv_entry(tmp_path, "url,text\n" + "\n".join(rows), crop=False))
    accelerator = Accelerator()
    plan_buckets(run.args, run.data, accelerator)
    assert pictures.asked == [] and accelerator.said == []  # nothing is fetched for the table of buckets
    capsys.readouterr()
    found = samples_of(run)
    assert found.pop("faults") == {"address that cannot be fetched": 2}
    gone, away = capsys.readouterr().out.splitlines()
    assert gone.startswith(f"{pictures.url}/gone?...: address that cannot be fetched: HTTP Error 404")
    assert away.startswith(f"{pictures.url}/away: address that cannot be fetched: ") and "sesame" not in gone
    assert sorted(sample.captions for sample in found.values()) == [["one, with a comma", "again"], ["two"]]
    assert run.data.samples == 4 and len(list((tmp_path / "kept").iterdir())) == 2
    pictures.asked.clear()
    again = opened(tmp_path, csv_entry(tmp_path, "url,text\n" + "\n".join(rows[:3])))
    assert len(batches_of(again, batch_size=1, count=4)) == 4 and pictures.asked == []
    fingerprints = [part_fingerprint(part) for part in run.data.datasets[0].parts]
    assert len(set(fingerprints)) == 4 and fingerprints[:2] == [
        part_fingerprint(p) for p in again.data.datasets[0].parts
    ]


def test_nothing_but_https_is_fetched(tmp_path, pictures):
    pictures.pictures = {"/a": encoded(quadrants(64, 96))}
    secret = tmp_path / "secret.png"
    secret.write_bytes(encoded(quadrants(64, 64)))
    run = opened(tmp_path, csv_entry(tmp_path, f"url,text\n{pictures.url}/a,x\nfile://{secret},x\ndata://x,x\n"))
    assert samples_of(run) == {"faults": {"address that cannot be fetched": 3}} and pictures.asked == []
    assert set(sources.HTTPS.handle_open) - {"unknown"} == {"https"}  # also where an answer sends it elsewhere


def test_a_csv_file_of_paths(tmp_path, refused):
    text = "file,text\nsub/a.png,one\nb.png,two\ngone.png,x\n"
    paths = csv_entry(tmp_path, text, csv_url_column="file", csv_cache_dir=None)
    (tmp_path / "list" / "sub").mkdir()
    quadrants(64, 96).save(tmp_path / "list" / "sub" / "a.png")
    quadrants(64, 64).save(tmp_path / "list" / "b.png")
    quadrants(64, 64).save(tmp_path / "secret.png")
    run = opened(tmp_path, paths)
    assert captions_of(run) == {"a": ["one"], "b": ["two"]} and samples_of(run)["faults"] == {"unreadable file": 1}
    for place, named in (
        ("../secret.png", "../secret.png: must be a path inside this folder"),
        (tmp_path / "secret.png", "secret.png: must be a path inside this folder"),
        ("", "row 1 has no file"),
        ("https://example.org/a.png", "has addresses, and there is no csv_cache_dir"),
    ):
        csv_entry(tmp_path, f"file,text\n{place},x\n")
        assert named in refused("--data_backend_config", backend(tmp_path, paths))
    csv_entry(tmp_path, "file,txt\na.png,x\n")
    assert "csv_caption_column text: " in refused("--data_backend_config", backend(tmp_path, paths))


# ---------------------------------------------------------------------------------------------------------------------
# Data that the command line names, and pictures that are held out
# ---------------------------------------------------------------------------------------------------------------------


def test_the_command_line_names_the_data_of_an_entry_without_any(tmp_path, folder, refused):
    bare = {"resolution": 0.04, "resolution_type": "area", "crop": False, "repeats": 2}
    run = opened(tmp_path, bare, words=["--train_data_dir", folder])
    (dataset,) = run.data.datasets
    assert (run.data.source, dataset.id, dataset.repeats) == ("--data_backend_config", str(folder), 2)
    assert dataset.rules.resolution == 0.04 and len(captions_of(run)) == 4
    shard = write_shard(tmp_path / "s.tar", [{"png": encoded(quadrants(64, 64)), "txt": b"of a shard"}])
    run = opened(tmp_path, bare | {"id": "a"}, entry(folder), words=["--train_shards_path_or_url", shard])
    assert [dataset.id for dataset in run.data.datasets] == ["a", "images"] and ["of a shard"] in captions_of(
        run
    ).values()
    for entries, count in (([entry(folder)], 0), ([bare | {"id": "a"}, bare | {"id": "b"}], 2)):
        message = refused("--data_backend_config", backend(tmp_path, *entries), "--train_data_dir", folder)
        assert f"--train_data_dir: {tmp_path}/multidatabackend.json has {count} datasets without instance_" in message
    assert "--data_backend_config and --dataset_name: one or the other" in refused(
        "--data_backend_config", backend(tmp_path, bare), "--dataset_name", "me/mine"
    )
    # on the command line alone a folder wins over a config's dataset file, as ever
    (tmp_path / "config.json").write_text(json.dumps({"data_backend_config": "gone.json"}))
    run = parse("--config", tmp_path / "config.json", "--train_data_dir", folder)
    assert run.data.source == "--train_data_dir"


def test_an_eval_dataset_is_not_trained_on(tmp_path, folder):
    held = entry(folder, id="held", dataset_type="eval")
    run = opened(tmp_path, entry(folder), held, words=["--eval_steps", 2])
    assert [dataset.id for dataset in run.data.datasets] == ["images"] and run.data.samples == 4
    assert [dataset.id for dataset in run.data.held_out] == ["held"] and run.notes == []
    run = opened(tmp_path, entry(folder), held)
    assert run.data.held_out == () and "'held': dataset_type eval: has no job without --eval_steps" in run.notes[0]
