"""The permanent links of features."""

from __future__ import annotations

import operator


def link(layer: int, head: int, feature: int, static: bool = False) -> str:
    """The permanent link of a feature, relative to the browser's address, or to the folder of an export if `static`.

    Raises:
        ValueError: a number below 0.
    """
    numbers = {"layer": layer, "head": head, "feature": feature}
    for name, value in numbers.items():
        if operator.index(value) < 0:
            raise ValueError(f"{name}: expected an integer >= 0, got {value}")
    return f"L{layer}H{head}/{feature}.html" if static else f"{layer}/{head}/{feature}"
