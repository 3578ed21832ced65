"""The house keeps to its design: who may import whom, read-only flags, and scripts that differ by their model alone."""

import argparse
import ast
import contextlib
import functools
import importlib
import inspect
import io
import re
import shlex
import subprocess
import sys

import pytest

from common.data import datasets
from common.data.datasets import SOURCES
from tests.helpers import ROOT, toy_shards

RULER = "# " + "=" * 117 + "\n"
LCM = ("train_lcm_distill_sd", "train_lcm_distill_sdxl")
WAN = "train_dmd_distill_wan"
SCRIPTS = (*LCM, WAN)
COMMON = sorted(path for path in (ROOT / "common").rglob("*.py") if path.read_text().strip())
CODE = [*(ROOT / f"{name}.py" for name in SCRIPTS), *COMMON]
MOST_FLOORS, MOST_FILES, MOST_LINES_OF_MAIN, MOST_CLOSURES = 7, 29, 200, 6


@functools.cache
def tree(path) -> ast.Module:
    return ast.parse(path.read_text())


@functools.cache
def parser_of(name: str) -> argparse.ArgumentParser:
    """The parser that a script's parse_args makes, as --help shows it."""
    found, parse_args = [], argparse.ArgumentParser.parse_args
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setattr(
            argparse.ArgumentParser, "parse_args", lambda self, *a: found.append(self) or parse_args(self, *a)
        )
        with pytest.raises(SystemExit):
            importlib.import_module(name).parse_args(["--help"])
    return found[0]


def shown(name: str) -> list[argparse.Action]:
    """Flags that --help lists."""
    return [action for action in parser_of(name)._actions if action.help != argparse.SUPPRESS]


# ---------------------------------------------------------------------------------------------------------------------
# Scripts of one method
# ---------------------------------------------------------------------------------------------------------------------


def parts(name: str) -> tuple[str, str, str]:
    """What stands before, in and behind the block of the model, without the docstring."""
    text = (ROOT / f"{name}.py").read_text()
    pattern = rf'""".*?"""\n(.*){RULER}# The model: .*?\n{RULER}(.*)({RULER}# Training\n{RULER}.*)'
    return re.fullmatch(pattern, text, re.DOTALL).groups()


def test_scripts_of_one_method_differ_by_their_model_alone():
    (head, _, training), (other_head, _, other_training) = map(parts, LCM)
    assert head == other_head and training == other_training
    assert head.count("\n") > 100 and training.count("\n") > 250  # that nothing is not compared with nothing
    assert "import torch\n" in head and "def parse_args" in head and "def main" in training


def defined(text: str) -> set[str]:
    """Functions, classes and constants of a block."""
    found = set()
    for node in ast.parse(text).body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        found |= {node.name} if hasattr(node, "name") else {target.id for target in targets}
    return found


def test_the_model_block_has_all_that_the_rest_asks_for():
    """A fork finds each under its name, and no other part of a script imports for the model."""
    used, blocks = [], [defined(parts(name)[1]) for name in LCM]
    for name, block in zip(LCM, blocks, strict=True):
        head, _, training = parts(name)
        used.append({node.id for node in ast.walk(ast.parse(head + training)) if isinstance(node, ast.Name)} & block)
    assert used[0] == used[1] and {"load_teacher", "encoders", "predict", "generate", "export", "FAMILY"} < used[0]
    for name in SCRIPTS:
        head, _, training = parts(name)
        assert not re.search(r"^(from|import) (diffusers|transformers|peft)", head + training, re.MULTILINE)


# ---------------------------------------------------------------------------------------------------------------------
# Who may import whom
# ---------------------------------------------------------------------------------------------------------------------


def path_of(module: str):
    """File of a module of the house, or None."""
    path = ROOT / (module.replace(".", "/") + ".py")
    return path if path.exists() else None


@functools.cache
def imports(path, everywhere: bool = False) -> frozenset[str]:
    """Modules that a file imports when it is imported; `everywhere`: inside of functions too."""
    found = set()
    for node in ast.walk(tree(path)) if everywhere else tree(path).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name for name in inner if path_of(name)} or {node.module}
    return frozenset(found)


def reached(path) -> set[str]:
    """All modules that a file imports, itself or by others of the house."""
    found, new = set(), imports(path)
    while new:
        found |= new
        new = {name for module in new if path_of(module) for name in imports(path_of(module))} - found
    return found


def floors(path, above=()) -> int:
    """Modules on the longest way down from here."""
    assert path not in above, f"{path.name}: imports itself by way of {above}"
    below = [path_of(module) for module in imports(path) if path_of(module)]
    return 1 + max((floors(other, (*above, path)) for other in below), default=0)


def test_the_house_has_few_floors_and_rooms():
    for name in SCRIPTS:
        assert 4 <= floors(ROOT / f"{name}.py") <= MOST_FLOORS
    assert len(COMMON) <= MOST_FILES


def foreign(module: str) -> bool:
    """Whether an LCM script has no use for a module."""
    return module.startswith(("common.wan", "common.data.clips")) or module.split(".")[0] == "av"


