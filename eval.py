"""Evaluate checkpoints and models on one or several data sets; draw learning curves of runs.

A checkpoint of ours (a run folder, its step_NNNNNN or the hf/ in it) is decoded by the script that
trained it, with its saved settings; any other model plainly, as `hrpo.py --no-hybrid` would. Every
flag of that script may be given, and then replaces the saved value.

Run      python eval.py runs/hrpo-tiny-arithmetic-s0 tiny --data arithmetic
         python eval.py runs/NAME --data gsm8k,svamp --limit 200 --eval_batch 128
         python eval.py runs/NAME --data math500 --num_samples 16 --temperature 0.6    # pass@k
         python eval.py runs/lepo-0 --latent_steps 4 --num_samples 16 --noise_scale 0.5
         python eval.py runs/hrpo-0 tiny --mode soft_thinking
         torchrun --standalone --nproc_per_node=8 eval.py Qwen/Qwen2.5-1.5B-Instruct --data gsm8k
         python eval.py plot runs/lepo-* runs/grpo-* --out docs/curves.png

Prints one table row per model and data set. --out writes every completion as JSONL, with all that
is needed to grade it again, and the numbers as JSON; files that exist are never overwritten.
"""

import argparse
import dataclasses
import gc
import importlib
import itertools
import json
import math
import os
import re
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from common import (
    answers_equal,
    checkpoint_settings,
    encode_prompts,
    extract_answer,
    fail,
    load_method,
    load_model,
    load_problems,
    make_rng,
    model_folder,
)

# === 1. how a model is decoded ====================================================================

MODES = {  # name: (script that decodes, None = that of the checkpoint; its Config values)
    "trained": (None, {}),
    "explicit": (None, None),  # None: the script's PLAIN, which switches its latent steps off
    # The language model alone, every step a mixture until the answer marker (arXiv 2505.15778), as
    # its released scripts sample; they also set --cold_stop_entropy 0.01 --cold_stop_length 256.
    "soft_thinking": ("lepo", dict(until_marker=True, noise_scale=0.0, temperature=0.6, top_k=10,
                                   top_p=0.95)),
    "floor": ("latent_grpo", dict(floor=True)),  # an empty thought: what is known without one
}
# what is chosen anew for each evaluation
NOT_SAVED = {"model", "preset", "out_dir", "seed", "device", "dtype", "num_samples", "greedy"}
ELSEWHERE = {"model": "name models before the flags", "train": "use --data", "eval_data": "use "
             "--data", "eval_limit": "use --limit", "out_dir": "use --out"}  # not flags here
COLUMNS = ("accuracy", "stderr", "flexible", "n", "latent_steps", "visible_tokens", "total_length",
           "switches", "truncated_frac", "unanswered_frac")


def parse_args(argv):
    """-> own flags, the models before them, and all other flags, which the script will parse."""
    parser = argparse.ArgumentParser(
        usage="eval.py MODEL [MODEL ...] [--flag value ...]", description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False,
        epilog="and every flag of the script that decodes (python lepo.py --help), among them\n"
        "--num_samples N, --no-greedy, --temperature, --top_k, --max_completion_length,\n"
        "--answer_marker, --eval_batch, --seed, --device, --dtype")
    parser.add_argument("--data", default="arithmetic", help="data sets, by commas (arithmetic)")
    parser.add_argument("--limit", type=int, default=0, help="problems per data set; 0 = all (0)")
    parser.add_argument("--mode", default="trained", choices=MODES, help=(
        "trained: as the script that trained the model decodes (default)\n"
        "explicit: with that script's latent steps off\n"
        "soft_thinking: mixtures until the answer marker, with lepo.py\n"
        "floor: the marker is given at once, only the answer is written, with latent_grpo.py"))
    parser.add_argument("--out", default="", help="folder for the JSONL and JSON files")
    flags = itertools.dropwhile(lambda word: not word.startswith("-"), argv)
    args, args.flags = parser.parse_known_args(list(flags))
    models = itertools.takewhile(lambda word: not word.startswith("-"), argv)
    args.models = list(dict.fromkeys(models))
    if not args.models:
        parser.error("name one or more models, before the flags")
    if args.limit < 0:
        parser.error("--limit: must be at least 0")
    return args


