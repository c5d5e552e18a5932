"""The commands about patches: into model folders and out again, to servers, together and apart."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lmrepair import door

if TYPE_CHECKING:
    from lmrepair.cli.patches.folders import apply as apply, revert as revert
    from lmrepair.cli.patches.hub import push as push
    from lmrepair.cli.patches.parts import compose as compose, diff as diff
    from lmrepair.cli.patches.serve import (
        EngineOptions as EngineOptions,
        export as export,
        verify_served as verify_served,
    )
    from lmrepair.cli.patches.served import (
        ServedAs as ServedAs,
        served_base as served_base,
        served_text as served_text,
        until_served as until_served,
    )
    from lmrepair.cli.patches.trouble import bisect as bisect, conflicts as conflicts

__getattr__, __dir__ = door(__name__)
