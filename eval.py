"""Evaluate checkpoints and models on one or several data sets; tabulate and draw the numbers.

A checkpoint of ours (a run folder, its step_NNNNNN or the hf/ in it) is decoded by the script that
trained it, with its saved settings; any other model plainly, as `hrpo.py --no-hybrid` would. Every
flag of that script may be given, and then replaces the saved value.

Run      python eval.py runs/lepo-0 tiny --data arithmetic --num_samples 16    # pass@k
         torchrun --standalone --nproc_per_node=8 eval.py runs/NAME --data gsm8k --out results
         python eval.py --table results/*.json    # means over seeds; python eval.py plot --help
         python eval.py show runs/lepo-0 --out thoughts.html    # see every step; show --help
         python eval.py ask runs/lepo-0 "3*7+2="    # one question, or line after line

--out writes every completion, with all that is needed to grade it again, and the numbers. The same
command goes on where it was stopped; results of other weights or settings are never overwritten.
"""

import argparse
import contextlib
import dataclasses
import html
import importlib
import itertools
import json
import math
import os
import re
import signal
import statistics
import string
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from common import (
    answers_equal, autocast, check_writable, checkpoint_settings, checkpoint_step, data_fingerprint,
    encode_prompts, extract_answer, fail, fingerprint, grade, keep_row, load_method, load_model,
    load_problems, lock_file, make_rng, mean, model_folder, run_program, select_rows,
    setup_distributed, step_folders, stop_agreed, summarise, weights_fingerprint)

# === 1. how a model is decoded ====================================================================

MODES = {  # name: (script that decodes, None = that of the checkpoint; its Config values)
    "trained": (None, {}),
    "explicit": (None, None),  # None: the script's PLAIN_GRPO, which switches its latent steps off
    # The language model alone, every step a mixture until the answer marker (arXiv 2505.15778), as
    # its released scripts sample; they also set --cold_stop_entropy 0.01 --cold_stop_length 256.
    "soft_thinking": ("lepo", dict(until_marker=True, noise_scale=0.0, temperature=0.6, top_k=10,
                                   top_p=0.95)),
    "floor": ("latent_grpo", dict(floor=True)),  # an empty thought: what is known without one
    "latent_grpo": ("latent_grpo", dict(latent=True)),  # a model that others trained to think so
}
NOT_SAVED = {"model", "preset", "out_dir", "seed", "device", "dtype", "num_samples", "greedy",
             "num_prompts", "minibatches"}
ELSEWHERE = {"model": "name models before the flags", "train": "use --data", "eval_data": "use "
             "--data", "eval_limit": "use --limit", "out_dir": "use --out"}  # not flags here
COLUMNS = ("flexible", "latent_steps", "visible_tokens", "total_length", "finished_length",
           "switches", "truncated_frac", "unanswered_frac")  # of a table, after accuracy and pass@k


COMMANDS = {  # the first word, "" if it is a model: (what follows it, what the help says)
    "": ("MODEL [MODEL ...]", __doc__),
    "show": ("show MODEL [MODEL ...]", """See what a model thinks, position by position.

Problems are decoded as in an evaluation. Each position has a row: the token; L for a latent step,
M for the answer marker; the entropy (nats); the log-prob, at a latent step the score that training
raises or lowers; the first metric of the method; what a latent step was fed. That is the heaviest
five of a mixture (LEPO, Latent-GRPO), of the soft token (HRPO), or the five tokens nearest to a
hidden state (HyRea). Colours are for terminals only; the variable NO_COLOR turns them off."""),
    "ask": ('ask MODEL ["QUESTION"]', """Ask a model one question, or those of standard input.

Each line of the input is a question. The completion appears as it is decoded, then the answer that
was found in it."""),
}


def best_checkpoint(out_dir):
    """The checkpoint with the best accuracy in metrics.jsonl, the first of equals; or None."""
    path = Path(out_dir, "metrics.jsonl")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    rows = [json.loads(line) for line in lines if keep_row(line, math.inf)]
    accuracy = {row["step"]: row["accuracy"] for row in rows if row["kind"] == "eval"}
    found = [folder for folder in step_folders(out_dir) if checkpoint_step(folder) in accuracy]
    return max(found, key=lambda folder: accuracy[checkpoint_step(folder)], default=None)


def parse_args(argv, command=""):
    """-> own flags, the models before them, and all other flags, which the script will parse."""
    usage, text = COMMANDS[command]
    parser = argparse.ArgumentParser(
        usage=f"eval.py {usage} [--flag value ...]", description=text,
        formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False,
        epilog="and every flag of the script that decodes (lepo.py --help), as --num_samples 8")
    if command == "ask":
        parser.add_argument("--show", action="store_true", help="also print the table of show")
    else:
        parser.add_argument("--data", default="", help="data sets, by commas (first run's own)")
        limit = 4 if command else 0
        parser.add_argument("--limit", type=int, default=limit,
                            help=f"problems per data set; 0 = all ({limit})")
    parser.add_argument("--best", action="store_true",
                        help="of a run: the checkpoint with the best evaluation, not the newest")
    parser.add_argument("--mode", default="trained", choices=MODES, help=(
        "trained: as the script that trained it decodes (default); explicit: its latent steps off\n"
        "soft_thinking: mixtures until the answer marker, with lepo.py\n"
        "floor: the marker is given at once, only the answer is written, with latent_grpo.py\n"
        "latent_grpo: thoughts of mixtures up to the marker, for a model of somebody else"))
    if command == "show":
        parser.add_argument("--question", default="", help="show this one, instead of --data")
        parser.add_argument("--out", default="", help="page to write (.html), or numbers (.json)")
    elif not command:
        parser.add_argument("--out", default="", help="folder for the JSONL and JSON files")
    first = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
    args, args.flags = parser.parse_known_args(argv[first:])
    args.models = list(dict.fromkeys(argv[:first]))
    if not args.models:
        parser.error("name one or more models, before the flags")
    if command == "ask" and len(args.models) > 2:
        parser.error("name one model and one question, in quotation marks")
    if command != "ask" and args.limit < 0:
        parser.error("--limit: must be at least 0")
    if args.best:
        for place, name in enumerate(args.models[:1] if command == "ask" else args.models):
            path = best_checkpoint(name) or fail(f"--best: {name}: no evaluated checkpoint in it")
            args.models[place] = str(path)
    return args


