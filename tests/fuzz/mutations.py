"""Valid content made invalid: odd values in place of some, and odd bytes in place of others."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

TEXTS = [
    *("", " ", "\t\n", "\0", "null", "no", "~", "*", "{}", "[]", "[1, 2", "a: b", "- a", "<<", "="),
    *("\x1b[2J", "\ud800", "\ufeff", "e\u0301", "\u00e9", "\u202e", "\U0001f989", "x" * 70_000),
    *("../../etc/passwd", "/dev/zero", "/nowhere/at all", "file:///etc/passwd", "hf:", "hf:a/b"),
    *("C:\\x", "http://127.0.0.1:9/x", "{a|b|{c|", "%s", "$HOME", "~root", "<script>", "'", '"'),
    *("9" * 5000, "1e999", "-1", "0x10", "1_0", "1:2:3", "2001-99-99", "nan", ".inf", "0.5"),
]
NUMBERS = [0, -1, 1, 2, 7, 8, 64, 65, 10**6, 2**31, 2**63, 2**64, 10**400, -(10**400)]
FLOATS = [0.0, -0.0, 0.5, 1.0, 1e-300, 1e300, float("inf"), float("-inf"), float("nan")]

odd_texts = st.sampled_from(TEXTS) | st.text(max_size=20)
scalars: st.SearchStrategy[Any] = (
    st.none() | st.booleans() | st.sampled_from(NUMBERS) | st.sampled_from(FLOATS) | odd_texts
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(odd_texts, inner, max_size=3),
    max_leaves=6,
)


def nested(depth: int) -> bytes:
    """JSON and YAML alike."""
    return b"[" * depth + b"]" * depth


@st.composite
def odd(draw: st.DrawFn, content: Any, keys: list[str]) -> Any:
    """A copy of nested dicts and lists in which a few places hold something else, are gone, or
    have another name."""
    content = json.loads(json.dumps(content))
    for _ in range(draw(st.integers(0, 4))):
        place: Any = content
        while isinstance(place, dict | list) and place:
            at = draw(st.sampled_from(list(place) if isinstance(place, dict) else [0, -1]))
            inner = place[at]
            if isinstance(inner, dict | list) and inner and draw(st.integers(0, 3)):
                place = inner
                continue
            match draw(st.integers(0, 5)):
                case 0:
                    del place[at]
                case 1 if isinstance(place, dict):
                    place[draw(st.sampled_from(keys) | odd_texts)] = place.pop(at)
                case 2:
                    place[at] = [inner, inner]
                case 3 if isinstance(place, dict):
                    place[draw(st.sampled_from(keys) | odd_texts)] = draw(values)
                case _:
                    place[at] = draw(values)
            break
    return content


@st.composite
def spoilt(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes with a few cut, flipped, repeated or put in."""
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(content)))
        to = min(len(content), at + draw(st.integers(0, 12)))
        part = content[at:to]
        match draw(st.integers(0, 5)):
            case 0:
                content = content[:at] + content[to:]
            case 1:
                content = content[:at] + part * draw(st.integers(2, 50)) + content[to:]
            case 2:
                content = content[:at] + bytes(255 - byte for byte in part) + content[to:]
            case 3:
                content = content[:at]
            case _:
                content = content[:at] + draw(st.binary(max_size=6) | ODD_BYTES) + content[to:]
    return content


ODD_BYTES = st.sampled_from(
    [
        *(b"\0", b"\xff", b"\xef\xbb\xbf", b"\xc3", b"\r", b"\n\n", b'"', b"'", b"\\", b"\\u0000"),
        *(b"\\ud800", b"{", b"}", b"[", b",", b": ", b"&a ", b"*a", b"!!python/object:os.system "),
        *(
            b"!!binary x",
            b"!!set {a}",
            b"? [1]\n: 2",
            b"<<: *a",
            b"---\n",
            b"...\n",
            b"%YAML 9.9\n",
        ),
        *(
            nested(2000),
            nested(100_000),
            b"9" * 5000,
            b"x" * 70_000,
            b"NaN",
            b"-Infinity",
            b"1e999",
        ),
    ]
)
