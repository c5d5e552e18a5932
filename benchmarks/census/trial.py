"""One class of the census: built tiny, placed or refused, its neurons proved once more, repaired, taken back."""

from __future__ import annotations

import re
import string
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from tiny import spread, tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

from lmrepair import Failure, LmrepairError, Method, MinKl, ModelError, Net, Reference, Star, repair
from lmrepair.model import Head, Sites, Statistics, Trial, same_bits, settled, statistics_of

VOCABULARY = 256  # of the models; the tokenizer has fewer tokens
PROMPT = "add a and b: return "
WANTED, RANK = 2, 1  # tokens of the target, each one that the model has in second place where it stands
TEXTS = Reference("ascii", ("for row in rows:\n    print(row)\n", "The garden is open from nine to five every day.\n"))
OWN_TEXTS = 8  # that the model writes for minkl's statistics
STEP = 3e-3  # of the loss, that a move of a layer's neurons is to make
MINKL = MinKl(max_probe_kl=float("inf"))  # random models say little that a step would not change


def ascii_tokenizer() -> PreTrainedTokenizerFast:
    """A token for every printable character of ASCII, and a BOS token before every text."""
    letters = sorted({"Ġ", "Ċ", *string.ascii_letters, *string.digits, *string.punctuation})
    made = Tokenizer(models.BPE(vocab={word: at for at, word in enumerate(["<s>", "</s>", *letters])}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    )


def trial(kind: str) -> Iterator[dict[str, Any]]:
    """What becomes of a model type, fact by fact, as plain data; ``refused`` says why where it ends early.

    What goes wrong in transformers is raised: the facts until then stand.
    """
    began = time.perf_counter()
    model = tiny_model(kind, VOCABULARY)
    yield {"class": type(model).__name__, "traits": traits(model)}
    try:
        net = Net(model, ascii_tokenizer(), kind)
    except ModelError as error:
        yield {"refused": str(error), "seconds": round(time.perf_counter() - began, 2)}
        return
    spread(model, net.anatomy.norm, net.anatomy.gain)
    net = Net(model, ascii_tokenizer(), kind)
    failure = failing(net)
    yield {"layers": net.layers, "neurons": sum(net.widths), "places": places(net)}
    yield {"traits": [*traits(model), *looks(net, failure)]}
    yield {"off": max(off_by(net, failure, layer) for layer in range(net.layers))}
    statistics = statistics_of(net, MINKL.asks(), own=OWN_TEXTS)
    for method in (Star(metric="identity", max_probe_kl=float("inf")), MINKL):
        yield {method.name: repaired(net, failure, method, statistics)}
    yield {"seconds": round(time.perf_counter() - began, 2)}


def places(net: Net) -> list[str]:
    """What is written to, by its name inside a block."""
    inside = [re.split(r"\.\d+\.", name, maxsplit=1)[-1] for name in net.anatomy.names]
    return sorted({re.sub(r"\b\d+\b", "N", name) for name in inside})


def failing(net: Net) -> Failure:
    """A short failure that is as one of a model that has learnt something: it wants what the model holds possible."""
    written = ""
    with torch.inference_mode():
        for _ in range(WANTED):
            given = torch.tensor([net.tokenizer(PROMPT + written)["input_ids"]])
            logits = net.model(input_ids=given, attention_mask=torch.ones_like(given), use_cache=False).logits[0, -1]
            letters = [at for at in logits.argsort(descending=True).tolist() if 2 <= at < len(net.tokenizer)]
            written += net.tokenizer.decode(letters[RANK : RANK + 1])
    return Failure(PROMPT, written, net.name)


def off_by(net: Net, failure: Failure, layer: int) -> float:
    """How far the loss moves otherwise than the layer's coefficients and gradients say, as a share of that.

    A proof that shares nothing with the one at load: all neurons of the layer are moved, in the weights, along the
    gradient and against it.
    """
    batches = net.batches(net.tokenize([failure]))
    with settled(net.model):
        gradient = net.read(batches, Sites({layer: torch.arange(net.widths[layer])})).gradients[layer]
        slope = float(gradient.square().sum())
        if slope == 0:
            return float("inf")
        losses = []
        for sign in (1.0, -1.0):
            with Trial(net, Sites({layer: torch.arange(net.widths[layer])})) as write:
                write.write({layer: sign * STEP / slope * gradient})
                losses.append(float(net.prefer(batches).loss.double().mean()))
    return abs((losses[0] - losses[1]) / (2 * STEP) - 1)


def repaired(net: Net, failure: Failure, method: Method, statistics: Statistics) -> dict[str, Any]:
    """A repair that is kept, looked at, and taken back: what was seen."""
    before = {name: tensor.clone() for name, tensor in net.model.state_dict().items()}
    try:
        found = repair(net, [failure], method, TEXTS, statistics=statistics if method.asks() else None)
    except LmrepairError as error:
        return {"repaired": False, "reason": str(error), "reverted": changed(net, before) == []}
    (outcome,) = found.outcomes
    record: dict[str, Any] = {
        "mistakes": [len(outcome.before), len(outcome.after)],
        "steps": found.cost.steps,
        "repaired": False,
    }
    if found.patch is None or found.drift is None:
        return {**record, "reason": outcome.reason, "reverted": changed(net, before) == []}
    record |= {
        "repaired": outcome.repaired and greedy(net, failure) == list(outcome.tokens.target),
        "reason": outcome.reason
        or ("" if greedy(net, failure) == list(outcome.tokens.target) else "greedy text is another"),
        "kl": found.drift.kl,
        "elsewhere": [name for name in changed(net, before) if not name.startswith(net.anatomy.names)],
    }
    found.patch.revert(net)
    return {**record, "reverted": changed(net, before) == []}


def greedy(net: Net, failure: Failure) -> list[int]:
    """What the model writes, token by token, each time from the whole text: no cache, nothing of the package's."""
    (tokens,) = net.tokenize([failure])
    ids = list(tokens.prompt)
    with torch.inference_mode():
        for _ in tokens.target:
            given = torch.tensor([ids])
            output = net.model(input_ids=given, attention_mask=torch.ones_like(given), use_cache=False)
            ids.append(int(output.logits[0, -1].argmax()))
    return ids[len(tokens.prompt) :]


def changed(net: Net, before: Mapping[str, Tensor]) -> list[str]:
    """The names of the tensors that are not, bit for bit, what they were."""
    return [name for name, tensor in net.model.state_dict().items() if not same_bits(tensor, before[name])]


def traits(model: Any) -> list[str]:
    """What is said of a model by looking at it: the kinds that a census is to cover."""
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    stacks = [parameter.dim() == 3 and parameter.shape[0] > 1 for parameter in model.parameters()]
    experts = any(name.endswith("experts") for name, _ in model.named_modules())
    found = {
        "mixture": experts or any(stacks) and hasattr(model.config.get_text_config(), "num_experts_per_tok"),
        "tied": getattr(head, "weight", None) is getattr(table, "weight", 0),
        "conv1d": any(isinstance(part, Conv1D) for part in model.modules()),
        "wrapper": model.config.get_text_config() is not model.config,
    }
    return [name for name, held in found.items() if held]


def looks(net: Net, failure: Failure) -> list[str]:
    """The same of what was placed: what follows the head, biases, widths, the norms of a block."""
    head = Head.of(net, net.tokenize([failure])[0])
    places = [net.model.get_submodule(name) for name in net.anatomy.names]
    block = net.model.get_submodule(re.split(r"(\.\d+)\.", net.anatomy.names[0], maxsplit=1)[0] + ".0")
    gains = [getattr(part, "weight", None) for part in block.modules()]
    norms = sum(isinstance(gain, Tensor) and gain.shape == (net.hidden,) for gain in gains)
    found = {
        f"cap {head.cap:g}": head.cap > 0,
        f"scale {head.scale:.3g}": head.scale != 1,
        "other logits": head.whole,
        "bias": any(getattr(place, "bias", None) is not None for place in places),
        f"{len(set(net.widths))} widths": len(set(net.widths)) > 1,
        f"{norms} norm{'s' * (norms != 1)}": norms != 2,
    }
    return [name for name, held in found.items() if held]
