"""Time `rollout` against transformers' `generate`: same model, prompts and lengths, alternating.

python tests/bench_rollout.py                       # 0.5M and 4M random models
python tests/bench_rollout.py --model FOLDER --batch 32 --new 24 --repeats 3

Equal lengths: nothing ends early. Skewed lengths: every step ends with probability 4 / new, so the
mean is about a quarter of the maximum. Prints medians over the repeats: tokens per second, and the
time of each variant as a multiple of its baseline's in the same repeat.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))

from conftest import make_lm, make_tokenizer

import hrpo
import lepo
from common import load_model, make_rng

CUT = "--top_k 30 --top_p 0.95"  # what LEPO samples from, also when it is explicit
VARIANTS = {  # name: (script, flags, baseline)
    "generate": (hrpo, "--no-hybrid", "generate"),
    "explicit": (hrpo, "--no-hybrid", "generate"),
    "HRPO, every step hybrid": (hrpo, "--hybrid", "explicit"),
    "explicit, top-k 30, top-p .95": (lepo, f"--latent_steps 0 {CUT}", "explicit"),
    "LEPO, every step latent": (lepo, f"--latent_steps 9999 {CUT}",
                                "explicit, top-k 30, top-p .95")}


def time_ours(script, policy, prompts, cfg, seed):
    start = time.perf_counter()
    batch = script.rollout(policy, prompts, cfg, make_rng("cpu", seed), cfg.group_size)
    return int(batch["lengths"].sum()) / (time.perf_counter() - start)


def time_generate(lm, prompts, cfg, seed):
    ids = torch.tensor(prompts).repeat_interleave(cfg.group_size, 0)
    torch.manual_seed(seed)
    start = time.perf_counter()
    out = lm.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0,
                      temperature=1.0, max_new_tokens=cfg.max_completion_length,
                      eos_token_id=lm.eos_ids or None, pad_token_id=0)
    seconds = time.perf_counter() - start
    ended = torch.isin(out[:, ids.shape[1] :], torch.tensor(lm.eos_ids))
    lengths = ended.int().argmax(1) + 1
    lengths[~ended.any(1)] = out.shape[1] - ids.shape[1]
    return int(lengths.sum()) / seconds


def compare(label, lm, tokenizer, args, skewed):
    """One line per variant: tokens per second, time against its baseline's."""
    vocabulary = lm.num_tokens
    lm.eos_ids = list(range(3, 3 + max(1, 4 * vocabulary // args.new))) if skewed else []
    rng = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, vocabulary, (args.batch // 8, args.prompt), generator=rng).tolist()
    speeds = {name: [] for name in VARIANTS}
    for repeat in range(args.repeats + 1):
        for name, (script, flags, _) in VARIANTS.items():
            cfg = script.parse_config(["--preset", "tiny", "--max_completion_length",
                                       str(args.new), *flags.split()])
            if name == "generate":
                speed = time_generate(lm, prompts, cfg, repeat)
            else:
                policy = script.Policy(lm, tokenizer, cfg).eval()
                speed = time_ours(script, policy, prompts, cfg, repeat)
            if repeat > 0:  # the first round only warms up
                speeds[name].append(speed)
    for name, (_, _, base) in VARIANTS.items():
        times = [b / a for a, b in zip(speeds[name], speeds[base])]
        spread = f"{statistics.median(times):.2f} ({min(times):.2f}-{max(times):.2f})"
        print(f"| {label} | {'skewed' if skewed else 'equal'} | {name} | "
              f"{statistics.median(speeds[name]):.0f} | {'-' if name == base else spread} | "
              f"{'-' if name == base else base} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=24)
    parser.add_argument("--new", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    if args.model:
        lm, tokenizer = load_model(args.model)
        models = {args.model.rstrip("/").split("/")[-1]: (lm, tokenizer)}
    else:
        small = dict(vocab_size=len(make_tokenizer()), hidden_size=128, intermediate_size=512,
                     initializer_range=0.02)
        large = {**small, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4}
        models = {"0.5M": (make_lm(**small), make_tokenizer()),
                  "4M": (make_lm(**large), make_tokenizer())}
    print(f"{torch.get_num_threads()} threads, batch {args.batch}, {args.new} new tokens at most")
    print("| model | lengths | variant | tokens / s | time (lowest-highest) | times that of |")
    print("|---|---|---|---|---|---|")
    for label, (lm, tokenizer) in models.items():
        for skewed in (False, True):
            compare(label, lm, tokenizer, args, skewed)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
