"""kill -9 at random moments of saving: afterwards the newest complete checkpoint has to load.

python tests/kill_saves.py [KILLS] [FOLDER]    # 100 kills, under a minute; the tests do 24

A forked child saves without end; the parent kills it, looks for the newest valid checkpoint and
loads it into the policy and the optimizer. No acknowledged save may be lost.
"""

import os
import random
import signal
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path

import torch
import torch.distributed as dist
from conftest import METHODS, make_lm, make_tokenizer
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import common


def save_without_end(out, policy, tokenizer, optimizer, step, acknowledge):
    lock = common.lock_run(out)
    common.open_run(out, {}, __file__, step)
    while lock:
        step += 1
        state = {"step": step, "skipped": 0}
        assert common.save_checkpoint(out, policy, tokenizer, optimizer, {}, state, 2)
        os.write(acknowledge, b".")


def kill_saves(folder, kills):
    script, out, rng = import_module(METHODS[0]), folder / "run", random.Random(0)
    cfg, tokenizer = script.parse_config(["--device", "cpu"]), make_tokenizer()
    policy = script.Policy(make_lm(), tokenizer, cfg)
    optimizer = torch.optim.AdamW(script.param_groups(policy, cfg))
    sum(p.square().sum() for p in policy.parameters()).backward()
    optimizer.step()
    step, cut_short = 0, 0
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    logging.disable_progress_bar()
    for _ in range(kills):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            save_without_end(out, policy, tokenizer, optimizer, step, writing)
        os.close(writing)
        os.read(reading, 1)  # the first save is through
        time.sleep(rng.random() * 0.2)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        saved = step + 1 + len(os.read(reading, 9999))
        os.close(reading)
        cut_short += any(out.glob("*.partial"))
        latest = common.latest_checkpoint(out)
        state = common.load_checkpoint(latest, policy, optimizer, {}, ())
        assert state["step"] in (saved, saved + 1), f"step {state['step']} after {saved} saves"
        step = state["step"]
    assert cut_short > kills / 4
    AutoModelForCausalLM.from_pretrained(latest / "hf")
    print(f"{kills} kills, {step} checkpoints, {cut_short} saves cut short, none lost")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        kill_saves(Path(*sys.argv[2:] or [place]), int(*sys.argv[1:2] or [100]))
