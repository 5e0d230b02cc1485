"""README and docs/: links and names resolve, quoted lines are real, sizes hold."""

import ast
import re
from importlib import import_module
from xml.dom import minidom

import pytest
import torch
from conftest import METHODS, ROOT
from pages import EXAMPLES, PAGES, README, blocks, read, without_blocks

import common

DOCS, TESTS = ROOT / "docs", ROOT / "tests"
ELSEWHERE = {  # flags of torchrun, git, pip, all
    "standalone", "nproc_per_node", "nnodes", "rdzv_backend", "rdzv_endpoint", "index", "help"}


def headings(page):
    """The anchors of a page, as GitHub writes them."""
    titles = re.findall(r"^#+ (.+)$", without_blocks(page), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_link_resolves():
    found = 0
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", without_blocks(page)):
            file, _, anchor = target.partition("#")
            if not target.startswith("http"):
                place = page.parent / file if file else page
                assert place.exists(), f"{page.name}: {target}"
                assert not anchor or anchor in headings(place), f"{page.name}: {target}"
                found += 1
        for name in re.findall(r"^\[([^]]+)\]: ", read(page), re.M):
            assert read(page).count(f"[{name}]") > 1, f"{page.name}: [{name}] is not used"
    assert found > 40


def test_every_file_that_is_named_exists():
    found = 0
    for page in PAGES:
        for name in re.findall(r"`([\w./-]+\.(?:py|md|toml|txt|svg|png))`", without_blocks(page)):
            places = [folder / name for folder in (ROOT, TESTS, DOCS)]
            assert name in EXAMPLES or any(place.is_file() for place in places), name
            found += 1
    assert found > 30


def test_every_flag_that_is_named_exists():
    tools = "".join(read(path) for path in [ROOT / "eval.py", *TESTS.glob("*.py")])
    known = ELSEWHERE | set(re.findall(r'add_argument\("--([a-z_]+)"', tools)) | {"table"}
    for method in METHODS:
        known |= set(import_module(method).Config.__dataclass_fields__)
    named = set()
    for page in PAGES:
        for flag in re.findall(r"(?<![\w-])--(?:no-)?([a-z][a-z_0-9]*)", read(page)):
            assert flag in known, f"{page.name}: no script or tool has --{flag}"
            named.add(flag)
    assert len(named) > 60


@pytest.mark.parametrize("method", METHODS)
def test_the_lines_beside_the_equations_are_in_the_script(method):
    files = [f"{method}.py", "common.py"]
    source = "".join(read(ROOT / file) for file in files)
    table = read(DOCS / f"{method}.md").partition("## Equations and lines")[2]
    rows = re.findall(r"^\| .+ \|$", table.partition("\n## ")[0], re.M)[1:]
    assert len(rows) >= 6
    for row in rows:
        last = re.split(r"(?<!\\)\|", row)[-2]
        assert "`" in last, row
        for span in re.findall(r"`([^`]+)`", last):
            names = re.fullmatch(r"([\w.]+?)(?:\(\.\.\..*\))?", span)  # a name, or name(..., x)
            if names:
                for name in names[1].split("."):
                    assert re.search(rf"\b{name}\b", source), f"{method}: no {span}"
            else:
                assert span in re.sub(r"\s+", " ", source), f"{method}: no line has {span}"


def test_the_diff_in_the_readme_is_real():
    block, = blocks(README, "diff")
    lines = block.splitlines()
    assert len(lines) == 10 and {line[0] for line in lines} == {"-", "+", " "}
    for sign, script in (("-", "hrpo.py"), ("+", "lepo.py")):
        part = "".join(f"{line[1:]}\n" for line in lines if line[0] in (sign, " "))
        assert f"\n{part}" in read(ROOT / script), f"{script} has other lines: see its git diff"


def test_the_readme_takes_three_minutes():
    text = read(README)
    assert 150 < len(text.splitlines()) <= 220
    assert 1500 < len(text.split()) <= 2400
    assert max(map(len, text.splitlines())) <= 160
    assert [line for line in text.splitlines() if line.endswith("-m pytest")]  # for .ci/run
    for page in PAGES:  # a row of a table cannot be broken
        wide = [line for line in read(page).splitlines() if len(line) > 160 and line[0] != "|"]
        assert not wide, f"{page.name}: {wide}"


def test_every_promise_names_a_test_that_exists():
    rows = re.findall(r"^\| (?!promise )(.+) \| (.+) \|$", read(DOCS / "promises.md"), re.M)
    tests = "".join(read(path) for path in TESTS.glob("test_*.py"))
    assert len(rows) >= 25
    for promise, held_by in rows:
        names = re.findall(r"`(\w+)(\.py)?`", held_by)
        assert names, promise
        for name, ending in names:
            file = TESTS / f"{name}.py"
            assert file.is_file() if ending else f"def {name}(" in tests, f"{promise}: {name}"


def test_the_picture_is_there_and_its_script_is_short():
    script = read(DOCS / "feedback.py")
    ast.parse(script)
    assert len(script.splitlines()) <= 80
    picture = minidom.parse(str(DOCS / "feedback.svg"))
    assert len(picture.getElementsByTagName("path")) > 100


@pytest.fixture
def small(monkeypatch):
    """docs/grpo_in_150_lines.py as a module."""
    monkeypatch.syspath_prepend(DOCS)
    return import_module("grpo_in_150_lines")


def test_grpo_in_150_lines_has_the_sections_and_names_of_hrpo(small):
    hrpo, title = import_module("hrpo"), r"^# === \d\. (.+?) =+$"
    assert len(read(DOCS / "grpo_in_150_lines.py").splitlines()) <= 150
    own = re.findall(title, read(DOCS / "grpo_in_150_lines.py"), re.M)
    assert own == [name for name in re.findall(title, read(ROOT / "hrpo.py"), re.M) if name in own]
    names = [name for name, value in vars(small).items()
             if getattr(value, "__module__", "") == small.__name__]
    assert len(own) == 6 and len(names) == 11 and all(hasattr(hrpo, name) for name in names)
    rewards = torch.tensor([1.0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 0])
    assert torch.equal(small.group_advantages(rewards, 4), hrpo.group_advantages(rewards, 4))


def test_grpo_in_150_lines_learns_what_is_rewarded(small, model, monkeypatch, capsys):
    rewards = []

    def reward(record):
        rewards.append(float("1" in record["completion"]))
        return rewards[-1]

    monkeypatch.setattr(small, "reward", reward)
    monkeypatch.setattr(small, "load_problems", lambda spec, split="train", limit=0: (
        common.arithmetic_problems(spec, split, 8)))
    small.main(small.Config(model=model, train="arithmetic:2", steps=8, num_prompts=4, lr=0.01,
                            eval_every=4, max_completion_length=6))
    assert len(rewards) == 8 * 4 * 8
    assert sum(rewards[-64:]) > sum(rewards[:64]) + 24, (sum(rewards[-64:]), sum(rewards[:64]))
    assert re.fullmatch(r"(step \d+  accuracy \d\.\d{3}\n){2}", capsys.readouterr().out)


@pytest.mark.parametrize("method", METHODS)
def test_the_metrics_of_a_method_stand_in_the_table(method):
    names = import_module(method).METHOD_METRICS
    assert names and all(f"`{name}`" in read(DOCS / "runs.md") for name in names)