def test_lcm_scripts_reach_nothing_of_wan_or_of_clips():
    for name in LCM:
        assert not [module for module in reached(ROOT / f"{name}.py") if foreign(module)]
    assert [module for module in reached(ROOT / f"{WAN}.py") if foreign(module)]  # that there is something to find


def test_common_imports_no_script_and_one_module_of_the_tests():
    """The judge of toy pictures stands with the toy, and common/report.py asks it."""
    for path in CODE:
        roots = {module.split(".")[0] for module in imports(path, everywhere=True)}
        assert not roots & set(SCRIPTS), path
        assert ("tests" in roots) == (path == ROOT / "common" / "report.py"), path
        assert "tests" not in {module.split(".")[0] for module in imports(path)}, path


def test_no_test_module_imports_another():
    for path in (ROOT / "tests").rglob("*.py"):
        for module in imports(path, everywhere=True):
            assert not module.rpartition(".")[2].startswith("test_"), path


IMPORT_ALL = f"""
import os, random, signal, sys
import accelerate, diffusers, numpy, peft, torch, transformers

def state():
    threads = torch.get_num_threads(), torch.get_num_interop_threads()
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    rngs = torch.get_rng_state().tolist(), str(random.getstate()), str(numpy.random.get_state())
    exact = torch.backends.cuda.matmul.allow_tf32, torch.get_default_dtype(), torch.is_grad_enabled()
    return threads, handlers, rngs, exact, torch.cuda.is_initialized(), os.getcwd(), os.listdir(), list(sys.argv)

before = state()
sys.path.insert(0, {str(ROOT)!r})
for name in {LCM!r}:
    __import__(name)
print(sorted(name for name in sys.modules if name.startswith(("common", "tests")) or name == "av"))
__import__({WAN!r})
assert state() == before
"""


@pytest.mark.slow
def test_importing_a_script_loads_what_it_needs_and_changes_nothing(tmp_path):
    done = subprocess.run([sys.executable, "-c", IMPORT_ALL], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    modules = ast.literal_eval(line)
    assert "common.data.stream" in modules and not [m for m in modules if foreign(m) or m.startswith("tests")]


# ---------------------------------------------------------------------------------------------------------------------
# Flags
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCRIPTS)
def test_args_holds_flags_and_nobody_writes_there(name):
    args, *_ = importlib.import_module(name).parse_args([])
    assert vars(args).keys() == {action.dest for action in parser_of(name)._actions} - {"help"}
    for flag in (*vars(args), "something_new"):
        with pytest.raises(AttributeError):
            setattr(args, flag, None)
    with pytest.raises(AttributeError):
        del args.seed


def is_args(node) -> bool:
    return isinstance(node, ast.Name) and node.id == "args"


def writes_args(node) -> bool:
    if isinstance(node, ast.Attribute):  # args.x = ..., del args.x
        return is_args(node.value) and not isinstance(node.ctx, ast.Load) or node.attr == "__dict__"
    if isinstance(node, ast.Subscript):  # vars(args)[...] = ...
        return not isinstance(node.ctx, ast.Load) and "(args)" in ast.unparse(node.value)
    if isinstance(node, ast.Call):
        name = ast.unparse(node.func)
        changes = name in ("setattr", "delattr", "object.__setattr__") or name.startswith("vars(args).")
        return (
            changes
            and "args" in [ast.unparse(word) for word in node.args]
            or name in (f"vars(args).{method}" for method in ("update", "pop", "setdefault", "clear"))
        )
    return False


def test_no_code_writes_to_args():
    for path in CODE:
        found = [node for node in ast.walk(tree(path)) if writes_args(node)]
        found = [node for node in found if "self" not in ast.unparse(node)]
        assert not found, f"{path}:{found[0].lineno}"
    for line in ("args.x = 1", "args.x += 1", "del args.x", "setattr(args, 'x', 1)", "vars(args)['x'] = 1"):
        assert any(map(writes_args, ast.walk(ast.parse(line)))), line
    for line in ("x = args.x", "x.args = 1", "other = vars(args) | {}", "vars(args)['x']"):
        assert not any(map(writes_args, ast.walk(ast.parse(line)))), line


CHECKS = {"parse_args", "check_shared_flags", "check_lcm_flags", "check_dmd_flags", "check_model_flags"}
CHECKS |= {"check_ranges", "check_precision", "check_trackers", "check_webhook"}


class Reads(ast.NodeVisitor):
    """Names read as args.NAME or getattr(args, "NAME", ...), but for those in functions that only parse and check."""

    def __init__(self):
        self.names = set()

    def visit_FunctionDef(self, node):
        if node.name not in CHECKS:
            self.generic_visit(node)

    def visit_Call(self, node):
        if isinstance(node.func, ast.Name) and node.func.id == "getattr" and is_args(node.args[0]):
            self.names |= {node.args[1].value} if isinstance(node.args[1], ast.Constant) else set()
        self.generic_visit(node)

    def visit_Attribute(self, node):
        if is_args(node.value) and isinstance(node.ctx, ast.Load):
            self.names.add(node.attr)
        self.generic_visit(node)


