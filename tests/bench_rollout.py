"""Time `rollout` against transformers' `generate`: same model, prompts and lengths, alternating.

python tests/bench_rollout.py                       # 0.5M and 4M random models
python tests/bench_rollout.py --model FOLDER --batch 16 --new 16 --repeats 3
python tests/bench_rollout.py --scale               # cost against length, batch and vocabulary
python tests/bench_rollout.py --long docs/speed_length.json     # a step behind many positions

Equal lengths: nothing ends early. Skewed lengths: every step ends with probability 4 / new, so the
mean is about a quarter of the maximum. Prints medians over the repeats: tokens per second, and the
time of each variant as a multiple of its baseline's in the same repeat. Every step of a latent
variant is latent; where that changes the lengths, skewed ones are not compared.
"""

import argparse
import copy
import json
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
import hyrea
import latent_grpo
import lepo
from common import load_model, make_rng

CUT = "--top_k 30 --top_p 0.95"  # what LEPO samples from, also when it is explicit
VARIANTS = {  # name: (script, flags, baseline)
    "generate": (hrpo, "--no-hybrid", "generate"),
    "explicit": (hrpo, "--no-hybrid", "generate"),
    "HRPO": (hrpo, "--hybrid", "explicit"),
    "explicit, top-k 50": (hrpo, "--no-hybrid --top_k 50", "generate"),
    "HRPO, top-k 50": (hrpo, "--hybrid --top_k 50", "explicit, top-k 50"),
    "explicit, top-k 30, top-p .95": (lepo, f"--latent_steps 0 {CUT}", "generate"),
    "LEPO, top-k 30, top-p .95": (
        lepo, f"--latent_steps 9999 {CUT}", "explicit, top-k 30, top-p .95"),
    "Latent-GRPO": (latent_grpo, "--latent", "explicit"),
    "HyRea": (hyrea, "--latents_per_step 9999", "explicit")}
SAMPLED = ("generate", "explicit", "HRPO")  # their lengths agree, skewed ones too


def clock():
    """Seconds; of CPU time with one thread, which other work on the machine disturbs less."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def make_policy(name, lm, tokenizer, cfg):
    """A policy whose latent phase never ends, which a random model would end at odd places."""
    if name == "HyRea":
        lm, tokenizer = copy.deepcopy((lm, tokenizer))  # it adds three tokens
        hyrea.start_state = lambda rows, *_: {"left": torch.full((rows,), 9999)}
    policy = VARIANTS[name][0].Policy(lm, tokenizer, cfg).eval()
    if name.startswith("HRPO"):
        policy.marker.may_complete[:] = False
    policy.marker_ids = [-1]  # Latent-GRPO's
    return policy


def time_ours(script, policy, prompts, cfg, seed):
    start = clock()
    batch = script.rollout(policy, prompts, cfg, make_rng("cpu", seed), cfg.group_size)
    return int(batch["lengths"].sum()) / (clock() - start)


def time_generate(lm, prompts, cfg, seed):
    ids = torch.tensor(prompts).repeat_interleave(cfg.group_size, 0)
    torch.manual_seed(seed)
    start = clock()
    out = lm.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0,
                      temperature=1.0, max_new_tokens=cfg.max_completion_length,
                      eos_token_id=lm.eos_ids or None, pad_token_id=0)
    seconds = clock() - start
    ended = torch.isin(out[:, ids.shape[1] :], torch.tensor(lm.eos_ids))
    lengths = ended.int().argmax(1) + 1
    lengths[~ended.any(1)] = out.shape[1] - ids.shape[1]
    return int(lengths.sum()) / seconds


def measure(lm, tokenizer, args, names, skewed=False):
    """Tokens per second of each variant, a list over the repeats."""
    vocabulary = lm.num_tokens
    lm.eos_ids = list(range(3, 3 + max(1, 4 * vocabulary // args.new))) if skewed else []
    rng = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, vocabulary, (args.batch // 8, args.prompt), generator=rng).tolist()
    speeds, ours = {name: [] for name in names}, {}
    for name in names:
        script, flags, _ = VARIANTS[name]
        argv = ["--preset", "tiny", "--max_completion_length", str(args.new), *flags.split()]
        cfg = script.parse_config(argv)
        ours[name] = script, make_policy(name, lm, tokenizer, cfg), prompts, cfg
    for repeat in range(args.repeats + 1):
        for name in names:
            speed = (time_generate(lm, prompts, ours[name][3], repeat) if name == "generate"
                     else time_ours(*ours[name], repeat))
            speeds[name] += [speed] if repeat else []  # the first round only warms up
    return speeds


def compare(label, lm, tokenizer, args, skewed):
    """One line per variant: tokens per second, time against its baseline's."""
    names = SAMPLED if skewed else [n for n in VARIANTS if "50" not in n or lm.num_tokens > 50]
    speeds = measure(lm, tokenizer, args, names, skewed)
    for name in names:
        base = VARIANTS[name][2]
        times = [b / a for a, b in zip(speeds[name], speeds[base])]
        spread = f"{statistics.median(times):.2f} ({min(times):.2f}-{max(times):.2f})"
        print(f"| {label} | {'skewed' if skewed else 'equal'} | {name} | "
              f"{statistics.median(speeds[name]):.0f} | {'-' if name == base else spread} | "
              f"{'-' if name == base else base} |", flush=True)


