"""`PlannedEdits`: what an `attach` was asked to change, and which of it falls into the call that is running."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..edits import Edits
from .binding import LayerSite
from .frame import Frame
from .sites import require_layer


class PlannedEdits:
    """Edits of some layers, and which of them have applied.

    Attributes:
        by_layer: `{layer: Edits}`; row is the row of the batch, -1 all of them, position the column in that row.
        applied: `{layer: [E] bool}`.
    """

    def __init__(self, by_layer: Mapping[int, Edits]):
        self.by_layer = by_layer
        self.applied = {layer: torch.zeros(len(e), dtype=torch.bool) for layer, e in by_layer.items()}

    def of_call(self, frame: Frame, lengths: list[int]) -> tuple[Edits, Tensor] | None:
        """The edits that fall into the columns of this call, positions counted from its first; and which they are.

        Args:
            lengths: columns of each row (sequence of a packed batch) of the call.

        Raises:
            ValueError: an edit of a row that the call does not have.
        """
        layer, start = frame.site.layer_index, frame.start
        planned = self.by_layer.get(layer)
        if planned is None:
            return None
        among = torch.arange(len(planned))
        if frame.first_row:  # the second text of a guided `generate`
            among = among[planned.row < 0]
            planned = planned[among]
        rows = len(lengths)
        beyond = (planned.row >= rows).nonzero().flatten()
        if len(beyond):
            i = int(beyond[0])
            raise ValueError(
                f"edits.row: expected row < {rows} (the rows of this call of layer {layer}), got {int(planned.row[i])} "
                f"in edit {i}"
            )
        which = torch.arange(len(planned))
        every = planned.row < 0
        row = torch.where(every, torch.zeros_like(planned.row), planned.row)
        if bool(every.any()):
            repeats = torch.where(every, rows, 1)
            which = which.repeat_interleave(repeats)
            nth = torch.arange(len(which)) - (repeats.cumsum(0) - repeats)[which]
            row = torch.where(every[which], nth, planned.row[which])
        position = planned.position[which] - start
        inside = (position >= 0) & (position < torch.tensor(lengths)[row])
        which, row, position = which[inside], row[inside], position[inside]
        if not len(which):
            return None
        return planned[which]._with(row=row, position=position), among[which]

    def require_all_applied(self, strict: bool, stacklevel: int) -> None:
        """Where an edit's position never came, warns or, if `strict`, raises ValueError."""
        for layer, ran in self.applied.items():
            missed = (~ran).nonzero().flatten()
            if len(missed):
                i, e = int(missed[0]), self.by_layer[layer]
                message = (
                    f"edits: {len(missed)} of {len(ran)} edits of layer {layer} never applied, because their position "
                    f"never ran while attached; the first is edit {i}: row {int(e.row[i])}, position "
                    f"{int(e.position[i])}, head {int(e.head[i])}"
                )
                if strict:
                    raise ValueError(message)
                warnings.warn(message, RuntimeWarning, stacklevel=stacklevel + 1)


def check_edits(
    model: nn.Module, found: Mapping[int, LayerSite], edits: Mapping[int, Edits] | None
) -> dict[int, Edits]:
    """The edits of `attach`, without layers that have none.

    Raises:
        ValueError: something else, or edits that do not fit the model.
    """
    if edits is None:
        return {}
    if not isinstance(edits, Mapping):
        raise ValueError(f"edits: expected {{layer: Edits}}, got {type(edits).__name__}")
    kept = {}
    for layer, planned in edits.items():
        if not isinstance(planned, Edits):
            raise ValueError(f"edits[{layer}]: expected Edits, got {type(planned).__name__}")
        site = require_layer(model, found, layer)
        if not len(planned):
            continue
        anywhere = max(int(planned.row.max()), 0) + 1, max(int(planned.position.max()), 0) + 1
        try:
            planned.check(anywhere[0], [anywhere[1]] * anywhere[0], site.num_v_heads, site.K, site.V)
        except ValueError as error:
            raise ValueError(f"edits[{layer}]: {error}") from None
        kept[layer] = planned
    return kept
