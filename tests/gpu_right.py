"""Part `right` of gpu_run.py: what the tests prove on a CPU, on this device.

replay  what the update computes about a rollout is what the rollout did; a row alone is the row
runs    the same command twice, and a killed and resumed run, give the same bits
off     each script with its method off is GRPO
rest    a NaN gradient, a lack of memory, and eval.py against the run's own evaluation
"""

import json
import multiprocessing
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path

import torch
import torch.distributed as dist
from conftest import METHODS, make_lm, save_folder
from gpu_run import ROOT
from runs import differences, rows
from safetensors.torch import load_file

from common import load_model, make_rng, run_program, select_rows

STRONG = {  # strong mixing, so that an error in it is visible
    "grpo": ("hrpo", "--no-hybrid"),
    "hrpo": ("hrpo", "--r_min 0.2 --r_max 0.9"),
    "lepo": ("lepo", "--latent_steps 5 --latent_tau 0.7"),
    "latent_grpo": ("latent_grpo", "--latent_top_k 4 --latent_tau 2"),
    "hyrea": ("hyrea", "--latents_per_step 1"),
}
OFF = {"hrpo": "--no-hybrid", "lepo": "--latent_steps 0", "latent_grpo": "--no-latent",
       "hyrea": "--max_replaced_steps 0"}
FIRST = {"latent_grpo": "--stage rl --no-mask_invalid --no-first_token_selection",
         "hyrea": "--stage rl"}
RUN = ("--preset tiny --train arithmetic:2 --steps 4 --num_prompts 4 --group_size 4 --lr 0.01 "
       "--max_completion_length 12 --eval_limit 32 --eval_every 2 --save_every 2 --kl_coef 0.1 "
       "--warmup_steps 1 --temperature 1 --top_k 0 --weight_decay 0 --max_grad_norm 1 "
       "--answer_marker </think>")
LIMIT = 1e-4  # of a gap between log-probs in float32
PROMPTS = [[1, 4, 6], [1, 6, 7, 12, 9, 10, 13, 3], [4], [1, 17, 17, 17, 17, 12]]


# === replay =======================================================================================


def build(method, model, dtype, device):
    """-> script, policy, cfg of a small random model; what the method adds is made large."""
    script, flags = STRONG[method]
    script = import_module(script)
    cfg = script.parse_config(["--preset", "tiny", "--model", model, "--max_completion_length",
                               "14", "--answer_marker", "7", "--device", device, *flags.split()])
    lm, tokenizer = load_model(model, dtype, torch.device(device))
    lm.eos_ids = [2, 5, 8, 11]  # random rows end soon, and not together
    policy = script.Policy(lm, tokenizer, cfg)
    for name, p in policy.named_parameters():
        if not name.startswith(("lm.", "table.")) and p.dim() > 1:
            p.data.mul_(20)
    return script, policy, cfg


@torch.no_grad()
def replay(facts, device, model, kind, method, dtype):
    """Gap between the log-probs of a rollout and those of its update, and of each row alone."""
    script, policy, cfg = build(method, model, dtype, device)
    batch = script.rollout(policy, PROMPTS, cfg, make_rng(device, 0), 16)
    mask, whole = batch["loss_mask"], policy(batch)["logprobs"]
    gap = (whole - batch["rollout_logprobs"])[mask].abs().max().item()
    apart = 0.0
    for row, length in enumerate(batch["lengths"].tolist()):
        alone = policy(select_rows(batch, [row]))["logprobs"][0]
        apart = max(apart, (alone - whole[row, :length]).abs().max().item())
    ended, latent = int(batch["finished"].sum()), int(batch["latent_mask"].sum())
    covered = len(batch["lengths"].unique()) > 2 and (latent > 0 or method == "grpo")
    told = {"ok": covered and max(gap, apart) <= LIMIT}
    facts.tell("replay", method=method, model=kind, dtype=str(dtype).removeprefix("torch."),
               largest_gap=gap, row_alone=apart, rows=len(mask), rows_ended_early=ended,
               latent_positions=latent, **(told if dtype == torch.float32 else {}))


# === programs =====================================================================================


def program(name, argv, change, log):
    """In a new process: main(argv) of a script, with a reward that random models earn half the
    time, and with a `change` of what its loss does."""
    handle = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    torch.set_num_threads(1)
    script, calls = import_module(name), []
    if name != "eval":
        script.reward = lambda record: float(record["length"] % 2)
        loss = script.policy_loss

    def policy_loss(*args):
        calls.append(None)
        value = loss(*args)
        if change == "kill" and len(calls) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        if change == "nan" and len(calls) == 2:
            value = value * float("nan")
        if change == "memory" and value.device.type == "cuda":
            torch.empty(1 << 50, dtype=torch.uint8, device="cuda")
        if change == "memory":
            raise torch.OutOfMemoryError("no GPU, so only the message is checked")
        return value

    script.policy_loss = policy_loss
    sys.argv = [f"{name}.py", *map(str, argv)]
    run_program(script.main)


def start(server, name, argv, log, change="", code=0):
    """Run a program to its end -> the lines that it printed; an error if its exit code differs."""
    process = server.Process(target=program, args=(name, argv, change, log))
    process.start()
    process.join()
    lines = log.read_text(encoding="utf-8").splitlines()
    if process.exitcode != code:
        print(*lines[-30:], sep="\n", flush=True)
        raise RuntimeError(f"{name} ended with {process.exitcode}, not {code}: {lines[-1:]}")
    return lines


