"""Count lines of Python and fail where a size budget is exceeded. `make lint` runs it."""

import subprocess
import sys
from pathlib import Path

# Lines per group of folders. The goals are 26,000 and 16,000: lower these numbers with every change
# that removes lines.
BUDGETS = {("flows", "tasks", "qrpo", "storage"): 31_850, ("tests",): 21_200}
FILE_BUDGET = 450  # lines of one file of the product, which is the first group


def count_lines(folders: tuple[str, ...]) -> dict[str, int]:
    """File -> lines, of all Python files that git tracks or would add."""
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *folders]
    names = subprocess.run(listing, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    paths = [Path(name) for name in names if name.endswith(".py")]
    return {str(path): len(path.read_text().splitlines()) for path in paths if path.exists()}


def main() -> None:
    """Print the counts; exit with 1 and the reasons where a budget is exceeded."""
    failures = []
    product, _ = BUDGETS
    for folders, budget in BUDGETS.items():
        lines = count_lines(folders)
        total = sum(lines.values())
        print(f"{', '.join(folders)}: {total:,} of {budget:,} lines")
        if total > budget:
            failures.append(f"{', '.join(folders)} exceed their budget by {total - budget:,} lines")
        if folders == product:
            failures += [
                f"{name} has {count} lines; the limit of a product file is {FILE_BUDGET}"
                for name, count in lines.items()
                if count > FILE_BUDGET
            ]
    if failures:
        sys.exit("\n".join(failures))


if __name__ == "__main__":
    main()
