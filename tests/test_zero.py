"""--zero spreads the optimizer over the ranks and changes nothing else, bit for bit."""

import re

import pytest
import torch
from conftest import METHODS, ROOT
from runs import differences, flags, launch, rows, train

START = ("--stage sft --train arithmetic-restated:2 --sft_steps 4 --sft_batch 8 --sft_save_every 2 "
         "--sft_lr 0.01 --max_completion_length 28")
RUNS = {  # name: script, flags
    **{method: (method, "--micro_batch 3") for method in METHODS},
    "lora": ("hrpo", "--lora_rank 4"),
    "cold start": ("hyrea", f"{START} --sft_rounds 2"),
    "Latent-SFT": ("latent_grpo", START)}
RESUMED = {  # parts: stopped and resumed with --zero; mixed: resumed without it
    "hrpo": ["parts", "mixed"], "lora": ["parts"], "cold start": ["parts"]}
DRIVER = """
import sys
sys.path[:0] = [{tests!r}, {root!r}]
from importlib import import_module
import runs, test_resume
for place, (name, (method, variant)) in enumerate({RUNS!r}.items()):
    script = import_module(method)
    script.reward, script.load_problems = test_resume.odd_length, test_resume.few_problems
    first = runs.FIRST.get(method, [])
    save = script.save_checkpoint
    def spy(out_dir, policy, tokenizer, optimizer, *args):
        own = getattr(optimizer, "optim", optimizer)
        moments = [s["exp_avg"].numel() for s in own.state.values()]
        print("MOMENTS", name, out_dir.name.split("-")[0], sum(moments), flush=True)
        return save(out_dir, policy, tokenizer, optimizer, *args)
    script.save_checkpoint = spy
    for out, more in [("plain", ""), ("whole", "--zero"), ("parts", "--zero --stop_after 3"),
                      ("parts", "--zero --resume auto"), ("mixed", "--zero --stop_after 3"),
                      ("mixed", "--resume auto")]:
        if out not in {{"plain", "whole", *{RESUMED!r}.get(name, [])}}:
            continue
        folder = {out!r} + f"/{{out}}-{{place}}"
        script.main([*first, *runs.flags({model!r}, folder, f"{{variant}} {{more}}")])
    script.save_checkpoint = save
script.dist.destroy_process_group()
"""


def run_all(model, folder, ranks):
    driver = folder / "driver.py"
    driver.write_text(DRIVER.format(
        RUNS=RUNS, RESUMED=RESUMED, tests=str(ROOT / "tests"), root=str(ROOT), model=model,
        out=str(folder)))
    job = launch(driver, [], folder / "log", ranks)
    log = folder / "log"
    assert job.wait(300) == 0, log.read_text()[-4000:]
    return log.read_text()


@pytest.fixture(scope="module")
def two_ranks(model, tmp_path_factory):
    """Folder of all runs on two ranks, and what they printed."""
    folder = tmp_path_factory.mktemp("zero")
    return folder, run_all(model, folder, 2)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_and_a_resumed_run_are_those_without_zero(name, two_ranks):
    folder, _ = two_ranks
    place = list(RUNS).index(name)
    plain = folder / f"plain-{place}"
    for other in ["whole", *RESUMED.get(name, [])]:
        found = folder / f"{other}-{place}"
        assert rows(found) == rows(plain), other
        assert differences(found / "step_000004", plain / "step_000004") == [], other
    assert all(row["grad_norm"] > 0 for row in rows(plain, "train"))  # there is something to equal


@pytest.mark.parametrize("name", RUNS)
def test_each_rank_holds_a_share_of_the_moments(name, two_ranks):
    _, log = two_ranks
    found = {kind: [int(n) for n in re.findall(rf"MOMENTS {name} {kind} (\d+)", log)]
             for kind in ("plain", "whole")}
    whole = max(found["plain"])
    assert set(found["plain"]) == {whole}
    assert whole * 0.3 < min(found["whole"]) and max(found["whole"]) < whole * 0.7
    assert min(found["whole"]) + max(found["whole"]) == whole


def test_no_rank_prints_a_warning_of_ddp(two_ranks):
    _, log = two_ranks
    assert "find_unused_parameters" not in log and "broadcast_buffers" not in log


def test_one_rank_takes_the_ordinary_optimizer(model, tmp_path):
    train("hrpo", flags(model, tmp_path / "plain"))
    train("hrpo", flags(model, tmp_path / "zero", "--zero"))
    assert differences(tmp_path / "plain" / "step_000004", tmp_path / "zero" / "step_000004") == []
    state = torch.load(tmp_path / "zero" / "step_000004" / "trainer.pt", weights_only=True)
    assert len(state["optimizer"]["state"]) > 8
