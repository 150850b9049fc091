"""Intervals by the bootstrap: what the figures would be, had other cases (or groups of cases) been drawn.

Shapes: N cases, G groups, M figures, R resamples, S seeds.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError

Floats = NDArray[np.float64]
_CELLS = 1 << 22  # of the (resamples, groups) matrix that is held at once


def resampled_sums(columns: Floats, groups: Sequence[str], resamples: int, seed: int) -> Floats:
    """Sums of each column (N, M) over R draws of the groups with replacement -> (R, M).

    Cases of one group (one patient, one slide, one publication) are drawn together. The draws depend on the seed and
    the number of groups alone, so two systems judged on the same cases meet the same draws and can be subtracted.
    """
    if resamples < 1:
        raise ConfigError(f"resamples {resamples}: at least 1 is wanted")
    names = {name: index for index, name in enumerate(dict.fromkeys(groups))}
    G = len(names)
    sums = np.zeros((G, columns.shape[1]))
    np.add.at(sums, [names[group] for group in groups], columns)
    random = np.random.default_rng(seed)
    step = max(1, _CELLS // G)
    parts = []
    for begin in range(0, resamples, step):
        rows = min(step, resamples - begin)
        drawn = random.integers(0, G, size=(rows, G)) + np.arange(rows)[:, None] * G
        times = np.bincount(drawn.ravel(), minlength=rows * G).reshape(rows, G)  # how often each group was drawn
        parts.append(times @ sums)
    return np.concatenate(parts)


def interval(values: Floats, level: float = 0.95, groups: int | None = None) -> tuple[float, float]:
    """The middle `level` of the resampled values (R,).

    A share that is 0 or 1 in all of its `groups` is so in every draw of them. That is no certainty: the exact binomial
    interval is then taken, for all of G from 0.025^(1 / G) to 1.
    """
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    if groups and low == high and low in (0.0, 1.0):
        surely = ((1 - level) / 2) ** (1 / groups)
        return (surely, 1.0) if low else (0.0, 1 - surely)
    return float(low), float(high)


def crossed_means(values: Floats, groups: Sequence[str], resamples: int, seed: int) -> Floats:
    """The mean of one figure of S runs on the same N cases (S, N), had other groups and other seeds been drawn: (R,).

    Groups and seeds are drawn apart, each with replacement, and every drawn run meets every drawn case. The draws depend
    on `seed` and on the numbers of groups and of runs alone, so differences of two systems can be resampled as they are.
    """
    runs = len(values)
    columns = np.vstack([values, np.ones(values.shape[1])]).T  # (N, S + 1)
    sums = resampled_sums(columns, groups, resamples, seed)  # (R, S + 1)
    times = np.random.default_rng([seed, 1]).multinomial(runs, np.full(runs, 1 / runs), size=resamples)  # (R, S)
    means: Floats = (sums[:, :runs] * times).sum(1) / (runs * sums[:, runs])
    return means
