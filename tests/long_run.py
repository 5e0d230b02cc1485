"""2000 updates with kill -9, SIGTERM and --resume auto in between equal 2000 without, bit for bit.

python tests/long_run.py [METHOD ...] [--steps 2000] [--stops 6]    # some 5 minutes a method

Each method trains `tiny` on 300 chains, 2 prompts x 2 completions a step. Compared: every row of
metrics.jsonl but for its clocks, samples.jsonl, and all that the last checkpoint holds. Printed:
memory and open files of the uninterrupted process (Linux), sampled twice a second.
"""

import argparse
import json
import random
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

from conftest import METHODS, ROOT
from runs import differences, launch, rows

import common

FLAGS = ("--model tiny --device cpu --num_prompts 2 --group_size 2 --max_completion_length 20 "
         "--eval_every 500 --eval_limit 64 --save_every 200 --warmup_steps 10")


def look(pid):
    """Resident memory in MiB and open file descriptors of a process, None once it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
        return int(status.partition("VmRSS:")[2].split()[0]) / 1024, files
    except (OSError, ValueError, IndexError):
        return None


def steps_done(out):
    return len(rows(out, "train"))


def whole_run(method, argv, out, log, steps):
    """Run to the end -> [(step, MiB, open files), ...] of its life after a tenth of the steps."""
    job, seen = launch(ROOT / f"{method}.py", argv, log), []
    while job.poll() is None:
        time.sleep(0.5)
        step, found = steps_done(out), look(job.pid)
        if found and steps / 10 < step < steps:
            seen.append((step, *found))
    assert job.returncode == 0, log.read_text()
    return seen


def stopped_run(method, argv, out, log, steps, stops):
    """The same with signals at random steps -> {signal: how often it hit}."""
    rng, hit = random.Random(method), {"SIGKILL": 0, "SIGTERM": 0}
    for number, at in enumerate(sorted(rng.sample(range(steps // 20, steps), stops))):
        job = launch(ROOT / f"{method}.py", [*argv, "--resume", "auto"], log)
        while steps_done(out) < at and job.poll() is None:
            time.sleep(rng.random() * 0.2)
        signum = (signal.SIGKILL, signal.SIGTERM)[number % 2]
        job.send_signal(signum)
        code = job.wait(60)
        assert code in (-9, 143), log.read_text()
        hit[signum.name] += 1
    job = launch(ROOT / f"{method}.py", [*argv, "--resume", "auto"], log)
    assert job.wait() == 0, log.read_text()
    return hit


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.
                                     RawTextHelpFormatter)
    parser.add_argument("methods", nargs="*", default=METHODS)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--stops", type=int, default=6)
    args = parser.parse_args()
    for method in args.methods:
        with tempfile.TemporaryDirectory() as place:
            folder, clock = Path(place), time.time()
            chains = common.arithmetic_problems("arithmetic", limit=300)
            data = folder / "chains.jsonl"
            data.write_text("".join(json.dumps({k: p[k] for k in ("question", "answer", "steps")})
                                    + "\n" for p in chains))
            argv = [*FLAGS.split(), "--train", str(data), "--eval_data", str(data),
                    "--steps", str(args.steps), "--out_dir"]
            whole, parts, log = folder / "whole", folder / "parts", folder / "log"
            seen = whole_run(method, [*argv, str(whole)], whole, log, args.steps)
            hit = stopped_run(
                method, [*argv, str(parts)], parts, log, args.steps, args.stops)
            end = f"step_{args.steps:06d}"
            assert differences(whole / end, parts / end) == []
            for name in ("metrics.jsonl", "samples.jsonl"):
                assert rows(whole, name=name) == rows(parts, name=name), name
            trained = rows(whole, "train")
            assert len(trained) == args.steps
            tenth = max(1, len(seen) // 10)
            early, late = ([statistics.median(row[k] for row in part) for k in (1, 2)]
                           for part in (seen[:tenth], seen[-tenth:]))
            top = max(row[2] for row in seen)
            updates = sum(r["grad_norm"] is not None for r in trained)
            print(f"{method}: {args.steps} steps ({updates} updates with a gradient), stopped by "
                  f"{hit}: rows and last checkpoint equal; memory {early[0]:.0f} MiB early, "
                  f"{late[0]:.0f} late; open files {early[1]:.0f} early, {late[1]:.0f} late, at "
                  f"most {top}; {time.time() - clock:.0f} s", flush=True)
            assert late[0] < early[0] + 24 and late[1] == early[1], seen[:: len(seen) // 20 + 1]


if __name__ == "__main__":
    sys.exit(main())
