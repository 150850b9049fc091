"""Which pairs this rank takes, batch by batch, so that ranks that hold a decoder together stay in step.

A decoder that is spread over the ranks computes on all of them or on none, and looks at a picture on all or on none. So
there is one picture to a batch then, batches with a picture come first, and a rank that has no more batches of a kind goes
through a pair of that kind for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from .. import parallel
from ..config import AlignSettings
from .batches import TokenPair, beginning, dealt, split

Group = list[TokenPair]


def rounds(pairs: Sequence[TokenPair], settings: AlignSettings, picture: int) -> list[tuple[Group, bool]]:
    """This rank's batches of some pairs, and whether they count; as many on every rank. One that does not count is empty
    where each rank has a decoder of its own. A picture counts as so many tokens."""
    mine, most = dealt(pairs, parallel.shares(), picture)[parallel.share()], settings.tokens_per_batch
    if not settings.shard:
        return _filled(list(split(mine, most, picture)), [])
    found = []
    for pictured in (True, False):
        alike = [group for same in _by_picture(mine, pictured) for group in split(same, most, picture)]
        shortest = sorted((pair for pair in pairs if (pair.image is not None) is pictured), key=lambda pair: pair.size)
        found += _filled(alike, shortest[:1])
    return found


def _by_picture(pairs: Sequence[TokenPair], pictured: bool) -> list[Group]:
    """The pairs of each picture, or those without."""
    found: dict[object, Group] = {}
    for pair in pairs:
        if (pair.image is not None) is pictured:
            found.setdefault(beginning(pair), []).append(pair)
    return list(found.values())


def _filled(groups: list[Group], filler: Group) -> list[tuple[Group, bool]]:
    count = int(parallel.highest(len(groups))[0])
    return [(group, True) for group in groups] + [(filler, False)] * (count - len(groups))