def configure(name, args):
    """Model argument -> (script that decodes it, its cfg, mode, {flag of the script: value}).

    A later one of these replaces an earlier: presets, saved settings, the mode, given flags.
    """
    path = model_folder(name)
    saved = checkpoint_settings(path)
    mode = args.mode
    if mode == "trained" and not saved:
        mode = "explicit"
    script, changes = find_script(name, mode, saved)
    fields = {field.name for field in dataclasses.fields(script.Config)}
    given = check_flags(name, mode, saved, script, fields, args.flags)

    # num_prompts and minibatches are for training; they only have to suit the number of ranks.
    argv = ["--model", str(path) if saved else name]
    argv += ["--num_prompts", os.environ.get("WORLD_SIZE", "1")]
    if "minibatches" in fields:
        argv += ["--minibatches", "1"]
    preset = saved.get("preset", "auto")
    if preset != "auto" and preset not in script.PRESETS:
        preset = "paper"
    cfg = script.parse_config([*argv, "--preset", preset, *args.flags])

    values = {field: saved[field] for field in fields - NOT_SAVED if field in saved}
    values.update(script.PLAIN_GRPO if changes is None else changes)
    given = {field: getattr(cfg, field) for field in sorted(given)}
    values.update(given)
    values["lora_rank"] = 0  # a checkpoint holds merged weights
    values.setdefault("greedy", cfg.num_samples == 1)
    cfg = dataclasses.replace(cfg, **values)
    if mode == "trained" and dataclasses.replace(cfg, **script.PLAIN_GRPO) == cfg:
        mode = "explicit"  # it was trained so
    return script, cfg, mode, given


def find_script(name, mode, saved):
    """-> the module that decodes, and what the mode changes in its Config (None: PLAIN_GRPO).

    A checkpoint of a fork is decoded by the fork, if that lies beside this file and has the fields
    that the mode changes.
    """
    method, changes = MODES[mode]
    own = saved.get("method", "hrpo")
    if not method or changes.keys() <= saved.keys():
        method = own
    is_here = method.isidentifier() and (Path(__file__).parent / f"{method}.py").is_file()
    if not is_here:
        fail(f"{name}: needs {method}.py, which is not beside eval.py")
    return importlib.import_module(method), changes


def check_flags(name, mode, saved, script, fields, flags):
    """Names of the Config fields that the flags set; `fail` on flags that make no sense here."""
    given = set()
    for flag in (word for word in flags if word.startswith("--")):
        field = re.sub(r"^--(no-)?|=.*$", "", flag)
        if field not in fields:
            fail(f"{flag}: is no flag of eval.py, nor of {script.METHOD}.py, which decodes {name}")
        given.add(field)
    for field in sorted(given & ELSEWHERE.keys()):
        fail(f"--{field}: is no flag of eval.py; {ELSEWHERE[field]}")
    if saved and "preset" in given:
        fail(f"--preset: {name} has its own settings; give single flags")
    if mode != "trained":
        for field in sorted(given & script.PLAIN_GRPO.keys()):
            fail(f"--{field}: {name} is decoded in mode {mode}, which decides it")
    return given


def load_policy(script, cfg):
    """-> policy, tokenizer; what the method added only if this script trained the model."""
    device = setup_distributed(cfg)[2]
    torch.manual_seed(cfg.seed)  # what a method adds to a model that it has not trained
    lm, tokenizer = load_model(cfg.model, getattr(torch, cfg.dtype), device)
    policy = script.Policy(lm, tokenizer, cfg)
    if checkpoint_settings(cfg.model).get("method") == script.METHOD:
        load_method(policy, cfg.model, script.METHOD)
    return policy, tokenizer


# === 2. numbers and files =========================================================================


def pass_at_k(correct, total, k):
    """Unbiased estimate that one of k samples is right, from `correct` right ones of `total`."""
    return 1 - math.comb(total - correct, k) / math.comb(total, k)


def numbers(records, num_samples):
    """Metrics of a data set from all its records: summarise, flexible accuracy, pass@k."""
    row = summarise(records, num_samples)
    correct = torch.tensor([record["correct"] for record in records]).view(-1, num_samples)
    counts = correct.sum(1).tolist()  # right samples of each problem
    loose = 0
    for record in records:
        answer = extract_answer(record["completion"], record["marker"], flexible=True)
        loose += answers_equal(answer, record["gold"])
    row["flexible"] = loose / len(records)
    finished = [record for record in records if not record["truncated"]]
    if finished:  # published lengths leave out what is cut off
        row["finished_length"] = mean(finished, "length")
    k = 2
    while k <= num_samples:
        row[f"pass@{k}"] = sum(pass_at_k(count, num_samples, k) for count in counts) / len(counts)
        k *= 2
    return row


def describe(name, data, mode, script, given, policy, problems, cfg):
    """What decides a result: the first line of its part file, the first fields of its .json."""
    header = {
        "model": name, "data": data, "mode": mode, "script": script.METHOD, "given": given,
        "train_seed": checkpoint_settings(cfg.model).get("seed"),
        "model_sha": weights_fingerprint(policy), "n": len(problems),
        "data_sha": data_fingerprint(problems), "torch": torch.__version__,
        "seed": cfg.seed, "ranks_with_noise": 0 if cfg.greedy else dist.get_world_size()}
    for field, value in vars(cfg).items():
        if field not in ("model", "out_dir", "num_prompts"):  # told above; of no effect, both
            header[f"--{field}"] = value
    return header


