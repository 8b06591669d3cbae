"""Collect the demo model's training text from documentation packages.

Every source is a Debian documentation package, Python's own standard library or the NumPy wheel;
all are under permissive licences, named in `SOURCES`. Run on Debian 12 or a derivative of it::

    python -m kvtrace_recorder.demo.corpus --work DIR

which downloads the packages by name with ``apt-get download`` (nothing is installed, no root
needed), turns HTML into text, drops duplicates and writes ``DIR/corpus/{train,heldout}.jsonl`` and
``DIR/corpus/sources.json``. The text itself is not part of the repository.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from kvtrace_recorder.demo.html_text import html_to_text

HELDOUT_EVERY = 50
"""One document in this many, chosen by the hash of its path, is never trained on."""
MIN_CHARS = 400
"""Shorter documents are navigation pages and redirects."""
MAX_FILE_BYTES = 3_000_000
"""Larger HTML files are generated indexes."""
MIN_ASCII_SHARE = 0.85
"""Below this a document is a translation: the model is too small for several languages."""


@dataclass(frozen=True)
class Source:
    """One package of text.

    Parameters
    ----------
    name
        Debian package, or ``stdlib`` / ``numpy`` for Python files of this interpreter.
    licence
        SPDX expression of the text.
    include, exclude
        Regular expressions searched for in the path inside the package.
    cap_mb
        At most this much text (10^6 characters) is kept, so that no source dominates.
    """

    name: str
    licence: str
    include: str = r"\.html$"
    exclude: str = r"$^"
    cap_mb: float = 8.0


SPHINX_JUNK = r"_modules/|genindex|search\.html|modindex|_static|_sources"
SOURCES = (
    Source("stdlib", "PSF-2.0", r"\.py$", r"/(test|tests|site-packages|pydoc_data|idlelib)/", 12),
    Source("numpy", "BSD-3-Clause", r"\.py$", r"/tests?/", 6),
    Source("python3.11-doc", "PSF-2.0", exclude=SPHINX_JUNK, cap_mb=14),
    Source("postgresql-doc-15", "PostgreSQL", cap_mb=12),
    Source(
        "rust-doc",
        "MIT OR Apache-2.0",
        r"html/(book|reference|nomicon|rust-by-example|edition-guide|embedded-book|rustc|rustdoc"
        r"|unstable-book|std)/.*\.html$",
        r"std/(arch|simd|primitive|os/|intrinsics)|/all\.html|print\.html|src/",
        12,
    ),
    Source("python-django-doc", "BSD-3-Clause", exclude=SPHINX_JUNK),
    Source("python-sqlalchemy-doc", "MIT", exclude=SPHINX_JUNK + "|changelog", cap_mb=7),
    Source("python-scipy-doc", "BSD-3-Clause", exclude=SPHINX_JUNK, cap_mb=7),
    Source("python-sklearn-doc", "BSD-3-Clause", exclude=SPHINX_JUNK),
    Source("python-statsmodels-doc", "BSD-3-Clause", exclude=SPHINX_JUNK + "|/dev/", cap_mb=4),
    Source("python-sympy-doc", "BSD-3-Clause", exclude=SPHINX_JUNK, cap_mb=6),
    Source("python-astropy-doc", "BSD-3-Clause", exclude=SPHINX_JUNK, cap_mb=5),
    Source("python-skimage-doc", "BSD-3-Clause", exclude=SPHINX_JUNK, cap_mb=3),
    Source("python-dask-doc", "BSD-3-Clause", exclude=SPHINX_JUNK, cap_mb=4),
    Source("python-xarray-doc", "Apache-2.0", exclude=SPHINX_JUNK),
    Source("numba-doc", "BSD-2-Clause", exclude=SPHINX_JUNK, cap_mb=3),
    Source("cython-doc", "Apache-2.0", exclude=SPHINX_JUNK),
    Source("python-ipython-doc", "BSD-3-Clause", exclude=SPHINX_JUNK),
    Source("sphinx-doc", "BSD-2-Clause", exclude=SPHINX_JUNK),
    Source("docutils-doc", "LicenseRef-public-domain", exclude=SPHINX_JUNK),
    Source("python-pytest-doc", "MIT", exclude=SPHINX_JUNK),
    Source("mypy-doc", "MIT", exclude=SPHINX_JUNK),
    Source("python-setuptools-doc", "MIT", exclude=SPHINX_JUNK),
    Source("python-cryptography-doc", "Apache-2.0 OR BSD-3-Clause", exclude=SPHINX_JUNK),
    Source("python-flask-doc", "BSD-3-Clause", exclude=SPHINX_JUNK),
    Source("python-jinja2-doc", "BSD-3-Clause", exclude=SPHINX_JUNK),
    Source("python-werkzeug-doc", "BSD-3-Clause", exclude=SPHINX_JUNK),
    Source("python-requests-doc", "Apache-2.0", exclude=SPHINX_JUNK),
    Source("python-aiohttp-doc", "Apache-2.0", exclude=SPHINX_JUNK),
    Source("python-tornado-doc", "Apache-2.0", exclude=SPHINX_JUNK),
    Source("python-scrapy-doc", "BSD-3-Clause", exclude=SPHINX_JUNK),
    Source("twisted-doc", "MIT", exclude=SPHINX_JUNK, cap_mb=4),
    Source("sqlite3-doc", "LicenseRef-public-domain", exclude=r"releaselog|syntax/"),
    Source("nodejs-doc", "MIT", exclude=r"/all\.html"),
    Source("apache2-doc", "Apache-2.0", r"manual/en/.*\.html$"),
    Source("erlang-doc", "Apache-2.0", exclude=r"/wx-|/java/|notes\.html|index\.html", cap_mb=7),
    Source(
        "llvm-14-doc",
        "Apache-2.0 WITH LLVM-exception",
        exclude=SPHINX_JUNK + "|AMDGPU/|CodeOfConduct",
    ),
    Source("cmake-doc", "BSD-3-Clause", exclude=SPHINX_JUNK, cap_mb=4),
    Source("ghc-doc", "BSD-3-Clause", r"users_guide/.*\.html$|libraries/base.*\.html$", "/src/", 5),
    Source("libboost1.81-doc", "BSL-1.0", cap_mb=6),
)


@dataclass(frozen=True)
class Document:
    """A page of text: the package it came from, its path inside it, and the text."""

    source: str
    path: str
    text: str


def tool(name: str) -> str:
    """Full path of one of Debian's package tools."""
    path = shutil.which(name)
    if path is None:
        raise FileNotFoundError(f"{name} was not found; the corpus is made of Debian packages")
    return path


