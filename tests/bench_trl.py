"""Time a whole GRPO step against one of TRL's GRPOTrainer, alternating, in one process.

python tests/bench_trl.py                           # needs: pip install trl

Both take 32 prompts x 8 completions of at most 14 tokens with the same weights, no KL term, a
learning rate that leaves the weights alone, and no activation checkpointing. Rewards: right
answers, by which some groups teach nothing and leave our update; and a coin, by which all teach.
TRL's rows in a pass: ours has 64. Medians over the steps, after three to warm up. Ours twice:
plain, and with --share_prompts.
"""

import argparse
import dataclasses
import random
import statistics
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))

from bench_rollout import clock
from bench_update import STEP, THREADS

import hrpo
from common import encode_prompts, load_model, load_problems


def our_step(model, cfg, problems):
    """-> a function that makes step number n, and the policy."""
    lm, tokenizer = load_model(model)
    lm.share_prompts = cfg.share_prompts
    policy = hrpo.Policy(lm, tokenizer, cfg)
    optimizer = torch.optim.AdamW(hrpo.param_groups(policy, cfg), betas=(0.9, cfg.adam_beta2))
    return lambda n: hrpo.train_step(policy, policy, None, optimizer, problems, cfg, n)[0]


def against_trl(model, steps):
    try:
        from datasets import Dataset
        from transformers import PrinterCallback, TrainerCallback
        from trl import GRPOConfig, GRPOTrainer
    except ImportError:
        return print("TRL is not installed here: pip install trl")
    cfg = hrpo.parse_config(STEP.split())
    tokenizer = load_model(model)[1]
    problems = load_problems("arithmetic", "train", 2048)
    problems = encode_prompts(tokenizer, problems, cfg)
    data = Dataset.from_list([{"prompt": tokenizer.decode(p["prompt_ids"]), "gold": p["answer"]}
                              for p in problems])
    assert tokenizer(data[0]["prompt"])["input_ids"] == problems[0]["prompt_ids"]
    right, lengths = hrpo.reward, []

    def coin(record):
        return float(random.random() < 0.5)

    def trl_reward(completion_ids, gold, **_):
        lengths.extend(map(len, completion_ids))
        ends = [tokenizer.decode(ids[-3:]) for ids in completion_ids]
        return [coin(None) if hrpo.reward is coin else float(end == f"</think>{answer}<eos>")
                for end, answer in zip(ends, gold)]

    class Alternate(TrainerCallback):
        """After each of TRL's steps, one of each of ours."""

        def __init__(self, *steps):
            self.steps, self.found, self.mark = steps, [], clock()

        def on_step_end(self, args, state, control, **_):
            seconds = [clock() - self.mark]
            for step in self.steps:
                start = clock()
                row = step(state.global_step)
                seconds.append(clock() - start)
            self.found.append((*seconds, row["zero_std_frac"], row["length"]))
            self.mark = clock()

    print("| reward | TRL's rows in a pass | groups without spread | lengths, ours and TRL's | "
          f"TRL, s | ours, s | TRL / ours | sharing prompts, s | TRL / ours |\n|{'---|' * 9}")
    for (hrpo.reward, rows) in ((right, 256), (right, 64), (coin, 256), (coin, 64)):
        lengths.clear()
        alternate = Alternate(*(our_step(model, dataclasses.replace(cfg, share_prompts=share),
                                         problems) for share in (False, True)))
        args = GRPOConfig(
            tempfile.mkdtemp(), per_device_train_batch_size=rows, num_generations=8,
            gradient_accumulation_steps=256 // rows, steps_per_generation=256 // rows,
            max_completion_length=14, beta=0.0, temperature=1.0, top_k=0, top_p=1.0,
            learning_rate=1e-12, lr_scheduler_type="constant", max_steps=steps + 3,
            loss_type="grpo", use_cpu=True, bf16=False, gradient_checkpointing=False,
            logging_strategy="no", save_strategy="no", report_to="none", disable_tqdm=True)
        trainer = GRPOTrainer(load_model(model)[0], trl_reward, args, data,
                              processing_class=tokenizer, callbacks=[alternate])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        trl, ours, shared, equal, length = zip(*alternate.found[3:])
        times = [(statistics.median(mine), statistics.median(x / y for x, y in zip(trl, mine)))
                 for mine in (ours, shared)]
        name = "a coin" if hrpo.reward is coin else "right answers"
        print(f"| {name} | {rows} | {statistics.mean(equal):.2f} | {statistics.mean(length):.1f}, "
              f"{statistics.mean(lengths):.1f} | {statistics.median(trl):.3f} | "
              f"{' | '.join(f'{s:.3f} | {ratio:.2f}' for s, ratio in times)} |", flush=True)
    hrpo.reward = right


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny:arithmetic")
    parser.add_argument("--steps", type=int, default=12)
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    print(f"{THREADS} threads, {args.steps} steps")
    against_trl(args.model, args.steps)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
