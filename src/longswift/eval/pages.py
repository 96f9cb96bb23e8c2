"""Self-contained HTML pages from the packaged templates: no network, no outside files."""

from __future__ import annotations

import base64
from typing import Any


def page(template: str, **content: Any) -> str:
    """A page with everything in it.

    Args:
        template: Name of a file in ``eval/templates``.
        content: What it shows; text is escaped.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    pages = Environment(
        loader=PackageLoader("longswift.eval"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return pages.get_template(template).render(**content)


def data_uri(content: bytes, kind: str) -> str:
    """An image as part of a page.

    Args:
        content: The file.
        kind: Its media type, e.g. ``"image/png"``.
    """
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