def open_results(stem, header, places, size):
    """What `stem` holds -> row of a complete set, or records to go on from, or why it cannot.

    places: (index, sample) of every record in the order of decoding, `size` of them a chunk. What
    follows the last complete chunk, say a torn line, is cut off the part file.
    """
    done, part = Path(f"{stem}.json"), Path(f"{stem}.part.jsonl")
    lines = []
    if part.exists():
        lines = re.findall(rb".*\n", part.read_bytes())  # a last line without its end is torn
    if not done.exists() and not lines:
        part.write_text(json.dumps(header) + "\n", encoding="utf-8")
        return []
    file = done if done.exists() else part
    saved = read_rows(done)[0] if done.exists() else json.loads(lines[0])
    for key, value in header.items():
        if saved.get(key) != value:
            return (f"{file}: is another evaluation, {key} {saved.get(key)!r} there and {value!r} "
                    "here; name another --out")
    if done.exists():
        print(f"{done}: complete, not decoded again", flush=True)
        return saved

    records = [json.loads(line) for line in lines[1:]]
    count = 0  # records that stand where they belong
    while count < min(len(records), len(places)):
        record = records[count]
        if (record["index"], record["sample"]) != places[count]:
            break
        count += 1
    if count < len(places):
        count -= count % size
    kept = lines[: 1 + count]
    os.truncate(part, sum(len(line) for line in kept))
    print(f"{part}: goes on after {count} of {len(places)} completions", flush=True)
    return records[:count]


def write_results(stem, row, records):
    """<model>.<data>.<mode>.<flags>.jsonl with every completion; then .json with the numbers."""
    lines = [json.dumps(record) for record in records]
    files = {"jsonl": lines, "json": [json.dumps(row, indent=1)]}
    for end, texts in files.items():
        partial = Path(f"{stem}.{end}.partial")
        partial.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
        partial.replace(f"{stem}.{end}")
    Path(f"{stem}.part.jsonl").unlink(missing_ok=True)


def evaluate(script, policy, tokenizer, problems, cfg, header, stem):
    """Decode a data set in chunks, after what `stem` ("" = no files) holds -> row, None if stopped.

    A chunk is whole batches of all ranks in the order of `script.evaluate`, so the same problems
    are decoded together as in one call; its noise is a function of (seed, data, start, rank).
    """
    order = sorted(range(len(problems)), key=lambda i: len(problems[i]["prompt_ids"]))
    rank, world_size = dist.get_rank(), dist.get_world_size()
    samples = cfg.num_samples
    size = cfg.eval_batch  # problems in a chunk
    if world_size > 1:  # ranks wait for each other after a chunk, which 8 batches make cheap
        size *= 8 * world_size
    held = [[]]
    if stem and rank == 0:
        if not Path(f"{stem}.json").exists():  # locked: two programs would mix their lines
            part = lock_file(f"--out {stem}", Path(f"{stem}.part.jsonl"))
        places = list(itertools.product(order, range(samples)))
        held = [open_results(stem, header, places, size * samples)]
    dist.broadcast_object_list(held)
    records = held[0]
    if isinstance(records, str):
        part = None  # unlocked, whoever keeps the traceback
        fail(records)
    if isinstance(records, dict):
        return records

    for start in range(len(records) // samples, len(order), size):
        chosen = order[start : start + size]
        asked = [problems[i] for i in chosen]
        rng = make_rng(policy.table.weight.device, cfg.seed, "eval", header["data"], start, rank)
        found = script.evaluate(policy, tokenizer, asked, cfg, rng)
        if stop_agreed():
            return None
        chunk = found["records"]
        for record in chunk:
            del record["row"]  # the user has it in a file
            record.update(index=chosen[record["index"]], marker=cfg.answer_marker)
        records += chunk
        if stem and rank == 0:
            part.writelines(json.dumps(record) + "\n" for record in chunk)
            part.flush()
    records.sort(key=lambda record: (record["index"], record["sample"]))
    row = {**header, **numbers(records, samples)}
    if stem and rank == 0:
        write_results(stem, row, records)
    return row


# === 3. tables and figures ========================================================================


def group(row):
    """Row that --out wrote -> (model without the seed at its end, mode and flags), data, seed."""
    seed = row.get("train_seed", r"\d+")  # the 32 of grpo-tau-32 is none
    parts = re.fullmatch(rf"(.+?)-s?({seed})((/step_\d+)?(/hf)?)/*", row["model"])
    words, seed = [row["model"]], "none"
    if parts:
        words, seed = [parts[1] + parts[3]], parts[2]
    if row["mode"] != "trained":
        words.append(row["mode"])
    for key, value in row["given"].items():
        if key != "eval_batch":
            words.append(f"{key}={value}")
    return " ".join(words), row["data"], seed


def print_table(groups):
    """Markdown table of {(model, data): rows that differ in their seed}."""
    passes = {name for rows in groups.values() for name in rows[0] if name.startswith("pass@")}
    passes = sorted(passes, key=lambda name: int(name.removeprefix("pass@")))
    columns = ["accuracy", *passes, *COLUMNS]
    titles = [name.replace("_", " ") for name in columns]
    lines = [["model", "data", "n", "seeds", *titles]]
    for (model, data), rows in groups.items():
        cells = []
        for column in columns:
            known = all(column in row for row in rows)
            cells.append(f"{mean(rows, column):.3f}" if known else "")
        error = rows[0]["stderr"]
        if len(rows) > 1:
            error = statistics.stdev(row["accuracy"] for row in rows)
        cells[0] += f" ± {error:.3f}"
        lines.append([model.replace("|", r"\|"), data, f"{rows[0]['n']}", f"{len(rows)}", *cells])
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    for line in lines:
        padded = [cell.ljust(width) for cell, width in zip(line, widths)]
        print("|", " | ".join(padded), "|")
    print("\naccuracy ± sample std over seeds, or, of one seed, ± standard error over n problems")


def table(files):
    """Print the table of what --out wrote: .json files, or lines of .jsonl; seeds make one row."""
    groups = {}
    if not files:
        fail("--table: name .json files that --out wrote")
    for file in files:
        for row in read_rows(file):
            if not {"model", "data", "mode", "given", "accuracy", "stderr", "n"} <= row.keys():
                fail(f"{file}: is no .json that --out wrote")
            model, data, seed = group(row)
            rows = groups.setdefault((model, data), {})
            if seed in rows or any(row["n"] != other["n"] for other in rows.values()):
                fail(f"{file}: {model} on {data} is there with seed {seed}, or with another n")
            rows[seed] = row
    print_table({key: [*rows.values()] for key, rows in groups.items()})


def read_rows(file):
    """A .json file -> [the object in it]; .jsonl -> [the object of each line]."""
    try:
        text = Path(file).read_bytes()
        lines = text.splitlines() if str(file).endswith(".jsonl") else [text]
        values = [json.loads(line) for line in lines]
    except (OSError, ValueError) as error:
        fail(f"{file}: {error}")
    return [value if isinstance(value, dict) else {} for value in values]


COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000",  # Okabe-Ito
           "#999999", "#6A3D9A", "#8C564B")
