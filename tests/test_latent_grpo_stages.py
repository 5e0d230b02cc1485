"""The supervised stage: labels, loss, its files, and runs through both stages, resumed anywhere."""

import dataclasses
import json
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, make_tokenizer
from runs import differences, flags, launch, rows, train
from safetensors.torch import load_file
from test_replay import build
from torch.nn import functional as F

import common
import latent_grpo as script
from common import make_rng, select_rows

torch.set_num_threads(1)
SHORT = "--sft_steps 4 --sft_batch 8 --sft_save_every 2 --sft_lr 0.01 --max_completion_length 16"
PROBLEM = {"question": "1", "steps": None, "solution": None, "answer": "7"}


@pytest.fixture(autouse=True)
def few_problems(monkeypatch):
    load = common.load_problems
    monkeypatch.setattr(script, "load_problems", lambda spec, split, limit=0: load(
        spec, split, limit or 24))


def demonstrations(policy, cfg, tokenizer, spec="arithmetic-verbose:1-3", limit=6):
    problems = common.encode_prompts(
        tokenizer, common.load_problems(spec, "train", limit), cfg)
    return script.read_demonstrations(problems, tokenizer, policy, cfg)


def built(**changes):
    tokenizer = make_tokenizer()
    _, policy, cfg = build("latent_grpo", tokenizer=tokenizer, answer_marker="</think>",
                           latent_tau=1.0, max_completion_length=40, **changes)
    return policy, cfg, tokenizer


@pytest.mark.parametrize("text, size, chunks", [
    ("+8=1-6=5", 2, ["+8", "=1", "-6", "=5"]), ("18+2", 2, ["1", "8+", "2"]),
    ("12=3", 3, ["1", "2=", "3"]), ("+18=4", 2, ["+1", "8=", "4"]), ("+8=1", 1, list("+8=1")),
    ("a+b", 2, ["a+", "b"])])
def test_chunks_never_hold_two_digits_side_by_side(text, size, chunks):
    tokenizer = make_tokenizer()
    is_digits = [tokenizer.decode([i]).isdigit() for i in range(len(tokenizer))]
    is_alone = [False] * len(tokenizer)
    found = script.chunk_labels(tokenizer(text)["input_ids"], size, is_digits, is_alone)
    assert [tokenizer.decode(c) for c in found] == chunks


class Pieces:
    """A tokenizer that cuts numbers into digits and keeps other runs whole, as SmolLM2's does."""

    vocabulary = ["<eos>", "</think>", "<<", ">>", *"0123456789", *"+-*/=", " =", " x", "+="]
    eos_token_id = 0

    def __call__(self, texts, add_special_tokens):
        pattern = "|".join(map(re.escape, sorted(self.vocabulary, key=len, reverse=True)))
        pieces = [re.findall(pattern, text) for text in texts]
        return {"input_ids": [[self.vocabulary.index(piece) for piece in row] for row in pieces]}

    def batch_decode(self, rows):
        return ["".join(self.vocabulary[i] for i in row) for row in rows]


def cut(text, chunk, alone, **changes):
    """The chunks of a chain, as text."""
    cfg = script.Config(chunk=chunk, alone=alone, max_completion_length=40, **changes)
    lm = SimpleNamespace(num_tokens=len(Pieces.vocabulary), eos_ids=[0])
    policy = SimpleNamespace(lm=lm, marker_ids=[1])
    problems = [{**PROBLEM, "solution": text}]
    kept = script.read_demonstrations(problems, Pieces(), policy, cfg)
    return Pieces().batch_decode(kept[0]["chunks"])


@pytest.mark.parametrize("text, chunk, alone, chunks", [
    ("<<56*9=504>>", 2, "", ["<<5", "6*", "9=", "5", "0", "4>>"]),
    ("<<56*9=504>>", 2, "+ - * / =", ["<<5", "6", "*", "9", "=", "5", "0", "4>>"]),
    ("<<56*9=504>>", 2, "=", ["<<5", "6*", "9", "=", "5", "0", "4>>"]),
    ("=5 x =4", 16, "=", ["=", "5 x", " =", "4"]),  # the text without its spaces decides
    ("x5+=4", 16, "+ =", ["5+=", "4"]),  # no single symbol
    ("5>><<=", 16, "+", ["5>><<="])])
def test_a_symbol_that_stands_alone_shares_its_latent_step_with_no_other_id(
        text, chunk, alone, chunks):
    assert cut(text, chunk, alone) == chunks


