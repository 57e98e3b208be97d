"""The bytes of a file, decompressed, and as UTF-8.

Intact data comes first, then `Unreadable` for the damage. What the format's own tool accepts, such as several
compressed streams in one file, is not damage.
"""

import bz2
import codecs
import contextlib
import lzma
import tempfile
import zlib
from collections.abc import Iterator
from typing import Any

from etils import epath

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd", ".bz2": "bzip2", ".xz": "xz"}
_READ_BYTES = 1 << 20
# Bytes of a compressed file read at a time: gzip's ratio is at most 1,032, zstd's 32,768.
_COMPRESSED_BYTES = {"gzip": 1 << 16, "zstd": 1 << 12, "bzip2": 1 << 12, "xz": 1 << 12}
_ZSTD_WINDOW = 1 << 31  # bytes, as `zstd --long=31`
# UTF-32's first: UTF-16's is a prefix of it.
_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_BYTES_A_RECORD = 1024  # assumed if no record of a file can be read


def compression_of(path: str) -> str:
    """The compression by a file's suffix; "": none."""
    return next((kind for suffix, kind in COMPRESSIONS.items() if path.endswith(suffix)), "")


class Unreadable(Exception):
    """A file cannot be read to its end; `unread`: the bytes after the damage over those before, None if unknown."""

    def __init__(self, reason: str, unread: float | None = None):
        super().__init__(reason)
        self.unread = unread

    def count_lost(self, records: int, path: str) -> int:
        """An estimate of the lost records where `records` were read: as many again if nothing is known."""
        if not records:
            return max(1, epath.Path(path).stat().length // _BYTES_A_RECORD)
        return max(1, round(records * (1.0 if self.unread is None else self.unread)))


def read_utf8(path: str) -> Iterator[bytes]:
    """Non-empty chunks of a file's text as UTF-8 without byte-order mark, by which UTF-16 and UTF-32 are known.

    UTF-8 itself is not checked. Raises `Unreadable` after the intact data.
    """
    return filter(None, _read_utf8(path))


def _read_utf8(path: str) -> Iterator[bytes]:
    chunks = read_bytes(path)
    head = b""
    for chunk in chunks:
        head += chunk
        if len(head) >= 4:
            break
    encoding = next((name for mark, name in _MARKS.items() if head.startswith(mark)), "")
    if encoding in ("", "utf-8-sig"):
        yield head.removeprefix(codecs.BOM_UTF8)
        yield from chunks
        return
    decoder = codecs.getincrementaldecoder(encoding)()
    try:
        yield decoder.decode(head).encode()
        for chunk in chunks:
            yield decoder.decode(chunk).encode()
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise Unreadable(f"invalid {encoding.upper()}, by its byte-order mark: {error.reason}") from error


def read_bytes(path: str) -> Iterator[bytes]:
    """The bytes of a file, decompressed as its suffix says; raises `Unreadable` after the intact data."""
    with epath.Path(path).open("rb") as file:
        if compression := compression_of(path):
            yield from _decompress(file, compression, epath.Path(path).stat().length)
            return
        while chunk := file.read(_READ_BYTES):
            yield bytes(chunk)


def _decompress(file: Any, compression: str, size: int) -> Iterator[bytes]:
    import zstandard

    decoder: Any = None
    read = streams = 0
    while data := bytes(file.read(_COMPRESSED_BYTES[compression])):
        read += len(data)
        while data:
            if decoder is None:
                if streams and compression in ("gzip", "xz"):
                    data = data.lstrip(b"\0")  # padding, which these ignore
                decoder = _decoder(compression) if data else None
                continue
            snapshot = decoder.copy() if compression == "gzip" else None
            try:
                yield decoder.decompress(data)
            except (zlib.error, zstandard.ZstdError, lzma.LZMAError, OSError) as error:  # OSError: of bzip2
                if snapshot is not None:
                    yield from _up_to_error(snapshot, data)
                # A checksum is of the whole stream: any part of it may be wrong.
                is_checksum = "check" in str(error) and "header check" not in str(error)
                unread = None if is_checksum else (size - read) / read
                raise Unreadable(f"damaged {compression}: {error}", unread) from error
            data = decoder.unused_data
            decoder, streams = (None, streams + 1) if decoder.eof else (decoder, streams)
    if decoder is not None or not streams:
        raise Unreadable(f"its {compression} stream ends early" if size else "the file is empty")


def _up_to_error(decoder: Any, data: bytes) -> Iterator[bytes]:
    """The output of gzip for the bytes before the one at which it fails."""
    with contextlib.suppress(zlib.error):
        for byte in data:
            yield decoder.decompress(bytes([byte]))


def _decoder(compression: str) -> Any:
    import zstandard

    match compression:
        case "gzip":
            return zlib.decompressobj(wbits=31)
        case "bzip2":
            return bz2.BZ2Decompressor()
        case "xz":
            return lzma.LZMADecompressor()
    return zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW).decompressobj()


@contextlib.contextmanager
def decompressed_copy(path: str) -> Iterator[tuple[str, Unreadable | None]]:
    """(a local file with the intact data of a compressed one, its damage)."""
    with tempfile.NamedTemporaryFile() as file:
        damage = None
        try:
            for chunk in read_bytes(path):
                file.write(chunk)
        except Unreadable as error:
            damage = error
        file.flush()
        yield file.name, damage
