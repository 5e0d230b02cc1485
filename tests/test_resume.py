"""A stopped and resumed run is the uninterrupted run, bit for bit; its files load elsewhere."""

import os
import re
import shutil
import socket
import subprocess
import sys
from importlib import import_module

import pytest
import torch
from conftest import ROOT, make_lm, save_folder
from runs import METHODS, OFF, checkpoint_values, differences, flags, launch, rows, train, tree
from transformers import AutoModelForCausalLM

import common

VARIANTS = ["", "OFF", "--lora_rank 4", "OFF --lora_rank 4"]


def odd_length(record):
    """A reward that a random model earns half the time, so that the policy gradient matters."""
    return float(record["length"] % 2)


def few_problems(spec, split="train", limit=0):
    """So few that passes over the data end inside a step; and quicker to tokenise."""
    return common.load_problems(spec, split, limit or 10)


@pytest.fixture(params=METHODS)
def method(request, monkeypatch):
    script = import_module(request.param)
    monkeypatch.setattr(script, "reward", odd_length)
    monkeypatch.setattr(script, "load_problems", few_problems)
    return request.param


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_resumed_run_equals_an_uninterrupted_one(method, model, tmp_path, variant):
    variant = variant.replace("OFF", OFF[method])
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    result = train(method, flags(model, whole, variant))
    assert result["n"] == 8
    assert isinstance(train(method, flags(model, parts, f"{variant} --stop_after 3")), dict)
    assert {p.name for p in parts.glob("step_*")} == {"step_000002", "step_000003"}
    assert train(method, flags(model, parts, f"{variant} --resume auto")) == result
    assert differences(whole / "step_000004", parts / "step_000004") == []
    assert rows(whole) == rows(parts)
    assert rows(whole, name="samples.jsonl") == rows(parts, name="samples.jsonl")
    assert [r["step"] for r in rows(whole, "train")] == [1, 2, 3, 4]
    assert [r["step"] for r in rows(whole, "eval")] == [0, 2, 4]
    moved = differences(whole / "step_000002", whole / "step_000004")
    assert len([name for name in moved if "/policy/" in name]) > 8  # there was something to equal
    trained = rows(whole, "train")
    assert trained[-1]["kl"] > 0 and min(r["zero_std_frac"] for r in trained) < 1


def test_the_reference_after_a_resume_is_the_original_model(method, model, tmp_path, monkeypatch):
    script, seen = import_module(method), []
    make = script.frozen_copy
    monkeypatch.setattr(script, "frozen_copy", lambda lm: seen.append(make(lm)) or seen[-1])
    train(method, flags(model, tmp_path / "run", "--stop_after 3"))
    train(method, flags(model, tmp_path / "run", "--resume auto"))
    original = AutoModelForCausalLM.from_pretrained(model).state_dict()
    assert len(seen) == 2
    for reference in seen:
        for k, v in reference.state_dict().items():
            rows = 29 if "embed" in k or "lm_head" in k else None  # hyrea sets those of its markers
            assert torch.equal(original[k][:rows], v[:rows])
            assert torch.equal(seen[0].state_dict()[k], v)


TWICE = """
import shutil, sys
sys.path[:0] = [{tests!r}, {root!r}]
import {method} as script, runs, test_resume
from pathlib import Path
script.reward, script.load_problems = test_resume.odd_length, test_resume.few_problems
whole, parts = Path({out!r}) / "whole", Path({out!r}) / "parts"
first = runs.FIRST.get({method!r}, [])
script.main([*first, *runs.flags({model!r}, whole, "{variant}")])
script.main([*first, *runs.flags({model!r}, parts, "{variant} --stop_after 3")])
script.main([*first, *runs.flags({model!r}, parts, "{variant} --resume auto")])
script.dist.destroy_process_group()
"""


@pytest.mark.parametrize("variant", [
    "", pytest.param("OFF --lora_rank 4", marks=pytest.mark.slow)])
def test_a_resumed_run_equals_an_uninterrupted_one_on_two_ranks(method, model, tmp_path, variant):
    driver, tests = tmp_path / "driver.py", str(ROOT / "tests")
    if method == "latent_grpo":
        variant += " --max_extra_rollouts 1"
    if method != "hrpo":  # several updates per rollout, where the method has a ratio
        variant += " --update_epochs 2 --minibatches 2"
    driver.write_text(TWICE.format(method=method, tests=tests, root=str(ROOT), model=model,
                                   out=str(tmp_path), variant=variant.replace("OFF", OFF[method])))
    job = launch(driver, [], tmp_path / "log", ranks=2)
    assert job.wait(120) == 0, (tmp_path / "log").read_text()
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert differences(whole / "step_000004", parts / "step_000004") == []
    assert rows(whole) == rows(parts)
    assert '"world_size": 2' in (whole / "config.json").read_text()
    assert min(r["zero_std_frac"] for r in rows(whole, "train")) < 1