@pytest.mark.parametrize("alone, top_k, size", [
    ("", 2, None), ("", 3, 2), ("+ - * / = << >>", 2, 1), ("+ - * / = << >>", 1, None)])
def test_more_embeddings_than_a_label_has_ids_warn_before_the_supervised_stage(
        alone, top_k, size, capsys):
    cut("<<56*9=504>>", 2, alone, latent_top_k=top_k)
    wanted = f"at most {size} ids" if size else ""
    assert wanted in capsys.readouterr().err and bool(wanted) == bool(size)


@pytest.mark.parametrize("top_k, off, is_said", [
    (2, "", False), (10, "", True), (10, "--no-latent", False)])
def test_more_embeddings_than_the_start_learned_warn_before_rl(
        tmp_path, capsys, top_k, off, is_said):
    (tmp_path / "latent").mkdir()
    (tmp_path / "latent/config.json").write_text('{"chunk": 2, "labels": "chunk"}')
    argv = ["--stage", "rl", "--model", str(tmp_path), "--latent_top_k", str(top_k), *off.split()]
    script.check_trainable(script.parse_config(argv))
    assert ("--latent_top_k 10: the labels" in capsys.readouterr().err) == is_said
    script.check_trainable(script.parse_config([*argv, "--model", str(tmp_path / "other")]))
    assert capsys.readouterr().err == ""  # nobody knows the labels of a foreign start


@pytest.mark.parametrize("more, is_said", [("--mask_invalid", True), ("", False)])
def test_masked_completions_without_end_warn(model, tmp_path, capsys, monkeypatch, more, is_said):
    monkeypatch.setattr(script, "rollout", lambda policy, *args: endless(policy, *args))
    argv = flags(model, tmp_path / "run", f"--steps 10 --eval_every 10 {more}")
    assert isinstance(train("latent_grpo", argv), dict)
    found = capsys.readouterr().err.count("--mask_invalid punishes none for 10 steps")
    assert found == is_said


draw = script.rollout


def endless(policy, *args):
    """A rollout that no EOS ends."""
    ends, policy.eos_ids = policy.eos_ids, policy.eos_ids[:0]
    batch = draw(policy, *args)
    policy.eos_ids = ends
    return batch


def test_a_constant_schedule_holds_the_rate_of_rl_and_not_that_of_the_supervised_stage():
    cfg = script.Config(steps=10, warmup_steps=2, schedule="constant")
    factors = [script.lr_factor(step, cfg) for step in range(10)]
    assert factors == pytest.approx([1 / 3, 2 / 3, *[1.0] * 8])
    assert script.lr_factor(6, dataclasses.replace(cfg, schedule="cosine")) == pytest.approx(0.5)
    assert script.start_config(cfg).schedule == "cosine"


def test_a_demonstration_is_laid_out_like_a_rollout():
    policy, cfg, tokenizer = built()
    problems = demonstrations(policy, cfg, tokenizer)
    still = dataclasses.replace(cfg, sft_noise=0.0)
    batch = script.demonstrate(problems, policy, still, False, make_rng("cpu", 0))
    for row, problem in enumerate(problems):
        latents, length = 2 * len(problem["steps"]), int(batch["lengths"][row])
        assert int(batch["latent_mask"][row].sum()) == latents == length - 3
        tail = tokenizer.decode(batch["completion_ids"][row, latents:length])
        assert tail == f"</think>{problem['teacher_answer']}<eos>"
        embeds = policy.completion_embeds(batch)[row]
        pairs = policy.table(torch.tensor(problem["chain_ids"])).view(latents, 2, -1)
        torch.testing.assert_close(embeds[:latents], pairs.mean(1))
    noisy = script.demonstrate(problems, policy, cfg, False, make_rng("cpu", 0))
    gap = (noisy["topk_scores"] - batch["topk_scores"])[batch["latent_mask"]]
    assert gap.min() >= -1.5 - 1e-5 and gap.max() <= 3 + 1e-5 and gap.std() > 0.5
    assert torch.equal(noisy["topk_ids"], batch["topk_ids"])


