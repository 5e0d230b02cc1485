"""One prepared run that finds out on a GPU, within minutes, what no other test can.

python tests/gpu_run.py --out FOLDER --model PACK --data PACK    # PACK: made by tests/gpu_pack.py
python tests/gpu_run.py --out FOLDER --small                     # the same on a CPU, two minutes
python tests/gpu_run.py --report docs > docs/gpu.md              # tables of docs/gpu.jsonl

right   replay, resume, determinism, NaN, memory and eval.py on the GPU    tests/gpu_right.py
decode  tokens a second of rollouts against `generate`                     tests/gpu_speed.py
update  tokens a second, share of the peak, memory of updates              tests/gpu_speed.py
real    SFT, then GRPO, HRPO and LEPO on a pretrained model                tests/gpu_real.py

Each part is a process of its own with a time limit. It appends a line to FOLDER/gpu.jsonl as soon
as a fact is known, so a run that is cut off keeps what it has. A crash, or a limit that is over, is
a line too, and the next part starts. FOLDER/PART.log holds all that a part prints.
"""

import argparse
import datetime
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

LIMITS = {"right": 90, "decode": 90, "update": 60, "real": 240}  # seconds of a run of 8 minutes
MODULES = {"right": "gpu_right", "decode": "gpu_speed", "update": "gpu_speed", "real": "gpu_real"}
PARTS = ["machine", *LIMITS]
NOTHING = """Nothing yet: no GPU was at hand. These commands find out, in 8 minutes on one GPU,
whether everything is right there, how fast rollouts and updates are, and what a pretrained model
learns:

```bash
python tests/convert_smollm2.py SMOLLM2
python tests/gpu_pack.py PACK --model SMOLLM2 --train a.jsonl.gz --test svamp.jsonl.gz
python tests/gpu_run.py --out FOLDER --model PACK --data PACK
cp FOLDER/gpu.jsonl docs
python tests/gpu_run.py --report docs
```

The last one prints this page. PACK holds the model in 3.4 bits a weight, 59 MiB with some data, so
that it can be carried to a machine without a network. What the rounding costs: the pack of
SmolLM2-135M-Instruct predicts 60 written solutions of GSM8K with 1.533 nats a token instead of
1.410, and .618 instead of .642 of their tokens:

```bash
python tests/gpu_pack.py PACK --model SMOLLM2 --compare 60
```

PyTorch 2.13 with transformers 5.17 was tried too, as a bare machine may have it: rollouts and
updates agree there as they do with newer versions.
"""


class Facts:
    """Lines of a gpu.jsonl; each is on the disk before `tell` returns."""

    def __init__(self, path, part):
        self.path, self.part = path, part

    def tell(self, table, **values):
        """Append a fact. A report shows the facts of a part with the same `table` as one table."""
        line = json.dumps({"part": self.part, "table": table, **values})
        with open(self.path, "a", encoding="utf-8") as f:
            f.write(line + "\n")
            f.flush()
            os.fsync(f.fileno())
        print(line, flush=True)

    def failed(self, where, error):
        """Append that something broke, with the first line of the reason."""
        reason = (str(error).strip() or type(error).__name__).split("\n")[0]
        self.tell("failures", where=where, error=reason[:300])

    def attempt(self, where, function, *args):
        """Call the function -> its result, or None after an error, which becomes a fact."""
        try:
            return function(*args)
        except Exception as error:  # whatever it is, the checks after it still run
            traceback.print_exc()
            self.failed(where, error)


