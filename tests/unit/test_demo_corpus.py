"""What goes into the demo model's corpus, and that the held-out part stays apart."""

from __future__ import annotations

from pathlib import Path

from kvtrace_recorder.demo.corpus import (
    SOURCES,
    Document,
    Source,
    deduplicate,
    documents,
    is_heldout,
)

PERMISSIVE = {
    "PSF-2.0",
    "PostgreSQL",
    "MIT",
    "Apache-2.0",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "Apache-2.0 WITH LLVM-exception",
    "LicenseRef-public-domain",
}


def test_every_source_is_permissive() -> None:
    for source in SOURCES:
        assert set(source.licence.split(" OR ")) <= PERMISSIVE, source.name
    assert len({s.name for s in SOURCES}) == len(SOURCES)


def test_paragraphs_are_kept_once() -> None:
    shared, own = "shared " * 30, "own text " * 60
    first, second = deduplicate(
        [
            Document("a", "1", f"{shared}\n\n{own}1"),
            Document("a", "2", f"{shared}\n\nshort\n\n{own}2"),
        ]
    )
    assert shared in first.text
    assert shared not in second.text
    assert "short" in second.text


def test_the_split_depends_on_the_path_alone() -> None:
    docs = [Document("package", f"page-{n}.html", "") for n in range(2000)]
    held = [d for d in docs if is_heldout(d)]
    assert 15 < len(held) < 80
    assert [is_heldout(Document(d.source, d.path, "other text")) for d in docs] == [
        is_heldout(d) for d in docs
    ]


def test_documents_follow_the_filters_and_the_cap(tmp_path: Path) -> None:
    root = tmp_path / "src" / "package" / "html"
    root.mkdir(parents=True)
    paragraph = "A sentence that says nothing new. " * 30
    for n in range(20):
        (root / f"page{n}.html").write_text(f"<body><p>{paragraph}{n}</p></body>")
    (root / "genindex.html").write_text(f"<body>{paragraph}</body>")
    (root / "tiny.html").write_text("<body>Moved.</body>")
    (root / "ja.html").write_text("<body>" + "文書" * 400 + "</body>")

    everything = documents(Source("package", "MIT", exclude="genindex"), tmp_path)
    assert {Path(d.path).name for d in everything} == {f"page{n}.html" for n in range(20)}
    capped = documents(Source("package", "MIT", exclude="genindex", cap_mb=0.005), tmp_path)
    assert capped == everything[: len(capped)]
    assert 0.005e6 < sum(len(d.text) for d in capped) < 0.008e6
