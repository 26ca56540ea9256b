"""`qrpo report`: a run as one self-contained HTML page. It has no script and fetches nothing.

content        what the page says, read from the store
plots          the figures, as SVG
page.html.j2   the page; text that models wrote is escaped, and the page's policy forbids scripts
               and requests
"""

from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from flows.views.report.content import gather
from flows.views.report.plots import draw
from storage import Store

__all__ = ["render_report", "write_report"]


def render_report(store: Store, run: str) -> str:
    """The page of the run, without sections for stages that have not run. ConfigError if there is
    no such run."""
    content = gather(store, run)
    environment = Environment(
        loader=PackageLoader("flows.views.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    return environment.get_template("page.html.j2").render(run=content, figures=draw(content))


def write_report(store: Store, run: str, path: Path) -> dict[str, Any]:
    """Write the page to `path`. Returns what `--json` prints."""
    page = render_report(store, run)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return {"run": run, "report": str(path), "bytes": len(page.encode())}