MARKERS = "os^Dv*X"  # a second way to tell curves apart; after ten comes the next line style


def read_curve(folder, y, suffix=""):
    """Run folder -> {"run", "label" (run without seed), "seed", "method", "steps", "values"}."""
    path = Path(folder)
    if not (path / "config.json").is_file() or not (path / "metrics.jsonl").is_file():
        fail(f"{folder}: is not a run folder; it lacks config.json or metrics.jsonl")
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    lines = (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines if keep_row(line, math.inf)]  # the whole ones
    evaluations = [row for row in rows if row["kind"] == "eval"]
    kind = "eval" if any(y in row for row in evaluations) else "train"
    points = {}
    for row in rows:
        if row["kind"] == kind and isinstance(row.get(y), int | float):
            points[row["step"]] = float(f"{row[y]:.6g}")
    if not points:
        numeric = {k for row in rows for k, v in row.items() if isinstance(v, int | float)}
        fail(f"{folder}: has no {y}; it has {', '.join(sorted(numeric - {'step'}))}")
    name, seed = path.resolve().name, config["seed"]
    label = re.sub(rf"-s?{seed}$", "", name) + suffix
    return {"run": name, "label": label, "seed": seed, "method": config["method"],
            "steps": [*points], "values": [*points.values()]}


def result_curve(file, row, y, x):
    """Row that --out wrote -> the same: pass@k over k = 1, 2, 4, ... or, with x, a single point."""
    found = {}
    for key, value in row.items():
        if type(value) in (int, float):
            found[key] = float(f"{value:.6g}")
    if x:
        for name in {x, y} - found.keys():
            known = [key for key in sorted(found) if not key.startswith("-")]
            fail(f"{file}: has no {name}; it has {', '.join(known)}")
        points = {found[x]: found[y]}
    else:
        given = {key: value for key, value in row["given"].items() if key != "num_samples"}
        row = {**row, "given": given}
        points = {1: found["accuracy"]}
        for key, value in found.items():
            if key.startswith("pass@"):
                points[int(key.removeprefix("pass@"))] = value
    model, data, seed = group(row)
    name = model.removeprefix(f"{Path(row['model']).parent}/")
    return {"run": row["model"], "label": f"{name}, {data}", "seed": seed, "method": row["script"],
            "steps": [*points], "values": [*points.values()]}


def read_figure(source, y, x):
    """Run folder, .json of a figure or of --out -> {"y", "x", "runs"}; y "" = accuracy."""
    if not source.endswith(".json"):
        names = y.split(",")
        curves = [read_curve(source, name, f" {name}" * (len(names) > 1)) for name in names]
        return {"y": y, "runs": curves}
    figure = read_rows(source)[0]
    if "given" in figure:
        curve = result_curve(source, figure, y, x)
        return {"y": y if x else "pass@k", "x": x, "runs": [curve]}
    return figure


def read_curves(sources, y, x=""):
    """Run folders, .json files of figures or of --out -> (y, curves, x); x "" = steps or k."""
    runs = []
    for source in sorted(sources, key=lambda source: not source.endswith(".json")):
        figure = read_figure(source, y or "accuracy", x)
        if not runs:  # the first one decides what was not asked for
            y = y or figure.get("y", "")
            x = x or figure.get("x", "")
        if "runs" not in figure or (figure["y"], figure.get("x", "")) != (y, x):
            fail(f"{source}: does not hold curves{y and f' of {y}'}{x and f' over {x}'}")
        runs += figure["runs"]
    names = [(run["label"], run["seed"]) for run in runs]
    for label, seed in names:
        if names.count((label, seed)) > 1:
            fail(f"{label}, seed {seed}: is there twice; leave one out, or rename its run folder")
    return y, runs, x


def seed_range(runs, label, x):
    """Curves of a label -> the steps that all its seeds have, and the values of the seeds there.

    With x a seed is one point; all are drawn at the mean of their places.
    """
    curves = [dict(zip(run["steps"], run["values"])) for run in runs if run["label"] == label]
    if x:
        places = [step for curve in curves for step in curve]
        middle = sum(places) / len(places)
        curves = [{middle: value} for curve in curves for value in curve.values()]
    steps = sorted(set.intersection(*map(set, curves)))
    if not steps:
        fail(f"{label}: its seeds have no step in common")
    return steps, [[curve[step] for curve in curves] for step in steps]


def name_curves(labels):
    """Labels -> the names that a figure shows: "model, data", without data if all have the same."""
    pairs = [label.rpartition(", ") for label in labels]
    alike = len({data for _, _, data in pairs}) == 1
    return [model for model, _, _ in pairs] if alike and pairs[0][0] else labels


def name_coinciding(axes, ends, are_points):
    """Write the names beside last points (x, y, name) that lie on top of each other."""
    places = []
    for x, y, name in ends:
        place = axes.transAxes.inverted().transform(axes.transData.transform((x, y)))
        places.append((place, name))
    named = set()
    for place, name in places:
        near = [other for at, other in places if abs(at - place).max() < 0.02]
        if len(near) == 1 or named & set(near):
            continue
        named |= set(near)
        text = ", ".join(near)
        if len(text) > 24 and not are_points:
            text = "\n".join(near)
        on_left = are_points and place[0] > 0.5  # a curve ends at the right: beside the axes
        axes.annotate(
            text, place, xycoords="axes fraction", fontsize=9, textcoords="offset points",
            xytext=(-7 if on_left else 7, 0), va="center", ha="right" if on_left else "left")


