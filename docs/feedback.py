"""Draw docs/feedback.svg: what each method feeds back, where it is random, what it scores.

python docs/feedback.py     # needs matplotlib
"""

from pathlib import Path

import matplotlib.pyplot as plt

INK, GREY, RED = "#24292f", "#7a828b", "#e5484d"  # grey and red are legible on white and on black
TOKEN, NOISE, STATE, BLUES = "#e3e6ea", "#b794e6", "#f6c56f", ["#8cc2f5", "#b9dafa", "#deeefd"]
CHAIN, SPAN = "3×4 = 12 2+12 = 14", "<start> $h$ $h$ <end> = 14"
ROWS = [  # name, a sign for each thinking step (see box), its text, what is fed, what is scored
    ("GRPO", "tttttt", CHAIN, "the token", "its log-prob"),
    ("HRPO", "mmmmmm", CHAIN, "token and soft token, gated", "the log-prob of the token"),
    ("LEPO", "nnnttt", CHAIN, "$K$ embeddings for $L_g$ steps", "soft labels, then tokens"),
    ("Latent-GRPO", "nnn---", CHAIN, "$K$ embeddings until the marker", "a density, then tokens"),
    ("HyRea", "thhftt", SPAN, "its last hidden state inside a span", "the tokens that were drawn"),
]
plt.rcParams["svg.hashsalt"] = "feedback"  # every run writes the same file
ax = plt.figure(figsize=(10, 5.3)).add_axes((0, 0, 1, 1), aspect="equal", frame_on=False)
ax.set(xlim=(-3.1, 16), ylim=(-7.95, 2.17), xticks=[], yticks=[])


def note(x, y, text, **style):
    ax.text(x, y, text, **{"color": GREY, "fontsize": 8.5, "va": "center", **style})


def line(left, right, y, **style):
    ax.plot([left, right], [y, y], **{"color": RED, "lw": 2.4, **style})


def die(x, y, color):
    ax.plot(x, y, "s", ms=10, mfc=color, mec=INK, mew=0.7)
    ax.plot([x - 0.08, x, x + 0.08], [y + 0.08, y, y - 0.08], "o", ms=1.7, color=INK)


def box(x, y, kind, text):
    """What is fed: t or f a token, m a gated mix, n a noisy mixture, h a hidden state."""
    left, right, low, high = x - 0.42, x + 0.42, y - 0.42, y + 0.42
    bars = [(0.84, {"h": STATE, "n": BLUES[0]}.get(kind, TOKEN))]
    if kind == "n":  # three weights, which differ from step to step
        bars += [(0.5 + 0.1 * (x % 3), BLUES[1]), (0.13 + 0.1 * (x % 2), BLUES[2])]
    for height, color in bars:
        ax.add_patch(plt.Rectangle((left, low), 0.84, height, fc=color, ec=GREY, lw=0.8))
    if kind == "m":
        corners = [(left, low), (right, low), (right, high)]
        ax.add_patch(plt.Polygon(corners, fc=BLUES[0], ec=GREY, lw=0.8))
        ax.plot([left, right], [low, high], color=RED, lw=2, ls=":")
        note(x - 0.14, y + 0.23, text, color=INK, ha="center", fontsize=6.5)
    elif kind != "n":
        note(x, y, text, color=INK, ha="center", fontsize=8.5 if len(text) < 5 else 6.2)
    if kind in "tmn":  # it was drawn, and so it is scored
        die(x, y + 0.63, NOISE if kind == "n" else "white")
        line(left, right, y - 0.56)
    if kind == "h":  # the state above the position before
        bent = dict(arrowstyle="-|>", color=RED, ls=":", lw=1.6, connectionstyle="arc3,rad=-0.9")
        ax.annotate("", (x - 0.12, high), (x - 0.8, high), arrowprops=bent)


for x, width, text in (0, 2, "prompt"), (2, 6, "thinking"), (8, 1, "</think>"), (9, 2, "answer"):
    note(x + width / 2 - 0.5, 1.6, text, ha="center", fontsize=9)
    line(x - 0.42, x + width - 0.58, 1.25, color=GREY, lw=1)
for y, (name, kinds, texts, fed, scored) in zip((0, -1.55, -3.1, -4.65, -6.2), ROWS):
    note(-0.75, y, name, fontsize=11, weight="bold", ha="right")
    note(11, y + 0.2, "feeds " + fed)
    note(11, y - 0.22, "scores " + scored, color=RED)
    words = f"2+3 ×4= {texts} </think> 14 <eos>".split()
    for x, (kind, text) in enumerate(zip("pp" + kinds + "ttt", words)):
        if kind != "-":
            box(x, y, kind, text)
die(0, -7.5, "white")
die(3.4, -7.5, NOISE)
line(7.2, 7.8, -7.5)
line(10.9, 11.5, -7.5, ls=":", lw=2)
for x, text in ((0.35, "a token is drawn"), (3.75, "Gumbel noise is drawn"),
                (8, "scored by the loss"), (11.7, "gradient flows through what is fed")):
    note(x, -7.5, text)
note(6, -4.65, "(shorter)", ha="center")
plt.savefig(Path(__file__).with_suffix(".svg"), transparent=True, metadata={"Date": None})
