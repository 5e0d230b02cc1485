"""The cold start as a run: files, stop and resume, its share of the data, two ranks."""

import json
import shutil

import pytest
import torch
from conftest import ROOT, make_lm, save_folder
from runs import differences, flags, launch, rows, train

import common
import hyrea as script
from common import make_rng

torch.set_num_threads(1)
SHORT = ("--train arithmetic-restated:2 --sft_steps 4 --sft_batch 8 --sft_save_every 2 "
         "--sft_lr 0.01 --sft_rounds 2 --max_completion_length 28")


@pytest.fixture(autouse=True)
def few_problems(monkeypatch):
    load = common.load_problems
    monkeypatch.setattr(script, "load_problems", lambda spec, split, limit=0: load(
        spec, split, limit or 24))


@pytest.fixture(params=["spare rows", "tied, resized"])
def folder(request, model, tmp_path):
    """A model with rows left for the markers, or with a table that has to grow."""
    if request.param == "spare rows":
        return model
    return save_folder(tmp_path / "tied", make_lm(vocab_size=29, tie_word_embeddings=True))


@pytest.mark.parametrize("more", ["", "--max_replaced_steps 0", "--replace random --lora_rank 2"])
def test_a_cold_start_stopped_and_resumed_is_the_uninterrupted_one(folder, tmp_path, more):
    model = folder
    whole, parts, more = tmp_path / "whole", tmp_path / "parts", f"--stage sft {SHORT} {more}"
    result = train("hyrea", flags(model, whole, more))
    train("hyrea", flags(model, parts, f"{more} --stop_after 3"))
    assert train("hyrea", flags(model, parts, f"{more} --resume auto")) == result
    assert differences(whole / "step_000004", parts / "step_000004") == []
    assert rows(whole, "eval") == rows(parts, "eval")
    assert [r["step"] for r in rows(whole, "eval")] == [0, 2, 4]
    learned = [0, 0, 0] if "max_replaced_steps 0" in more else [0, 0, 1]
    assert [r["replaced"] for r in rows(whole, "eval")] == learned


@pytest.mark.parametrize("stage", ["sft", "all"])
@pytest.mark.parametrize("step", [2, 4])
def test_a_signal_during_the_evaluation_of_the_cold_start_saves(
        model, tmp_path, monkeypatch, stage, step):
    original = script.evaluate
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    more, below = f"--stage {stage} {SHORT} --sft_save_every 9", "." if stage == "sft" else "sft"
    result = train("hyrea", flags(model, whole, more))
    with monkeypatch.context() as patch:
        patch.setattr(script, "evaluate", lambda policy, tokenizer, problems, cfg, rng: (
            rng.initial_seed() == make_rng("cpu", 0, "eval", step, 0).initial_seed()
            and common.SIGNALS.append(15)) or original(policy, tokenizer, problems, cfg, rng))
        assert train("hyrea", flags(model, parts, more)) == 143
    assert (parts / below / f"step_00000{step}").exists()
    assert train("hyrea", flags(model, parts, f"{more} --resume auto")) == result
    assert rows(whole / below) == rows(parts / below)
    assert differences(whole / "step_000004", parts / "step_000004") == []


@pytest.mark.parametrize("call", [2, 3, 6])
@pytest.mark.parametrize("lora", ["", "--lora_rank 2"])
def test_a_run_of_both_stages_resumes_in_either(model, tmp_path, monkeypatch, capsys, call, lora):
    monkeypatch.setattr(script, "reward", lambda record: float(record["length"] % 2))
    more, clip, calls = f"--stage all {SHORT} {lora} --minibatches 2", torch.nn.utils, []
    result = train("hyrea", flags(model, tmp_path / "whole", more))
    original = clip.clip_grad_norm_
    with monkeypatch.context() as patch:
        patch.setattr(clip, "clip_grad_norm_", lambda *args: calls.append(0) or (
            len(calls) == call and common.SIGNALS.append(15)) or original(*args))
        assert train("hyrea", flags(model, tmp_path / "parts", more)) == 143
    assert train("hyrea", flags(model, tmp_path / "parts", f"{more} --resume auto")) == result
    for folder in ("sft/step_000004", "step_000004"):
        assert differences(tmp_path / "whole" / folder, tmp_path / "parts" / folder) == []
    for folder in ("sft", "."):
        assert rows(tmp_path / "whole" / folder) == rows(tmp_path / "parts" / folder)
    assert "starting at the beginning" not in capsys.readouterr().err
    config = json.loads((tmp_path / "whole/step_000004/hf/latent/config.json").read_text())
    assert config["start_sha"] != config["model_sha"]


