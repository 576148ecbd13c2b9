"""What a history tells: the table of `DrMADCallback.summary`, and the door to all of reports.

Records are described in `records.py`, saved and loaded in `history_files.py`; `progress.py` says
how far a walk is. `kd.reports` has the names of all of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from keras_drmad.history_files import as_history as as_history
from keras_drmad.history_files import load_history as load_history
from keras_drmad.history_files import save_history as save_history
from keras_drmad.progress import Progress as Progress
from keras_drmad.records import Entry as Entry
from keras_drmad.records import Label as Label
from keras_drmad.records import Nested as Nested
from keras_drmad.records import Record as Record
from keras_drmad.records import as_image as as_image
from keras_drmad.records import by_argument as by_argument
from keras_drmad.records import cosines as cosines
from keras_drmad.records import entries as entries
from keras_drmad.records import flat as flat
from keras_drmad.records import horizon_of as horizon_of
from keras_drmad.records import nested as nested
from keras_drmad.records import norm as norm


def table(
    labels: Sequence[Label],
    arrays: Sequence[Any],
    history: Sequence[Record],
    by_layer: bool = False,
) -> str:
    """What was tuned, as a table.

    Args:
        labels, arrays: The current values, as for `nested`.
        history: The records so far.
        by_layer: Whether each layer has a row of its own. Defaults to `False`.

    Returns:
        The table, a string of several lines.
    """
    rows: list[tuple[str, ...]] = [
        ("hyperparameter", "grain", "count", "start", "now", "hypergradient norm")
    ]
    if not by_layer:
        rows[0] += ("verified cosine",)  # it is of all layers together
    now = Record(math.nan, nested(labels, arrays), {}, None, 0, 0, True, "", labels=tuple(labels))
    first = entries(history[0] if history else now)
    last = entries(history[-1]) if history else []
    verified = cosines(next((r for r in reversed(history) if r.verification), now))
    name = (lambda e: e.name) if by_layer else (lambda e: e.label.argument)
    for key in dict.fromkeys(name(e) for e in entries(now)):
        here, begun, ended = (
            [e for e in es if name(e) == key] for es in (entries(now), first, last)
        )
        cosine = verified.get(here[0].label.argument)
        row = (
            key,
            grain(here),
            f"{sum(e.value.size for e in here):,}",
            _range(begun),
            _range(here),
            f"{norm(ended):.3g}" if ended else "—",
            "—" if cosine is None else f"{cosine:.3f}",
        )
        rows.append(row[: len(rows[0])])
    return aligned(rows)


def grain(found: Sequence[Entry]) -> str:
    """The grain in space and time in words, such as "layer, 40 in time"."""
    label, value = found[0].label, found[0].value
    words = label.per or "—"
    return f"{words}, {len(value)} in time" if label.in_time else words


def _range(found: Sequence[Entry]) -> str:
    if not found:
        return "—"
    values = np.concatenate([np.ravel(e.value).astype(np.float64) for e in found])
    low, mean, high = (f"{x:.3g}" for x in (values.min(), values.mean(), values.max()))
    return low if low == high else f"{mean} ({low} to {high})"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text as a table with a line under the first."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    return "\n".join([lines[0], "─" * (sum(widths) + 2 * len(widths) - 2), *lines[1:]])