def configure(name, args):
    """Model argument -> (script that decodes it, its cfg, mode, {flag of the script: value}).

    A later one of these replaces an earlier: presets, saved settings, the mode, given flags.
    """
    path = model_folder(name)
    saved = checkpoint_settings(path)
    mode = args.mode if saved or args.mode != "trained" else "explicit"
    method, changes = MODES[mode]
    own = saved.get("method", "hrpo")  # one of ours, or a fork that lies beside them
    if not method or changes.keys() <= saved.keys():  # a fork of the mode's script has its fields
        method = own
    if not method.isidentifier() or not (Path(__file__).parent / f"{method}.py").is_file():
        fail(f"{name}: needs {method}.py, which is not beside eval.py")
    script = importlib.import_module(method)
    names = {f.name for f in dataclasses.fields(script.Config)}
    for word in args.flags:
        if word.startswith("--") and re.sub(r"^--(no-)?|=.*$", "", word) not in names:
            fail(f"{word}: is no flag of eval.py, nor of {method}.py, which decodes {name}")
    given = {n for n in names for word in args.flags if re.match(rf"--(no-)?{n}(=|$)", word)}
    for field in sorted(given & ELSEWHERE.keys()):
        fail(f"--{field}: is no flag of eval.py; {ELSEWHERE[field]}")
    if saved and "preset" in given:
        fail(f"--preset: {name} has its own settings; give single flags")
    for field in sorted(given & script.PLAIN.keys() if mode != "trained" else ()):
        fail(f"--{field}: {name} is decoded in mode {mode}, which decides it")
    preset = saved.get("preset", "auto")
    cfg = script.parse_config([  # num_prompts: any that divides by the ranks; it is for training
        "--model", str(path) if saved else name, "--num_prompts", os.environ.get("WORLD_SIZE", "1"),
        "--preset", preset if preset in (*script.PRESETS, "auto") else "paper", *args.flags])
    given = {n: getattr(cfg, n) for n in sorted(given)}
    values = {n: saved[n] for n in names - NOT_SAVED if n in saved}
    values.update({**(script.PLAIN if changes is None else changes), **given, "lora_rank": 0})
    values.setdefault("greedy", cfg.num_samples == 1)
    cfg = dataclasses.replace(cfg, **values)
    if mode == "trained" and dataclasses.replace(cfg, **script.PLAIN) == cfg:
        mode = "explicit"  # it was trained so
    return script, cfg, mode, given


def load_policy(script, cfg):
    """-> policy, tokenizer; what the method added only if this script trained the model."""
    device = script.setup_distributed(cfg)[2]
    lm, tokenizer = load_model(cfg.model, getattr(torch, cfg.dtype), device)
    policy = script.Policy(lm, tokenizer, cfg)
    if checkpoint_settings(cfg.model).get("method") == script.METHOD:
        load_method(policy, cfg.model, script.METHOD)
    return policy, tokenizer


# === 2. numbers and files =========================================================================


def pass_at_k(correct, total, k):
    """Unbiased estimate that one of k samples is right, from `correct` right ones of `total`."""
    return 1 - math.comb(total - correct, k) / math.comb(total, k)


def summarise(metrics, num_samples):
    """Add flexible accuracy, and for several samples pass@1, 2, 4, ... -> flat dict of numbers."""
    records = metrics.pop("records")
    loose = [answers_equal(extract_answer(r["completion"], r["marker"], flexible=True), r["gold"])
             for r in records]
    metrics["flexible"] = sum(loose) / len(loose)
    counts = [sum(r["correct"] for r in records[i : i + num_samples])
              for i in range(0, len(records), num_samples)]
    for k in [2**i for i in range(1, num_samples.bit_length()) if 2**i <= num_samples]:
        metrics[f"pass@{k}"] = sum(pass_at_k(c, num_samples, k) for c in counts) / len(counts)
    return metrics


def settings(given):
    return [f"{name}={value}" for name, value in given.items()]


def result_stem(folder, name, data, mode, given):
    parts = [name.strip("/"), data, mode, *settings(given)]
    return folder / re.sub(r"[^\w.=-]+", "-", ".".join(parts))