def test_each_round_learns_from_its_share_of_the_shuffled_problems(model, tmp_path, monkeypatch):
    seen, examples = [], script.sft_examples
    monkeypatch.setattr(script, "sft_examples", lambda chosen, policy, k, *args: seen.append(
        (k, {p["question"] for p in chosen})) or examples(chosen, policy, k, *args))
    train("hyrea", flags(model, tmp_path / "run", f"--stage sft {SHORT}"))
    assert [k for k, _ in seen] == [0, 0, 1, 1]
    first, second = seen[0][1] | seen[1][1], seen[2][1] | seen[3][1]
    assert len(first) == 12 < len(second)  # 8 + 8 draws of the first 12, then of all 24


def saved(folder):
    return torch.load(folder / "trainer.pt", weights_only=True)


def test_the_model_that_ranks_the_steps_is_that_after_round_0_even_in_a_resumed_run(
        model, tmp_path, monkeypatch):
    more, seen = f"--stage all {SHORT} --sft_save_every 1 --keep_checkpoints 9", []
    entropies = script.chain_entropies
    monkeypatch.setattr(script, "chain_entropies", lambda lm, *args: seen.append(
        {k: v.clone() for k, v in lm.state_dict().items()}) or entropies(lm, *args))
    train("hyrea", flags(model, tmp_path / "run", more.replace("all", "sft") + " --stop_after 3"))
    train("hyrea", flags(model, tmp_path / "run", more.replace("all", "sft") + " --resume auto"))
    assert len(seen) == 2  # steps 2 and 3, in which one step is replaced
    for step in (3, 4):
        ranker, = saved(tmp_path / f"run/step_00000{step}")["ranker"]
        for name, value in ranker.items():
            assert torch.equal(seen[0][name], value) and torch.equal(seen[1][name], value)
    round_0 = saved(tmp_path / "run/step_000002")
    assert round_0["ranker"] == []
    for name, value in round_0["policy"].items():
        assert torch.equal(seen[1][name.removeprefix("lm.")], value), name
    seen.clear()
    train("hyrea", flags(model, tmp_path / "two", f"{more} --no-entropy_once"))
    assert len(seen) == 2 and any(not torch.equal(seen[0][k], seen[1][k]) for k in seen[0])
    assert saved(tmp_path / "two/sft/step_000004")["ranker"] == []


def test_rl_after_a_cold_start_carries_no_ranking_model(model, tmp_path):
    train("hyrea", flags(model, tmp_path / "run", f"--stage all {SHORT}"))
    assert len(saved(tmp_path / "run/sft/step_000004")["ranker"]) == 1
    assert saved(tmp_path / "run/step_000004")["ranker"] == []


@pytest.mark.parametrize("lost", [False, True])
def test_a_resumed_rl_run_trains_its_cold_start_again_only_if_that_was_deleted(
        model, tmp_path, monkeypatch, lost):
    whole, parts, more = tmp_path / "whole", tmp_path / "parts", f"--stage all {SHORT}"
    calls, step, read = [], script.sft_step, script.read_demonstrations
    train("hyrea", flags(model, whole, more))
    train("hyrea", flags(model, parts, f"{more} --stop_after 3"))
    assert (parts / "step_000003").exists() and not (parts / "sft/step_000003").exists()
    if lost:
        shutil.rmtree(parts / "sft")
    monkeypatch.setattr(script, "sft_step", lambda *args: calls.append(args[-1]) or step(*args))
    monkeypatch.setattr(script, "read_demonstrations", lambda *args: (
        calls.append("chains") or read(*args)))
    train("hyrea", flags(model, parts, f"{more} --resume auto"))
    assert calls == ["chains", 0, 1, 2, 3] * lost
    assert differences(whole / "step_000004", parts / "step_000004") == []


