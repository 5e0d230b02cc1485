"""Short training runs of a script on a random model: in this process, in another, on ranks."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import torch
from conftest import METHODS, ROOT
from safetensors.torch import load_file

torch.set_num_threads(1)  # tiny tensors; on busy cores two threads wait for each other
OFF = {"hrpo": "--no-hybrid", "lepo": "--latent_steps 0",  # what turns each into plain GRPO
       "latent_grpo": "--no-latent", "hyrea": "--max_replaced_steps 0"}
assert set(OFF) == set(METHODS)
# Flags of a script, which others may overrule; completions of a random model are mostly cut off.
FIRST = {"latent_grpo": ["--stage", "rl", "--no-mask_invalid"],
         "hyrea": ["--stage", "rl"]}
QUICK = ("--preset tiny --train arithmetic:2 --device cpu --steps 4 --num_prompts 4 --group_size 4 "
         "--max_completion_length 12 --eval_limit 8 --eval_every 2 --save_every 2 --lr 0.01 "
         "--kl_coef 0.5 --warmup_steps 1")
CLOCKED = {"seconds", "tokens_per_s_rollout", "tokens_per_s_update", "peak_mem_gib"}


def flags(model, out_dir, more=""):
    return ["--model", str(model), "--out_dir", str(out_dir), *QUICK.split(), *more.split()]


def train(method, argv):
    """main(argv) in this process -> its result, or the code of the SystemExit that it raised."""
    handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        return import_module(method).main([*FIRST.get(method, []), *argv])
    except SystemExit as stop:
        return stop.code
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)


def launch(script, argv, log, ranks=1):
    """Start a script as a user would -> Popen; its output goes to the file `log`."""
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    with open(log, "w", encoding="utf-8") as f:
        argv = [*FIRST.get(Path(script).stem, []), *argv]
        return subprocess.Popen([*command, str(script), *argv], stdout=f, stderr=f, cwd=ROOT,
                                env={**os.environ, "OMP_NUM_THREADS": "1"})


def wait_until(condition, seconds=60):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "waited in vain"
        time.sleep(0.01)


def rows(out_dir, kind=("train", "eval"), name="metrics.jsonl"):
    """Rows of a run without what depends on the clock; the half line of a live run is left out."""
    path = out_dir / name
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    lines = [json.loads(line) for line in text.splitlines(True) if line.endswith("\n")]
    return [{k: v for k, v in line.items() if k not in CLOCKED}
            for line in lines if line["kind"] in kind]


def tensors(value, path=""):
    """Every tensor and number of nested containers -> {path: value}."""
    if isinstance(value, (dict, list, tuple)):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, item in pairs for k, v in tensors(item, f"{path}/{key}").items()}
    return {path: value}


def checkpoint_values(folder):
    """All weights, moments and counters of a checkpoint -> {name: value}."""
    found = tensors(torch.load(folder / "trainer.pt", weights_only=True))
    for path in folder.rglob("*.safetensors"):
        found.update({f"{path.name} {k}": v for k, v in load_file(path).items()})
    assert sum("exp_avg" in name for name in found) > 8
    return found


def differences(a, b):
    """Names of the values in which two checkpoint folders differ, bit for bit."""
    a, b = checkpoint_values(a), checkpoint_values(b)
    assert a.keys() == b.keys()
    same = {k: torch.equal(a[k], b[k]) if torch.is_tensor(a[k]) else a[k] == b[k] for k in a}
    return [k for k in a if not same[k]]


def tree(folder):
    """Every path below a folder, with the content of the files."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
            for p in sorted(folder.rglob("*"))}