START = ("--stage sft --train arithmetic-restated:2 --sft_steps 4 --sft_batch 8 --sft_save_every 2 "
         "--sft_lr 0.01 --max_completion_length 28")
CURRICULUM = {"hyrea": "--sft_rounds 2", "latent_grpo": ""}  # of its rounds, one ends at step 2


@pytest.mark.slow
@pytest.mark.parametrize("name", CURRICULUM)
def test_a_supervised_stage_resumes_bit_for_bit_on_two_ranks(name, model, tmp_path):
    driver = tmp_path / "driver.py"
    driver.write_text(TWICE.format(method=name, tests=str(ROOT / "tests"), root=str(ROOT),
                                   model=model, out=str(tmp_path),
                                   variant=f"{START} {CURRICULUM[name]}"))
    job = launch(driver, [], tmp_path / "log", ranks=2)
    assert job.wait(120) == 0, (tmp_path / "log").read_text()
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert (parts / "step_000003").exists()
    assert differences(whole / "step_000004", parts / "step_000004") == []
    assert rows(whole) == rows(parts)
    early, late = (checkpoint_values(whole / step) for step in ("step_000002", "step_000004"))
    assert sum(not torch.equal(late[k], v) for k, v in early.items() if "/policy/" in k) > 8


def test_the_seed_alone_decides_a_run_even_twice_in_a_process(method, model, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert isinstance(train(method, flags(model, tmp_path / name, f"--seed {seed}")), dict)
    first, same, other = (tmp_path / name / "step_000004" for name in "abc")
    assert differences(first, same) == [] and rows(first.parent) == rows(same.parent)
    assert len(differences(first, other)) > 8 and rows(first.parent) != rows(other.parent)


def test_one_step_more_or_less_makes_the_comparison_fail(method, model, tmp_path):
    """Guards the tests above: a resume that repeated or lost its noise would be seen."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(method, flags(model, whole))
    train(method, flags(model, parts, "--stop_after 2"))
    script = import_module(method)
    load, shift = script.load_checkpoint, {"step": 1, "skipped": 0, "best": [-1.0, 0]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "load_checkpoint", lambda *args: load(*args) and shift)
        train(method, flags(model, parts, "--resume auto"))
    assert differences(whole / "step_000004", parts / "step_000004")


def test_rows_of_steps_that_are_run_again_do_not_appear_twice(method, model, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(method, flags(model, whole))
    shutil.copytree(whole, killed)
    shutil.rmtree(killed / "step_000004")
    with open(killed / "metrics.jsonl", "a") as f:
        f.write('{"kind": "train", "st')  # what a kill in the middle of a write leaves
    train(method, flags(model, killed, "--resume auto"))
    assert rows(whole) == rows(killed)
    assert rows(whole, name="samples.jsonl") == rows(killed, name="samples.jsonl")
    assert differences(whole / "step_000004", killed / "step_000004") == []


def test_resume_takes_the_path_of_the_newest_checkpoint_and_no_other(
        method, model, tmp_path, capsys):
    out = tmp_path / "run"
    train(method, flags(model, out, "--stop_after 3"))
    before = tree(out)
    for path, reason in ((out / "step_000002", "newer checkpoints"), (out / "no", "not a check"),
                         (tmp_path / "elsewhere", "not a checkpoint (step")):
        if path.name == "elsewhere":
            shutil.copytree(out / "step_000003", path)
        assert train(method, flags(model, out, f"--resume {path}")) == 2
        assert reason in capsys.readouterr().err and tree(out) == before
    assert isinstance(train(method, flags(model, out, f"--resume {out / 'step_000003'}")), dict)
    assert checkpoint_values(out / "step_000004")["/step"] == 4


def test_resuming_a_finished_run_only_evaluates(method, model, tmp_path):
    result = train(method, flags(model, tmp_path / "run"))
    before, kept = rows(tmp_path / "run"), tree(tmp_path / "run" / "step_000004")
    more = "--resume auto --micro_batch 3 --eval_batch 5 --save_every 1"  # these may change
    again = train(method, flags(model, tmp_path / "run", more))
    assert again == pytest.approx(result) and tree(tmp_path / "run" / "step_000004") == kept
    assert [(r["kind"], r["step"]) for r in rows(tmp_path / "run")] == [
        (r["kind"], r["step"]) for r in before]


@pytest.mark.parametrize("lora_rank", [0, 4])
@pytest.mark.parametrize("tied", [False, True])
def test_hf_loads_as_an_ordinary_model_with_the_policys_logits(
        method, tmp_path, monkeypatch, lora_rank, tied):
    script, ids, logits = import_module(method), torch.arange(3, 13)[None], []
    save = script.save_checkpoint

    def spy(out_dir, policy, *args):
        policy.lm.eval()
        with torch.no_grad():
            logits.append(policy.lm(input_ids=ids, use_cache=False).logits)
        return save(out_dir, policy, *args)

    monkeypatch.setattr(script, "save_checkpoint", spy)
    model = save_folder(tmp_path / "model", make_lm(tie_word_embeddings=tied))
    train(method, flags(model, tmp_path / "run", f"--lora_rank {lora_rank}"))
    start, found = (AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
                    for folder in (model, tmp_path / "run" / "step_000004" / "hf"))
    assert not found[1]["missing_keys"] and not found[1]["unexpected_keys"]
    with torch.no_grad():
        difference = found[0](input_ids=ids).logits - logits[-1]
        moved = found[0](input_ids=ids).logits - start[0](input_ids=ids).logits
    assert difference.abs().max() < 1e-5 < 1e-2 < moved.abs().max()
    if lora_rank == 0:
        assert difference.abs().max() == 0


def test_a_dry_run_writes_nothing(method, model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "note").write_text("mine")
    before, script, draws = tree(tmp_path), import_module(method), []
    rollout = script.rollout
    monkeypatch.setattr(script, "rollout", lambda *args: draws.append(0) or rollout(*args))
    for out in ("new", "used"):
        more = "--dry_run" + " --max_extra_rollouts 2" * (method == "latent_grpo")
        assert train(method, flags(model, out, more))["step"] == 2
        assert "peak memory" in capsys.readouterr().out
    assert len(draws) == 4  # groups of equal rewards draw no more
    assert tree(tmp_path) == before


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_two_nodes_without_one_run_folder_are_refused(model, tmp_path):
    """Each node has its own `run`: rank 0 would go on from step 2 and rank 1 start anew."""
    nodes = [tmp_path / "node0", tmp_path / "node1"]
    for node in nodes:
        node.mkdir()
    argv = flags(model, "run", "--eval_limit 2")
    begun = launch(ROOT / "hrpo.py", [*flags(model, nodes[0] / "run", "--eval_limit 2"),
                                      "--stop_after", "2"], tmp_path / "log", ranks=2)
    assert begun.wait(120) == 0, (tmp_path / "log").read_text()
    port, jobs = free_port(), []
    for number, node in enumerate(nodes):
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node",
                   "1", f"--node_rank={number}", "--master_addr=127.0.0.1", f"--master_port={port}",
                   str(ROOT / "hrpo.py"), *argv, "--resume", "auto"]
        with open(node / "log", "w") as log:
            jobs.append(subprocess.Popen(command, cwd=node, stdout=log, stderr=log, env={
                **os.environ, "OMP_NUM_THREADS": "1"}))
    assert [job.wait(120) != 0 for job in jobs] == [True, True]
    for node in nodes:
        error, = re.findall("^error: .*", (node / "log").read_text(), re.M)
        assert "resumed step differs between ranks: 2, 0" in error and "one run folder" in error
    assert len(rows(nodes[0] / "run", "train")) == 2 and not [*nodes[1].glob("run/step_*")]


@pytest.mark.parametrize("name, value", [("lr", 0.5), ("model_sha", "other"), ("data_sha", "x")])
def test_ranks_with_other_flags_weights_or_data_are_refused(monkeypatch, capsys, name, value):
    settings = {"lr": 0.1, "model_sha": "a", "data_sha": "b"}
    common.check_ranks(settings, None)
    monkeypatch.setattr(common, "gather", lambda mine: [*mine, {**mine[0], name: value}])
    with pytest.raises(SystemExit) as stop:
        common.check_ranks(settings, None)
    line, = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and f"{name} differs between ranks: {settings[name]}" in line
