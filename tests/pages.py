"""The pages of the project, for the tests that read them."""

import re

from conftest import ROOT

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
# Files that a reader makes, and what they are copies of.
EXAMPLES = {"mine.py": "hrpo.py", "dr_latent_grpo.py": "latent_grpo.py",
            "budget_hyrea.py": "hyrea.py", "gated_lepo.py": "lepo.py"}


def read(path):
    return path.read_text(encoding="utf-8")


def blocks(page, language):
    """The fenced blocks of a page in that language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", read(page), re.M | re.S)


def without_blocks(page):
    return re.sub(r"^```.*?^```$", "", read(page), flags=re.M | re.S)
