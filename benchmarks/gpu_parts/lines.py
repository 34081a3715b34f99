"""A file of JSON lines that only grows, so that what was written stays whatever becomes of the writer."""

import json
from pathlib import Path
from typing import Any


class Lines:
    """One JSON object a line; a line that a killed process left half written is passed over.

    Args:
        path: of the file, which the first `append` makes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[dict[str, Any]]:
        """All whole lines, in order."""
        if not self.path.exists():
            return []
        rows = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue  # half a line
            if isinstance(row, dict):
                rows.append(row)
        return rows

    def append(self, row: dict[str, Any]) -> None:
        """Writes a line at once."""
        torn = self.path.exists() and self.path.read_bytes()[-1:] not in (b"", b"\n")
        with self.path.open("a", encoding="utf-8") as file:
            file.write(("\n" if torn else "") + json.dumps(row, ensure_ascii=False) + "\n")
