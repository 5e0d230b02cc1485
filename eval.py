"""Evaluate checkpoints and models on one or several data sets.

A checkpoint of ours (a run folder, its step_NNNNNN or the hf/ in it) is decoded by the script that
trained it, with its saved settings; any other model plainly, as `hrpo.py --no-hybrid` would.

Run      python eval.py runs/hrpo-tiny-arithmetic-s0 tiny --data arithmetic
         python eval.py runs/NAME --data gsm8k,svamp --limit 200
         python eval.py runs/NAME --data math500 --num_samples 16 --temperature 0.6    # pass@k
         torchrun --standalone --nproc_per_node=8 eval.py Qwen/Qwen2.5-1.5B-Instruct --data gsm8k

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
import re
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

COLUMNS = ("accuracy", "stderr", "flexible", "n", "latent_steps", "visible_tokens", "total_length",
           "truncated_frac", "unanswered_frac")


def parse_args(argv=None):
    style = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style, allow_abbrev=False)
    parser.add_argument("models", nargs="+", help="run folder, checkpoint, model folder, hub id")
    parser.add_argument("--data", default="arithmetic", help="data sets, by commas (arithmetic)")
    parser.add_argument("--limit", type=int, default=0, help="problems per data set; 0 = all (0)")
    parser.add_argument("--plain", action="store_true", help="switch the method's latent steps off")
    parser.add_argument("--num_samples", type=int, default=1, help="completions per problem (1); "
                        "more than 1 samples instead of argmax and adds pass@k")
    parser.add_argument("--temperature", type=float, help="of sampling, and of HRPO's soft "
                        "token even when greedy (as trained)")
    parser.add_argument("--max_completion_length", type=int, help="tokens (as trained)")
    parser.add_argument("--answer_marker", help="text before the answer (as trained)")
    parser.add_argument("--batch", type=int, help="problems decoded together (as trained)")
    parser.add_argument("--seed", type=int, default=0, help="of sampling (0)")
    parser.add_argument("--device", default="auto", help="cuda, mps, cpu or auto (auto)")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16 or auto (auto)")
    parser.add_argument("--out", default="", help="folder for the JSONL and JSON files")
    args = parser.parse_args(argv)
    if args.num_samples < 1 or args.limit < 0:
        fail("--num_samples must be at least 1, --limit at least 0")
    return args


def find_method(name):
    """Model argument -> (folder or hub id, method, saved settings or None for other models)."""
    path, saved = model_folder(name), checkpoint_settings(name)
    if not saved:
        return name, "hrpo", None
    method = saved["method"]  # one of our scripts, or a fork of one that lies beside this file
    if not method.isidentifier() or not (Path(__file__).parent / f"{method}.py").is_file():
        fail(f"{name}: was trained by {method}.py, which is not beside eval.py")
    return str(path), method, saved


def load_policy(name, args):
    """-> (script module, policy, tokenizer, cfg) for one model argument."""
    source, method, saved = find_method(name)
    script = importlib.import_module(method)
    flags = ["--model", source, "--device", args.device, "--dtype", args.dtype]
    cfg = script.parse_config([*flags, "--preset", saved["preset"] if saved else "auto"])
    given = {"temperature": args.temperature, "answer_marker": args.answer_marker,
             "max_completion_length": args.max_completion_length, "eval_batch": args.batch}
    changes = {key: value for key, value in given.items() if value is not None}
    if saved:
        own = {"model", "preset", "device", "dtype", "out_dir", "lora_rank"}
        names = {f.name for f in dataclasses.fields(cfg)} - own
        changes = {**{key: saved[key] for key in names if key in saved}, **changes}
    if args.plain or not saved:
        changes.update(script.PLAIN)
    changes.update(seed=args.seed, num_samples=args.num_samples, greedy=args.num_samples == 1)
    cfg = dataclasses.replace(cfg, **changes, lora_rank=0)
    device = script.setup_distributed(cfg)[2]
    lm, tokenizer = load_model(cfg.model, getattr(torch, cfg.dtype), device)
    policy = script.Policy(lm, tokenizer, cfg)
    load_method(policy, source, method)
    return script, policy, tokenizer, cfg


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


def result_stem(folder, name, data):
    return folder / re.sub(r"[^\w.-]+", "-", f"{name.strip('/')}.{data}")


def write_results(folder, name, data, row, records):
    """<model>.<data>.jsonl with every completion, .json with the numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = result_stem(folder, name, data)
    with open(f"{stem}.jsonl", "x", encoding="utf-8") as f:
        f.writelines(json.dumps(record) + "\n" for record in records)
    with open(f"{stem}.json", "x", encoding="utf-8") as f:
        json.dump(row, f, indent=1)


def print_table(rows):
    columns = [*COLUMNS, *(key for key in rows[-1] if key.startswith("pass@"))]
    labels = [f"{row['model']} {row['data']} {row['mode']}" for row in rows]
    width = max(map(len, labels))
    print(" " * width, *(f"{name:>15}" for name in columns))
    for label, row in zip(labels, rows):
        cells = (f"{row[c]:15d}" if isinstance(row[c], int) else f"{row[c]:15.3f}" for c in columns)
        print(f"{label:{width}}", *cells)


def main(argv=None):
    """Evaluate, print, write -> list of rows, one per model and data set."""
    args = parse_args(argv)
    sets = {name: load_problems(name, "test", args.limit) for name in args.data.split(",") if name}
    for name, data in itertools.product(args.models, sets) if args.out else []:
        if Path(f"{result_stem(Path(args.out), name, data)}.jsonl").exists():
            fail(f"--out {args.out}: already has results of {name} on {data}; name another folder")
    rows = []
    for name in args.models:
        script, policy, tokenizer, cfg = load_policy(name, args)
        mode = "plain" if dataclasses.replace(cfg, **script.PLAIN) == cfg else script.METHOD
        for data, problems in sets.items():
            encoded = encode_prompts(tokenizer, problems, cfg.answer_marker, cfg.max_prompt_length)
            rng = make_rng(policy.table.weight.device, cfg.seed, "eval", data, dist.get_rank())
            metrics = script.evaluate(policy, tokenizer, encoded, cfg, rng)
            if script.stop_agreed():
                raise SystemExit("stopped")
            records = [{**r, "marker": cfg.answer_marker} for r in metrics.pop("records")]
            metrics = summarise({**metrics, "records": records}, cfg.num_samples)
            row = {"model": name, "data": data, "mode": mode, "num_samples": cfg.num_samples,
                   "temperature": 0.0 if cfg.greedy else cfg.temperature, "seed": cfg.seed,
                   "dtype": cfg.dtype, "torch": torch.__version__, **metrics}
            rows.append(row)
            if dist.get_rank() == 0 and args.out:
                write_results(Path(args.out), name, data, row, records)
    if dist.get_rank() == 0:
        print_table(rows)
    return rows


if __name__ == "__main__":
    main()
    dist.destroy_process_group()
    gc.collect()  # without it gloo's threads can abort the interpreter's exit
