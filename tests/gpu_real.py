"""Part `real` of gpu_run.py: supervised start, RL methods, greedy accuracy on a pretrained model.

All methods train at the same time from the same start, and make equally many updates: as many as
the slowest of them can. To add a method, or a start for it, add a line below.
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import gpu_pack
from conftest import make_lm, save_folder
from gpu_run import ROOT

STARTS = [  # name, script, flags
    ("SFT", "hyrea", "--stage sft --max_replaced_steps 0 --sft_steps 400 --sft_rounds 1 "
                     "--sft_batch 32 --sft_lr 2e-4"),
]
METHODS = [  # name, its start, script, flags
    ("GRPO", "SFT", "hrpo", "--no-hybrid"),
    ("HRPO", "SFT", "hrpo", ""),
    ("LEPO", "SFT", "lepo", "--latent_steps 8 --top_k 30 --top_p 0.95"),
]
ALL = ("--dtype bfloat16 --micro_batch 32 --max_prompt_length 256 --max_completion_length 96 "
       "--answer_marker #### --temperature 1 --top_k 0 --lora_rank 0 --kl_coef 0 --weight_decay 0 "
       "--max_grad_norm 1 --eval_limit 16 --eval_every 9999 --save_every 9999")
RL = "--steps 300 --warmup_steps 5 --num_prompts 32 --group_size 8 --lr 5e-6"
SMALL = {"start": "--dtype float32 --max_completion_length 12 --sft_steps 4 --sft_batch 4",
         "rl": "--dtype float32 --max_completion_length 12 --steps 3 --num_prompts 2 "
               "--group_size 2"}
SHARES = {"start": 0.35, "rl": 0.75}  # of the time, until this stage makes no more updates
SAVING = 20  # seconds that a run may take to save, after its last update


def launch(script, argv, log):
    """Start a script as a user would; its output goes to the file `log`."""
    with open(log, "w", encoding="utf-8") as f:
        return subprocess.Popen([sys.executable, str(ROOT / f"{script}.py"), *map(str, argv)],
                                stdout=f, stderr=f, cwd=ROOT,
                                env={**os.environ, "OMP_NUM_THREADS": "1"})


def train_rows(out):
    """What a run has logged about its steps so far."""
    path = out / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(True) if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return [row for row in rows if row["kind"] == "train"]


def end(facts, jobs, until):
    """Wait for {name: (process, log)}; a stop signal at the time `until`, so that they save."""
    for name, (job, _) in jobs.items():
        try:
            job.wait(max(0, until - time.time()))
        except subprocess.TimeoutExpired:
            job.terminate()
            facts.failed(name, "told to stop, its time was over")
    for name, (job, log) in jobs.items():
        if job.wait() not in (0, 128 + signal.SIGTERM):
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
            print(*lines[-30:], sep="\n", flush=True)
            facts.failed(name, f"ended with code {job.returncode}: {' '.join(lines[-1:])}")


def train_equally(jobs, outs, until):
    """Stop each job after as many updates as the slowest one can make until then."""
    goal = None
    while any(job.poll() is None for job, _ in jobs.values()) and time.time() < until:
        time.sleep(0.1)
        logged = {name: train_rows(outs[name]) for name in jobs if not jobs[name][0].poll()}
        done = {name: len(rows) for name, rows in logged.items()}
        if goal is None and min(done.values(), default=0) >= 3:
            slowest = max(statistics.median(r["seconds"] for r in rows) for rows in logged.values())
            goal = max(*done.values(), min(done.values()) + int((until - time.time()) / slowest))
        for name, (job, _) in jobs.items():
            if goal and done.get(name, 0) >= goal and job.poll() is None:
                job.terminate()  # it saves; a second signal does nothing


def tell_training(facts, name, rows):
    """How a run went: its first and last five steps."""
    def over(part, key, reduce=statistics.mean):
        values = [row[key] for row in part if row.get(key) is not None]
        return reduce(values) if values else None

    first, last = rows[:5], rows[-5:]
    facts.tell("training", method=name, steps=len(rows), skipped=over(rows, "skipped", sum),
               reward_first_5=over(first, "reward"), reward_last_5=over(last, "reward"),
               length_last_5=over(last, "length"), latent_last_5=over(last, "latent_steps"),
               seconds_a_step=over(last, "seconds"),
               rollout_tokens_per_s=over(last, "tokens_per_s_rollout"),
               update_tokens_per_s=over(last, "tokens_per_s_update"),
               largest_logprob_gap=over(rows, "logprob_gap", max),
               peak_gib=over(last, "peak_mem_gib", max))


def find_data(args):
    """-> training sets, test sets: names with commas."""
    if args.small and not args.data:
        return "arithmetic:2", "arithmetic:2,arithmetic:3"
    found = [",".join(map(str, sorted(Path(args.data, kind).glob("*.jsonl*"))))
             for kind in ("train", "test")]
    if not all(found):
        raise SystemExit(f"--data {args.data}: want train/*.jsonl.gz and test/*.jsonl.gz in it")
    return found


def real(facts, device, place, deadline, args):
    """Starts, then methods, then evaluations; each of these at the same time as its like."""
    begin = time.time()
    until = {stage: begin + share * (deadline - begin) for stage, share in SHARES.items()}
    train, tests = find_data(args)
    model = args.model
    if args.small and not model:
        model = save_folder(place / "model", make_lm())
    if not model:
        raise SystemExit("--model: name a pack or a model")
    model = gpu_pack.unpack(model, place / "unpacked")
    outs = {name: place / name for name, *_ in [*STARTS, *METHODS]}
    given = ["--device", device, "--train", train, "--eval_data", tests]

    def job_of(name, start, script, flags, stage):
        log = place / f"{name}.log"
        words = f"{ALL} {flags} {SMALL[stage] if args.small else ''}".split()
        return launch(script, [*words, *given, "--model", start, "--out_dir", outs[name]], log), log

    jobs = {name: job_of(name, model, script, flags, "start") for name, script, flags in STARTS}
    end(facts, jobs, until["start"])
    facts.tell("starts", seconds=time.time() - begin, updates={
        name: (train_rows(outs[name]) or [{}])[-1].get("step") for name in jobs})
    jobs = {name: job_of(name, outs[start], script, f"{RL} {flags}", "rl")
            for name, start, script, flags in METHODS}
    train_equally(jobs, outs, until["rl"])
    end(facts, jobs, until["rl"] + SAVING)
    for name in jobs:
        facts.attempt(name, tell_training, facts, name, train_rows(outs[name]))
    jobs = {}
    for name, out in outs.items():
        log = place / f"{name}.eval.log"
        argv = [out, "--data", tests, "--limit", 8 if args.small else 200, "--eval_batch", 200,
                "--device", device, "--out", place / "results" / name]
        jobs[name] = launch("eval", argv, log), log
    end(facts, jobs, deadline)
    for name in outs:
        for file in sorted((place / "results" / name).glob("*.json")):
            row = json.loads(file.read_text(encoding="utf-8"))
            facts.tell("greedy accuracy", model=name, data=Path(row["data"]).name.split(".")[0],
                       **{key: row[key] for key in ("accuracy", "stderr", "n", "total_length",
                                                    "latent_steps", "truncated_frac")})
