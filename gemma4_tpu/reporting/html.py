"""A report's Markdown as one HTML file: images embedded, nothing fetched; for wide or narrow screens, light or dark."""

from __future__ import annotations

import base64
import re
import struct
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote

import jinja2
from markdown_it import MarkdownIt
from markdown_it.token import Token

from gemma4_tpu.costing.figures import LABELS

_PNG = b"\x89PNG\r\n\x1a\n"
_WIDE_PIXELS = 1100  # on a narrow screen, wider images scroll inside their own box
_BAD = r"\W*(failed|disagrees|impossible|doubtful)\b"
"""Starts of cells that a reader should not miss."""
_TEMPLATE = Path(__file__).with_name("page.html")


def html_page(markdown: str, folder: Path) -> str:
    """Renders one self-contained page.

    Args:
      markdown: with one title (`#`), which becomes the page's; HTML in it is shown as text.
      folder: base of the images' paths. The name of a missing image is shown instead.
    """
    reader = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = reader.parse(markdown)
    title = "Report"
    sections: list[tuple[str, str]] = []
    made: list[Token] = []
    for place, token in enumerate(tokens):
        following = tokens[place + 1] if place + 1 < len(tokens) else None
        match token.type:
            case "heading_open" if token.tag == "h1" and following:
                title = _text(following)
            case "heading_open" if token.tag == "h2" and following:
                name = _text(following)
                made.append(_html(("</section>" if sections else "") + f'<section id="{_anchor(name, sections)}">'))
                sections.append((_anchor(name, sections), name))
            case "table_open":
                made.append(_html('<div class="wide" role="region" aria-label="Table" tabindex="0">'))
            case "paragraph_open" if following and _only_pictures(following):
                token.tag = tokens[place + 2].tag = "div"
                token.attrSet("class", "plots")
                following.children = [child for child in following.children or [] if child.type == "image"]
            case "td_open" if following and re.match(_BAD, following.content):
                token.attrSet("class", "bad")
            case "inline":
                _mark_labels(token)
        for child in token.children or []:
            if child.type == "image":
                _inline(child, folder)
        made.append(token)
        if token.type == "table_close":
            made.append(_html("</div>"))
    if sections:
        made.append(_html("</section>"))
    template = jinja2.Environment(autoescape=True).from_string(_TEMPLATE.read_text(encoding="utf-8"))
    return template.render(title=title, sections=sections, body=reader.renderer.render(made, reader.options, {}))


def _html(text: str) -> Token:
    return Token("html_block", "", 0, content=text + "\n", block=True)


def _text(inline: Token) -> str:
    return "".join(child.content for child in inline.children or [] if child.type in ("text", "code_inline"))


def _anchor(name: str, taken: Sequence[tuple[str, str]]) -> str:
    """An anchor for links, unique on the page."""
    anchor = re.sub(r"\W+", "-", name.lower()).strip("-") or "section"
    return anchor if anchor not in dict(taken) else f"{anchor}-{len(taken)}"


def _only_pictures(inline: Token) -> bool:
    kinds = {child.type for child in inline.children or []}
    return "image" in kinds and kinds <= {"image", "softbreak"}


def _mark_labels(inline: Token) -> None:
    """Gives `*measured*` and the other labels a class, so that they stand out."""
    children = inline.children or []
    for place, child in enumerate(children[:-1]):
        if child.type == "em_open" and (word := children[place + 1].content) in LABELS:
            child.attrSet("class", f"by {word}")


def _inline(image: Token, folder: Path) -> None:
    """Embeds the file in the page; a wide image gets a class."""
    path = folder / unquote(str(image.attrGet("src") or ""))
    data = path.read_bytes() if path.is_file() else b""
    if not data.startswith(_PNG):
        image.type, image.content = "text", f"(no image: {_text(image)})"
        return
    image.attrSet("src", f"data:image/png;base64,{base64.b64encode(data).decode()}")
    width, height = struct.unpack(">II", data[16:24])
    image.attrSet("width", str(width))
    image.attrSet("height", str(height))
    if width > _WIDE_PIXELS:
        image.attrSet("class", "large")
