"""Where a causal language model is made: its head, its final norm and its FFNs, dense or mixtures of experts.

Everything is found by shape and by behaviour on a short probe; there is no table of model names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lmrepair import door

if TYPE_CHECKING:
    from lmrepair.model.anatomy.gathered import (
        bare as bare,
        passing as passing,
        settled as settled,
        together as together,
    )
    from lmrepair.model.anatomy.norm import Norm as Norm
    from lmrepair.model.anatomy.places import Anatomy as Anatomy, find as find, not_finite as not_finite
    from lmrepair.model.anatomy.probe import first_infinite as first_infinite, weight as weight
    from lmrepair.model.anatomy.products import altered as altered, seen as seen
    from lmrepair.model.anatomy.shards import (
        agreed as agreed,
        here as here,
        in_shards as in_shards,
        rows as rows,
        whole as whole,
    )
    from lmrepair.model.anatomy.stacks import Place as Place

__getattr__, __dir__ = door(__name__)
