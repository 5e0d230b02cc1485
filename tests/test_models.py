"""Odd models: several ends, no pad id, padded embeddings, pickles; and what NaN does to a run."""

import hashlib
import json
import os
import shutil
from importlib import import_module

import pytest
import torch
from conftest import make_lm, make_tokenizer, save_folder
from runs import OFF, differences, flags, rows, train
from safetensors.torch import load_file, save_file

import common


def odd_model(folder, tokenizer, lm=None, **generation):
    lm = lm or make_lm()
    for name, value in generation.items():
        setattr(lm.generation_config, name, value)
        setattr(lm.config, name, value)
    return save_folder(folder, lm, tokenizer)


def test_a_tokenizer_without_pad_token_or_template_trains(method, tmp_path):
    tokenizer = make_tokenizer(template=False)
    tokenizer.pad_token = None
    folder = odd_model(tmp_path / "model", tokenizer)
    assert common.load_model(folder)[0].pad_id == 2
    argv = flags(folder, tmp_path / "run", "--max_prompt_length 999")
    assert train(method, argv)["n"] == 8


def test_a_model_without_an_end_is_refused(method, tmp_path, capsys):
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    folder = odd_model(tmp_path / "model", tokenizer, eos_token_id=None)
    assert train(method, flags(folder, tmp_path / "run")) == 2
    assert "end-of-sequence" in capsys.readouterr().err


def test_each_of_several_ends_ends_a_completion(method, tmp_path):
    script, ends = import_module(method), [2, 5, 7]
    folder = odd_model(tmp_path / "model", make_tokenizer(), eos_token_id=[5, 7])
    lm, tokenizer = common.load_model(folder)
    assert lm.eos_ids == ends
    policy = script.Policy(lm, tokenizer, script.parse_config(flags(folder, tmp_path / "run")))
    cfg = script.parse_config(flags(folder, tmp_path, "--max_completion_length 20"))
    batch = script.rollout(policy, [[1, 4, 13, 5, 15]], cfg, common.make_rng("cpu", 0), 64)
    stops = torch.isin(batch["completion_ids"], torch.tensor(ends)) & batch["completion_mask"]
    assert batch["finished"].any() and not batch["finished"].all()
    assert torch.equal(stops.sum(1), batch["finished"].long())  # at most one, and it is the last
    last = batch["completion_ids"].gather(1, batch["lengths"][:, None] - 1)[:, 0]
    assert set(last[batch["finished"]].tolist()) == set(ends)


def test_more_tokenizer_ids_than_embedding_rows_are_refused(method, tmp_path, capsys):
    folder = odd_model(tmp_path / "model", make_tokenizer(), make_lm(vocab_size=20))
    assert train(method, flags(folder, tmp_path / "run")) == 2
    line, = capsys.readouterr().err.splitlines()
    assert "embedding rows" in line and str(len(make_tokenizer())) in line


