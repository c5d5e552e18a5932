"""Statistics of reference text: what is read, the moments of what flows through the layers, kept in few bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lmrepair import door

if TYPE_CHECKING:
    from lmrepair.model.statistics.cache import CachedFile as CachedFile, cache_folder as cache_folder
    from lmrepair.model.statistics.gathering import (
        Planned as Planned,
        own_texts as own_texts,
        planned as planned,
        statistics_of as statistics_of,
    )
    from lmrepair.model.statistics.moments import (
        Asked as Asked,
        Inverse as Inverse,
        Metric as Metric,
        Moment as Moment,
        OnDemand as OnDemand,
        Statistics as Statistics,
        blocks as blocks,
    )
    from lmrepair.model.statistics.sums import READ_AT_ONCE as READ_AT_ONCE, gather as gather
    from lmrepair.model.statistics.texts import WINDOW as WINDOW, beginnings as beginnings, windows as windows

__getattr__, __dir__ = door(__name__)
