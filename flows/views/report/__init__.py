"""`qrpo report`: a run as one self-contained HTML page, for a person to read. No script, and nothing is fetched by it.

`content` gathers what the page says, `plots` draws, `page.html.j2` lays it out. What models wrote is escaped, never run: the
page's own content security policy forbids scripts and every request.
"""

from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from flows.views.report.content import gather
from flows.views.report.plots import draw
from storage import Store

__all__ = ["render_report", "write_report"]


def render_report(store: Store, run: str) -> str:
    """The page of the run; ConfigError where there is no such run. Stages that have not run are left out."""
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
    """Write the page to `path`; what was written, for `--json`."""
    page = render_report(store, run)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return {"run": run, "report": str(path), "bytes": len(page.encode())}