@pytest.mark.parametrize("more", ["", "--greedy", "--top_k 39", "--top_p 0.9"])
def test_embedding_rows_beyond_the_tokenizer_are_never_sampled(method, tmp_path, more):
    lm, script, tokenizer = make_lm(), import_module(method), make_tokenizer()
    with torch.no_grad():
        lm.lm_head.weight[len(tokenizer):] *= 100  # they would win at every other step
    folder = odd_model(tmp_path / "model", tokenizer, lm)
    cfg = script.parse_config(flags(folder, tmp_path / "run", more))
    torch.manual_seed(0)
    policy = script.Policy(*common.load_model(folder), cfg)
    rng = common.make_rng("cpu", 0)
    batch = script.rollout(policy, [[1, 4, 13, 5, 15]], cfg, rng, 32, greedy="greedy" in more)
    known = policy.lm.num_tokens  # the tokenizer's, and what the method adds to it
    assert batch["completion_ids"].max() < known < lm.lm_head.weight.shape[0]
    assert known - len(tokenizer) == (3 if method == "hyrea" else 0)
    assert policy(batch)["logprobs"].exp().max() <= 1


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight"])
def test_nan_in_the_model_is_refused_by_the_name_of_the_weight(
        method, model, tmp_path, name, capsys):
    broken = shutil.copytree(model, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights[name][5] = float("nan")
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    assert train(method, flags(broken, tmp_path / "run")) == 2
    line, = capsys.readouterr().err.splitlines()
    assert "NaN" in line and name in line and not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize("more", ["", "OFF"])
def test_nan_logits_in_a_run_end_in_a_clear_error(method, model, tmp_path, more, monkeypatch):
    script = import_module(method)
    logits_of = common.lm_logits
    monkeypatch.setattr(script, "lm_logits", lambda lm, hidden: logits_of(lm, hidden) * torch.nan)
    with pytest.raises(FloatingPointError, match="NaN"):
        train(method, flags(model, tmp_path / "run", more.replace("OFF", OFF[method])))


def test_a_model_folder_with_pickled_weights_only_is_refused(method, model, tmp_path, capsys):
    folder = shutil.copytree(model, tmp_path / "pickled")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert train(method, flags(folder, tmp_path / "run")) == 2
    error, = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert "--model" in error and not (tmp_path / "run").exists()


def spoiled(script, steps):
    """The script's policy_loss, NaN in the given calls (counted from 1, one a step)."""
    calls, loss = [], script.policy_loss

    def policy_loss(outputs, batch, cfg):
        calls.append(1)
        return loss(outputs, batch, cfg) * (float("nan") if len(calls) in steps else 1)

    return policy_loss


def test_an_update_whose_gradient_is_nan_is_skipped_and_counted(
        method, model, tmp_path, monkeypatch):
    script, out = import_module(method), tmp_path / "run"
    monkeypatch.setattr(script, "policy_loss", spoiled(script, {3}))
    assert isinstance(train(method, flags(model, out, "--save_every 1 --keep_checkpoints 9")), dict)
    assert [r["skipped"] for r in rows(out, "train")] == [0, 0, 1, 0]
    assert rows(out, "train")[2]["grad_norm"] is None
    changed = differences(out / "step_000002", out / "step_000003")
    changed = {name for name in changed if not name.startswith("/best")}
    assert changed == {"/skipped", "/step"}  # no weight, no moment, no AdamW step counter
    assert len(differences(out / "step_000003", out / "step_000004")) > 8


def test_five_nan_updates_in_a_row_stop_the_run_with_a_checkpoint_that_goes_on(
        method, model, tmp_path, monkeypatch):
    script, out = import_module(method), tmp_path / "run"
    more = "--steps 20 --save_every 100"
    with monkeypatch.context() as patch:
        patch.setattr(script, "policy_loss", spoiled(script, {1, 2, 3, 4, *range(6, 30)}))
        code = train(method, flags(model, out, more))
    assert "5 updates in a row" in code and len(rows(out, "train")) == 10
    kept = [r["step"] for r in rows(out, "train", "samples.jsonl")]  # of skipped updates, all
    assert [kept.count(step) for step in range(1, 11)] == [16] * 4 + [2] + [16] * 5
    values = torch.load(out / "step_000010" / "trainer.pt", weights_only=True)["policy"].values()
    assert all(value.isfinite().all() for value in values)
    assert isinstance(train(method, flags(model, out, f"{more} --resume auto")), dict)
    assert [r["skipped"] for r in rows(out, "train")][9:] == [1] + [0] * 10


class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_a_checkpoint_never_runs_pickled_code(method, model, tmp_path, monkeypatch):
    run = tmp_path / "run"
    train(method, flags(model, run))
    monkeypatch.chdir(tmp_path)
    path = run / "step_000004" / "trainer.pt"
    torch.save({"step": 4, "policy": {}, "optimizer": Evil()}, path)
    manifest = json.loads((path.parent / "manifest.json").read_text())
    manifest["trainer.pt"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (path.parent / "manifest.json").write_text(json.dumps(manifest))
    assert train(method, flags(model, run, "--resume auto")) == 2
    assert not (tmp_path / "executed").exists()
    torch.load(path, weights_only=False)  # the trap is a real one
    assert (tmp_path / "executed").exists()
