"""Time and memory of the update, and two ranks against one.

python tests/bench_update.py                        # all parts; or --parts memory,layers,ranks
python tests/bench_update.py --parts layers --model FOLDER --lengths 128,256

memory  log-probs by our chunked head against log_softmax over all logits: forward and backward
layers  the same with and without --gradient_checkpointing
ranks   a step of 1 process with 1 and 2 threads and of torchrun with 2 processes

Times are medians of alternating repeats in one process. Memory is how far the resident set rises
above model and gradients, in a process of its own, whose malloc returns what is freed (glibc
otherwise keeps blocks below 32 MB, and the peak would be mostly those).
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))

from bench_rollout import clock
from conftest import make_lm

import common
import hrpo
from common import completion_hidden, load_model

THREADS = int(os.environ.get("OMP_NUM_THREADS", 1))
TIGHT = {"MALLOC_MMAP_THRESHOLD_": "1000000", "MALLOC_TRIM_THRESHOLD_": "1000000"}
STEP = ("--preset tiny --no-hybrid --kl_coef 0 --max_completion_length 14 --lr 1e-12 "
        "--warmup_steps 0 --eval_limit 64 --eval_every 999 --save_every 999")  # lr: a fixed policy


def build(case):
    """case {"model", "shape", "vocab", "batch", "length"} -> lm, batch as a rollout gives it."""
    if case["model"]:
        lm = load_model(case["model"])[0]
    else:
        lm = make_lm(vocab_size=case["vocab"], max_position_embeddings=4096,
                     initializer_range=0.02, **case["shape"])
        lm.num_tokens = case["vocab"]
    batch = {}
    for part, length in (("prompt", 16), ("completion", case["length"])):
        batch[f"{part}_ids"] = torch.randint(3, lm.num_tokens, (case["batch"], length))
        batch[f"{part}_mask"] = torch.ones_like(batch[f"{part}_ids"]).bool()
    return lm.train(), batch


def forward_backward(lm, batch, mode):
    """Seconds; mode: naive, ours, or layers = ours with --gradient_checkpointing."""
    lm.activation_checkpointing_disable()
    if mode == "layers":
        lm.activation_checkpointing_enable()
    ids, start = batch["completion_ids"], clock()
    hidden = completion_hidden(lm, batch, lm.get_input_embeddings()(ids))
    if mode == "naive":
        logprobs = common.lm_logits(lm, hidden).log_softmax(-1).gather(2, ids[..., None])[..., 0]
    else:
        logprobs = common.completion_logprobs(lm, hidden, ids, batch["completion_mask"])[0]
    logprobs.mean().backward()
    return clock() - start


def resident(name):
    return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def print_extra_memory(case):
    """In a process of its own: MiB that one pass needs above model and gradients."""
    lm, batch = build(case)
    short = {name: value[:, :4] for name, value in batch.items()}
    forward_backward(lm, short, case["mode"])  # gradients exist from here on
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    forward_backward(lm, batch, case["mode"])
    print(resident("VmHWM") - before)


def extra_memory(case, mode):
    argv = [sys.executable, __file__, "--case", json.dumps({**case, "mode": mode})]
    return float(subprocess.run(argv, check=True, capture_output=True, text=True,
                                env={**os.environ, **TIGHT}).stdout.split()[-1])


def compare(cases, modes, repeats):
    """One line per case: seconds and MiB of both modes, ratio of the times."""
    first, second = modes
    print(f"| model | vocabulary | completions | {first}, s | {second}, s | time | "
          f"{first}, MiB | {second}, MiB |\n|---|---|---|---|---|---|---|---|")
    for case in cases:
        lm, batch = build(case)
        seconds = {mode: [] for mode in modes}
        for repeat in range(repeats + 1):
            for mode in modes:
                spent = forward_backward(lm, batch, mode)
                seconds[mode] += [spent] if repeat else []  # the first round warms up
        a, b = (statistics.median(seconds[mode]) for mode in modes)
        ratio = statistics.median(y / x for x, y in zip(*seconds.values()))
        size = sum(p.numel() for p in lm.parameters()) / 1e6
        memory = [extra_memory(case, mode) for mode in modes]
        print(f"| {size:.1f}M | {lm.num_tokens} | {case['batch']} x {case['length']} | {a:.3f} | "
              f"{b:.3f} | {ratio:.2f} | {memory[0]:.0f} | {memory[1]:.0f} |", flush=True)


def run_rank(folder):
    """One rank of a short run; writes how long its steps took, computed, and waited."""
    torch.set_num_threads(THREADS)
    step, agree, found = hrpo.train_step, hrpo.stop_agreed, []

    def timed_agree():
        start, result = time.perf_counter(), agree()
        if found:  # the first of a step comes after the rollout
            found[-1].setdefault("wait", time.perf_counter() - start)
        return result

    def timed_step(*args):
        found.append({})
        wall, cpu, result = time.perf_counter(), time.process_time(), step(*args)
        found[-1].update(wall=time.perf_counter() - wall, cpu=time.process_time() - cpu)
        return result

    hrpo.train_step, hrpo.stop_agreed = timed_step, timed_agree
    hrpo.main([*STEP.split(), "--steps", "20", "--out_dir", f"{folder}/run"])
    Path(folder, f"{dist.get_rank()}.json").write_text(json.dumps(found[5:]))
    dist.destroy_process_group()


def compare_ranks():
    print("| processes x threads | completions / s | step, s | a rank waits after its rollout | "
          "wall time that is no CPU time |\n|---|---|---|---|---|")
    for ranks, threads in ((1, 1), (1, 2), (2, 1)):
        with tempfile.TemporaryDirectory() as folder:
            launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
            argv = [sys.executable, *(launcher if ranks > 1 else []), __file__, "--rank", folder]
            subprocess.run(argv, check=True, capture_output=True,
                           env={**os.environ, "OMP_NUM_THREADS": str(threads)})
            steps = [s for f in Path(folder).glob("*.json") for s in json.loads(f.read_text())]
        wall = statistics.median(s["wall"] for s in steps)
        waits = sum(s["wait"] for s in steps) / sum(s["wall"] for s in steps)
        idle = 1 - sum(s["cpu"] for s in steps) / sum(s["wall"] for s in steps) / threads
        print(f"| {ranks} x {threads} | {256 / wall:.0f} | {wall:.3f} | {waits:.1%} | "
              f"{idle:.1%} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", default="memory,layers,ranks")
    parser.add_argument("--model", default="")
    parser.add_argument("--lengths", default="64,128,256,512")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    for inner in ("--case", "--rank"):
        parser.add_argument(inner, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    if args.case:
        return print_extra_memory(json.loads(args.case))
    if args.rank:
        return run_rank(args.rank)
    print(f"{THREADS} threads")
    lengths = [int(n) for n in args.lengths.split(",")]
    case = {"model": args.model, "batch": args.batch}
    if "memory" in args.parts:
        shape = dict(hidden_size=64, num_hidden_layers=1, intermediate_size=128)
        compare([{**case, "shape": shape, "vocab": v, "length": n}
                 for v in ([0] if args.model else [1024, 8192, 49152]) for n in lengths],
                ("naive", "ours"), args.repeats)
    if "layers" in args.parts:
        shape = dict(hidden_size=256, num_hidden_layers=8, intermediate_size=1024)
        compare([{**case, "shape": shape, "vocab": 1024, "length": n} for n in lengths],
                ("ours", "layers"), args.repeats)
    if "ranks" in args.parts:
        compare_ranks()


if __name__ == "__main__":
    main()