def write_results(stem, row, records):
    """<model>.<data>.<mode>.<flags>.jsonl with every completion, .json with the numbers."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{stem}.jsonl", "x", encoding="utf-8") as f:
        f.writelines(json.dumps(record) + "\n" for record in records)
    with open(f"{stem}.json", "x", encoding="utf-8") as f:
        json.dump(row, f, indent=1)


def print_table(rows):
    columns = [*COLUMNS, *(key for key in rows[-1] if key.startswith("pass@"))]
    labels = [" ".join((row["model"], row["data"], row["mode"], *settings(row["given"])))
              for row in rows]
    width = max(map(len, labels))
    print(" " * width, *(f"{name:>15}" for name in columns))
    for label, row in zip(labels, rows):
        cells = (f"{row[c]:15d}" if isinstance(row[c], int) else f"{row[c]:15.3f}" for c in columns)
        print(f"{label:{width}}", *cells)


# === 3. learning curves ===========================================================================

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")  # Okabe-Ito
MARKERS = "os^Dv*X"  # a second way to tell curves apart; the next line style after seven


def parse_plot_args(argv):
    parser = argparse.ArgumentParser(
        usage="eval.py plot RUN [RUN ...] --out FILE.png [--y METRIC]", allow_abbrev=False,
        description="Curves of a metric, one for all seeds of a run; NAME-0, NAME-s1 are seeds of "
        "NAME. Writes the numbers beside the figure, as .json, which RUN may be too. With the "
        ".json files that --out wrote: pass@k.")
    parser.add_argument("runs", nargs="+", help="run folders, or .json files of such a figure")
    parser.add_argument("--y", default="", help="metric of the evaluation or else training rows "
                        "of metrics.jsonl (accuracy, or that of the .json)")
    parser.add_argument("--out", required=True, help="figure to write: .png, .pdf or .svg")
    args = parser.parse_args(argv)
    if Path(args.out).suffix not in (".png", ".pdf", ".svg"):
        parser.error(f"--out {args.out}: must end in .png, .pdf or .svg")
    return args


def read_curve(folder, y):
    """Run folder -> {"run", "label" (run without seed), "seed", "method", "steps", "values"}."""
    path = Path(folder)
    if not (path / "config.json").is_file() or not (path / "metrics.jsonl").is_file():
        fail(f"{folder}: is not a run folder; it lacks config.json or metrics.jsonl")
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    lines = (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    rows = [json.loads(line) for line in lines if line.endswith("\n")]  # a live run: half a line
    kind = "eval" if any(y in row for row in rows if row["kind"] == "eval") else "train"
    points = [(row["step"], float(f"{row[y]:.6g}")) for row in rows
              if row["kind"] == kind and isinstance(row.get(y), int | float)]
    if not points:
        numbers = {k for row in rows for k, v in row.items() if isinstance(v, int | float)}
        fail(f"{folder}: has no {y}; it has {', '.join(sorted(numbers - {'step'}))}")
    name, seed = path.resolve().name, config["seed"]
    return {"run": name, "label": re.sub(rf"-s?{seed}$", "", name), "seed": seed,
            "method": config["method"], "steps": [s for s, _ in points],
            "values": [v for _, v in points]}


def pass_curve(row):
    """Row that --out wrote -> the same for its pass@k, k = 1, 2, 4, ...; label: mode and flags."""
    points = {1: row["accuracy"], **{int(k[5:]): v for k, v in row.items() if k[:5] == "pass@"}}
    given = {k: v for k, v in row["given"].items() if k not in ("num_samples", "eval_batch")}
    label = " ".join([Path(row["model"]).name, *settings(given)])
    return {"run": row["model"], "label": label, "seed": row["seed"], "method": row["script"],
            "steps": list(points), "values": [float(f"{v:.6g}") for v in points.values()]}


def read_curves(sources, y):
    """Run folders, .json files of figures, .json files of --out -> (metric, list of curves)."""
    runs = []
    for source in sorted(sources, key=lambda source: not source.endswith(".json")):
        if source.endswith(".json"):
            try:
                figure = json.loads(Path(source).read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                fail(f"{source}: {error}")
            if "given" in figure:
                figure = {"y": "pass@k", "runs": [pass_curve(figure)]}
            if "runs" not in figure or (y or figure["y"]) != figure["y"]:
                fail(f"{source}: does not hold curves{y and ' of ' + y}")
            y, runs = figure["y"], runs + figure["runs"]
        else:
            y = y or "accuracy"
            runs.append(read_curve(source, y))
    names = [(run["label"], run["seed"]) for run in runs]
    for label, seed in names:
        if names.count((label, seed)) > 1:
            fail(f"{label}, seed {seed}: is there twice; rename one run folder")
    return y, runs


def draw_curves(y, runs, file):
    """Mean over the seeds of each label, at the steps that all of them have; band: min to max."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        fail("plot needs matplotlib: pip install matplotlib")
    figure = Figure(figsize=(6.4, 4.2), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for number, label in enumerate(dict.fromkeys(run["label"] for run in runs)):
        curves = [dict(zip(r["steps"], r["values"])) for r in runs if r["label"] == label]
        steps = sorted(set.intersection(*map(set, curves)))
        if not steps:
            fail(f"{label}: its seeds have no step in common")
        values = [[curve[step] for curve in curves] for step in steps]
        colour, style = COLOURS[number % 7], ("-", "--", ":")[number // 7 % 3]
        seeds = f" ({len(curves)} seed{'s' * (len(curves) > 1)})" if y != "pass@k" else ""
        axes.plot(steps, [sum(v) / len(v) for v in values], style, color=colour, linewidth=1.8,
                  marker=MARKERS[number % 7], markersize=5, markevery=max(1, len(steps) // 12),
                  label=label + seeds)
        if len(curves) > 1:
            axes.fill_between(steps, [*map(min, values)], [*map(max, values)], color=colour,
                              alpha=0.18, linewidth=0)
    axes.set_xlabel("training step" if y != "pass@k" else "k, samples per problem", fontsize=12)
    if y == "pass@k":
        ticks = sorted({step for run in runs for step in run["steps"]})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, ticks)
    axes.set_ylabel(y.replace("_", " "), fontsize=12)
    axes.tick_params(labelsize=11)
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    widest = max(len(run["label"]) for run in runs)
    several = len({run["label"] for run in runs}) < len(runs)
    figure.legend(loc="outside upper center", ncols=max(1, min(3, 70 // (widest + 9))),
                  fontsize=10, frameon=False,
                  title="mean over seeds; band: lowest to highest" if several else None,
                  title_fontsize=9)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)


def plot(argv):
    args = parse_plot_args(argv)
    data = Path(args.out).with_suffix(".json")
    if data.exists() and not data.read_text(encoding="utf-8").startswith('{"y": '):
        fail(f"{data}: exists and does not belong to a figure; give another --out")
    y, runs = read_curves(args.runs, args.y)
    draw_curves(y, runs, Path(args.out))
    lines = ",\n".join(json.dumps(run) for run in runs)  # one run, one line
    data.write_text(f'{{"y": {json.dumps(y)}, "runs": [\n{lines}\n]}}\n', encoding="utf-8")
    print(f"{len(runs)} runs: {args.out}, {data}")


# === 4. main ======================================================================================


def main(argv=None):
    """Evaluate, print, write -> list of rows, one per model and data set."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["plot"]:
        return plot(argv[1:])
    args = parse_args(argv)
    asked = [configure(name, args) for name in args.models]  # wrong flags show before hours of work
    sets = {name: load_problems(name, "test", args.limit) for name in args.data.split(",") if name}
    stems = {(name, data): result_stem(Path(args.out), name, data, mode, given)
             for (name, (_, _, mode, given)), data in itertools.product(
                 zip(args.models, asked), sets)}
    for (name, data), stem in stems.items() if args.out else ():
        if Path(f"{stem}.jsonl").exists():
            fail(f"--out {args.out}: already has results of {name} on {data}; name another folder")
    rows = []
    for name, (script, cfg, mode, given) in zip(args.models, asked):
        policy = tokenizer = None  # frees the model before
        policy, tokenizer = load_policy(script, cfg)
        for data, problems in sets.items():
            encoded = encode_prompts(tokenizer, problems, cfg.answer_marker, cfg.max_prompt_length)
            rng = make_rng(policy.table.weight.device, cfg.seed, "eval", data, dist.get_rank())
            metrics = script.evaluate(policy, tokenizer, encoded, cfg, rng)
            if script.stop_agreed():
                raise SystemExit("stopped")
            records = [{**r, "marker": cfg.answer_marker} for r in metrics.pop("records")]
            metrics = summarise({**metrics, "records": records}, cfg.num_samples)
            row = {"model": name, "data": data, "mode": mode, "script": script.METHOD,
                   "given": given, "num_samples": cfg.num_samples, "greedy": cfg.greedy,
                   "temperature": cfg.temperature, "top_k": cfg.top_k, "top_p": cfg.top_p,
                   "seed": cfg.seed, "dtype": cfg.dtype, "torch": torch.__version__, **metrics}
            rows.append(row)
            if dist.get_rank() == 0 and args.out:
                write_results(stems[name, data], row, records)
    if dist.get_rank() == 0:
        print_table(rows)
    return rows


if __name__ == "__main__":
    main()
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()  # without it gloo's threads can abort the interpreter's exit
