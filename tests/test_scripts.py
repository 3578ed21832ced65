"""Scripts of one method are word for word the same, but for their arguments and the model."""

import ast
import re

from tests.helpers import ROOT

RULER = "# " + "=" * 117 + "\n"
MOST_LINES = 650
SCRIPTS = ("train_lcm_distill_sd.py", "train_lcm_distill_sdxl.py")


def parts(name: str) -> dict[str, str]:
    """Docstring, imports, constants, arguments, model and training of a script."""
    text = (ROOT / name).read_text()
    docstring, rest = re.fullmatch(r'(""".*?""")\n(.*)', text, re.DOTALL).groups()
    head, model, training = re.fullmatch(
        rf"(.*){RULER}# The model: .*?\n{RULER}(.*){RULER}# Training\n{RULER}(.*)", rest, re.DOTALL
    ).groups()
    imports, arguments = head.split("def parse_args", 1)
    return {"docstring": docstring, "imports": imports, "arguments": arguments, "model": model, "training": training}


def own_imports(text: str) -> set[tuple[str, str]]:
    """(module, name) of what a script imports by name."""
    found = [node for node in ast.parse(text).body if isinstance(node, ast.ImportFrom)]
    return {(node.module, alias.name) for node in found for alias in node.names}


def test_training_is_the_same_word_for_word():
    sd, sdxl = map(parts, SCRIPTS)
    assert sdxl["training"] == sd["training"]
    assert sd["training"].count("\n") > 250  # that it is not compared with nothing


def test_imports_differ_by_model_and_sizes_alone():
    sd, sdxl = (parts(name)["imports"] for name in SCRIPTS)
    assert own_imports(sd) - own_imports(sdxl) == {
        ("diffusers", "StableDiffusionPipeline"),
        ("common.buckets", "Rules"),
    }
    assert own_imports(sdxl) - own_imports(sd) == {
        ("diffusers", "StableDiffusionXLPipeline"),
        ("transformers", "CLIPTextModelWithProjection"),
        ("common.buckets", "add_bucket_flags"),
        ("common.buckets", "check_bucket_flags"),
    }
    constants = [text[text.index("LORA_TARGETS") :] for text in (sd, sdxl)]
    assert constants[0] == constants[1]


def test_the_model_block_has_the_same_functions():
    """A fork finds each under its name."""
    functions = [re.findall(r"^def (\w+)", parts(name)["model"], re.MULTILINE) for name in SCRIPTS]
    assert functions[0] == functions[1] and {"load_unet", "encode_prompts", "predict", "draw"} < set(functions[0])


def test_arguments_differ_by_defaults_and_the_model_alone():
    """The SDXL script has those of sizes and datasets besides, all in common/buckets.py."""
    sd, sdxl = (set(re.findall(r'add\("--(\w+)"', parts(name)["arguments"])) for name in SCRIPTS)
    assert sd == sdxl


def test_scripts_stay_readable():
    for name in SCRIPTS:
        assert (ROOT / name).read_text().count("\n") <= MOST_LINES
    for path in (ROOT / "common").glob("*.py"):
        assert path.read_text().count("\n") <= 350, path
