"""What a user can mend ends in one line that says where: memory, NaN, disks, GPUs, terminals."""

import io
import json
import os
import re
import resource
import runpy
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from conftest import METHODS, ROOT
from runs import FIRST, flags, launch, rows, train, tree

import common
import eval as evaluation


def as_program(method, argv, monkeypatch, capsys):
    """Run a script as `python SCRIPT argv` would -> (exit code or message, lines on stderr)."""
    monkeypatch.setattr(sys, "argv", [f"{method}.py", *FIRST.get(method, []), *argv])
    load = common.load_problems
    monkeypatch.setattr(common, "load_problems", lambda spec, split, limit=0: load(
        spec, split, limit or 64))
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / f"{method}.py"), run_name="__main__")
    return stop.value.code, capsys.readouterr().err.splitlines()


def raising(error):
    def work(*args, **kwargs):
        raise error
    return work


@pytest.mark.parametrize("method", METHODS)
def test_out_of_memory_names_the_flags_that_help_and_is_said_by_any_rank(
        method, model, tmp_path, monkeypatch, capsys):
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nmore")
    monkeypatch.setattr(common, "grade", raising(full))
    monkeypatch.setattr(common, "weights_fingerprint", lambda lm: os.environ.update(
        RANK="3", LOCAL_RANK="3") or "")
    monkeypatch.setenv("RANK", "0")  # restored afterwards, as is
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(common.dist, "init_process_group", lambda *args, **more: None)
    said, _ = as_program(method, flags(model, tmp_path / "run"), monkeypatch, capsys)
    assert said.startswith("error: CUDA out of memory. Tried to allocate 9 GiB.; lower")
    for flag in ("--micro_batch", "--max_tokens", "--num_prompts", "--eval_batch", "--dry_run"):
        assert flag in said


@pytest.mark.parametrize("method", METHODS)
def test_logits_that_are_not_finite_name_the_prompt_and_the_position(
        method, model, tmp_path, monkeypatch, capsys):
    lm_logits, calls = common.lm_logits, []

    def spoiled(lm, hidden):
        logits = lm_logits(lm, hidden)
        calls.append(len(logits))
        if len(calls) > 3 and logits.dim() == 2:  # the check at load is one; then positions
            logits[-1, 0] = float("nan")
        return logits

    monkeypatch.setattr(common, "lm_logits", spoiled)
    said, _ = as_program(method, flags(model, tmp_path / "run"), monkeypatch, capsys)
    asked = [p["question"] for p in common.load_problems("arithmetic:2", "test", 8)]
    assert said.startswith("error: NaN or inf logits at position 2 after '<bos>")
    assert sum(f"<bos>{question}<think>'" in said for question in asked) == 1 and "\n" not in said