READ_IN_A_LOOP = {*SOURCES, "aspect_bucket_rounding"}
READ_IN_A_LOOP |= {"minimum_image_size", "maximum_image_size", "target_downsample_size"}
CHECKED_ALONE = {  # what a rule or a note is all about
    "help",
    "local_rank",  # says that it has no job
    "ignore_final_epochs",  # demands --max_train_steps
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_flag_is_read(name):
    reads = Reads()
    for path in {ROOT / f"{name}.py", *filter(None, map(path_of, reached(ROOT / f"{name}.py")))}:
        reads.visit(tree(path))
    reads.names |= READ_IN_A_LOOP
    refused = set(getattr(importlib.import_module(name), "NO_JOB", ()))
    flags = {action.dest for action in parser_of(name)._actions}
    assert flags - reads.names - refused == CHECKED_ALONE


def help_of(name: str, capsys, monkeypatch) -> str:
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit):
        importlib.import_module(name).parse_args(["--help"])
    return capsys.readouterr().out


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_shows_every_default_and_a_usage_of_one_line(name, capsys, monkeypatch):
    text = help_of(name, capsys, monkeypatch)
    usage, empty, *_ = text.splitlines()
    assert usage.startswith("usage: ") and usage.endswith(" [flags]") and not empty
    text = re.sub(r"\n {9,}", "  ", text)  # a long flag's help stands below it
    lines = {line.split()[0].rstrip(","): line for line in text.splitlines() if line.startswith("  --")}
    for action in shown(name):
        if action.dest == "help":
            continue
        line = lines.pop(action.option_strings[0])
        assert len(line.split("  ")) > 2, line  # there is a help
        assert "default" in line or action.default in (None, False), line
    assert not lines


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_lists_no_flag_that_the_script_refuses(name, capsys, monkeypatch):
    """Each flag that is listed may be given, or misses something else than a job."""
    module = importlib.import_module(name)
    monkeypatch.setattr(datasets, "count_epoch", lambda _: 1)  # of shards, for each flag anew
    assert not set(getattr(module, "NO_JOB", ())) & {action.dest for action in shown(name)}
    no_job = re.compile(r"has no job|: no job(?! without a CUDA GPU)")
    for action in shown(name):
        if action.dest in ("help", "local_rank"):
            continue
        value = str(action.choices[-1]) if action.choices else "16" if action.type in (int, float) else "x"
        count = action.nargs if isinstance(action.nargs, int) else 1
        notes = [""]
        try:
            *_, notes = module.parse_args([action.option_strings[0], *[value] * count])
        except SystemExit:
            pass
        assert not no_job.search(capsys.readouterr().err + "\n".join(notes)), action.dest


# ---------------------------------------------------------------------------------------------------------------------
# Readable
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCRIPTS)
def test_main_sets_up_loops_and_ends(name):
    main = next(node for node in tree(ROOT / f"{name}.py").body if getattr(node, "name", "") == "main")
    inner = [node for node in ast.walk(main) if isinstance(node, ast.FunctionDef) and node is not main]
    assert main.end_lineno - main.lineno < MOST_LINES_OF_MAIN and len(inner) <= MOST_CLOSURES
    assert list(inspect.signature(importlib.import_module(name).main).parameters)[0] == "args"


def readme_commands() -> list[str]:
    """Launch lines in the blocks of all READMEs, and those in lines of text."""
    found = []
    for path in sorted([ROOT / "README.md", *(ROOT / "common").rglob("README.md"), ROOT / "tests/toy/README.md"]):
        text = path.read_text()
        blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ")
        found += [part.strip() for line in blocks.splitlines() for part in line.split("&&")]
        found += re.findall(r"`(accelerate launch [^`]*)`", text)
    return sorted({line for line in found if "accelerate launch" in line and ".py" in line})


THERE = {  # what must exist to be parsed
    "--train_prompts": "prompts.txt",
    "--train_data_dir": "clips",
    "--config": "config.json",
    "--data_backend_config": "data.json",
    "--validation_prompt_library": "library.json",
    "--webhook_config": "webhook.json",
}


@pytest.mark.parametrize("command", readme_commands())
def test_commands_of_the_readmes_parse(command, tmp_path):
    words = shlex.split(command)
    script = next(word for word in words if word.endswith(".py"))
    given = words[words.index(script) + 1 :]
    (tmp_path / "prompts.txt").write_text("a red ball\n")
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "a.mp4").write_bytes(b"not read yet")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "library.json").write_text('{"name": "a red ball"}')
    (tmp_path / "webhook.json").write_text('{"webhook_url": "http://127.0.0.1:9/"}')
    shards = toy_shards(tmp_path / "data")
    (tmp_path / "data.json").write_text(f'[{{"id": "a", "type": "webdataset", "instance_data_dir": "{shards}"}}]')
    for i, (flag, value) in enumerate(zip(given, given[1:], strict=False)):
        if flag == "--train_shards_path_or_url" and not value.startswith(("pipe:", "http")):
            given[i + 1] = shards
        elif flag in THERE:
            given[i + 1] = str(tmp_path / THERE[flag])
    importlib.import_module(script.removesuffix(".py")).parse_args(given)


def test_there_are_commands():
    assert len(readme_commands()) > 10