def find_commit():
    """The commit of this repository, with a sign that files differ from it; "" without git."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        return ""


def machine(device, commit):
    """What a reader must know about the machine, the software and the code."""
    import torch
    import transformers

    found = {"device": platform.machine(), "commit": commit}
    if device == "cuda":
        found["device"] = torch.cuda.get_device_name()
        found["gib"] = round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1)
    return {**found, "date": datetime.date.today().isoformat(), "cuda": torch.version.cuda,
            "python": platform.python_version(), "torch": torch.__version__,
            "transformers": transformers.__version__, "cores": os.cpu_count()}


# === parts as processes ===========================================================================


def run_part(part, command, limit, out):
    """Run a part's command with a limit in seconds; say in one line how it ended."""
    facts, start = Facts(out / "gpu.jsonl", part), time.time()
    with open(out / f"{part}.log", "w", encoding="utf-8") as log:
        # a session of its own, so that the programs which the part starts end with it
        job = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT, start_new_session=True)
        try:
            code = job.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
    try:
        os.killpg(job.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # nothing is left of it
    job.wait()
    lines = (out / f"{part}.log").read_text(encoding="utf-8", errors="replace").splitlines()
    if code is None:
        facts.failed(part, f"stopped at its limit of {limit:.0f} s")
    elif code != 0:
        last = [line for line in lines if line.strip()][-1:]
        facts.failed(part, f"ended with code {code} {' '.join(last)}")
    facts.tell("end", seconds=round(time.time() - start, 1), code=code)


def command(part, limit, args):
    """How to start the process of a part."""
    options = ["--part", part, "--seconds", str(limit), "--out", args.out, "--data", args.data,
               "--model", args.model, "--commit", args.commit, *["--small"] * args.small]
    return [sys.executable, __file__, *options]


def run_parts(args):
    """Run the parts one after the other; the last one has all the time that is left."""
    out, end = Path(args.out), time.time() + 60 * args.minutes
    out.mkdir(parents=True, exist_ok=True)
    for part in args.only:
        left = end - time.time()
        limit = left if part == args.only[-1] else min(left, LIMITS[part] * args.minutes / 8)
        run_part(part, command(part, limit, args), max(0, limit), out)


def be_part(args):
    """In the process of a part: compute its facts."""
    import torch

    device = "cuda" if torch.cuda.is_available() and not args.small else "cpu"
    facts = Facts(Path(args.out, "gpu.jsonl"), args.part)
    if device == "cpu" and not args.small:
        raise SystemExit("there is no GPU; --small runs on a CPU")
    Facts(facts.path, "machine").tell("machine", **machine(device, args.commit))
    module = import_module(MODULES[args.part])
    with tempfile.TemporaryDirectory() as place:  # run folders, models: too large to bring home
        deadline = time.time() + float(args.seconds) - 5
        getattr(module, args.part)(facts, device, Path(place), deadline, args)


# === report =======================================================================================


def show(value):
    """A value as the cell of a table."""
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return "" if value is None else str(value).replace("|", r"\|")


def table(rows):
    """Markdown table of dicts; its columns are their keys, in the order of their appearance."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [[key.replace("_", " ") for key in columns], ["---"] * len(columns)]
    lines += [[show(row.get(key)) for key in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def report(folder):
    """Text of docs/gpu.md from the facts in FOLDER/gpu.jsonl, or from none."""
    path = Path(folder, "gpu.jsonl")
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    facts = [json.loads(line) for line in text.splitlines(True) if line.endswith("\n")]
    on_cpu = facts and not any("gib" in fact for fact in facts)
    pages = ["# Run on a CPU: it measures nothing\n" if on_cpu else "# Measured on a GPU\n"]
    if not facts:
        pages.append(NOTHING)
    checks = [fact["ok"] for fact in facts if "ok" in fact]
    if checks:
        pages.append(f"{sum(checks)} of {len(checks)} checks hold.\n")
    tables = {}  # {(part, table): rows}, in the order of their first facts
    for fact in facts:
        rows = tables.setdefault((fact.pop("part"), fact.pop("table")), [])
        rows += [fact] if fact not in rows else []
    shown = ""
    for (part, name), rows in sorted(tables.items(), key=lambda item: PARTS.index(item[0][0])):
        heading = f"## {part}\n\n" if part != shown else ""
        pages.append(f"{heading}{name}:\n\n{table(rows)}\n")
        shown = part
    return "\n".join(pages)


# === main =========================================================================================


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="folder for gpu.jsonl and the logs")
    parser.add_argument("--model", default="", help="a pack, or a model that load_model reads")
    parser.add_argument("--data", default="", help="a pack, or a folder with train/ and test/")
    parser.add_argument("--commit", default=find_commit(), help="what runs (git's answer)")
    parser.add_argument("--minutes", type=float, default=8, help="for all parts (8)")
    parser.add_argument("--only", nargs="+", default=[*LIMITS], choices=LIMITS, metavar="PART")
    parser.add_argument("--small", action="store_true", help="the same on a CPU, with tiny models")
    parser.add_argument("--report", metavar="FOLDER", help="print FOLDER/gpu.jsonl as Markdown")
    for inner in ("--part", "--seconds"):
        parser.add_argument(inner, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.report:
        return print(report(args.report), end="")
    if not args.out:
        parser.error("name --out FOLDER, or --report FOLDER")
    for name in ("out", "model", "data"):  # parts run in the root of the repository
        path = getattr(args, name)
        if path and (name == "out" or Path(path).exists()):
            setattr(args, name, str(Path(path).resolve()))
    return be_part(args) if args.part else run_parts(args)


if __name__ == "__main__":
    main()