@pytest.mark.parametrize("coding", ["ascii", "cp1252"])
@pytest.mark.parametrize("method", METHODS)
def test_a_terminal_without_utf_8_ends_no_run(method, model, tmp_path, monkeypatch, coding):
    data, shown = tmp_path / "ä.jsonl", io.TextIOWrapper(io.BytesIO(), coding, errors="strict")
    data.write_text('{"question": "1+1=√Ω", "answer": "2"}\n{"question": "2+1=", "answer": "3"}\n',
                    encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", shown)
    argv = flags(model, tmp_path / "rün", f"--train {data} --eval_data {data}")
    monkeypatch.setattr(sys, "argv", [f"{method}.py", *FIRST.get(method, []), *argv])
    runpy.run_path(str(ROOT / f"{method}.py"), run_name="__main__")
    monkeypatch.setattr(sys, "argv", ["eval.py", str(tmp_path / "rün"), "--out", str(tmp_path)])
    runpy.run_path(str(ROOT / "eval.py"), run_name="__main__")
    shown.flush()
    assert b"1+1=" in shown.buffer.getvalue() and b"accuracy ?" in shown.buffer.getvalue().replace(
        b"\xb1", b"?")
    assert "√Ω" in json.loads((tmp_path / "rün" / "samples.jsonl").read_text(
        encoding="utf-8").splitlines()[0])["question"] + "√Ω"


@pytest.mark.parametrize("method", METHODS)
def test_a_folder_without_permission_is_named_before_a_model_is_loaded(
        method, model, tmp_path, monkeypatch, capsys):
    script = import_module(method)
    monkeypatch.setattr(script, "load_model", raising(AssertionError("loaded")))
    monkeypatch.setattr(evaluation, "load_model", raising(AssertionError("loaded")))
    access = os.access  # root may write everywhere
    monkeypatch.setattr(os, "access", lambda path, mode: "locked" not in str(path) and access(
        path, mode))
    (tmp_path / "locked").mkdir()
    before = tree(tmp_path)
    assert train(method, flags(model, tmp_path / "locked" / "a" / "b")) == 2
    line, = capsys.readouterr().err.splitlines()
    assert "--out_dir" in line and f"no permission in {tmp_path / 'locked'}" in line
    with pytest.raises(SystemExit) as stop:
        evaluation.main([str(model), "--out", str(tmp_path / "locked")])
    line, = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and "--out" in line and "no permission" in line
    assert tree(tmp_path) == before


@pytest.mark.parametrize("method", METHODS)
def test_a_machine_without_a_gpu_trains_on_the_cpu_and_says_so(
        method, model, tmp_path, monkeypatch, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    script = import_module(method)
    monkeypatch.setattr(script, "load_problems", lambda spec, split, limit=0: common.load_problems(
        spec, split, 8))
    argv = [word.replace("cpu", "auto") for word in flags(model, tmp_path / "run", "--steps 1")]
    assert isinstance(train(method, argv), dict)
    shown = capsys.readouterr().out
    assert "device=cpu dtype=float32" in shown and "on 1 x cpu" in shown
    assert train(method, flags(model, tmp_path / "other", "--device cuda")) == 2
    assert "--device cuda: more ranks on this machine than GPUs" in capsys.readouterr().err


@pytest.mark.parametrize("method", METHODS)
def test_a_disk_that_takes_no_weights_keeps_the_run_alive_until_its_end(
        method, model, tmp_path, monkeypatch, capsys):
    """A real limit of the operating system on the size of a file, below that of the weights."""
    script, soft = import_module(method), resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr(script, "load_problems", lambda spec, split, limit=0: common.load_problems(
        spec, split, 8))
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, soft[1]))
        code = train(method, flags(model, tmp_path / "run"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, soft)
    assert "the last checkpoint could not be written" in str(code)
    lines = [line for line in capsys.readouterr().err.splitlines() if "NOT saved" in line]
    assert len(lines) == 3 and all("step_00000" in line and "MiB free" in line for line in lines)
    assert len(rows(tmp_path / "run", "train")) == 4 and not [*(tmp_path / "run").glob("step_*")]
    assert isinstance(train(method, flags(model, tmp_path / "run", "--resume auto")), dict)


def test_a_disk_that_is_full_in_the_middle_of_a_row_costs_that_row_only(tmp_path, capsys):
    soft, row = resource.getrlimit(resource.RLIMIT_FSIZE), {"kind": "train", "x": "y" * 900}
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2500, soft[1]))
        for step in range(4):
            common.log_rows(tmp_path, {**row, "step": step}, [])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, soft)
    common.log_rows(tmp_path, {**row, "step": 9}, [])
    assert [r["step"] for r in rows(tmp_path)] == [0, 1, 9]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "step 2 not written" in lines[0] and "metrics.jsonl" in lines[0]