def test_a_cold_start_without_finite_gradients_stops_after_five(model, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "optimizer_step", lambda *args: None)
    more = SHORT.replace("--sft_steps 4", "--sft_steps 9")
    code = train("hyrea", flags(model, tmp_path / "run", f"--stage all {more}"))
    assert "5 updates in a row" in code and not (tmp_path / "run/step_000001").exists()
    found = rows(tmp_path / "run/sft", "train")
    assert len(found) == 5 and {(r["loss"], r["skipped"]) for r in found} == {(None, 1)}


@pytest.mark.parametrize("stage", ["sft", "all"])
def test_a_dry_run_of_a_cold_start_tries_a_step_of_rl(model, tmp_path, capsys, stage):
    row = train("hyrea", flags(model, tmp_path / "run", f"--stage {stage} {SHORT} --dry_run"))
    assert row["step"] == 2 and row["length"] == 28 and not (tmp_path / "run").exists()
    assert "no span was forced" in capsys.readouterr().out


def test_rl_of_a_model_without_a_cold_start_is_pointed_out(model, tmp_path, capsys):
    train("hyrea", flags(model, tmp_path / "start", f"--stage sft {SHORT}"))
    capsys.readouterr()
    for start, warned in ((model, True), (tmp_path / "start", False)):
        train("hyrea", flags(start, tmp_path / f"run{warned}", "--steps 1"))
        assert ("has had no cold start" in capsys.readouterr().out) == warned


def test_unwise_settings_of_a_cold_start_are_warned_of_and_too_few_rows_refused(
        model, capsys, monkeypatch):
    cfg = script.parse_config(flags(model, "run", f"--stage sft {SHORT} --max_replaced_steps 2"))
    script.start_config(cfg)
    assert "--sft_rounds 2: too few" in capsys.readouterr().err
    monkeypatch.setattr(script.dist, "get_world_size", lambda: 9)
    with pytest.raises(SystemExit):
        script.start_config(cfg)
    assert "--sft_batch 8: must be at least" in capsys.readouterr().err


TWO_RANKS = """
import sys, torch
sys.path[:0] = [{tests!r}, {root!r}]
import torch.distributed as dist, gc
from torch.nn.parallel import DistributedDataParallel
from test_hyrea_start import built
import hyrea as script
dist.init_process_group("gloo")
policy, cfg, _, problems = built(latents_per_step=2)
problems = problems[:5]  # 2 and 3: unequal shares
cfg.micro_batch, cfg.max_grad_norm, cfg.steps, cfg.warmup_steps = 2, 1e9, 9, 0
trained = {{n: p for n, p in policy.named_parameters() if p.requires_grad}}
whole = script.sft_examples(problems, policy, 2, cfg)
w = script.label_weights(whole, policy, cfg.marker_weight)
loss = -(policy(whole, labels=True)["logprobs"] * w).sum() / w.sum()
loss.backward()
wanted = {{n: p.detach() - p.grad for n, p in trained.items() if p.grad is not None}}
policy.zero_grad()
rate = 1 / script.lr_factor(2, cfg)
optimizer = torch.optim.SGD([{{"params": list(trained.values()), "initial_lr": rate}}], 1.0)
ddp = DistributedDataParallel(policy, broadcast_buffers=False, find_unused_parameters=True)
cfg.sft_steps, cfg.sft_rounds, cfg.sft_batch = 3, 3, 5
row, _ = script.sft_step(policy, ddp, optimizer, problems, cfg, 2)
assert row["replaced"] == 2 and abs(row["loss"] - loss.item()) < 1e-4, (row, loss)
for n, p in wanted.items():
    assert (trained[n] - p).abs().max() <= 1e-5 * (1 + p.abs().max()), n
dist.barrier()
dist.destroy_process_group()
gc.collect()
"""


def test_an_update_of_the_cold_start_on_two_ranks_is_that_of_one(tmp_path):
    driver = tmp_path / "driver.py"
    driver.write_text(TWO_RANKS.format(tests=str(ROOT / "tests"), root=str(ROOT)))
    job = launch(driver, [], tmp_path / "log", ranks=2)
    assert job.wait(120) == 0, (tmp_path / "log").read_text()
