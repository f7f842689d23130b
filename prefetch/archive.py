"""Zip archives as `torch.save` writes them: where in the file each record's bytes lie. Reads no record itself.

Stricter than zip files in general, so that there is one way to read each: the end record is the last thing in the file,
the directory lies right before it, no name is there twice, and what is read is neither compressed nor encrypted.

Format: https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT, sections 4.3 and 4.5.3.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import NoReturn

from weightstream.errors import HeaderError, UnsupportedFormatError
from weightstream.prefetch.opening import read_exactly

__all__ = ["MAX_DIRECTORY_BYTES", "Archive", "Record"]

#: Our own limit, 100,000 records and more; a record takes at most some 20 times its entry in memory.
MAX_DIRECTORY_BYTES = 2**24

_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR64 = struct.Struct("<4sLQL")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
#: Numbers that are too large for their place in the end record: entries here, in all, bytes, and the beginning.
_MARKS = (0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF)
_MARK32 = 0xFFFFFFFF

#: Flags of an entry: encrypted, a patch, strongly encrypted, with a hidden header.
_NOT_PLAIN = 0x1 | 0x20 | 0x40 | 0x2000

#: In the attributes of an entry. The bytes of a folder are none.
_FOLDER = 0x10


@dataclass(frozen=True, slots=True)
class Record:
    """One file in an archive: where its own header begins, how many bytes it has, and whether they are plain."""

    header: int
    num_bytes: int
    is_plain: bool


class Archive:
    """The directory of an archive.

    Args:
        fd: a descriptor of the file; its position is neither used nor moved.
        file_bytes: the file's length.
        file: its name, for messages.

    Attributes:
        records: every record by name.
        prefix: what the names of torch's own records begin with, up to the first slash.

    Raises:
        HeaderError: the archive breaks the format, or the rules above.
        ReadError: the operating system refused a read.
    """

    def __init__(self, fd: int, file_bytes: int, *, file: str) -> None:
        self._fd = fd
        self._file = file
        self.records: dict[str, Record] = {}
        begin, end, count = self._find_directory(file_bytes)
        self._data_end = begin
        self._read_directory(read_exactly(fd, end - begin, begin, file), count)
        self.prefix = next(iter(self.records)).partition("/")[0]

    def locate(self, name: str) -> int:
        """Return where a record's bytes begin. It costs one small read: padding before them is not in the directory.

        Raises:
            HeaderError: what stands before the bytes is not this record's header.
            UnsupportedFormatError: the record is compressed or encrypted.
            ReadError: the operating system refused a read.
        """
        record = self.records[name]
        if not record.is_plain:
            raise UnsupportedFormatError(
                "a record of the archive is compressed, encrypted, or a folder",
                file=self._file,
                actual=name,
                hint="Load it with torch and save it again",
            )
        raw_name = name.encode()
        if record.header + _LOCAL.size + len(raw_name) > self._data_end:
            self._refuse("a record's header does not lie before the directory", name)
        raw = read_exactly(self._fd, _LOCAL.size + len(raw_name), record.header, self._file)
        signature, _, _, method, _, _, _, _, _, name_bytes, extra_bytes = _LOCAL.unpack_from(raw)
        if signature != b"PK\3\4" or method != 0 or name_bytes != len(raw_name) or raw[_LOCAL.size :] != raw_name:
            self._refuse("a record's own header is not what the directory says", name)
        begin: int = record.header + _LOCAL.size + name_bytes + extra_bytes
        if begin + record.num_bytes > self._data_end:
            self._refuse("a record does not end before the directory", name)
        return begin

    def read(self, name: str) -> bytes:
        """Return a record's bytes."""
        return read_exactly(self._fd, self.records[name].num_bytes, self.locate(name), self._file)

    def _find_directory(self, file_bytes: int) -> tuple[int, int, int]:
        """Return where the directory begins and ends, and its number of entries."""
        at = file_bytes - _END.size
        if at < 0:
            self._refuse("the file is truncated: there is no end record")
        signature, disk, first_disk, here, count, size, begin, comment = _END.unpack(
            read_exactly(self._fd, _END.size, at, self._file)
        )
        if signature != b"PK\5\6" or comment:
            self._refuse("the file is truncated, or longer than its archive: it does not end with the end record")
        long = self._find_directory64(at)
        if long is not None:  # torch writes it whether the numbers need it or not
            for short, number, mark in zip((here, count, size, begin), long[1:], _MARKS, strict=True):
                if short not in (number, mark):
                    self._refuse("the two end records do not agree")
            at, here, count, size, begin = long
        if disk or first_disk or here != count or begin + size != at:
            self._refuse("the directory does not lie right before the end record")
        if size > MAX_DIRECTORY_BYTES:
            self._refuse(f"the directory has {size} bytes, more than {MAX_DIRECTORY_BYTES}")
        if not count:
            self._refuse("the archive is empty")
        return begin, at, count

    def _find_directory64(self, end: int) -> tuple[int, int, int, int, int] | None:
        """Return where the long end record begins and its numbers, or None where there is none before the short one."""
        where = end - _LOCATOR64.size
        if where < _END64.size:
            return None
        signature, disk, at, disks = _LOCATOR64.unpack(read_exactly(self._fd, _LOCATOR64.size, where, self._file))
        if signature != b"PK\6\7":
            return None
        if disk or disks != 1 or at != where - _END64.size:
            self._refuse("the locator does not lie right behind the long end record")
        signature, size, _, _, disk, first_disk, here, count, length, begin = _END64.unpack(
            read_exactly(self._fd, _END64.size, at, self._file)
        )
        if signature != b"PK\6\6" or size != _END64.size - 12 or disk or first_disk:
            self._refuse("the long end record is not valid")
        return at, here, count, length, begin

    def _read_directory(self, raw: bytes, count: int) -> None:
        position = 0
        while position < len(raw):
            if position + _ENTRY.size > len(raw):
                self._refuse("the directory ends inside an entry")
            fields = _ENTRY.unpack_from(raw, position)
            signature, _, _, flags, method, _, _, _, stored, size, name_bytes, extra_bytes, comment_bytes = fields[:13]
            position += _ENTRY.size
            rest = raw[position : position + name_bytes + extra_bytes]
            position += name_bytes + extra_bytes + comment_bytes
            if signature != b"PK\1\2" or fields[13] or position > len(raw):
                self._refuse("an entry of the directory is not valid")
            try:
                name = rest[:name_bytes].decode()
            except UnicodeDecodeError:
                self._refuse("a name in the directory is not UTF-8")
            size, stored, header = self._long(name, rest[name_bytes:], size, stored, fields[16])
            if name in self.records:
                self._refuse("a name is there twice", name)
            if header + _LOCAL.size + max(stored, size) > self._data_end:  # also of one that is never located
                self._refuse("a record does not end before the directory", name)
            is_plain = not flags & _NOT_PLAIN and not fields[15] & _FOLDER and method == 0 and stored == size
            self.records[name] = Record(header, size, is_plain)
        if len(self.records) != count:
            self._refuse(f"the directory has {len(self.records)} entries, and the end record says {count}")

    def _long(self, name: str, extra: bytes, *values: int) -> list[int]:
        """Replace numbers that did not fit into 32 bits by those in the extra field."""
        found = list(values)
        position = 0
        while _MARK32 in found:
            if position + 4 > len(extra):
                self._refuse("a long number is missing", name)
            kind, length = struct.unpack_from("<HH", extra, position)
            position += 4
            if kind == 1:
                long = iter(struct.unpack_from(f"<{min(length, len(extra) - position) // 8}Q", extra, position))
                found = [next(long, value) if value == _MARK32 else value for value in found]
                break
            position += length
        if max(found) >= 2**63:
            self._refuse("a number has more than 63 bits", name)
        return found

    def _refuse(self, what: str, name: str | None = None) -> NoReturn:
        raise HeaderError(what, file=self._file, actual=name, hint="The file is damaged: fetch it again")