def test_loss_of_single_ids_without_noise_is_the_cross_entropy_of_the_chain():
    policy, cfg, tokenizer = built()
    problems = demonstrations(policy, cfg, tokenizer)
    batch = script.demonstrate(problems, policy, cfg, True, make_rng("cpu", 0))
    outputs, losses = policy(batch), policy(batch, labels=True)
    weights = batch["topk_scores"].softmax(-1)
    kl = script.soft_label_loss(outputs["kept"], weights, batch["latent_mask"])
    answers = batch["completion_mask"] & ~batch["latent_mask"]
    torch.testing.assert_close(losses["kl"], kl.sum())
    torch.testing.assert_close(losses["ce"], -outputs["logprobs"][answers].sum())
    for row, problem in enumerate(problems):
        ids = problem["prompt_ids"] + problem["chain_ids"] + problem["answer_ids"]
        logits = policy.lm(input_ids=torch.tensor([ids])).logits[0, :-1, : policy.lm.num_tokens]
        losses = F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
        start, middle = len(problem["prompt_ids"]) - 1, -len(problem["answer_ids"])
        torch.testing.assert_close(kl[row], losses[start:middle].mean(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(-outputs["logprobs"][row][answers[row]], losses[middle:],
                                   rtol=1e-5, atol=1e-5)


def test_soft_label_loss_is_the_forward_kl_with_a_flat_optimum_and_does_not_mix_rows():
    weights = torch.tensor([[[0.5, 0.5], [0.9, 0.1], [1.0, 0.0]]], dtype=torch.float64)
    mask = torch.tensor([[True, True, False]])
    logits = weights.clamp(min=1e-9).log().requires_grad_()
    loss = script.soft_label_loss(torch.log_softmax(logits, -1), weights, mask)
    assert loss.shape == (1,) and abs(loss.item()) < 1e-12
    assert torch.autograd.grad(loss.sum(), logits)[0].abs().max() < 1e-12
    policy, cfg, tokenizer = built()
    problems = demonstrations(policy, cfg, tokenizer)
    batch = script.demonstrate(problems, policy, cfg, False, make_rng("cpu", 0))
    found = []
    for part in (batch, *(select_rows(batch, [row]) for row in range(6))):
        weights = part["topk_scores"].softmax(-1)
        found.append(script.soft_label_loss(policy(part)["kept"], weights, part["latent_mask"]))
    torch.testing.assert_close(found[0], torch.cat(found[1:]), rtol=1e-5, atol=1e-5)


def test_demonstrations_need_a_chain_that_fits_and_does_not_hold_the_marker(capsys):
    policy, cfg, tokenizer = built()
    chains = [{"solution": "1+2"}, {"steps": ["1", "2"]}, {}, {"solution": "1</think>2"},
              {"solution": "1" * 50}]
    problems = [{**PROBLEM, **c, "prompt_ids": [1]} for c in chains]
    kept = script.read_demonstrations(problems, tokenizer, policy, cfg)
    assert [tokenizer.decode(p["chain_ids"]) for p in kept] == ["1+2", "1 2"]  # real data: spaces
    assert "3 of 5 problems demonstrate nothing" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        script.read_demonstrations(problems[2:3], tokenizer, policy, cfg)
    assert "--stage rl" in capsys.readouterr().err


@pytest.mark.parametrize("ends, taught", [((4, 2), 2), ((2, 4), 2), ((4, 5), 4)])
def test_demonstrations_end_with_the_end_of_the_tokenizer(ends, taught):
    """A model may know several ends; its template ends a turn with the tokenizer's own."""
    policy, cfg, tokenizer = built(eos=ends)
    kept = demonstrations(policy, cfg, tokenizer)
    assert {problem["answer_ids"][-1] for problem in kept} == {taught}


def test_a_dry_run_of_the_supervised_stage_measures_one_rollout_and_update(
        model, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "replace_dead_groups", None)  # draws nothing more
    more = f"--stage sft --dry_run --max_extra_rollouts 2 {SHORT}"
    row = train("latent_grpo", flags(model, tmp_path / "run", more))
    assert row["length"] == 16 and not (tmp_path / "run").exists()


def test_a_supervised_update_without_a_finite_gradient_is_skipped(model, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "soft_label_loss", lambda kept, *_: kept.sum() * float("nan"))
    stop = train("latent_grpo", flags(model, tmp_path / "run", f"--stage sft {SHORT}"))
    skipped = rows(tmp_path / "run", "train")
    assert [row["skipped"] for row in skipped] == [1] * 4 and isinstance(stop, dict)
    assert skipped[0]["kl"] is None and skipped[0]["grad_norm"] is None


def test_a_supervised_run_stopped_and_resumed_is_the_uninterrupted_one(model, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    more = f"--stage sft --cot_steps 1 {SHORT}"
    result = train("latent_grpo", flags(model, whole, more))
    train("latent_grpo", flags(model, parts, f"{more} --stop_after 3"))
    state = torch.load(parts / "step_000003" / "trainer.pt", weights_only=True)
    assert state["step"] == 3
    assert train("latent_grpo", flags(model, parts, f"{more} --resume auto")) == result
    assert differences(whole / "step_000004", parts / "step_000004") == []
    assert rows(whole, "eval") == rows(parts, "eval")


def test_two_ranks_learn_what_one_does(model, tmp_path):
    """Without noise, which ranks draw apart, the weights agree to rounding."""
    more = f"--stage sft --sft_noise 0 --eval_limit 4 {SHORT}"
    found = []
    for ranks in (1, 2):
        out = tmp_path / str(ranks)
        job = launch(ROOT / "latent_grpo.py", flags(model, out, more), tmp_path / "log", ranks)
        assert job.wait(120) == 0, (tmp_path / "log").read_text()
        found.append(load_file(out / "step_000004" / "hf" / "model.safetensors"))
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=0, atol=1e-4)


def stopping(monkeypatch, call):
    """A stop signal arrives during the given call of an update, counted over both stages."""
    clip, calls = torch.nn.utils.clip_grad_norm_, []

    def clip_and_signal(*args):
        calls.append(0)
        if len(calls) == call:
            common.SIGNALS.append(15)
        return clip(*args)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip_and_signal)


@pytest.mark.parametrize("call", [2, 3, 4, 6])
@pytest.mark.parametrize("lora", ["", "--lora_rank 2"])
def test_a_run_of_both_stages_resumes_in_either(model, tmp_path, monkeypatch, call, lora):
    monkeypatch.setattr(script, "reward", lambda record: float(record["length"] % 2))
    more = f"--stage all {SHORT} --minibatches 2 --update_epochs 1 {lora} --lr 0.003"
    result = train("latent_grpo", flags(model, tmp_path / "whole", more))
    with monkeypatch.context() as patch:
        stopping(patch, call)
        assert train("latent_grpo", flags(model, tmp_path / "parts", more)) == 143
    assert train("latent_grpo", flags(model, tmp_path / "parts", f"{more} --resume auto")) == result
    for folder in ("sft/step_000004", "step_000004"):
        assert differences(tmp_path / "whole" / folder, tmp_path / "parts" / folder) == []
    assert rows(tmp_path / "whole") == rows(tmp_path / "parts")
    trained = rows(tmp_path / "whole", "train")
    assert trained[-1]["kl"] > 0 and trained[0]["latent_steps"] > 0


@pytest.mark.parametrize("lora", ["", "--lora_rank 2"])
def test_the_reference_after_both_stages_is_the_saved_supervised_model(
        model, tmp_path, monkeypatch, lora):
    make, seen = script.frozen_copy, []
    monkeypatch.setattr(script, "frozen_copy", lambda lm: seen.append(make(lm)) or seen[-1])
    more = f"--stage all {SHORT} {lora}"
    train("latent_grpo", flags(model, tmp_path / "run", f"{more} --stop_after 3"))
    train("latent_grpo", flags(model, tmp_path / "run", f"{more} --resume auto"))
    saved, _ = common.load_model(str(tmp_path / "run" / "sft"))
    first, _ = common.load_model(model)
    assert len(seen) == 2
    for reference in seen:
        state = common.merged_state_dict(reference)
        for name, value in saved.state_dict().items():
            torch.testing.assert_close(state[name], value, rtol=0, atol=1e-6)
    moved = [not torch.equal(v, saved.state_dict()[n]) for n, v in first.state_dict().items()]
    assert any(moved)
    config = json.loads((tmp_path / "run/step_000004/hf/latent/config.json").read_text())
    assert config["start_sha"] != config["model_sha"]


def test_the_supervised_model_goes_on_with_rl_and_knows_its_preset(model, tmp_path):
    train("latent_grpo", flags(model, tmp_path / "start", f"--stage sft {SHORT}"))
    cfg = script.parse_config(["--model", str(tmp_path / "start")])
    assert cfg.preset == "tiny" and cfg.train == "arithmetic-verbose"
    result = train("latent_grpo", flags(tmp_path / "start", tmp_path / "rl", "--stage rl"))
    assert result["n"] == 8


@pytest.mark.parametrize("more, words", [
    ("--stage both", "--stage both sft rl all"), ("--ste biased", "--ste paper released none"),
    ("--latent_end never", "--latent_end clean"), ("--latent_tau 0", "--latent_tau 0.0"),
    ("--latent_end clean --latent_top_k 1", "--latent_top_k 2"),
    ("--chunk 0", "--chunk 0 1"), ("--minibatches 0", "--minibatches 0 1"),
    ("--schedule linear", "--schedule linear cosine constant"),
    ("--sft_steps 0", "--sft_steps 0 1"), ("--sft_batch 0", "--sft_batch 0 1"),
    ("--deterministic --device cuda", "--deterministic cumsum"),
    ("--floor", "--floor not trained"), ("--noise_scale 0", "--noise_scale 0 not trained")])
def test_wrong_settings_are_refused(model, tmp_path, capsys, more, words):
    assert train("latent_grpo", flags(model, tmp_path / "run", more)) == 2
    line, = capsys.readouterr().err.splitlines()
    assert all(word in line for word in words.split())


@pytest.mark.parametrize("ours, baseline, rate", [
    ("tiny", "soft_grpo", {"lr": 3e-4}), ("paper", "soft_grpo_paper", {})])
def test_presets_of_the_baseline_differ_in_the_three_devices_and_the_rate(ours, baseline, rate):
    off = {"one_sided": False, "mask_invalid": False, "first_token_selection": False}
    assert script.PRESETS[baseline] == {**script.PRESETS[ours], **off, **rate}


LOW = dict(num_prompts=64, group_size=8, minibatches=4, update_epochs=1, kl_coef=0.0,
           max_completion_length=128, lora_rank=0, latent_top_k=2, latent_end="either",
           gradient_checkpointing=False)
HIGH = dict(num_prompts=32, group_size=8, minibatches=1, update_epochs=1, kl_coef=0.001,
            max_prompt_length=1024, max_completion_length=4096, lora_rank=0, latent_end="perturbed",
            gradient_checkpointing=True, chunk=16)
ALL = dict(lr=1e-6, warmup_steps=0, schedule="constant", adam_beta2=0.999, weight_decay=0.01,
           clip_eps=0.2, max_grad_norm=1.0, latent_tau=1.0, noise_scale=1.0, latent_top_p=0.95,
           max_extra_rollouts=50, one_sided=True, alone="+ - * / =")
START = dict(stage="sft", lora_rank=64)
SOFT = dict(num_prompts=64, group_size=8, minibatches=2, kl_coef=0.001, latent_top_k=5,
            latent_tau=0.1, renormalise=True, one_sided=False, mask_invalid=False, greedy=False,
            first_token_selection=False, max_extra_rollouts=0, max_completion_length=8192)


@pytest.mark.parametrize("preset, published", [
    ("paper", {**ALL, **LOW}), ("llama-3.2-1b", {**ALL, **LOW, "max_prompt_length": 192}),
    ("llama-3.2-1b-sft", {**START, "sft_lr": 3e-4, "sft_batch": 512, "chunk": 2,
                          "encoder_lr": 1e-4}),
    ("qwen2.5-math-7b", {**ALL, **HIGH}),
    ("qwen2.5-math-7b-sft", {**START, "sft_lr": 2e-5, "sft_batch": 256, "chunk": 16,
                             "encoder_lr": 1e-5}),
    ("soft_grpo_own", {**ALL, **SOFT})])
def test_presets_are_those_of_the_papers_and_their_scripts(preset, published):
    cfg = script.parse_config(["--preset", preset])
    assert {name: getattr(cfg, name) for name in published} == {**published}


def test_a_thought_keeps_as_many_embeddings_as_a_chunk_has_ids_in_every_preset():
    for preset in script.PRESETS:
        cfg = script.parse_config(["--preset", preset])
        if cfg.labels == "encoder":
            assert cfg.latent_top_k == 10  # published
        else:
            assert cfg.latent_top_k == cfg.chunk or preset == "soft_grpo_own"  # it has no labels


def test_the_two_runs_of_a_named_preset_share_what_the_model_reads():
    for name in ("llama-3.2-1b", "qwen2.5-math-7b"):
        rl, sft = (script.parse_config(["--preset", name + end]) for end in ("", "-sft"))
        changed = {key for key, value in vars(rl).items() if value != getattr(sft, key)}
        assert changed <= {"model", "preset", "stage", "lora_rank", "out_dir", "sft_steps",
                           "sft_batch", "sft_lr"} and rl.prompt_suffix == "<think>"


def test_a_run_with_the_own_recipe_of_the_baseline(model, tmp_path):
    more = "--preset soft_grpo_own --steps 2 --mask_invalid --answer_marker </think>"
    result = train("latent_grpo", flags(model, tmp_path / "run", more))
    first = rows(tmp_path / "run", "train")[0]
    assert result["n"] == 8 and first["latent_steps"] > 0
    assert first["logprob_gap"] < 1e-4 and first["crossed_frac"] > 0.05  # two-sided
