"""How the scripts read: same sections and names, shared text identical, every flag documented."""

import ast
import dataclasses
import re
import subprocess
import sys
from difflib import SequenceMatcher
from importlib import import_module

import pytest
from conftest import ROOT

SCRIPTS = [p for p in ("hrpo.py", "lepo.py", "latent_grpo.py", "hyrea.py") if (ROOT / p).exists()]
TITLES = ["1. config", "2. the method", "3. rollout", "4. rewards and advantages",
          "5. evaluation", "6. plumbing", "7. training"]
SHARED = ["3. rollout", "5. evaluation", "6. plumbing", "7. training"]
METHOD_NAMES = {"Policy", "start_state", "next_input", "reference_logprobs", "policy_loss",
                "param_groups", "method_metrics"}
LONGEST = {"common.py": 1275, "eval.py": 470, "README.md": 500,
           "latent_grpo.py": 1217, "lepo.py": 935, "hyrea.py": 1240, "test_replay.py": 260,
           "test_eval_files.py": 260}  # others: a script 930, a test 250


def sections(name):
    """{title: text} of a script, split at its banners; "" is what precedes the first."""
    parts = re.split(r"^# === (.+?) =+\n", (ROOT / name).read_text(encoding="utf-8"), flags=re.M)
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2]))}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_has_the_sections_in_order(name):
    assert [title for title in sections(name) if title and "b." not in title[:3]] == TITLES


@pytest.mark.parametrize("title", SHARED)
def test_shared_sections_are_byte_identical(title):
    staged = [n for n in SCRIPTS if title == "7. training" and any("b." in t for t in sections(n))]
    texts = {sections(name)[title] for name in SCRIPTS if name not in staged}
    assert len(texts) == 1, f"section '{title}' differs: change it in all scripts or in none"
    for name in staged:  # a supervised stage inserts lines, and changes none
        lines = texts.copy().pop().splitlines(), sections(name)[title].splitlines()
        assert {tag for tag, *_ in SequenceMatcher(None, *lines, False).get_opcodes()} == {
            "equal", "insert"}, name


@pytest.mark.parametrize("name", SCRIPTS)
def test_section_2_owns_the_method(name):
    tree = ast.parse(sections(name)["2. the method"])
    defined = {node.name for node in tree.body if hasattr(node, "name")}
    assert METHOD_NAMES <= defined


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_name_of_the_method_stands_only_in_docstring_config_and_section_2(name):
    word = name.removesuffix(".py").replace("_", "[_-]?")
    for title in ("3. rollout", "5. evaluation", "6. plumbing", "7. training"):
        assert not re.search(rf"\b{word}\b", sections(name)[title], re.I), title


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_config_field_is_documented_and_every_method_field_has_a_source(name):
    script = import_module(name.removesuffix(".py"))
    text = sections(name)["1. config"]
    before, _, method = text.partition("    # the method\n")
    notes = dict(re.findall(r"^    (\w+): \w+ = .*?  # (.+)$", text, re.M))
    assert list(notes) == [f.name for f in dataclasses.fields(script.Config)]
    for field in re.findall(r"^    (\w+): \w+ = ", method, re.M):
        tag = re.search(r"\[(eq|tab|sec|stage|fig|code|ours)", notes[field])
        assert tag, f"{field}: no source tag"


@pytest.mark.parametrize("name", SCRIPTS)
def test_public_functions_have_docstrings(name):
    for file in (name, "common.py"):
        for node in ast.parse((ROOT / file).read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and len(node.body) > 2:
                small = node.end_lineno - node.lineno < 6
                assert ast.get_docstring(node) or small, f"{file}: {node.name}"


@pytest.mark.parametrize("name", SCRIPTS)
def test_importing_a_script_has_no_side_effect(name, tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {name.removesuffix('.py')}"
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


def test_files_keep_their_size_and_width():
    files = [*ROOT.glob("*.py"), *(ROOT / "tests").glob("*.py"), ROOT / "README.md"]
    for file in files:
        lines = file.read_text(encoding="utf-8").splitlines()
        limit = LONGEST.get(file.name, 250 if file.parent.name == "tests" else 930)
        assert len(lines) <= limit, f"{file.name} has {len(lines)} lines, {limit} are allowed"
        if file.suffix == ".py":
            wide = [n for n, line in enumerate(lines, 1) if len(line) > 100]
            assert not wide, f"{file.name}: lines {wide} are wider than 100"


def test_only_the_four_packages_are_imported_at_run_time():
    allowed = {"torch", "transformers", "numpy", "tqdm", "tokenizers", "safetensors",
               "huggingface_hub", "pyarrow", "matplotlib", "common"}
    allowed |= {name.removesuffix(".py") for name in SCRIPTS} | set(sys.stdlib_module_names)
    for name in [*SCRIPTS, "common.py", "eval.py"]:
        for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert {n.split(".")[0] for n in names} <= allowed, name


def test_every_departure_in_the_code_stands_in_the_page_of_the_method():
    for name in SCRIPTS:
        departures = re.findall(r"paper: .*", (ROOT / name).read_text(encoding="utf-8"))
        page = (ROOT / "docs" / name.replace(".py", ".md")).read_text(encoding="utf-8")
        assert page.count("\n| ") >= len(departures) > 0


def test_every_promise_of_the_readme_names_a_test_that_exists():
    promises = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Promises")[2]
    names = re.findall(r"`(\w+)(\.py)?`", promises.partition("\n## ")[0])
    tests = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "tests").glob("test_*.py"))
    for name, ending in names:
        if ending or name.startswith("test_"):
            assert (ROOT / "tests" / f"{name}.py").is_file() if ending else f"def {name}(" in tests
