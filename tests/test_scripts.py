"""Scripts of one method are word for word the same, but for their arguments and the model."""

import argparse
import ast
import importlib
import re

import pytest
from common.dmd_flags import NOT_HERE

from tests.helpers import ROOT

RULER = "# " + "=" * 117 + "\n"
LCM = ("train_lcm_distill_sd.py", "train_lcm_distill_sdxl.py")
WAN = "train_dmd_distill_wan.py"
SCRIPTS = (*LCM, WAN)
MOST_LINES = {name: 650 for name in LCM} | {WAN: 805}


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
    sd, sdxl = map(parts, LCM)
    assert sdxl["training"] == sd["training"]
    assert sd["training"].count("\n") > 250  # that it is not compared with nothing


def test_imports_differ_by_model_and_sizes_alone():
    sd, sdxl = (parts(name)["imports"] for name in LCM)
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
    functions = [re.findall(r"^def (\w+)", parts(name)["model"], re.MULTILINE) for name in LCM]
    assert functions[0] == functions[1] and {"load_unet", "encode_prompts", "predict", "draw"} < set(functions[0])


def test_arguments_differ_by_defaults_and_the_model_alone():
    """The SDXL script has those of sizes and datasets besides, all in common/buckets.py."""
    sd, sdxl = (set(re.findall(r'add\("--(\w+)"', parts(name)["arguments"])) for name in LCM)
    assert sd == sdxl


def uses_of_arguments(path, but_in: set[str]) -> set[str]:
    """Names read as args.NAME or getattr(args, "NAME", ...), but for those in functions that only parse and check."""

    class Reader(ast.NodeVisitor):
        def __init__(self):
            self.names = set()

        def visit_FunctionDef(self, node):
            if node.name not in but_in:
                self.generic_visit(node)

        def visit_Call(self, node):
            if isinstance(node.func, ast.Name) and node.func.id == "getattr" and ast.unparse(node.args[0]) == "args":
                self.names |= {node.args[1].value} if isinstance(node.args[1], ast.Constant) else set()
            self.generic_visit(node)

        def visit_Attribute(self, node):
            if isinstance(node.value, ast.Name) and node.value.id == "args" and isinstance(node.ctx, ast.Load):
                self.names.add(node.attr)
            self.generic_visit(node)

    reader = Reader()
    reader.visit(ast.parse(path.read_text()))
    return reader.names


def imported(path) -> set:
    """The script and all of common/ that it reaches."""
    found, new = set(), {path}
    while new:
        found |= new
        modules = {
            module for path in new for module, _ in own_imports(path.read_text()) if module.startswith("common.")
        }
        modules |= {
            f"common.{name}" for path in new for module, name in own_imports(path.read_text()) if module == "common"
        }
        new = {ROOT / (module.replace(".", "/") + ".py") for module in modules} - found
    return found


# What other flags become while they are parsed.
DONE_WHILE_PARSING = {
    "help",
    "local_rank",  # says that it has no job
    "use_8bit_adam",  # becomes --optimizer
    "ignore_final_epochs",  # demands --max_train_steps
    "webhook_config",  # becomes args.webhook
    "train_shards_path_or_url",  # becomes args.datasets
    "max_train_samples",  # becomes args.num_samples
    "vae_cache_ondemand",  # these become args.caches
    "vae_cache_disable",
}
DONE_IN_WAN = DONE_WHILE_PARSING | {
    "data_backend_config",  # these become args.datasets
    "train_prompts",
    "dmd_denoising_steps",  # becomes args.steps
    *(NOT_HERE.keys() - {"use_fix_crop_and_size"}),  # shared flags that are refused
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_flag_is_read(name, monkeypatch):
    parsers, parse_args = [], argparse.ArgumentParser.parse_args
    monkeypatch.setattr(
        argparse.ArgumentParser, "parse_args", lambda self, *a: parsers.append(self) or parse_args(self, *a)
    )
    with pytest.raises(SystemExit):
        importlib.import_module(name.removesuffix(".py")).parse_args(["--help"])
    flags = {action.dest for action in parsers[0]._actions}
    checks = {"parse_args", "check_shared_flags", "check_lcm_flags", "check_dmd_flags", "check_data_flags"}
    used = set().union(*(uses_of_arguments(path, {*checks, "check_precision"}) for path in imported(ROOT / name)))
    assert flags - used == (DONE_IN_WAN if name == WAN else DONE_WHILE_PARSING)


def test_scripts_stay_readable():
    for name in SCRIPTS:
        assert (ROOT / name).read_text().count("\n") <= MOST_LINES[name]
    for path in (ROOT / "common").glob("*.py"):
        assert path.read_text().count("\n") <= 350, path
