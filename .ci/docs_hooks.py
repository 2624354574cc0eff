"""What MkDocs needs to build docs/, whose pages are written for a reader of the repository."""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority

ROOT = Path(__file__).resolve().parent.parent
_FENCE = re.compile(r"^```.*?^```$", re.M | re.S)
_OUTSIDE = re.compile(r"\[([^\]]+)\]\((\.\./[^)#\s]+)(?:#[^)\s]*)?\)")
_tree: Path | None = None


# before mkdocstrings reads its own configuration
@event_priority(100)
def on_config(config: Any) -> Any:
    """Let mkdocstrings read the package as it installs: kernels/ inside bngd_triton/."""
    global _tree
    _tree = Path(tempfile.mkdtemp())
    package = _tree / "bngd_triton"
    shutil.copytree(ROOT / "bngd_triton", package)
    shutil.copytree(ROOT / "kernels", package / "kernels")
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [str(_tree)]
    return config


def on_post_build(config: Any) -> None:
    """Remove what `on_config` made."""
    if _tree is not None:
        shutil.rmtree(_tree)


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Name files of the repository that no page is made of, instead of linking to them.

    Such a link works where the repository is shown; a site of the pages alone has nothing there.
    """
    end, parts = 0, []
    for fence in _FENCE.finditer(markdown):
        parts += [_OUTSIDE.sub(_named, markdown[end : fence.start()]), fence.group()]
        end = fence.end()
    return "".join([*parts, _OUTSIDE.sub(_named, markdown[end:])])


def _named(link: re.Match[str]) -> str:
    text, target = link[1], link[2].removeprefix("../")
    return f"`{target}`" if text.strip("`") == target else f"{text} (`{target}`)"
