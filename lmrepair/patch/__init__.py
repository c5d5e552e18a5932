"""The change itself: a patch as a value, as a file, and in a model folder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lmrepair import door

if TYPE_CHECKING:
    from lmrepair.patch.bisection import first_bad as first_bad, first_patches as first_patches
    from lmrepair.patch.compose import (
        Difference as Difference,
        combine as combine,
        difference as difference,
        without as without,
    )
    from lmrepair.patch.conflicts import Forecast as Forecast, forecasts as forecasts
    from lmrepair.patch.disk import (
        OtherDtypeError as OtherDtypeError,
        Rewritten as Rewritten,
        Writing as Writing,
        folder_of as folder_of,
        refuse_output as refuse_output,
        rewrite as rewrite,
    )
    from lmrepair.patch.folder import refuse_existing as refuse_existing, save_model as save_model
    from lmrepair.patch.format import Item as Item, Made as Made, holds_patch as holds_patch
    from lmrepair.patch.hub import CARD as CARD, FILE as FILE, upload as upload
    from lmrepair.patch.patch import (
        LayerPart as LayerPart,
        Patch as Patch,
        PatchSize as PatchSize,
        by_layer as by_layer,
    )
    from lmrepair.patch.serving import (
        ENGINES as ENGINES,
        MOST_MARGIN as MOST_MARGIN,
        Base as Base,
        Chosen as Chosen,
        Factors as Factors,
        Held as Held,
        Modules as Modules,
        Tried as Tried,
        answers as answers,
        best_of_tried as best_of_tried,
        chosen as chosen,
        exact as exact,
        held as held,
        held_by_llama_cpp as held_by_llama_cpp,
        held_over as held_over,
        held_whole as held_whole,
        holding as holding,
        known_architecture as known_architecture,
        llama_cpp as llama_cpp,
        llama_package as llama_package,
        llama_tokens as llama_tokens,
        peft_config as peft_config,
        peft_on as peft_on,
        read_base as read_base,
        refuse_experts as refuse_experts,
        save_gguf as save_gguf,
        save_peft as save_peft,
        until_held as until_held,
    )

__getattr__, __dir__ = door(__name__)