def random_model(vocabulary, **shape):
    lm = make_lm(vocab_size=vocabulary, initializer_range=0.02, max_position_embeddings=4096,
                 **{"hidden_size": 128, "intermediate_size": 512, **shape})
    lm.num_tokens = vocabulary
    return lm


def scale(args):
    """One line per length, batch and vocabulary of the 0.5M shape: microseconds per token."""
    names, tokenizer = ("generate", "explicit", "HRPO", "HRPO, top-k 50"), make_tokenizer()
    print(f"| new tokens | batch | vocabulary | {' | '.join(names)} |\n|{'---|' * 7}")
    for new, batch, vocabulary in (
            (64, 16, 1024), (128, 16, 1024), (256, 16, 1024), (512, 16, 1024), (1024, 16, 1024),
            (64, 64, 1024), (64, 256, 1024), (64, 16, 8192), (64, 16, 49152)):
        args.new, args.batch = new, batch
        speeds = measure(random_model(vocabulary), tokenizer, args, names)
        cells = " | ".join(f"{1e6 / statistics.median(speeds[name]):.1f}" for name in names)
        print(f"| {new} | {batch} | {vocabulary} | {cells} |", flush=True)


SHAPES = {  # of --long; grouped heads as Qwen and SmolLM2 have them
    "5M": dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=4,
               num_attention_heads=8, num_key_value_heads=2, vocab_size=1024),
    "135M, 2 of 30 layers": dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=2,
                                 num_attention_heads=9, num_key_value_heads=3, vocab_size=49152)}
LONG = ("ours", "generate", "generate, static cache")
STEPS = 16


def time_step(lm, policy, name, prompts, cfg, group_size):
    """Seconds of a decoding step of all rows: the median of STEPS steps behind the prompts."""
    cfg.max_completion_length, cfg.group_size = STEPS + 1, group_size
    stamps = []
    if name == "ours":
        step = hrpo.next_input
        hrpo.next_input = lambda *args: stamps.append(clock()) or step(*args)
        hrpo.rollout(policy, prompts, cfg, make_rng("cpu", 0), group_size)
        hrpo.next_input = step
    else:
        ids = torch.tensor(prompts).repeat_interleave(group_size, 0)
        static = {"cache_implementation": "static"} if "static" in name else {}
        lm.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0,
                    temperature=1.0, max_new_tokens=STEPS + 1, eos_token_id=None, pad_token_id=0,
                    logits_processor=[lambda ids, scores: stamps.append(clock()) or scores],
                    **static)
    return statistics.median(b - a for a, b in zip(stamps, stamps[1:]))


def long(args):
    """Milliseconds of a decoding step of all rows, behind so many positions."""
    print(f"| model | rows | positions | {' | '.join(LONG)} | best generate / ours |")
    print("|---|---|---|---|---|---|---|")
    runs = []
    for shape, sizes in SHAPES.items():
        lm = make_lm(initializer_range=0.02, max_position_embeddings=4096, **sizes)
        lm.num_tokens, lm.eos_ids = sizes["vocab_size"], []
        cfg = hrpo.parse_config(["--preset", "tiny", "--no-hybrid"])
        policy = hrpo.Policy(lm, make_tokenizer(), cfg).eval()
        for rows in (16, 64):
            found = {name: [] for name in LONG}
            lengths = (256, 1024, 2048) if sizes["vocab_size"] < 9999 else (256, 1024)
            for length in lengths:
                rng = torch.Generator().manual_seed(0)
                prompts = torch.randint(3, lm.num_tokens, (rows // 8, length), generator=rng)
                times = {name: [] for name in LONG}
                for repeat in range(args.repeats + 1):
                    for name in LONG:
                        seconds = time_step(lm, policy, name, prompts.tolist(), cfg, 8)
                        times[name] += [seconds] * (repeat > 0)  # 0 warms up
                medians = {name: 1e3 * statistics.median(times[name]) for name in LONG}
                for name in LONG:
                    found[name].append(round(medians[name], 2))
                ratio = min(medians[name] for name in LONG[1:]) / medians["ours"]
                cells = " | ".join(f"{medians[name]:.1f}" for name in LONG)
                print(f"| {shape} | {rows} | {length} | {cells} | {ratio:.2f} |", flush=True)
            runs += [{"run": name, "label": f"{name}: {shape}, {rows} rows", "seed": 0,
                      "method": name, "steps": list(lengths), "values": found[name]}
                     for name in LONG]
    figure = {"y": "ms a step", "x": "positions", "runs": runs}
    Path(args.long).write_text(json.dumps(figure, indent=1) + "\n", encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=24)
    parser.add_argument("--new", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--scale", action="store_true")
    parser.add_argument("--long", default="", help="file for the figure")
    args = parser.parse_args()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    print(f"{torch.get_num_threads()} threads, {args.repeats} repeats")
    if args.scale:
        return scale(args)
    if args.long:
        return long(args)
    if args.model:
        models = {args.model.rstrip("/").split("/")[-1]: load_model(args.model)}
    else:
        small, tokenizer = len(make_tokenizer()), make_tokenizer()
        large = dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=4)
        models = {"0.5M": (random_model(small), tokenizer),
                  "4M": (random_model(small, **large), tokenizer)}
    print(f"batch {args.batch}, {args.new} new tokens at most\n"
          "| model | lengths | variant | tokens / s | time (lowest-highest) | times that of |\n"
          "|---|---|---|---|---|---|")
    for label, (lm, tokenizer) in models.items():
        for skewed in (False, True):
            compare(label, lm, tokenizer, args, skewed)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