class Runs:
    """Short runs on a random model, each with its folder and its log beside it."""

    def __init__(self, facts, device, place, model, server):
        self.facts, self.device, self.place, self.model = facts, device, place, model
        self.server = server

    def run(self, method, out, more="", change="", code=0):
        """Train a method into the folder `out` -> (path of it, printed lines)."""
        script, own = STRONG[method]
        argv = [*f"{RUN} {own} {FIRST.get(script, '')} {more}".split(), "--model", self.model,
                "--device", self.device, "--out_dir", str(self.place / out)]
        log = self.place / f"{out}.log"
        return self.place / out, start(self.server, script, argv, log, change, code)

    def twice(self, method, more):
        """The same run twice, the second one killed in its third update and resumed."""
        name = f"{method}{more.replace(' ', '')}"
        whole, _ = self.run(method, f"{name}-whole", more)
        parts, _ = self.run(method, f"{name}-parts", more, "kill", -signal.SIGKILL)
        twice = differences(whole / "step_000002", parts / "step_000002")
        self.run(method, f"{name}-parts", f"{more} --resume auto")
        resumed = differences(whole / "step_000004", parts / "step_000004")
        moved = differences(whole / "step_000002", whole / "step_000004")
        same = rows(whole) == rows(parts)
        told = {"ok": not twice and not resumed and same and len(moved) > 8}
        self.facts.tell("runs", method=method, flags=more.strip(), twice_equal=not twice,
                        resumed_equal=not resumed, metrics_equal=same,
                        **(told if "deterministic" in more else {}))
        return whole

    def compare_evaluation(self, method, more):
        """`twice`, and eval.py on that checkpoint gives what the run itself logged about it."""
        whole = self.twice(method, more)
        argv = [whole, "--data", "arithmetic:2", "--limit", 32, "--device", self.device,
                "--out", f"{whole}-results"]
        start(self.server, "eval", argv, Path(f"{whole}.eval.log"))
        file, = Path(f"{whole}-results").glob("*.json")
        row, own = json.loads(file.read_text(encoding="utf-8")), rows(whole, "eval")[-1]
        pairs = {key: (own[key], row[key]) for key in ("accuracy", "total_length", "latent_steps")}
        self.facts.tell("rest", check=f"eval.py, {method}", found=str(pairs),
                        ok=all(a == b for a, b in pairs.values()))

    def off(self):
        """Each script with its method off: how far are its weights from those of GRPO?"""
        grpo = None
        for script, more in OFF.items():
            out = self.place / f"off-{script}"
            argv = f"{RUN} {FIRST.get(script, '')} {more} --deterministic".split()
            argv += ["--model", self.model, "--device", self.device, "--out_dir", out]
            start(self.server, script, argv, Path(f"{out}.log"))
            weights = load_file(out / "step_000004" / "hf" / "model.safetensors")
            grpo = weights if grpo is None else grpo
            gap = max((weights[name] - grpo[name]).abs().max().item() for name in grpo)
            self.facts.tell("off", method=script, largest_gap_of_weights=gap, ok=gap == 0)

    def nan(self):
        """A gradient that is not finite costs one update."""
        out, _ = self.run("grpo", "nan", change="nan")
        skipped = [row["skipped"] for row in rows(out, "train")]
        weights = load_file(out / "step_000004" / "hf" / "model.safetensors").values()
        finite = all(bool(w.isfinite().all()) for w in weights)
        self.facts.tell("rest", check="NaN gradient", found=f"skipped {skipped}",
                        ok=finite and [bool(x) for x in skipped] == [False, True, False, False])

    def memory(self):
        """Too little memory is said in one line, by its exit code too."""
        _, lines = self.run("grpo", "memory", change="memory", code=1)
        self.facts.tell("rest", check="out of memory", found=lines[-1][:200],
                        ok=lines[-1].startswith("error: ") and "--micro_batch" in lines[-1])


def right(facts, device, place, deadline, args):
    """All checks; programs run beside the replays, several at a time."""
    os.environ["PYTHONPATH"] = f"{ROOT}:{ROOT / 'tests'}"  # for the server, which imports once
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload([*METHODS, "eval", "gpu_right"])
    models = {kind: save_folder(place / kind, make_lm(kind)) for kind in ("llama", "qwen2", "gpt2")}
    runs, attempt = Runs(facts, device, place, models["llama"], server), facts.attempt
    with ThreadPoolExecutor(2 if args.small else 8) as pool:
        for check in (runs.nan, runs.memory, runs.off):
            pool.submit(attempt, check.__name__, check)
        for method in STRONG if not args.small else ("hrpo", "hyrea"):
            more = "" if method == "latent_grpo" else "--deterministic"  # it needs cumsum
            pool.submit(attempt, f"runs, {method}", runs.compare_evaluation, method, more)
        if not args.small:
            pool.submit(attempt, "runs, grpo", runs.twice, "grpo", " ")
        if not dist.is_initialized():
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        for dtype in (torch.float32, torch.bfloat16):
            for kind, model in models.items():
                for method in STRONG:
                    attempt(f"replay, {method}, {kind}, {dtype}", replay, facts, device, model,
                            kind, method, dtype)
