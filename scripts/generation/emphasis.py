"""The weights of a prompt: (word) counts for 1.1 times as much, (word:1.3) for 1.3, [word] for
1/1.1. Written from the description of the syntax that web UIs share.

Brackets nest, and their factors multiply. A backslash before a bracket makes it a letter, as does
having no partner.
"""

from __future__ import annotations

import re

from train.config import UserError

STEP = 1.1
MOST = 10.0
_TOKEN = re.compile(r"\\[()\[\]\\]|[(\[]|:\s*(?P<factor>[+-]?(?:\d+\.?\d*|\.\d+))\s*\)|[)\]]")

Piece = tuple[str, float]


def pieces(prompt: str) -> list[Piece]:
    """The prompt without its brackets, in pieces of one weight each; of an empty one none.

    Raises UserError for a weight beyond 10 or below -10.
    """
    found = _Pieces()
    end = 0
    for match in _TOKEN.finditer(prompt):
        found.add(prompt[end : match.start()])
        found.take(match)
        end = match.end()
    found.add(prompt[end:])
    return found.joined()


class _Pieces:
    def __init__(self) -> None:
        self._texts: list[str] = []
        self._weights: list[float] = []
        self._open: list[tuple[str, int]] = []  # bracket, and where it stands

    def add(self, text: str) -> None:
        self._texts.append(text)
        self._weights.append(1.0)

    def take(self, match: re.Match[str]) -> None:
        token = match[0]
        if token[0] == "\\":
            self.add(token[1])
        elif token in "([":
            self._open.append((token, len(self._texts)))
            self.add(token)
        elif match["factor"]:
            self._close("(", float(match["factor"]), token)
        else:
            self._close(*(("(", STEP) if token == ")" else ("[", 1 / STEP)), token)

    def _close(self, bracket: str, factor: float, token: str) -> None:
        """Weighs what is within; brackets without a partner in between stay letters."""
        at = next((k for k in reversed(range(len(self._open))) if self._open[k][0] == bracket), -1)
        if at < 0:
            self.add(token)
            return
        _, start = self._open[at]
        del self._open[at:]
        self._texts[start] = ""
        for index in range(start, len(self._weights)):
            self._weights[index] *= factor

    def joined(self) -> list[Piece]:
        joined: list[Piece] = []
        for text, weight in zip(self._texts, self._weights, strict=True):
            if not -MOST <= weight <= MOST:
                raise UserError(
                    f"prompt: {text[:40]!r} weighs {weight:g}; weights are from {-MOST:g} to "
                    f"{MOST:g}, and 0.5 to 1.5 is what works"
                )
            if joined and joined[-1][1] == weight:
                joined[-1] = (joined[-1][0] + text, weight)
            elif text:
                joined.append((text, weight))
        return joined
