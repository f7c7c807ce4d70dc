"""The pages of the site: those of docs/, and what lies beside it and is linked from them."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
BESIDE = ("CONTRIBUTING.md", "experiments/**/*.md", "experiments/**/*.png", "experiments/**/*.csv")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages beside docs/ below the same names."""
    for pattern in BESIDE:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links of the repository into those of the site, where docs/ is the root."""
    if page.file.src_uri == "CONTRIBUTING.md":
        return markdown.replace("](docs/", "](")
    if "/" in page.file.src_uri:
        return markdown.replace("](../../docs/", "](../../")
    return markdown.replace("](../", "](")


def on_page_content(html: str, **_: Any) -> str:
    """Show the roles of docstrings (``:func:`ldt.prune```) as code."""
    return re.sub(r":[a-z]+:<code>~?", "<code>", html)
