"""Zip archives whose entries are checked before they are read: names, places, sizes, checksums."""

import struct
import zipfile
import zlib
from collections.abc import Iterator
from typing import IO, cast

from distill_jax.weights import common
from distill_jax.weights.common import File, shown, size_of

_LOCAL = struct.Struct("<4s5H3I2H")
_ENCRYPTED, _UTF8 = 0x1, 0x800


_MAX_DIRECTORY = 8 << 20


class _Directory:
    """A mapped file whose directory of entries is read if it is not too large."""

    def __init__(self, file: File):
        self.seek, self.tell, self._map = file.map.seek, file.map.tell, file.map

    def read(self, size: int = -1) -> bytes:
        if size > _MAX_DIRECTORY:
            raise zipfile.BadZipFile(f"its directory claims {size_of(size)}")
        return self._map.read(size)


class Member:
    """An entry of an archive, checked.

    Attributes:
      name: as the archive has it.
      size: bytes of its content.
      start: offset in the file of the content, which may be compressed.
    """

    def __init__(self, file: File, info: zipfile.ZipInfo):
        self.file, self.name, self.size = file, info.orig_filename, info.file_size
        self.stored = info.compress_type == zipfile.ZIP_STORED
        self.start = self._content(info)
        self.end = self.start + info.compress_size
        self.header, self.crc = info.header_offset, info.CRC
        if self.end > file.size:
            raise self.error("reaches beyond the end of the file")
        if self.stored and info.compress_size != info.file_size:
            raise self.error("is not compressed and has two sizes")

    def error(self, what: str, hint: str = "") -> common.WeightsError:
        return self.file.error(f"entry {shown(self.name)} {what}", hint)

    def _content(self, info: zipfile.ZipInfo) -> int:
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise self.error(f"is compressed by method {info.compress_type}", "stored or deflated")
        if info.flag_bits & _ENCRYPTED:
            raise self.error("is encrypted")
        at = info.header_offset
        if not 0 <= at <= self.file.size - _LOCAL.size:
            raise self.error("begins outside the file")
        local = _LOCAL.unpack_from(self.file.view, at)
        start = at + _LOCAL.size + local[9] + local[10]
        if local[0] != b"PK\3\4" or start > self.file.size:
            raise self.error("has no header where the directory says")
        name = self.file.bytes(at + _LOCAL.size, at + _LOCAL.size + local[9])
        encoding = "utf-8" if local[2] & _UTF8 else "cp437"
        if name.decode(encoding, "replace") != info.orig_filename or local[3] != info.compress_type:
            raise self.error("differs between the directory and its own header")
        return start

    def check(self) -> None:
        """Compares size and CRC-32 of the content with those of the directory.

        Raises:
          WeightsError: one of them differs.
        """
        if self.stored:
            crc = self.file.crc32(self.start, self.end)
        else:
            size = crc = 0
            for part in self._inflated():
                size, crc = size + len(part), zlib.crc32(part, crc)
            if size != self.size:
                raise self.error(f"has not the {size_of(self.size)} that the directory says")
        if crc != self.crc:
            raise self.error("has a wrong checksum (CRC-32)", "a file that is not damaged")

    def _inflated(self, most: int | None = None) -> Iterator[bytes]:
        """Yields the content in pieces, up to one beyond the declared size."""
        machine = zlib.decompressobj(-zlib.MAX_WBITS)
        left = (self.size if most is None else most) + 1
        try:
            for chunk in self.file.chunks(self.start, self.end):
                if machine.eof:
                    raise self.error("has bytes behind its compressed data")
                rest: bytes | memoryview = chunk
                while left > 0 and len(rest) and not machine.eof:
                    part = machine.decompress(rest, min(left, common.CHUNK))
                    rest = machine.unconsumed_tail
                    left -= len(part)
                    yield part
            if left > 0 and not machine.eof:
                raise self.error("is compressed data that ends too early")
            if machine.unused_data:
                raise self.error("has bytes behind its compressed data")
        except zlib.error as error:
            raise self.error(f"cannot be decompressed: {error}") from error

    def head(self, size: int) -> bytes:
        """Returns the first bytes of the content, as many as there are up to `size`."""
        size = min(size, self.size)
        if self.stored:
            return self.file.bytes(self.start, self.start + size)
        return b"".join(self._inflated(size))[:size]

    def content(self) -> memoryview:
        """Returns the checked content: mapped, or decompressed where it is compressed."""
        if self.stored:
            return self.file.view[self.start : self.end]
        content, at = bytearray(self.size), 0
        for part in self._inflated():
            content[at : at + len(part)] = part  # `check` has seen that they fit
            at += len(part)
        return memoryview(content).toreadonly()


def recognised(file: File) -> bool:
    return file.bytes(0, 4) == b"PK\3\4"


def members(file: File) -> dict[str, Member]:
    """Returns the entries of an archive, their contents checked.

    Raises:
      WeightsError: the archive is damaged, two entries have one name or one place, or they would
        expand to more than `EXPANSION` times the size of the file.
    """
    try:
        with zipfile.ZipFile(cast(IO[bytes], _Directory(file))) as archive:
            infos = archive.infolist()
    except Exception as error:  # on damaged directories, of many types
        why = f": {shown(str(error))[1:-1]}" if isinstance(error, zipfile.BadZipFile) else ""
        raise file.error(
            f"is no complete zip archive{why}",
            "a file that is not truncated or damaged",
        ) from error
    by_name: dict[str, Member] = {}
    for info in infos:
        member = Member(file, info)
        if member.name in by_name:
            raise member.error("is there twice")
        by_name[member.name] = member
    end = 0
    for member in sorted(by_name.values(), key=lambda m: m.header):
        if member.header < end:
            raise member.error("overlaps another one")
        end = member.end
    total = sum(member.size for member in by_name.values())
    if total > common.EXPANSION * file.size + common.SLACK:
        raise file.error(
            f"its entries would expand to {size_of(total)} from {size_of(file.size)}",
            "the same arrays saved without compression",
        )
    if len(by_name) > 1 and not any(member.crc for member in by_name.values()):
        raise file.error(
            "is an archive without checksums",
            "a file saved with torch.serialization.set_crc32_options(True), the default",
        )
    for member in by_name.values():
        member.check()
    return by_name
