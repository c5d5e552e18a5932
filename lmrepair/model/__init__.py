"""Where the model is made: its anatomy, the net that reads it, its fingerprint, edits of it, its statistics."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lmrepair import door

if TYPE_CHECKING:
    from lmrepair.model.anatomy import (
        Norm as Norm,
        not_finite as not_finite,
        rows as rows,
        weight as weight,
        whole as whole,
    )
    from lmrepair.model.batches import (
        TOKENS_AT_ONCE as TOKENS_AT_ONCE,
        Batch as Batch,
        Preference as Preference,
        Reading as Reading,
        Sites as Sites,
        Watched as Watched,
    )
    from lmrepair.model.digests import (
        Fingerprint as Fingerprint,
        digest as digest,
        fingerprint as fingerprint,
        layer_digest as layer_digest,
    )
    from lmrepair.model.edit import (
        EXPONENT as EXPONENT,
        SPREAD as SPREAD,
        Change as Change,
        Delta as Delta,
        Edit as Edit,
        LowRank as LowRank,
        Product as Product,
        Projections as Projections,
        Trial as Trial,
        beside as beside,
        grown as grown,
        no_change as no_change,
        patched as patched,
        put as put,
        same_bits as same_bits,
        take as take,
        written_out as written_out,
    )
    from lmrepair.model.head import Head as Head
    from lmrepair.model.loading import (
        EMBEDDED as EMBEDDED,
        load as load,
        open_gguf as open_gguf,
        quietly as quietly,
        ranks as ranks,
    )
    from lmrepair.model.net import DTYPES as DTYPES, Net as Net, settled as settled
    from lmrepair.model.process import (
        Progress as Progress,
        give_back as give_back,
        keep_blocks_apart as keep_blocks_apart,
        quiet as quiet,
        uninterrupted as uninterrupted,
    )
    from lmrepair.model.source import HUB as HUB, Source as Source
    from lmrepair.model.statistics import (
        READ_AT_ONCE as READ_AT_ONCE,
        WINDOW as WINDOW,
        Asked as Asked,
        CachedFile as CachedFile,
        Inverse as Inverse,
        Metric as Metric,
        Moment as Moment,
        OnDemand as OnDemand,
        Planned as Planned,
        Statistics as Statistics,
        blocks as blocks,
        cache_folder as cache_folder,
        own_texts as own_texts,
        planned as planned,
        statistics_of as statistics_of,
        windows as windows,
    )
    from lmrepair.model.writing import Choose as Choose, Prompt as Prompt, greedy as greedy, write as write

__getattr__, __dir__ = door(__name__)
