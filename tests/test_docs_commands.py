"""Every command in README and docs/ parses, up to the end of its command line."""

import argparse
import re
import runpy
import shlex
import sys
from importlib import import_module
from pathlib import Path

import comparison
import pytest
from conftest import METHODS, ROOT
from pages import EXAMPLES, PAGES, README, blocks, read, without_blocks

import eval as evaluation

SEPARATORS = ";&\n"


def split_commands(text):
    """The simple commands of a shell text, as lists of words. Loops run for their first value."""
    text = re.sub(r"\s# .*| > \S+", "", text.replace("\\\n", " "))  # no comments, no output files
    words = shlex.shlex(text, posix=True, punctuation_chars=SEPARATORS)
    words.whitespace_split, words.whitespace, words.commenters = True, " \t", ""
    commands, values = [[]], {}
    for word in words:
        last = commands[-1]
        if set(word) <= set(SEPARATORS):
            commands.append([])
        elif word not in ("do", "done"):
            last.append(re.sub(r"\$(\w+)", lambda name: values[name[1]], word))
        if last[:1] == ["for"] and len(last) == 4:
            values[last[1]] = last[3]
    return [command for command in commands if command and command[0] != "for"]


def commands(page):
    """All commands of a page: those in its shell blocks, and those between backticks."""
    found = [split_commands(text) for text in blocks(page, "bash")]
    for span in re.findall(r"`([^`\n]+)`", without_blocks(page)):
        if re.match(r"(python|torchrun|git|pip) ", span):
            found.append(split_commands(span))
        elif re.match(r"\w+\.py -", span):  # the name of a script, and flags
            found.append(split_commands(f"python {span}"))
    return sum(found, [])


class Parsed(Exception):
    """A program has parsed its command line; it goes no further."""


def parse_only(program, *args):
    """Run a program up to the end of its command line -> arguments, flags that it does not know."""
    parse = argparse.ArgumentParser.parse_known_args

    def stop(self, *args, **kwargs):
        raise Parsed(*parse(self, *args, **kwargs))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", stop)
        with pytest.raises(Parsed) as parsed:
            program(*args)
    return parsed.value.args


def check_eval(argv):
    """Does eval.py know the flags? It leaves some to the script that decodes: then, does one?"""
    if argv[0] == "--table":
        return
    assert not argv[0].startswith("-"), "the models stand first"
    _, unknown = parse_only(evaluation.main, argv)
    assert not unknown or argv[0] != "plot" and any(accepts(m, unknown) for m in METHODS), unknown


def accepts(method, flags):
    try:
        return bool(import_module(method).parse_config(flags))
    except SystemExit:
        return False


def check_tool(path, argv):
    """Does a file in tests/ or docs/ know its arguments?"""
    if "argparse" not in read(path):
        assert all(word.isdigit() for word in argv), "it takes no flags"
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(path), *argv])
        args, unknown = parse_only(runpy.run_path, str(path), None, "__main__")
    if path.stem == "estimate":  # the flags of a script
        unknown = import_module(args.script).parse_config(unknown) and []
    assert not unknown, unknown
    if path.stem == "comparison":  # flags for the scripts that it runs
        for name in comparison.complete(args).names:
            _, script, *flags = comparison.command(name, 0, args)
            import_module(Path(script).stem).parse_config(flags)


def check(words):
    """Does the command parse? It raises if not, with an exit code or a reason."""
    while re.match(r"[A-Z_0-9]+=", words[0]):  # variables of the environment
        words = words[1:]
    program, *rest = words
    for word in rest:
        if re.match(r"(docs|tests)/|requirements", word):
            assert [*ROOT.glob(word), *ROOT.glob(f"{word}.*")], f"no {word}"
    if program == "torchrun":
        first = next(i for i, word in enumerate(rest) if word.endswith(".py"))
        own = {word.partition("=")[0] for word in rest[:first] if word.startswith("--")}
        nodes = {"--nnodes", "--nproc_per_node", "--rdzv_backend", "--rdzv_endpoint"}
        assert own in ({"--standalone", "--nproc_per_node"}, nodes), "torchrun on one node or many"
        program, rest = "python", rest[first:]
    if Path(program).name != "python":
        assert Path(program).name in ("pip", "git", "cp"), "a program that this test does not know"
        for word in rest:
            assert not word.endswith(".py") or word in EXAMPLES or (ROOT / word).is_file(), word
    elif rest[0] == "-m":
        assert rest[1] in ("venv", "pytest")
    elif rest[0] == "-c":
        compile(rest[1], "docs", "exec")
    else:
        path = ROOT / EXAMPLES.get(rest[0], rest[0])
        assert path.is_file(), f"no {rest[0]}"
        if path.stem in METHODS:
            import_module(path.stem).parse_config(rest[1:])
        elif path.stem == "eval":
            check_eval(rest[1:])
        else:
            check_tool(path, rest[1:])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_a_page_parses(page, monkeypatch, capsys):
    for words in commands(page):
        ranks = re.findall(r"--nproc_per_node=(\d+)", " ".join(words)) or ["1"]
        monkeypatch.setenv("WORLD_SIZE", ranks[0])
        try:
            check(words)
        except (AssertionError, SyntaxError, SystemExit) as error:
            said = capsys.readouterr().err.strip()
            pytest.fail(f"{page.name}: {shlex.join(words)}\n{error} {said}")


def test_commands_were_found_and_stand_in_shell_blocks_only():
    found = [words for page in PAGES for words in commands(page)]
    assert len(found) > 90 and len(commands(README)) > 20
    assert len([words for words in found if words[1:2] == ["eval.py"]]) > 20
    assert [words for words in found if words[0] == "torchrun"]
    for page in PAGES:
        others = re.sub(r"^```bash\n.*?^```$", "", read(page), flags=re.M | re.S)
        assert not re.search(r"^ *(python|torchrun|pip) ", others, re.M), page.name


@pytest.mark.parametrize("good, bad", [
    ("python hrpo.py --no-hybrid", "python hrpo.py --no-hybrit"),
    ("torchrun --standalone --nproc_per_node=2 hrpo.py", "torchrun --nproc_per_node=2 hrpo.py"),
    ("python eval.py tiny --latent_tau 0.3", "python eval.py tiny --latent_tua 0.3"),
    ("python eval.py plot runs/a --out a.png", "python eval.py plot runs/a"),
    ("python tests/long_run.py hrpo --stops 2", "python tests/long_run.py hrpo --stop x"),
    ("python tests/kill_saves.py 9", "python tests/kill_saves.py --kills 9"),
    ("python tests/comparison.py runs/x '--more=lepo: --latent_steps 4'",
     "python tests/comparison.py runs/x '--more=hrpo: --latent_steps 4'"),
    ("for x in 1 2; do python hrpo.py --seed $x; done",
     "for x in one; do python hrpo.py --seed $x; done"),
    ("python -c 'print(1)'", "python -c 'print(1'"),
    ("X=1 pip install -r requirements.txt", "pip install -r requirements-none.txt"),
    ("git diff --no-index hrpo.py lepo.py", "mail students"),
])
def test_a_command_that_does_not_parse_is_noticed(good, bad):
    for words in split_commands(good):
        check(words)
    with pytest.raises((AssertionError, SyntaxError, SystemExit)):
        for words in split_commands(bad):
            check(words)
