"""Whether a library is all there: what maps one of which the end is missing dies of it, with no error to catch."""

from __future__ import annotations

import struct
from pathlib import Path

MAGIC = b"\x7fELF"


def missing(path: Path) -> str:
    """What says that the file was cut off, "" where nothing does. Other formats are for the system's loader to check.

    The section table is the last thing that a linker writes, and what is loaded is in the program table.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(64)
        if not head.startswith(MAGIC):
            return "" if size else "the file is empty"
        try:
            order, wide = "<>"[head[5] - 1], head[4] == 2
            *_, programs, sections, _, _, each, n_programs, section, n_sections, _ = struct.unpack_from(
                f"{order}16sHHI{'QQQ' if wide else 'III'}IHHHHHH", head
            )
            ends = [sections + section * n_sections, programs + each * n_programs]
            file.seek(programs)
            table = file.read(each * n_programs)
            for k in range(n_programs):
                entry = struct.unpack_from(f"{order}{'IIQQQQ' if wide else 'IIIII'}", table, k * each)
                ends.append((entry[2] + entry[5]) if wide else (entry[1] + entry[4]))
        except (struct.error, IndexError):
            return "its headers are cut off"
    return f"it ends at byte {size} of {max(ends)}" if max(ends) > size else ""
