"""Patches where models run: PEFT adapters, llama.cpp LoRAs, and what these engines answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lmrepair import door

if TYPE_CHECKING:
    from lmrepair.patch.serving.choice import Chosen as Chosen, chosen as chosen
    from lmrepair.patch.serving.engines import (
        ENGINES as ENGINES,
        MOST_MARGIN as MOST_MARGIN,
        Tried as Tried,
        best_of_tried as best_of_tried,
        held_by_llama_cpp as held_by_llama_cpp,
        held_over as held_over,
        llama_cpp as llama_cpp,
        llama_package as llama_package,
        llama_tokens as llama_tokens,
        until_held as until_held,
    )
    from lmrepair.patch.serving.factors import (
        Factors as Factors,
        Held as Held,
        answers as answers,
        exact as exact,
        held as held,
        held_whole as held_whole,
        holding as holding,
        least as least,
        refuse_experts as refuse_experts,
    )
    from lmrepair.patch.serving.gguf import (
        Base as Base,
        known_architecture as known_architecture,
        read_base as read_base,
        save_gguf as save_gguf,
    )
    from lmrepair.patch.serving.peft import (
        Modules as Modules,
        peft_config as peft_config,
        peft_on as peft_on,
        save_peft as save_peft,
    )

__getattr__, __dir__ = door(__name__)
