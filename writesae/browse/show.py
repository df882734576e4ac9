"""How numbers and tokens are written on a page. `assets/common.js` has the same rules, for what the script draws.

Tokens and sources may hold anything. Escaping for HTML is the template's; here characters that would move or hide
their neighbours (controls, direction overrides) become visible escapes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

LEVELS = 10  # of shading, 1 weakest
LONGEST = 40  # characters shown of a token that stands alone
_LONGEST_PIECE = 400  # of one token in a context
_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff\U000e0000-\U000e007f]"
)


def plain(text: str) -> str:
    """Text with controls and direction overrides as escapes; spaces, tabs and line breaks stay."""
    return _HIDDEN.sub(lambda m: f"\\u{{{ord(m.group()):x}}}", text)


def token(text: str) -> str:
    """A token that stands alone: its outer spaces, tabs and line breaks as signs, cut if it is long."""
    text = plain(text)
    if len(text) > LONGEST:
        text = text[: LONGEST - 1] + "…"
    inner = text.strip(" ")
    left = len(text) - len(text.lstrip(" ")) if inner else len(text)
    right = len(text) - left - len(inner)
    text = "␣" * left + inner + "␣" * right
    return text.replace("\n", "⏎").replace("\t", "⇥") or "(empty)"


def count(x: float) -> str:
    return f"{int(x):,}"


def number(x: float | None) -> str:
    """An activation or a score: two or three digits that matter."""
    if x is None or math.isnan(x):
        return "–"
    size = abs(x)
    if math.isinf(x):
        text = "∞"
    elif size == 0 or 0.01 <= size < 10:
        text = f"{size:.2f}"
    elif 10 <= size < 1000:
        text = f"{size:.1f}" if size < 100 else f"{size:.0f}"
    else:
        mantissa, exponent = f"{size:.1e}".split("e")
        text = f"{mantissa}e{int(exponent)}"
    return f"−{text}" if x < 0 else text


def percent(x: float | None) -> str:
    """A share in per cent, without the sign."""
    if x is None or not math.isfinite(x):
        return "–"
    p = 100 * x
    if p >= 10:
        return f"{p:.1f}"
    if p >= 1:
        return f"{p:.2f}"
    if p >= 0.1:
        return f"{p:.3f}"
    return "0" if p <= 0 else f"{p:.4f}" if p >= 0.0001 else "<0.0001"


def level(activation: float, largest: float) -> int:
    """Shade of an activation: 0 for none, 1 to `LEVELS` in equal steps up to the feature's largest."""
    if not activation > 0:
        return 0
    if math.isinf(activation) or not 0 < largest < math.inf:
        return LEVELS
    return min(LEVELS, max(1, math.ceil(LEVELS * activation / largest)))


def pieces(tokens: Sequence[str], activations: Sequence[float], at: int, largest: float) -> list[dict]:
    """A context as runs of text: silent tokens joined, each token that fires by itself with its shade and value."""
    out: list[dict] = []
    for i, (text, activation) in enumerate(zip(tokens, activations, strict=True)):
        shown = plain(text[:_LONGEST_PIECE])
        shade = level(activation, largest)
        if shade or i == at:
            out.append({"text": shown, "level": shade, "value": number(activation), "here": i == at})
        elif out and not out[-1]["level"] and not out[-1]["here"]:
            out[-1]["text"] += shown
        else:
            out.append({"text": shown, "level": 0, "value": "", "here": False})
    return out
