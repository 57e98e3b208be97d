"""Fetches code in six languages, manuals and a book from Debian packages, as JSON Lines with their licenses.

    python examples/real_corpora/fetch.py [DIRECTORY]     # default: corpora

Needs Debian or Ubuntu with a current package index (`apt-get update`), but no root: packages are downloaded and
unpacked, not installed. RFCs are added to the manuals if the index has them (Debian's section non-free).
Downloads about 110 MB and keeps at most `CORPUS_BYTES` of each corpus.
"""

import dataclasses
import gzip
import hashlib
import html.parser
import json
import lzma
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

CORPUS_BYTES = 12 << 20
FILE_BYTES = 200, 200 << 10  # smaller and larger files are skipped
_UNWANTED = re.compile(
    r"(^|/)(tests?|testdata|vendor|unsupported|po|changelog[^/]*|copyright)(/|$)", re.IGNORECASE
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
    """Files of Debian packages.

    Attributes:
      packages: patterns of their names; the newest of several versions is used.
      suffixes: file name suffixes or patterns.
      optional: patterns of packages that are used if the index has them.
      license: as in the packages' `copyright` files, which are kept in `licenses/`.
    """

    packages: tuple[str, ...]
    suffixes: tuple[str, ...]
    license: str
    optional: tuple[str, ...] = ()


CORPORA = {
    "python": Corpus(packages=(r"libpython3\.\d+-stdlib",), suffixes=(".py",), license="PSF-2.0"),
    "go": Corpus(packages=(r"golang-1\.\d+-src",), suffixes=(".go",), license="BSD-3-Clause"),
    "rust": Corpus(packages=("rust-src",), suffixes=(".rs",), license="MIT OR Apache-2.0"),
    "c": Corpus(packages=("glibc-source",), suffixes=(".c", ".h"), license="LGPL-2.1-or-later and others"),
    "cpp": Corpus(packages=("libeigen3-dev",), suffixes=(".h", ""), license="MPL-2.0"),
    "ruby": Corpus(packages=(r"libruby\d+\.\d+",), suffixes=(".rb",), license="Ruby OR BSD-2-Clause"),
    "manuals": Corpus(
        packages=("debian-handbook", "debian-reference-en", "developers-reference", "git-doc"),
        suffixes=(
            *("en-US/*.html", ".en.txt.gz", "developers-reference.txt.gz", "git-doc/*.txt"),
            "RFC/*/rfc*.txt.gz",
        ),
        license="GPL-2.0-or-later (handbook also CC-BY-SA-3.0; RFCs: IETF Trust)",
        optional=("doc-rfc-fyi-bcp",),
    ),
    "book": Corpus(
        packages=("anarchism",), suffixes=(".html",), license="GFDL-1.1-or-later OR GPL-2.0-or-later"
    ),
}


class _Text(html.parser.HTMLParser):
    """The text of an HTML page, one paragraph per block."""

    BLOCKS = frozenset(
        ("p", "h1", "h2", "h3", "h4", "li", "pre", "div", "td", "dt", "dd", "blockquote", "br")
    )
    HIDDEN = frozenset(("script", "style", "head", "nav"))

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.hidden = 0

    def handle_starttag(self, tag, attrs):
        self.hidden += tag in self.HIDDEN
        if tag in self.BLOCKS:
            self.parts.append("\n\n")

    def handle_endtag(self, tag):
        self.hidden -= tag in self.HIDDEN
        if tag in self.BLOCKS:
            self.parts.append("\n\n")

    def handle_data(self, data):
        if not self.hidden:
            self.parts.append(data)


def page_text(page: str) -> str:
    """An HTML page's text: one line per paragraph, separated by empty lines."""
    reader = _Text()
    reader.feed(page)
    reader.close()
    paragraphs = re.split(r"\n\s*\n", "".join(reader.parts))
    return "\n\n".join(text for text in (re.sub(r"\s+", " ", part).strip() for part in paragraphs) if text)


def read_text(path: Path) -> str:
    """A file's text; "" if it is not UTF-8."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return ""
    return page_text(text) if path.suffix == ".html" else text


def documents(root: Path, corpus: Corpus) -> Iterator[dict[str, str]]:
    """The documents of an unpacked corpus, ordered by hash, up to `CORPUS_BYTES`."""
    left = CORPUS_BYTES
    files = [path for path in root.rglob("*") if path.is_file() and not path.is_symlink()]
    files = [path for path in files if _matches(path.relative_to(root).as_posix(), corpus.suffixes)]
    for path in sorted(files, key=lambda path: hashlib.sha256(str(path.relative_to(root)).encode()).digest()):
        text = read_text(path)
        size = len(text.encode())
        if (
            FILE_BYTES[0] <= size <= (FILE_BYTES[1] if path.suffix not in (".html", ".gz") else left)
            and size <= left
        ):
            left -= size
            yield {"text": text, "id": path.relative_to(root).as_posix(), "license": corpus.license}


def _matches(path: str, suffixes: tuple[str, ...]) -> bool:
    if _UNWANTED.search(path):
        return False
    name = path.rpartition("/")[2]
    return any(
        Path(path).match(suffix) if "*" in suffix else name.endswith(suffix) if suffix else "." not in name
        for suffix in suffixes
    )


def newest(pattern: str) -> str:
    """The package of the newest version whose name matches; "" without one."""
    prefix = re.match(r"[a-z-]*", pattern)[0]  # type: ignore[index]
    names = subprocess.run(
        ["apt-cache", "pkgnames", prefix], capture_output=True, text=True, check=True
    ).stdout
    found = [name for name in names.split() if re.fullmatch(pattern, name)]
    return max(found, default="", key=lambda name: [int(number) for number in re.findall(r"\d+", name)])


def packages_of(corpus: Corpus) -> list[str]:
    """The packages of the index; exits where one is missing that is not optional."""
    found = {pattern: newest(pattern) for pattern in (*corpus.packages, *corpus.optional)}
    for pattern, package in found.items():
        if not package and pattern in corpus.packages:
            sys.exit(
                f"there is no Debian package {pattern}: run `apt-get update` once as root, or edit CORPORA"
            )
        if not package:
            print(f"{pattern} is not in the package index: skipped", flush=True)
    return [package for package in found.values() if package]


def unpack(package: str, root: Path) -> None:
    """Downloads a package and unpacks it, with the source archive in it, into `root/PACKAGE`."""
    # As root, apt would download as another user, who cannot write to `root`, and warn of it.
    command = ["apt-get", "download", "-q", "-o", "APT::Sandbox::User=root", package]
    subprocess.run(command, cwd=root, check=True, stdout=subprocess.DEVNULL)
    (archive,) = root.glob(f"{package}_*.deb")
    subprocess.run(["dpkg-deb", "-x", archive, root / package], check=True)
    archive.unlink()
    for file in list((root / package).rglob("*.tar.xz")):
        with lzma.open(file) as stream, tarfile.open(fileobj=stream) as tar:  # type: ignore[arg-type]
            tar.extractall(file.parent, filter="data")


def main(directory: Path) -> None:
    if not shutil.which("apt-get"):
        sys.exit("this example needs Debian or Ubuntu: there is no apt-get here")
    (directory / "licenses").mkdir(parents=True, exist_ok=True)
    for name, corpus in CORPORA.items():
        target = directory / f"{name}.jsonl"
        if target.exists():
            continue
        with tempfile.TemporaryDirectory() as temporary:
            root = Path(temporary)
            for package in packages_of(corpus):
                unpack(package, root)
                for file in (root / package).glob("usr/share/doc/*/copyright"):
                    shutil.copy(file, directory / f"licenses/{package}")
            lines = [json.dumps(document) for document in documents(root, corpus)]
        part = target.with_suffix(".part")  # half a file would be taken for a finished one
        part.write_text("\n".join(lines) + "\n")
        part.rename(target)
        print(
            f"{target}: {len(lines):,} documents, {target.stat().st_size:,} bytes, {corpus.license}",
            flush=True,
        )


if __name__ == "__main__":
    main(Path(*sys.argv[1:2] or ["corpora"]))
