"""A real pretrained model, its tokenizer and chat template: rollout, update, resume, evaluation.

Needs a folder made by tests/convert_smollm2.py, named in the variable LATENT_RL_SMOLLM2; skipped
without. The rows are the GSM8K and SVAMP samples in tests/data.
"""

import json
import os

import pytest
import torch
from conftest import ROOT, prompt_cfg

import eval as evaluation
import hrpo
from common import Marker, encode_prompts, load_model, load_problems, make_rng

FOLDER = os.environ.get("LATENT_RL_SMOLLM2", "")
pytestmark = pytest.mark.skipif(not FOLDER, reason="LATENT_RL_SMOLLM2 names no model folder")
DATA = str(ROOT / "tests" / "data" / "svamp_mini.jsonl")


@pytest.fixture(scope="module")
def real():
    return load_model(FOLDER)


def test_the_chat_template_is_used_and_left_padded_rollout_equals_replay(real):
    lm, tokenizer = real
    problems = encode_prompts(tokenizer, load_problems(DATA, limit=3), prompt_cfg("####", 400))
    assert tokenizer.decode(problems[0]["prompt_ids"]).endswith("<|im_start|>assistant\n")
    cfg = hrpo.parse_config(["--model", FOLDER, "--max_completion_length", "12", "--top_k", "0"])
    policy = hrpo.Policy(lm, tokenizer, cfg)
    prompts = [p["prompt_ids"] for p in problems]
    assert len({len(p) for p in prompts}) > 1
    batch = hrpo.rollout(policy, prompts, cfg, make_rng("cpu", 0), group_size=2)
    gap = (policy(batch)["logprobs"] - batch["rollout_logprobs"])[batch["loss_mask"]]
    assert gap.abs().max() < 2e-4


@pytest.mark.parametrize("text, marker", [("so #### 4", "####"), ("a</think>4", "</think>")])
def test_the_marker_is_found_where_the_text_has_it(real, text, marker):
    lm, tokenizer = real
    watch, ids = Marker(tokenizer, marker, lm.num_tokens), tokenizer(text)["input_ids"]
    for end in range(1, len(ids) + 1):
        tail = ([-1] * watch.width + ids[:end])[-watch.width :]
        done = tokenizer.decode(ids[:end]).endswith(marker)
        assert watch.completed(torch.tensor([tail])).item() == done


def test_train_resume_and_evaluate(tmp_path):
    flags = ["--model", FOLDER, "--train", DATA, "--eval_data", DATA, "--steps", "2",
             "--num_prompts", "2", "--group_size", "2", "--max_completion_length", "12",
             "--eval_limit", "4", "--lora_rank", "4", "--lr", "1e-4", "--warmup_steps", "0",
             "--kl_coef", "0.05", "--out_dir", str(tmp_path / "run")]
    hrpo.main([*flags, "--stop_after", "1"])
    hrpo.main([*flags, "--resume", "auto"])
    rows = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(row) for row in rows]
    assert [row["step"] for row in rows if row["kind"] == "train"] == [1, 2]
    assert all(row["kl"] is not None and row["kl"] >= 0 for row in rows if row["kind"] == "train")
    table = evaluation.main([str(tmp_path / "run"), FOLDER, "--data", DATA, "--limit", "2",
                             "--max_completion_length", "8", "--answer_marker", "####"])
    assert [row["mode"] for row in table] == ["trained", "explicit"]
