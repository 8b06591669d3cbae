"""Turn a documentation page into the text a reader sees."""

from __future__ import annotations

import re
from html.parser import HTMLParser

MAIN_CONTENT = (
    re.compile(r"<main\b[^>]*>"),
    re.compile(r"<(?:div|section)\b[^>]*role=\"main\"[^>]*>"),
    re.compile(r"<div\b[^>]*class=\"(?:body|document|content)\"[^>]*>"),
    re.compile(r"<div\b[^>]*id=\"(?:content|main|page-content|apicontent)\"[^>]*>"),
    re.compile(r"<article\b[^>]*>"),
    re.compile(r"<body\b[^>]*>"),
)
"""Where the content of a page begins, most specific first."""

BLOCKS = frozenset(
    {
        "p",
        "div",
        "section",
        "article",
        "ul",
        "ol",
        "dl",
        "table",
        "tr",
        "pre",
        "h1",
        "h2",
        "h3",
        "h4",
        "h5",
        "h6",
        "blockquote",
        "figure",
        "hr",
    }
)
LINES = frozenset({"li", "dt", "dd", "br"})
SKIPPED = frozenset(
    {"script", "style", "nav", "footer", "svg", "button", "form", "head", "noscript", "select"}
)
SKIPPED_CLASSES = frozenset(
    {
        "headerlink",
        "navheader",
        "navfooter",
        "sphinxsidebar",
        "related",
        "toctree-wrapper",
        "contents",
        "toc",
        "sidebar",
        "breadcrumbs",
        "srclink",
        "src-link",
        "anchor",
        "viewcode-link",
        "prev-next-area",
    }
)
VOID = frozenset(
    {
        "area",
        "base",
        "br",
        "col",
        "embed",
        "hr",
        "img",
        "input",
        "link",
        "meta",
        "source",
        "track",
        "wbr",
    }
)


class PageText(HTMLParser):
    """Collect the visible text of one element; preformatted text keeps its spaces."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._pre = 0
        self._skip_tag = ""
        self._skip_depth = 0
        self._root_tag = ""
        self._root_depth = 0
        self.done = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Open an element: count nesting, break lines, begin skipping."""
        if self.done:
            return
        if not self._root_tag:
            self._root_tag = tag
        if tag == self._root_tag:
            self._root_depth += 1
        if self._skip_depth:
            self._skip_depth += tag == self._skip_tag
            return
        # The root itself may carry a class such as "content": never skip that one.
        is_root = tag == self._root_tag and self._root_depth == 1
        if not is_root and (tag in SKIPPED or (tag not in VOID and self._unwanted(attrs))):
            self._skip_tag, self._skip_depth = tag, 1
            return
        if tag == "pre":
            self._pre += 1
        self._break(tag)
        if tag == "li":
            self.parts.append("- ")
        elif tag in {"td", "th"}:
            self.parts.append(" ")

    def handle_endtag(self, tag: str) -> None:
        """Close an element."""
        if self.done:
            return
        if tag == self._root_tag:
            self._root_depth -= 1
            self.done = self._root_depth <= 0
        if self._skip_depth:
            self._skip_depth -= tag == self._skip_tag
            return
        if tag == "pre":
            self._pre = max(0, self._pre - 1)
        self._break(tag)

    def handle_data(self, data: str) -> None:
        """Keep text, with runs of white space outside ``pre`` as one space."""
        if self.done or self._skip_depth:
            return
        self.parts.append(data if self._pre else re.sub(r"\s+", " ", data))

    def _break(self, tag: str) -> None:
        if tag in BLOCKS:
            self.parts.append("\n\n")
        elif tag in LINES:
            self.parts.append("\n")

    @staticmethod
    def _unwanted(attrs: list[tuple[str, str | None]]) -> bool:
        return any(
            key in {"class", "role"} and not SKIPPED_CLASSES.isdisjoint((value or "").split())
            for key, value in attrs
        )


def html_to_text(html: str) -> str:
    """Text of the page's main content: headings, paragraphs, lists, tables and code.

    Navigation, scripts, permalinks and sidebars are left out; at most one blank line stays between
    blocks.
    """
    start = next((m.start() for p in MAIN_CONTENT if (m := p.search(html))), 0)
    page = PageText()
    page.feed(html[start:])
    page.close()
    text = "".join(page.parts).replace("\u00b6", "").replace("\u00a0", " ")
    text = re.sub(r"[ \t]+\n", "\n", text)
    text = re.sub(r"(?m)^ (?=\S)", "", text)
    text = re.sub(r"\n-\s*\n+", "\n- ", text)
    text = re.sub(r"\n{2,}- ", "\n- ", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"
