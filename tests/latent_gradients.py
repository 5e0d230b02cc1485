"""Bias and variance of LEPO's five latent gradients against tau, on one latent step.

python tests/latent_gradients.py docs/lepo_gradients           # writes .json and .png, 5 minutes
python tests/latent_gradients.py docs/lepo_gradients --draw    # only the picture, from the .json

A policy of 30 tokens takes one latent step z = softmax((log pi + g) / tau). The reward f(z) is
known and smooth, so the true gradient of E f(z) for the logits is the mean of that of f itself.
Each estimator is (f(z) - mean f) times the gradient of lepo.latent_logprob, over the same samples:
cosine and size of its mean against the true gradient show its bias, |mean|^2 / trace of the
covariance of one sample is its signal-to-noise ratio.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from common import gumbel_like
from lepo import latent_logprob, mixture_weights

TAUS, SEEDS, TOKENS = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0), 4, 30
CHUNKS, SAMPLES = 10, 200_000
KINDS = ("soft", "token", "concrete", "gumbel")  # none is 0: no signal and no noise
REWARDS = {"mlp": "an MLP of the mixed embedding", "pair": "needs two tokens mixed",
           "argmax": "nearly a function of the heaviest token"}


def make_rewards(rng):
    """{name: f}, f: z [N, n] -> [N]."""
    table, inner = torch.randn(TOKENS, 16, generator=rng), torch.randn(16, 32, generator=rng) / 2
    outer, values = torch.randn(32, generator=rng) / 4, torch.randn(TOKENS, generator=rng)
    return {"mlp": lambda z: torch.tanh(z @ table @ inner) @ outer,
            "pair": lambda z: 4 * z[:, 0] * z[:, 1],
            "argmax": lambda z: (z**4 / (z**4).sum(1, keepdim=True)) @ values}


def one_tau(tau, seed):
    """{reward: {kind: [cosine, size, signal-to-noise]}}"""
    rng = torch.Generator().manual_seed(seed)
    logits, rewards = 1.5 * torch.randn(TOKENS, generator=rng), make_rewards(rng)
    logits[:2] = logits.max()  # the two tokens that "pair" wants are the likeliest
    true = {name: 0 for name in rewards}
    sums = {(name, kind): [0, 0] for name in rewards for kind in KINDS}  # of estimates, squares
    for _ in range(CHUNKS):
        rows = logits.expand(SAMPLES, -1).clone().requires_grad_()
        logprobs = rows.log_softmax(-1)
        noise = gumbel_like(rows, rng)
        u = logprobs.detach() + noise
        z = mixture_weights(logprobs + noise, tau)  # keeps the path from the logits to f(z)
        scores = {}
        for kind in KINDS:
            score = latent_logprob(u, logprobs, tau, kind).sum()
            scale = TOKENS if kind in ("concrete", "gumbel") else 1  # they are divided by n
            scores[kind] = scale * torch.autograd.grad(score, rows, retain_graph=True)[0]  # [N, n]
        for name, reward in rewards.items():
            value = reward(z)
            true[name] += torch.autograd.grad(value.sum(), rows, retain_graph=True)[0].sum(0)
            advantage = (value - value.mean()).detach()[:, None]
            for kind, score in scores.items():
                sums[name, kind][0] += (advantage * score).sum(0)
                sums[name, kind][1] += (advantage * score).square().sum().item()
    found, count = {name: {} for name in rewards}, CHUNKS * SAMPLES
    for (name, kind), (total, squares) in sums.items():
        mean = total / count
        variance = squares / count - mean.square().sum()
        signal = mean.square().sum() - variance / count  # without the noise of the mean itself
        truth = true[name] / count
        found[name][kind] = [torch.cosine_similarity(mean, truth, 0).item(),
                             (mean.norm() / truth.norm()).item(), (signal / variance).item()]
    return found


def draw(results, path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    titles = ("cosine of the mean\nwith the true gradient", "|mean| / |true gradient|",
              "signal / noise\nof one sample (log)")
    # concrete and gumbel coincide in two columns: a dashed line with open markers over a solid one
    styles = {"soft": dict(color="#0072B2", marker="o", label="soft (LEPO)"),
              "token": dict(color="#D55E00", marker="s", label="token"),
              "concrete": dict(color="#009E73", marker="^", ms=9, label="concrete × n"),
              "gumbel": dict(color="#000000", marker="v", ms=5, ls="--", mfc="white",
                             label="gumbel × n")}
    plt.rcParams.update({"font.size": 12, "axes.titlesize": 12})
    figure = plt.figure(figsize=(9, 9), layout="constrained")
    parts = figure.subfigures(len(REWARDS), 1, hspace=0.03)
    for part, (reward, text) in zip(parts, REWARDS.items()):
        part.suptitle(f"reward: {text}", fontsize=13, fontweight="bold")
        for column, panel in enumerate(part.subplots(1, 3)):
            for kind, style in styles.items():
                values = torch.tensor([[run[reward][kind][column] for run in results[str(tau)]]
                                       for tau in TAUS])  # [taus, seeds]
                panel.plot(TAUS, values.mean(1), lw=2, **style)
                panel.fill_between(TAUS, values.amin(1), values.amax(1), color=style["color"],
                                   alpha=0.15, linewidth=0)
            panel.grid(color="0.9")
            panel.spines[["top", "right"]].set_visible(False)
            panel.set_title(titles[column] if reward == "mlp" else "")
            panel.set_xticks((0.1, 0.5, 1.0))
            panel.set_xlabel("tau" if part is parts[-1] else "")
            if column == 2:
                panel.set_yscale("log")
                panel.set_ylim(6e-4, 0.4)
            else:
                panel.set_ylim(*((0.965, 1.003) if column == 0 else (0, 1.1)))
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncol=4, frameon=False)
    figure.savefig(f"{path}.png", dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("path", help="of the two files, without the ending")
    parser.add_argument("--draw", action="store_true", help="redraw from the .json")
    args = parser.parse_args()
    if not args.draw:
        results = {str(tau): [one_tau(tau, seed) for seed in range(SEEDS)] for tau in TAUS}
        Path(f"{args.path}.json").write_text(json.dumps(results, indent=1))
    results = json.loads(Path(f"{args.path}.json").read_text())
    draw(results, args.path)
    for reward, text in REWARDS.items():
        print(f"\n| {text} | " + " | ".join(KINDS) + " |")
        for tau in TAUS:
            means = torch.tensor([[run[reward][kind] for kind in KINDS]
                                  for run in results[str(tau)]]).mean(0)  # [kinds, 3]
            print(f"| tau {tau} | " + " | ".join(
                f"{c:.3f} / {s:.2f} / {r:.4f}" for c, s, r in means.tolist()) + " |")


if __name__ == "__main__":
    main()
