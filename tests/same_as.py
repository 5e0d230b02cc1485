"""Does this tree train exactly what COMMIT trained? Weights, samples, metrics, bit for bit.

python tests/same_as.py COMMIT [SCRIPT ...] [--steps 8] [-- FLAGS]

Unpacks COMMIT into a temporary folder and runs the default command of every script in both trees
on this machine, some steps of each stage. Nothing is stored: another processor or another torch
draws other samples. Exit code 1 names the first difference of each script.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
STAGED = {"hyrea": ["--sft_steps", "20"], "latent_grpo": ["--sft_steps", "12"]}
TIMES = {"seconds", "tokens_per_s_rollout", "tokens_per_s_update", "peak_mem_gib"}


def run(tree, method, steps, flags, out):
    """Train in a tree -> its run folder."""
    command = [sys.executable, str(tree / f"{method}.py"), "--steps", str(steps), "--seed", "3",
               "--eval_limit", "256", "--out_dir", str(out), *STAGED.get(method, []), *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tree)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr[-3000:]}")
    return out


def rows(file):
    """{(kind, step, number among its like): row} of a metrics.jsonl or samples.jsonl."""
    found = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        number = sum(key[:2] == (row["kind"], row["step"]) for key in found)
        found[row["kind"], row["step"], number] = row
    return found


def compare_rows(old, new):
    """What differs in rows and keys that both have; every old row has to be there."""
    for place, row in old.items():
        if place not in new:
            yield f"row {place} is missing"
            continue
        for key in row.keys() & new[place].keys() - TIMES:
            if row[key] != new[place][key]:
                yield f"row {place}: {key} {row[key]!r} was, {new[place][key]!r} is"


def compare_tensors(name, old, new):
    for key in old.keys() & new.keys():
        if isinstance(old[key], torch.Tensor) and not torch.equal(old[key], new[key]):
            yield f"{name}: {key} differs by up to {(old[key] - new[key]).abs().max():.3g}"
    if not old.keys() & new.keys():
        yield f"{name}: no tensor in common"


def differences(old, new):
    """Of two run folders, the supervised stage's too."""
    folders = [path.parent.relative_to(old) for path in sorted(old.rglob("metrics.jsonl"))]
    for folder in folders:
        for file in ("metrics.jsonl", "samples.jsonl"):
            pair = [rows(tree / folder / file) for tree in (old, new)]
            yield from (f"{folder / file}: {text}" for text in compare_rows(*pair))
        last = max((old / folder).glob("step_*")).name
        for file in ("hf/model.safetensors", "hf/latent/method.safetensors"):
            pair = [load_file(tree / folder / last / file) for tree in (old, new)]
            if pair[0]:
                yield from compare_tensors(folder / last / file, *pair)
        states = [torch.load(tree / folder / last / "trainer.pt") for tree in (old, new)]
        moments = [state["optimizer"]["state"] for state in states]
        for number in moments[0]:
            pair = [moment[number] for moment in moments]
            yield from compare_tensors(f"{folder / last}: moments of {number}", *pair)


def main():
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("commit")
    parser.add_argument("scripts", nargs="*", default=[])
    parser.add_argument("--steps", type=int, default=8)
    argv = sys.argv[1:]
    flags = argv[argv.index("--") + 1 :] if "--" in argv else []
    args = parser.parse_args(argv[: argv.index("--")] if "--" in argv else argv)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        old = Path(folder, "old")
        archive = subprocess.run(
            ["git", "archive", args.commit], cwd=ROOT, check=True, capture_output=True).stdout
        tarfile.open(fileobj=io.BytesIO(archive)).extractall(old, filter="data")
        for method in args.scripts or ["hrpo", "lepo", "latent_grpo", "hyrea"]:
            method = method.removesuffix(".py")
            runs = [run(tree, method, args.steps, flags, Path(folder, f"{method}-{name}"))
                    for tree, name in ((old, "old"), (ROOT, "new"))]
            found = list(differences(*runs))
            print(f"{method}: {'same' if not found else found[0]}", flush=True)
            for text in found[1:20]:
                print(f"  {text}")
            failed = failed or bool(found)
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