def draw_curves(y, runs, file, x=""):
    """Mean over the seeds of each label, at the steps all have (x: at its mean); band: min-max."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        fail("plot needs matplotlib: pip install matplotlib")
    labels = list(dict.fromkeys(run["label"] for run in runs))
    names = name_curves(labels)
    widest = max(len(name) for name in names)
    columns = max(1, min(3, 70 // (widest + 9)))
    many = len(labels) > 3 * columns  # their legend stands beside the axes, which keep their size
    width = 7 + 0.085 * widest if many else 6.4
    figure = Figure(figsize=(width, 4.2), dpi=150, layout="constrained")
    axes = figure.add_subplot(axisbelow=True)
    ends = []  # (x, y, name) of the last point of each curve
    for number, label in enumerate(labels):
        steps, values = seed_range(runs, label, x)
        colour = COLOURS[number % len(COLOURS)]
        style = "none" if x else ("-", "--", ":")[number // len(COLOURS) % 3]
        marker = MARKERS[(number + number // len(MARKERS)) % len(MARKERS)]
        seeds = len(values[0])
        text = names[number]
        if y != "pass@k" or seeds > 1:
            text += f" ({seeds} seed{'s' * (seeds > 1)})"
        middles = [sum(at_step) / seeds for at_step in values]
        axes.plot(steps, middles, linestyle=style, color=colour, lw=1.8, ms=5, marker=marker,
                  label=text, markevery=max(1, len(steps) // 12))
        ends.append((steps[-1], middles[-1], names[number]))
        if seeds > 1:
            lows = [min(at_step) for at_step in values]
            highs = [max(at_step) for at_step in values]
            axes.fill_between(steps, lows, highs, color=colour,  # of no width, with x: its edge
                              alpha=0.5 if x else 0.18, linewidth=2 if x else 0)

    steps = "training step" if y != "pass@k" else "k, samples per problem"
    axes.set_xlabel(x.replace("_", " ") or steps, fontsize=12)
    axes.set_ylabel(y.replace("_", " ").replace(",", ", "), fontsize=12)
    if y == "pass@k" and not x:
        ticks = sorted({step for run in runs for step in run["steps"]})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, ticks)
    elif not x:
        axes.xaxis.get_major_locator().set_params(integer=True)  # there is no step 0.5
    name_coinciding(axes, ends, are_points=bool(x))
    axes.tick_params(labelsize=11)
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    title = None
    if len(labels) < len(runs):
        title = f"mean over seeds; {'bar' if x else 'band'}: lowest to highest"
    figure.legend(loc="outside right upper" if many else "outside upper center", fontsize=10,
                  frameon=False, title=title, title_fontsize=9, ncols=1 if many else columns)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)


def plot(argv):
    parser = argparse.ArgumentParser(
        usage="eval.py plot RUN [RUN ...] --out FILE.png [--y METRIC] [--x METRIC]",
        allow_abbrev=False, description="Curves of a metric over steps, one for all seeds of a run "
        "(NAME-0, NAME-s1), or of pass@k; with --x: points. Writes the numbers too, as .json.")
    parser.add_argument("runs", nargs="+", help="run folders, or .json files of --out or a figure")
    parser.add_argument("--y", default="", help="metrics, by commas (accuracy, or the .json's)")
    parser.add_argument("--x", default="", help="with files of --out: another metric, for points")
    parser.add_argument("--out", required=True, help="figure to write: .png, .pdf or .svg")
    args = parser.parse_args(argv)
    file, data = Path(args.out), Path(args.out).with_suffix(".json")
    if file.suffix not in (".png", ".pdf", ".svg"):
        fail(f"--out {file}: must end in .png, .pdf or .svg")
    if data.exists() and not data.read_text(encoding="utf-8").startswith('{"y": '):
        fail(f"{data}: exists and does not belong to a figure; give another --out")
    y, runs, x = read_curves(args.runs, args.y, args.x)
    draw_curves(y, runs, file, x)
    values = {"y": y, "x": x, "runs": runs}
    if not x:
        del values["x"]
    text = json.dumps(values).replace('{"run": ', '\n{"run": ')  # a line for each run
    data.write_text(text + "\n", encoding="utf-8")
    print(f"{len(runs)} runs: {args.out}, {data}")


# === 4. thoughts ==================================================================================

NUM_SHOWN = 5  # tokens of a mixture


def load_alone(script, cfg):
    """As load_policy, in a single process, which a stop signal simply ends: it loses nothing."""
    policy, tokenizer = load_policy(script, cfg)
    if dist.get_world_size() > 1:
        fail("show and ask run in one process: start them without torchrun")
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_DFL)
    return policy, tokenizer


def decode_thoughts(script, policy, tokenizer, problems, cfg, rng):
    """Decode problems -> their records (grade), with "positions": a dict for each position.

    The numbers come from a replay of the completions, one by one, as an update would score them.
    """
    cfg = dataclasses.replace(cfg, kl_coef=0.0)  # there is no reference
    found = []
    for start in range(0, len(problems), cfg.eval_batch):
        chosen = problems[start : start + cfg.eval_batch]
        prompts = [problem["prompt_ids"] for problem in chosen]
        batch = script.rollout(policy, prompts, cfg, rng, cfg.num_samples, cfg.greedy)
        records = grade(batch, chosen, tokenizer, cfg.answer_marker)
        for row, record in enumerate(records):
            del record["row"]
            single = select_rows(batch, [row])
            record["index"] = start + row // cfg.num_samples
            record["sample"] = row % cfg.num_samples
            with torch.no_grad(), autocast(policy.lm):  # as the rollout computed
                record["positions"] = read_positions(script, policy, tokenizer, single, cfg)
            mark_answer(record, cfg.answer_marker)
        found += records
    return found


def read_positions(script, policy, tokenizer, batch, cfg):
    """Batch of one completion -> for each position {"token", "latent", "fed", "numbers"}.

    fed: (token, weight) of what a latent step was fed, the heaviest first; empty in a fork that has
    no describe. numbers: log-prob, and what the script measures at such a position.
    """
    outputs = policy(batch)
    values = {"log-prob": (outputs["logprobs"], batch["loss_mask"])}
    values.update(script.measure(policy, outputs, batch, cfg))
    latent = batch["latent_mask"][0].tolist()
    weights = None
    if hasattr(script, "describe") and any(latent):
        ids, weights = script.describe(policy, outputs, batch, cfg)
        spread = -torch.xlogy(weights, weights).sum(-1)  # its entropy [1, T]
        weights, places = weights.topk(min(NUM_SHOWN, weights.shape[-1]), -1)
        ids = places if ids is None else ids.gather(-1, places)
    positions = []
    for t, token in enumerate(batch["completion_ids"][0].tolist()):
        numbers = {}
        for name, (value, mask) in values.items():
            if mask[0, t]:
                numbers[name] = round(value[0, t].item(), 4)
        fed = []
        if latent[t] and weights is not None:
            numbers.setdefault("entropy", round(spread[0, t].item(), 4))  # of what has no score
            for i, weight in zip(ids[0, t].tolist(), weights[0, t].tolist()):
                if weight > 0:
                    fed.append((tokenizer.decode([i]), round(weight, 4)))
        positions.append({
            "token": tokenizer.decode([token]), "latent": latent[t], "fed": fed,
            "numbers": numbers})
    return positions


def mark_answer(record, marker):
    """Add "marker" to the positions: does the token hold a part of the last answer marker?"""
    text = "".join(position["token"] for position in record["positions"])
    first = text.rfind(marker)
    last = first + len(marker) if first >= 0 else first
    end = 0
    for position in record["positions"]:
        start = end
        end += len(position["token"])
        position["marker"] = start < last and end > first


def printable(text):
    """Text in one line, for a terminal or a page; what could steer either is written out."""
    text = text.replace("\n", "↵")
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def token_text(token):
    """As printable; spaces alone are made visible."""
    return printable(token) if token.strip(" ") else "␣" * len(token)


def verdict(record):
    """What came of a completion, in a line."""
    answer = record["extracted"]
    words = "no answer" if answer is None else f"answer {printable(answer)[:40]}"
    if record["gold"]:
        golds = [record["gold"]] if isinstance(record["gold"], str) else record["gold"]
        right = "right" if record["correct"] else "wrong"
        words = f"{right}: {words}, gold {printable(' or '.join(golds))}"
    return f"{words}; {record['latent_steps']} of {record['length']} steps are latent"


def paint(text, colour):
    """Text in an ANSI colour, on a terminal only (https://no-color.org)."""
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        return text
    return f"\033[{colour}m{text}\033[0m"


LATENT, MARKER, RIGHT, WRONG = "36", "1;35", "32", "31"  # ANSI colours


def print_thought(record, script):
    """The table of a completion: a line for each position, at most 80 columns wide."""
    metric = next(iter(script.METHOD_METRICS), "")  # a fork may have none
    colour = RIGHT if record["correct"] else WRONG
    print(paint(verdict(record), colour if record["gold"] else "0"))
    print(f"{'':4}  {'token':8} {'entropy':>7} {'logprob':>7} {metric:>12}  fed")
    for t, position in enumerate(record["positions"]):
        cells = []
        for name, width in (("entropy", 7), ("log-prob", 7), (metric, 12)):
            value = position["numbers"].get(name)
            cells.append(" " * width if value is None else f"{round(value, 2) + 0.0:{width}.2f}")
        fed = []
        for token, weight in position["fed"]:
            pair = f"{token_text(token)[:8]} {weight:.2f}".replace(" 0.", " .")
            if weight >= 0.005 and len("  ".join([*fed, pair])) <= 34:
                fed.append(pair)
        sign = " "
        if position["latent"]:
            sign = "L"
        elif position["marker"]:
            sign = "M"
        token = token_text(position["token"])[:8]
        line = f"{t:4}{sign} {token:8} {' '.join(cells)}  {'  '.join(fed)}".rstrip()
        print(paint(line, {"L": LATENT, "M": MARKER, " ": "0"}[sign]))


def print_means(name, records):
    """One line: how many of all positions are latent, and the means of what the table shows."""
    positions = [position for record in records for position in record["positions"]]
    latents = [position for position in positions if position["latent"]]
    words = [f"{len(latents)} of {len(positions)} positions are latent"]
    graded = [record["correct"] for record in records if record["gold"]]
    if graded:
        words.insert(0, f"{sum(graded)} of {len(graded)} are right")
    values = {}
    for position in positions:
        kind = "latent" if position["latent"] else "token"
        for key, value in position["numbers"].items():
            values.setdefault(f"{kind} {key}", []).append(value)
        for place, (_, weight) in enumerate(position["fed"], 1):
            values.setdefault(f"weight {place}", []).append(weight)
    for key, found in values.items():
        count = len(latents) if "weight" in key else len(found)  # weights that are 0 are left out
        words.append(f"{key} {sum(found) / count:.3f}")
    print(f"means of {printable(name)}: {', '.join(words)}")


MADE_BY = "made by eval.py show"
PAGE = string.Template("""<!doctype html>
<html lang="en">
<!-- made by eval.py show -->
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>Thoughts</title>
<style>
:root { --paper: #fff; --ink: #1f2328; --grey: #59636e; --line: #c8d1da; --hot: 230, 120, 0;
  --latent: #0969da; --marker: #a626a4; --right: #1a7f37; --wrong: #c6252d;
  --bar: #8cc2f5; --bar2: #b9dafa; --bar3: #deeefd; color-scheme: light dark }
@media screen and (prefers-color-scheme: dark) {
  :root { --paper: #0d1117; --ink: #e6edf3; --grey: #9aa4af; --line: #48515b; --hot: 235, 130, 20;
    --latent: #58a6ff; --marker: #d68fe0; --right: #4cc163; --wrong: #ff7b72;
    --bar: #1f5f9e; --bar2: #1f4a78; --bar3: #1c3654 } }
* { box-sizing: border-box; -webkit-print-color-adjust: exact; print-color-adjust: exact }
body { margin: 0 auto; max-width: 76em; padding: 1em 1em 15em; background: var(--paper);
  color: var(--ink); font: 15px/1.45 system-ui, sans-serif }
h1 { font-size: 1.4em; margin: 0 0 .3em }
h2 { font-size: 1em; margin: 1.6em 0 0; padding-top: .8em; border-top: 1px solid var(--line);
  white-space: pre-wrap; overflow-wrap: anywhere }
p { margin: .7em 0 .25em; color: var(--grey); overflow-wrap: anywhere }
.right { color: var(--right) }
.wrong { color: var(--wrong) }
.row { display: flex; flex-wrap: wrap; gap: 3px }
.box { display: flex; flex-direction: column; justify-content: center; min-width: 2.3em;
  min-height: 2em; border: 1px solid var(--line); border-radius: 4px; overflow: hidden;
  background: rgba(var(--hot), var(--e)); cursor: default }
.token { font: 14px/1.7 ui-monospace, monospace; text-align: center; padding: 0 .3em;
  max-width: 11em; overflow: hidden; text-overflow: ellipsis; white-space: pre }
.latent { border: 2px solid var(--latent) }
.latent .token { border-top: 1px solid var(--latent) }
.marker { border: 2px dashed var(--marker) }
.box:hover, .box:focus { outline: 3px solid var(--ink); outline-offset: -1px }
.bars { display: flex; flex-direction: column-reverse; height: 4.4em; min-width: 2em;
  background: var(--paper) }
.bars b { display: grid; place-content: center; overflow: hidden; background: var(--bar3);
  font: 11px/1.1 ui-monospace, monospace; white-space: pre; max-width: 13em;
  box-shadow: inset 0 1px var(--paper) }
.bars b:nth-child(1) { background: var(--bar) }
.bars b:nth-child(2) { background: var(--bar2) }
.card { display: none; position: fixed; inset: auto 0 0 0; margin: auto; max-width: 46em;
  max-height: 14em; overflow: auto; padding: .6em 1em; background: var(--paper);
  border: 2px solid var(--line); border-bottom: 0; border-radius: 8px 8px 0 0;
  font-size: 14px; z-index: 1 }
.box:focus .card { display: block }
.box:hover .card { display: block; z-index: 2 }
.card table { display: inline-table; vertical-align: top; margin: .3em 2em 0 0;
  border-spacing: 0; font-variant-numeric: tabular-nums }
.card td { padding: 0 1em 0 0; overflow-wrap: anywhere; white-space: pre-wrap }
.card td + td { text-align: right; padding: 0 }
.key .box { min-width: 3em; text-align: center }
@media print { body { padding-bottom: 0 } .card, .hint { display: none !important }
  .row, .box { break-inside: avoid } }
</style>
</head>
<body>
<h1>Thoughts</h1>
<div class="row key"><div class="box" style="--e:0">0</div>
<div class="box" style="--e:.28">0.5</div><div class="box" style="--e:.44">1</div>
<div class="box" style="--e:.61">2</div>
<div class="box latent" style="--e:0"><div class="token">latent step</div></div>
<div class="box marker" style="--e:0"><div class="token">answer marker</div></div></div>
<p>The shade of a box is the entropy of its step, in nats. Bars are the weights of what a latent
step was fed. <span class="hint">Point at a box, or reach it with the Tab key, for its numbers.
</span></p>
$body
</body>
</html>
""")


def write_page(shown):
    """{model: records with positions} -> HTML without scripts that loads nothing."""
    problems = {}  # {(data, question): its completions}
    for name, records in shown.items():
        for record in records:
            key = (record["data"], record["question"])
            problems.setdefault(key, []).append((name, record))
    parts = []
    for (data, question), completions in problems.items():
        parts.append(f"<h2>{as_html(question)} <small>{as_html(data)}</small></h2>")
        for name, record in completions:
            kind = "right" if record["correct"] else "wrong"
            if not record["gold"]:
                kind = "open"
            parts.append(
                f'<p>{as_html(name)}, sample {record["sample"]}: '
                f'<span class="{kind}">{as_html(verdict(record))}</span></p>')
            parts.append('<div class="row">')
            parts += [write_box(t, position) for t, position in enumerate(record["positions"])]
            parts.append("</div>")
    return PAGE.substitute(body="\n".join(parts))


def as_html(text):
    """Any text, also a hostile one, as the content of an HTML element."""
    return html.escape(printable(text))


def shade(entropy):
    """Entropy in nats -> opacity of a box, which leaves its text legible."""
    return round(0.7 * (1 - math.exp(-entropy)), 2)


def write_box(t, position):
    """Position t of a completion as HTML: bars of what was fed, token, card with the numbers."""
    token = as_html(token_text(position["token"]))
    kinds = [kind for kind in ("latent", "marker") if position[kind]]
    bars, fed = [], []
    for piece, weight in position["fed"]:
        piece = as_html(token_text(piece))
        name = piece if weight > 0.17 else ""
        if weight >= 0.02:
            bars.append(f'<b style="height:{100 * weight:.0f}%">{name}</b>')
        fed.append(f"<tr><td>{piece}</td><td>{weight:.3f}</td></tr>")
    numbers = []
    for name, value in position["numbers"].items():
        numbers.append(f"<tr><td>{name.replace('_', ' ')}</td><td>{value:.3f}</td></tr>")
    title = ", ".join([f"step {t}", *kinds])
    above = f'<div class="bars">{"".join(bars)}</div>' if bars else ""
    return (
        f'<div class="{" ".join(["box", *kinds])}" tabindex="0" '
        f'style="--e:{shade(position["numbers"].get("entropy", 0))}">{above}'
        f'<div class="token">{token}</div><div class="card">{title}: <b>{token}</b><br>'
        f'<table>{"".join(numbers)}</table><table>{"".join(fed)}</table></div></div>')


def show(argv):
    """eval.py show: print, and write with --out, what models think -> {model: records}."""
    args = parse_args(argv, "show")
    file = Path(args.out)
    if args.out:
        if file.suffix not in (".html", ".json"):
            fail(f"--out {file}: must end in .html or .json")
        check_writable(f"--out {file}", file.parent)
    if file.is_file() and MADE_BY not in file.read_text(encoding="utf-8", errors="replace"):
        fail(f"--out {file}: exists and was not made by eval.py show; name another one")
    if args.question and args.data:
        fail("--question: give either it or --data")
    asked = [configure(name, args) for name in args.models]
    sets = {"": [{"question": args.question, "answer": ""}]}
    if not args.question:
        sets = load_sets(args)

    shown = {}
    for name, (script, cfg, mode, _) in zip(args.models, asked):
        policy = tokenizer = None  # frees the model before
        policy, tokenizer = load_alone(script, cfg)
        shown[name] = []
        for data, problems in sets.items():
            encoded = encode_prompts(tokenizer, problems, cfg)
            rng = make_rng(policy.lm.device, cfg.seed, "show", data)
            records = decode_thoughts(script, policy, tokenizer, encoded, cfg, rng)
            for record in records:
                record["data"] = data
                where = f"{name} ({mode})  problem {record['index']}  sample {record['sample']}"
                print(f"\n{paint(printable(where), '1')}\n{printable(record['question'])}")
                print_thought(record, script)
            shown[name] += records
        print()
        print_means(name, shown[name])
    if args.out:
        text = json.dumps({"made_by": MADE_BY, **shown})
        if file.suffix == ".html":
            text = write_page(shown)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        print(file)
    return shown


def ask(argv):
    """eval.py ask: the completion of a question, then its answer; or of each line of the input."""
    args = parse_args(argv, "ask")
    name, *questions = args.models
    script, cfg, _, _ = configure(name, args)
    if cfg.num_samples > 1:
        fail(f"--num_samples {cfg.num_samples}: ask decodes one completion; use show")
    policy, tokenizer = load_alone(script, cfg)
    if questions:
        return answer(script, policy, tokenizer, questions[0], cfg, args.show)
    for line in read_lines():
        with contextlib.suppress(SystemExit):  # a question that cannot be encoded; the next may be
            answer(script, policy, tokenizer, line, cfg, args.show)


def read_lines():
    """The lines of standard input that are not empty; a terminal shows a prompt for each."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if line.strip():
            yield line


def answer(script, policy, tokenizer, question, cfg, with_table):
    """Decode a question; print the completion token by token, then the answer -> the record."""
    problems = encode_prompts(tokenizer, [{"question": question, "answer": ""}], cfg)
    rng = make_rng(policy.lm.device, cfg.seed, "ask", question)
    step = script.next_input
    script.next_input = printing(step, tokenizer)
    try:
        record, = decode_thoughts(script, policy, tokenizer, problems, cfg, rng)
    finally:
        script.next_input = step
    print()
    if with_table:
        print_thought(record, script)
    else:
        print(verdict(record))
    return record


def printing(next_input, tokenizer):
    """A script's next_input that also prints what the text grows by."""
    ids = []
    texts = [""]

    def step(*args):
        found = next_input(*args)
        ids.append(found[0].item())
        text = tokenizer.decode(ids, skip_special_tokens=True)
        if not text.endswith("\ufffd"):  # a character of several tokens, which is not complete
            lines = text[len(texts[-1]) :].split("\n")
            print("\n".join(map(printable, lines)), end="", flush=True)
            texts.append(text)
        return found

    return step


# === 5. main ======================================================================================


def load_sets(args):
    """{name: problems} of --data, or of what the first checkpoint was trained on."""
    names = args.data.split(",")
    if not args.data:
        saved = [checkpoint_settings(model_folder(name)) for name in args.models]
        own = [settings.get("eval_data") or settings["train"] for settings in saved if settings]
        names = own[:1] or ["arithmetic"]
    return {name: load_problems(name, "test", args.limit) for name in names if name}


def main(argv=None):
    """Evaluate, print, write -> list of rows, one per model and data set."""
    argv = sys.argv[1:] if argv is None else argv
    others = {"plot": plot, "--table": table, "show": show, "ask": ask}
    if argv and argv[0] in others:
        return others[argv[0]](argv[1:])
    args = parse_args(argv)
    if args.out:
        check_writable(f"--out {args.out}", Path(args.out))
    asked = [configure(name, args) for name in args.models]  # wrong flags show before hours of work
    sets = load_sets(args)

    rows = []
    for name, (script, cfg, mode, given) in zip(args.models, asked):
        policy = tokenizer = None  # frees the model before
        policy, tokenizer = load_policy(script, cfg)
        for data, problems in sets.items():
            encoded = encode_prompts(tokenizer, problems, cfg)
            header = describe(name, data, mode, script, given, policy, encoded, cfg)
            stem = ""
            if args.out:
                parts = [name.strip("/"), data, mode, *(f"{k}={v}" for k, v in given.items())]
                words = re.sub(r"[^\w.=-]+", "-", ".".join(parts))
                if len(words.encode()) > 200:  # file names end at 255 bytes, endings included
                    words = f"{words[:60]}.{fingerprint(words)}"
                stem = Path(args.out, words)
            rows.append(evaluate(script, policy, tokenizer, encoded, cfg, header, stem))
            if stop_agreed():
                how = "; the same command goes on from there" if args.out else ""
                raise SystemExit(1 if dist.get_rank() else f"stopped at {name} on {data}{how}")
    if dist.get_rank() == 0:
        groups = {}
        for row in rows:  # one model each, so a seed in its name stays
            model, data, _ = group({**row, "train_seed": None})
            groups[model, data] = [row]
        print_table(groups)
    return rows


if __name__ == "__main__":
    if sys.argv[1:2] in (["show"], ["ask"]):  # `| head` ends them quietly
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    run_program(main)
