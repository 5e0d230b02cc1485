"""Every method and baseline on one task: same base, same demonstrations, equal updates, many seeds.

python tests/comparison.py runs/compare                              # tiny, 5 seeds: two hours
python tests/comparison.py runs/real --model FOLDER --train FILE.jsonl --data svamp,gsm8k

Each RL method starts from --sft_steps supervised updates in its own kind of thought (GRPO, HRPO and
LEPO: written chains) and then takes --steps updates on --num_prompts x --group_size completions.
What is complete is skipped and what was stopped goes on, so the same command can be given again.
Then all models are evaluated by eval.py (files in OUT/results and OUT/results-soft, their rows also
in OUT/rows.jsonl) and two tables are printed; `python eval.py --table OUT/rows.jsonl` repeats one.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
RUNS = {  # name: (script, run that it starts from, flags)
    "sft": ("hyrea", None, "--stage sft --max_replaced_steps 0"),
    "grpo": ("hrpo", "sft", "--no-hybrid"),
    "hrpo": ("hrpo", "sft", ""),
    "lepo": ("lepo", "sft", ""),
    "latent-sft": ("latent_grpo", None, "--stage sft"),
    "latent-grpo": ("latent_grpo", "latent-sft", "--stage rl"),
    "soft-grpo": ("latent_grpo", "latent-sft", "--stage rl --preset soft_grpo"),
    "coconut": ("hyrea", None, "--stage sft --replace all"),
    "hyrea-start": ("hyrea", None, "--stage sft"),
    "hyrea": ("hyrea", "hyrea-start", "--stage rl"),
}


def parse_args():
    parser = argparse.ArgumentParser(usage="comparison.py OUT [--flag ...]", description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--train", default="arithmetic-restated:2-4")
    parser.add_argument("--data", default="", help="held-out sets, by commas (test split)")
    parser.add_argument("--max_completion_length", type=int, default=48)
    parser.add_argument("--names", nargs="+", default=list(RUNS), choices=RUNS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--sft_steps", type=int, default=800)
    parser.add_argument("--num_prompts", type=int, default=16)
    parser.add_argument("--group_size", type=int, default=8)
    parser.add_argument("--limit", type=int, default=1024, help="held-out problems")
    parser.add_argument("--more", action="append", default=[],
                        help="flags for every run, or for those of a script: --more 'hyrea: --x 1'")
    return parser.parse_args()


def command(name, seed, args):
    """Command line of a run, its stage included; what makes it this run stands last and wins."""
    script, start, flags = RUNS[name]
    model = args.out / f"{start}-{seed}" if start else args.model
    if args.model != "tiny":
        flags = flags.replace("soft_grpo", "soft_grpo_paper")
    words = f"--train {args.train} --seed {seed} --num_prompts {args.num_prompts} " \
            f"--group_size {args.group_size} --steps {args.steps} --eval_limit {args.limit} " \
            f"--max_completion_length {args.max_completion_length} --resume auto "
    words += f"--eval_data {args.data.split(',')[0]} " * bool(args.data)
    for more in args.more:  # "flags", or "script: flags"
        chosen, colon, its_flags = more.partition(": ")
        words += f"{its_flags if chosen == script else '' if colon else more} "
    supervised = ["--sft_steps", str(args.sft_steps)] * (script in ("hyrea", "latent_grpo"))
    return [sys.executable, str(ROOT / f"{script}.py"), "--model", str(model), "--out_dir",
            str(args.out / f"{name}-{seed}"), *supervised, *words.split(), *flags.split()]


def run_seed(seed, args):
    """All runs of a seed, one after the other; a note in the run folder says how long one took."""
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    for name in args.names:
        note = args.out / f"{name}-{seed}.seconds"
        if note.exists():
            continue
        clock = time.time()
        with open(args.out / f"{name}-{seed}.log", "a", encoding="utf-8") as log:
            done = subprocess.run(command(name, seed, args), stdout=log, stderr=log,
                                  env={**os.environ, "OMP_NUM_THREADS": str(threads)})
        if done.returncode:
            raise SystemExit(f"{name}-{seed}: exit code {done.returncode}, see {log.name}")
        note.write_text(f"{time.time() - clock:.0f}\n", encoding="utf-8")
        print(f"{name}-{seed}: {time.time() - clock:.0f} s", flush=True)


def cost(name, args):
    """-> minutes of a run, start included, in the fastest seed; tokens drawn in RL, on average."""
    seconds, tokens, start = [], [], RUNS[name][1]
    for seed in args.seeds:
        notes = [args.out / f"{n}-{seed}.seconds" for n in (name, start) if n]
        seconds.append(sum(float(note.read_text()) for note in notes))
        lines = (args.out / f"{name}-{seed}" / "metrics.jsonl").read_text().splitlines()
        rows = [row for row in map(json.loads, lines) if row["kind"] == "train" and "length" in row]
        tokens.append(sum(row["length"] for row in rows) * args.num_prompts * args.group_size)
    return min(seconds) / 60, sum(tokens) / len(tokens)


def main():
    args = parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda seed: run_seed(seed, args), args.seeds))
    sys.path.insert(0, str(ROOT))
    import eval as evaluation

    data = ["--data", args.data or args.train, "--limit", str(args.limit)]
    base = f"tiny:{args.train}" if args.model == "tiny" else args.model
    models = [str(args.out / f"{name}-{seed}") for name in args.names for seed in args.seeds]
    soft = [model for model in models if Path(model).name.split("-")[0] in ("sft", "grpo")]
    rows, length = [], ["--max_completion_length", str(args.max_completion_length)]
    with contextlib.redirect_stdout(sys.stderr):
        for mode, folder, chosen in (("trained", "results", models),
                                     ("soft_thinking", "results-soft", soft)):
            words = [*data, "--mode", mode, "--out", str(args.out / folder)]
            rows += evaluation.main([base, *words, *length])
            rows += evaluation.main([*chosen, *words]) if chosen else []
    for row in rows:
        row["model"] = Path(row["model"]).name
    rows.sort(key=lambda row: row["data"])  # stable: a table for each data set
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (args.out / "rows.jsonl").write_text(text, encoding="utf-8")
    evaluation.main(["--table", str(args.out / "rows.jsonl")])
    print("\n| | minutes, start included, fastest seed | tokens drawn in RL |\n|---|---|---|")
    for name in args.names:
        minutes, tokens = cost(name, args)
        print(f"| {name} | {minutes:.1f} | {tokens / 1e6:.2f} M |")


if __name__ == "__main__":
    main()
