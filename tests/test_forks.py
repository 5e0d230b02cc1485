"""The forks of docs/fork.md: their diffs apply, and each does what the page says."""

import re
import shutil
import subprocess
import sys
from importlib import import_module

import pytest
import test_replay
import torch
from conftest import ROOT
from pages import EXAMPLES, blocks
from runs import FIRST, flags, rows, train

import common

PAGE = ROOT / "docs" / "fork.md"
FORKS = [name.removesuffix(".py") for name in EXAMPLES if name != "mine.py"]


@pytest.fixture(scope="module", params=FORKS)
def fork(request, tmp_path_factory):
    """Name of a fork, made as the page says and importable."""
    name, folder = request.param, tmp_path_factory.mktemp("forks")
    origin = EXAMPLES[f"{name}.py"]
    shutil.copy(ROOT / origin, folder / f"{name}.py")
    diff, = [block for block in blocks(PAGE, "diff") if block.startswith(f"--- {name}.py")]
    done = subprocess.run(["git", "apply", "-p0", "-"], input=diff, text=True,
                          cwd=folder, capture_output=True, env={"GIT_CEILING_DIRECTORIES": "/"})
    assert done.returncode == 0, done.stderr
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        origin = origin.removesuffix(".py")
        patch.setitem(test_replay.CHANGES, name, test_replay.CHANGES[origin])
        if origin in FIRST:
            patch.setitem(FIRST, name, FIRST[origin])
        yield name
    sys.modules.pop(name, None)


def test_the_page_counts_the_lines_of_each_diff():
    titles = re.findall(r"^### .*\((?:\w+, )?(\d+) lines\)$", PAGE.read_text(), re.M)
    added = [len(re.findall(r"^\+(?!\+\+)", block, re.M)) for block in blocks(PAGE, "diff")]
    assert list(map(int, titles)) == added and len(added) == len(FORKS) == 3


def test_a_fork_trains_and_its_update_reads_what_its_rollout_fed(fork, model, tmp_path):
    assert isinstance(train(fork, flags(model, tmp_path, "--max_completion_length 14")), dict)
    gaps = [row["logprob_gap"] for row in rows(tmp_path, "train")]
    assert len(gaps) == 4 and max(gap for gap in gaps if gap is not None) < 1e-4
    module, policy, cfg = test_replay.build(fork)
    batch = test_replay.draw(module, policy, cfg)
    found = test_replay.score(policy, batch)
    assert batch["loss_mask"].any()
    assert (found - batch["rollout_logprobs"])[batch["loss_mask"]].abs().max() < 1e-4


@pytest.mark.parametrize("fork", ["dr_latent_grpo"], indirect=True)
def test_one_constant_divides_all_positions_and_no_deviation_divides_advantages(fork):
    script = import_module(fork)
    cfg = script.Config(max_completion_length=10)
    mask = torch.tensor([[True] * 4, [True, False, False, False]])
    assert torch.equal(script.loss_weights({"loss_mask": mask}, cfg), mask / 20)
    assert script.group_advantages(torch.tensor([1.0, 0, 0, 0]), 4).tolist() == [
        0.75, -0.25, -0.25, -0.25]


@pytest.mark.parametrize("fork", ["budget_hyrea"], indirect=True)
def test_each_completion_begins_with_its_latents_and_has_no_others(fork):
    module, policy, cfg = test_replay.build(fork, latents_per_step=3)
    batch = test_replay.draw(module, policy, cfg)
    assert batch["latent_mask"][:, 1:4].all() and batch["latent_mask"].sum() == 3 * 12
    assert not batch["loss_mask"][:, :5].any() and batch["loss_mask"][:, 5].any()
    problem = {"steps_ids": [[4], [5, 6], [7]], "answer_ids": [9, 2], "prompt_ids": [1, 3],
               "question": "q"}
    cfg.entropy_once = False
    shown = module.sft_examples([problem], policy, 1, cfg)
    ids = shown["completion_ids"][0].tolist()
    assert ids[:5] == [policy.start_id, *[policy.latent_id] * 3, policy.end_id]
    assert len(ids) in (10, 9) and ids[-2:] == [9, 2]  # one step is left out
    assert shown["loss_mask"][0].tolist() == [False] * 5 + [True] * (len(ids) - 5)


@pytest.mark.parametrize("fork", ["gated_lepo"], indirect=True)
def test_the_gate_mixes_token_and_mixture_and_learns(fork):
    module, policy, cfg = test_replay.build(fork, r_min=0.2, r_max=0.9)
    batch = test_replay.draw(module, policy, cfg)
    embeds = policy.completion_embeds(batch)
    tokens = policy.table(module.heaviest_ids(batch))
    latent = batch["latent_mask"]
    assert not torch.allclose(embeds[latent], tokens[latent])
    assert torch.equal(embeds[~latent & batch["loss_mask"]], tokens[~latent & batch["loss_mask"]])
    policy(batch)["logprobs"].sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in policy.gate.parameters())


REWARDS = re.findall(r"^def reward.*?(?=^```)", PAGE.read_text(encoding="utf-8"), re.M | re.S)


@pytest.mark.parametrize("source", REWARDS)
def test_the_rewards_of_the_page_train_and_see_the_columns_of_a_row(
        source, model, tmp_path, monkeypatch):
    names = {}
    exec(source, names)
    seen = []
    monkeypatch.setattr("hrpo.reward", lambda record: seen.append(record) or names["reward"](
        {**record, "row": {"difficulty": 1.0, **record["row"]}}))
    assert isinstance(train("hrpo", flags(model, tmp_path / "run")), dict)
    assert len(REWARDS) == 2 and all(isinstance(names["reward"](
        {**record, "row": {"difficulty": 2}}), float | int) for record in seen)
    data = tmp_path / "rows.jsonl"
    data.write_text('{"question": "1+1=", "answer": "2", "difficulty": 3}\n')
    problem, = common.load_problems(str(data))
    assert problem["row"]["difficulty"] == 3
