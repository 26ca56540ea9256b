"""Find words that this project does not use in its texts. `make lint` runs it.

Metaphors and phrases that readers of another first language stumble over. Write the standard term.
"""

import re
import subprocess
import sys
from pathlib import Path

# Pattern -> what to write instead.
WORDS = {
    r"mend(s|ed|ing)?": "fix",
    r"dear": "expensive",
    r"told apart": "distinguished",
    r"so many": "N",
    r"(nursery|errand|epitaph|salvage|misfit)s?": "the standard term",
    r"room of its own": "the standard term",
    r"left out": "excluded, rejected",
    r"beside (it|them|each|this|that)": "next to",
    r"what lies": "what is",
    r"all the same": "still",
    r"by heart": "memorized",
    r"in vain": "without result",
    r"for ever": "without end",
    r"is taken to": "active voice",
}
ALLOWED = {"CHANGELOG.md", ".ci/words.py"}
KINDS = ("*.py", "*.md", "*.yaml", "*.yml", "*.html", "*.j2", "*.toml", "Makefile")


def main() -> None:
    """Print every use; exit with 1 if there is one."""
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *KINDS]
    names = subprocess.run(listing, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    found = []
    for path in (Path(name) for name in names if name not in ALLOWED):
        for number, line in enumerate(
            path.read_text(encoding="utf-8").splitlines() if path.exists() else [], 1
        ):
            for pattern, instead in WORDS.items():
                if match := re.search(rf"\b{pattern}\b", line, re.IGNORECASE):
                    found.append(f"{path}:{number}: {match[0]!r}: write {instead}")
    if found:
        sys.exit("\n".join(found))


if __name__ == "__main__":
    main()
