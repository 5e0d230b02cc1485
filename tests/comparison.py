"""Every method and baseline on one task: same base, same demonstrations, equal updates, many seeds.

python tests/comparison.py runs/compare                              # tiny, 5 seeds: two hours
python tests/word_problems.py words mawps.jsonl gsm8k.jsonl          # a pretrained model of 135M:
python tests/comparison.py runs/real --preset real --model SMOLLM2 --train words/train.jsonl \
  --data words/held_out.jsonl,svamp,multiarith,gsm8k --names sft grpo --seeds 0 --minutes 40

Each RL method starts from --sft_steps supervised updates in its own kind of thought (GRPO, HRPO and
LEPO: written chains) and then takes --steps updates on --num_prompts x --group_size completions.
What is complete is skipped and what was stopped goes on, so the same command can be given again.
--names, --seeds and --minutes cut the work into pieces. Real models all start from the run `sft`;
HyRea learns from copied.jsonl beside --train (see word_problems.py).
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
    "all-replaced": ("hyrea", None, "--stage sft --replace all"),
    "hyrea-start": ("hyrea", None, "--stage sft"),
    "hyrea": ("hyrea", "hyrea-start", "--stage rl"),
}
START = "--stage sft --sft_lr 3e-4"
REAL_RUNS = {
    **RUNS,
    "sft": ("hyrea", None, "--stage sft --max_replaced_steps 0 --sft_rounds 1 --sft_lr 2e-4"),
    "latent-sft": ("latent_grpo", "sft", START),
    "soft-grpo": ("latent_grpo", "latent-sft", "--stage rl --preset soft_grpo_paper"),
    "learned-sft": ("latent_grpo", "sft", f"{START} --labels encoder --latent_top_k 10"),
    "learned-grpo": ("latent_grpo", "learned-sft", "--stage rl --latent_top_k 10"),
    "coconut": ("hyrea", "sft", f"{START} --train COPIED --replace block --end_latent sampled"),
    "hyrea-start": ("hyrea", "sft", f"{START} --train COPIED --max_replaced_steps 1"),
    "hyrea": ("hyrea", "hyrea-start", "--stage rl --train COPIED --max_replaced_steps 1"),
}
del REAL_RUNS["all-replaced"]
REAL = [  # flags of all runs of a pretrained model, and of those of a script
    "--instruction= --answer_marker #### --max_prompt_length 200 --dtype bfloat16 --lora_rank 0 "
    "--lr 5e-6 --warmup_steps 3 --kl_coef 0 --weight_decay 0 --max_grad_norm 1 --temperature 1 "
    "--top_k 0 --top_p 1 --micro_batch 16 --eval_every 9999 --eval_limit 16 --eval_batch 32 "
    "--save_every 10",
    "hyrea: --sft_batch 16 --sft_save_every 25", "lepo: --latent_steps 8",
    "latent_grpo: --sft_batch 16 --sft_save_every 25 --cot_steps 0 --minibatches 1 "
    "--max_extra_rollouts 0 --noise_scale 0.5"]


def parse_args():
    parser = argparse.ArgumentParser(usage="comparison.py OUT [--flag ...]", description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--preset", choices=["tiny", "real"], default="tiny")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--train", default="arithmetic-restated:2-4")
    parser.add_argument("--data", default="", help="held-out sets, by commas (test split)")
    parser.add_argument("--max_completion_length", type=int, default=48)
    parser.add_argument("--names", nargs="+", help="some of the runs", choices=REAL_RUNS)
    parser.add_argument("--seeds", nargs="+", type=int, help="tiny: 0 to 4, real: 0 to 2")
    parser.add_argument("--minutes", type=float, help="stop then; the same command goes on")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--steps", type=int, help="of RL; tiny: 120, real: 25")
    parser.add_argument("--sft_steps", type=int, help="tiny: 800, real: 150")
    parser.add_argument("--num_prompts", type=int, default=16)
    parser.add_argument("--group_size", type=int, default=8)
    parser.add_argument("--limit", type=int, help="held-out problems; tiny: 1024, real: 300")
    parser.add_argument("--more", action="append", default=[],
                        help="flags for every run, or for those of a script: --more 'hyrea: --x 1'")
    return complete(parser.parse_args())


def complete(args):
    """Fill in what was not given."""
    is_real = args.preset == "real"
    args.runs = REAL_RUNS if is_real else RUNS
    args.names = args.names or list(args.runs)
    args.seeds = args.seeds or ([0, 1, 2] if is_real else [0, 1, 2, 3, 4])
    args.steps = args.steps or (25 if is_real else 120)
    args.sft_steps = args.sft_steps or (150 if is_real else 800)
    args.limit = args.limit or (300 if is_real else 1024)
    args.more = REAL * is_real + args.more
    return args


def command(name, seed, args):
    """Command line of a run, its stage included; what makes it this run stands last and wins."""
    script, start, flags = args.runs[name]
    model = args.out / f"{start}-{seed}" if start else args.model
    flags = flags.replace("COPIED", str(Path(args.train).with_name("copied.jsonl")))
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
            job = subprocess.Popen(command(name, seed, args), stdout=log, stderr=log,
                                   env={**os.environ, "OMP_NUM_THREADS": str(threads)})
            try:
                code = job.wait(None if args.end is None else max(0, args.end - clock))
            except subprocess.TimeoutExpired:
                job.terminate()  # it saves
                job.wait()
                raise SystemExit(f"{name}-{seed}: stopped, its time is over; the same command "
                                 "goes on") from None
        if code:
            raise SystemExit(f"{name}-{seed}: exit code {code}, see {log.name}")
        note.write_text(f"{time.time() - clock:.0f}\n", encoding="utf-8")
        print(f"{name}-{seed}: {time.time() - clock:.0f} s", flush=True)


def cost(name, args):
    """-> minutes of a run, start included, in the fastest seed; tokens drawn in RL, on average."""
    seconds, tokens, start = [], [], args.runs[name][1]
    for seed in args.seeds:
        notes = [args.out / f"{n}-{seed}.seconds" for n in (name, start) if n]
        seconds.append(sum(float(note.read_text()) for note in notes))
        lines = (args.out / f"{name}-{seed}" / "metrics.jsonl").read_text().splitlines()
        rows = [row for row in map(json.loads, lines) if row["kind"] == "train" and "length" in row]
        tokens.append(sum(row["length"] for row in rows) * args.num_prompts * args.group_size)
    return min(seconds) / 60, sum(tokens) / len(tokens)


def main():
    args = parse_args()
    args.end = args.minutes and time.time() + 60 * args.minutes
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