@pytest.mark.parametrize("method", METHODS)
def test_a_run_in_which_no_group_teaches_changes_no_weight(method, model, tmp_path, monkeypatch):
    script = import_module(method)
    monkeypatch.setattr(script, "load_problems", lambda spec, split, limit=0: common.load_problems(
        spec, split, 8))
    monkeypatch.setattr(script, "reward", lambda record: 1.0)
    more = "--kl_coef 0 --weight_decay 0.5"
    assert isinstance(train(method, flags(model, tmp_path / "run", more)), dict)
    early, late = (torch.load(tmp_path / "run" / name / "trainer.pt", weights_only=True)
                   for name in ("step_000002", "step_000004"))
    assert all(torch.equal(late["policy"][name], value) for name, value in early["policy"].items())
    assert late["optimizer"]["state"] == {} and len(late["policy"]) > 8
    for row in rows(tmp_path / "run", "train"):
        assert (row["zero_std_frac"], row["grad_norm"], row["reward"]) == (1, None, 1)


@pytest.mark.parametrize("length", [1, 12])
@pytest.mark.parametrize("method", METHODS)
def test_completions_that_never_end_or_end_at_once_train_and_are_counted(
        method, model, tmp_path, monkeypatch, length):
    script = import_module(method)
    rollout, seen = script.rollout, []

    def of_that_length(policy, *args):
        policy.eos_ids = policy.eos_ids[:0] if length == 12 else torch.arange(99)
        seen.append(rollout(policy, *args))
        return seen[-1]

    monkeypatch.setattr(script, "rollout", of_that_length)
    monkeypatch.setattr(script, "load_problems", lambda spec, split, limit=0: common.load_problems(
        spec, split, 8))
    monkeypatch.setattr(script, "reward", lambda record: float(len(record["completion"]) % 2))
    cut = float(length == 12)
    assert train(method, flags(model, tmp_path / "run"))["truncated_frac"] == cut
    assert all((batch["lengths"] == length).all() for batch in seen)
    for row in rows(tmp_path / "run", "train"):
        assert (row["truncated_frac"], row["length"], row["skipped"]) == (cut, length, 0)
    saved = torch.load(tmp_path / "run" / "step_000004" / "trainer.pt", weights_only=True)
    assert all(value.isfinite().all() for value in saved["policy"].values())


SPOILED = """
import os, sys
sys.path[:0] = [{tests!r}, {root!r}]
import {method} as script, runs, test_resume
script.load_problems, loss = test_resume.few_problems, script.policy_loss
if os.environ["RANK"] == "1":
    script.policy_loss = lambda *args: loss(*args) * float("nan")
script.main([*runs.FIRST.get({method!r}, []), *runs.flags({model!r}, {out!r}, "--steps 9")])
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_all_ranks_skip_an_update_and_stop_together_and_the_problems_of_all_are_saved(
        method, model, tmp_path):
    driver, out = tmp_path / "driver.py", tmp_path / "run"
    driver.write_text(SPOILED.format(method=method, tests=str(ROOT / "tests"), root=str(ROOT),
                                     model=model, out=str(out)))
    job = launch(driver, [], tmp_path / "log", ranks=2)
    assert job.wait(120) == 1 and "5 updates in a row" in (tmp_path / "log").read_text()
    assert [r["skipped"] for r in rows(out, "train")] == [1] * 5
    assert [p.name for p in out.glob("step_*")][-1] == "step_000005"
    for step in range(1, 6):
        found = [r for r in rows(out, name="samples.jsonl") if (r["kind"], r["step"]) == (
            "train", step)]
        assert len(found) == 16 and len({r["question"] for r in found}) == 4


def test_the_same_message_does_not_come_from_every_rank(monkeypatch, capsys):
    for rank, local, words in (("0", "0", ["warning", "error"]), ("3", "0", ["error"]),
                               ("3", "3", [])):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", local)
        common.warn("x")
        with pytest.raises(SystemExit):
            common.fail("y")
        assert [x.split(":")[0] for x in capsys.readouterr().err.splitlines()] == words


def test_no_text_file_is_opened_in_the_language_of_the_machine():
    for name in [*METHODS, "common", "eval"]:
        text = Path(ROOT / f"{name}.py").read_text(encoding="utf-8")
        for line in text.splitlines():
            opens = re.search(r"(\s|=)open\(|\.(read|write)_text\(", line)
            assert not opens or "encoding=" in line or '"rb"' in line, f"{name}: {line}"
