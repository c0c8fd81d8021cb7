"""Fenced blocks of a Markdown page: what to run, what to write and what only to check."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_FENCE = re.compile(r"^```(\S+)[ \t]*(.*?)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Attributes:
        language: The first word after the fence.
        note: The rest of that line: ``checked``, or a file to write the block to.
        line: Where it begins in the page.
    """

    language: str
    note: str
    text: str
    line: int

    @property
    def commands(self) -> list[list[str]]:
        """The words of each command of a shell block."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [shlex.split(line, comments=True) for line in lines if shlex.split(line, True)]


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page, in order."""
    text = page.read_text()
    for found in _FENCE.finditer(text):
        language, note, body = found.groups()
        yield Block(language, note.strip(), body, text.count("\n", 0, found.start()) + 1)