def fetch(names: Iterable[str], work: Path) -> None:
    """Download Debian packages and unpack them under ``work/src/NAME``, skipping those there."""
    debs = work / "debs"
    debs.mkdir(parents=True, exist_ok=True)
    for name in names:
        target = work / "src" / name
        if target.exists():
            continue
        if not list(debs.glob(f"{name}_*.deb")):
            subprocess.run([tool("apt-get"), "download", name], cwd=debs, check=True)
        (deb,) = debs.glob(f"{name}_*.deb")
        target.mkdir(parents=True)
        subprocess.run([tool("dpkg-deb"), "-x", deb, target], check=True)


def root_of(source: Source, work: Path) -> Path:
    """Folder that holds the source's files."""
    if source.name == "stdlib":
        return Path(sysconfig.get_paths()["stdlib"])
    if source.name == "numpy":
        spec = find_spec("numpy")
        if spec is None or spec.origin is None:
            raise FileNotFoundError("numpy is not installed; the corpus reads its docstrings")
        return Path(spec.origin).parent
    return work / "src" / source.name


def fingerprint(text: str) -> int:
    """64-bit hash that is the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def documents(source: Source, work: Path) -> list[Document]:
    """Texts of a source in an order fixed by their paths' hashes, up to its cap."""
    root = root_of(source, work)
    include, exclude = re.compile(source.include), re.compile(source.exclude)
    paths = [
        path
        for path in root.rglob("*")
        if path.suffix in {".html", ".py"} and path.is_file() and not path.is_symlink()
    ]
    inner = {path.relative_to(root).as_posix(): path for path in paths}
    chosen = [p for p in inner if include.search("/" + p) and not exclude.search("/" + p)]
    kept: list[Document] = []
    chars = 0
    for name in sorted(chosen, key=fingerprint):
        if chars > source.cap_mb * 1e6:
            break
        if inner[name].stat().st_size > MAX_FILE_BYTES:
            continue
        raw = inner[name].read_text(encoding="utf-8", errors="replace")
        text = raw if name.endswith(".py") else html_to_text(raw)
        if len(text) < MIN_CHARS or ascii_share(text) < MIN_ASCII_SHARE:
            continue
        kept.append(Document(source.name, name, text))
        chars += len(text)
    return kept


def ascii_share(text: str) -> float:
    """Share of characters below U+0080."""
    return len(text.encode("ascii", "ignore")) / len(text)


def deduplicate(docs: Iterable[Document]) -> Iterator[Document]:
    """Drop every paragraph of 80 characters or more that an earlier document already had.

    Generated references repeat licence headers, inherited methods and navigation on every page; a
    paragraph seen once is enough, and one seen in the held-out part must not be trained on.
    """
    seen: set[int] = set()
    for doc in docs:
        fresh = []
        for paragraph in doc.text.split("\n\n"):
            if len(paragraph) >= 80:
                key = fingerprint(paragraph)
                if key in seen:
                    continue
                seen.add(key)
            fresh.append(paragraph)
        text = "\n\n".join(fresh)
        if len(text) >= MIN_CHARS:
            yield Document(doc.source, doc.path, text)


def is_heldout(doc: Document) -> bool:
    """Whether a document belongs to the part that is never trained on."""
    return fingerprint(f"{doc.source}/{doc.path}") % HELDOUT_EVERY == 0


def build(work: Path, workers: int) -> None:
    """Write ``work/corpus``: two JSON-lines files and a table of sources."""
    fetch((s.name for s in SOURCES if s.name not in {"stdlib", "numpy"}), work)
    with ProcessPoolExecutor(workers) as pool:
        found = list(pool.map(partial(documents, work=work), SOURCES))
    # Held-out documents come first, so that a shared paragraph stays with them alone.
    docs = sorted((d for part in found for d in part), key=lambda d: not is_heldout(d))
    out = work / "corpus"
    out.mkdir(parents=True, exist_ok=True)
    totals = {s.name: {**asdict(s), "train_bytes": 0, "heldout_bytes": 0} for s in SOURCES}
    with (out / "train.jsonl").open("w") as train, (out / "heldout.jsonl").open("w") as heldout:
        for doc in deduplicate(docs):
            held = is_heldout(doc)
            (heldout if held else train).write(json.dumps(asdict(doc)) + "\n")
            key = "heldout_bytes" if held else "train_bytes"
            totals[doc.source][key] += len(doc.text.encode())
    (out / "sources.json").write_text(json.dumps(list(totals.values()), indent=1))


def main() -> None:
    """Parse the command line and build the corpus."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for downloads and text")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    build(args.work, args.workers)


if __name__ == "__main__":
    main()
