"""Statistics of reference text: gathered in one streamed pass, kept on disk by the model's fingerprint."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from lmrepair.errors import FailuresError, UsageError
from lmrepair.failures import Reference, Tokens, write_atomically
from lmrepair.model.digests import fingerprint
from lmrepair.model.moments import Asked, Moment, Statistics
from lmrepair.model.net import TOKENS_AT_ONCE, Net, settled

log = logging.getLogger("lmrepair")

FULL_WIDTH = 2048  # "auto" keeps moments full up to this width, sampled above it
TEXTS, LENGTH = 64, 192  # how much text a model writes for its own statistics, in tokens
WINDOW = 256  # tokens read of one reference text
FORMAT = 2

Report = Callable[[int, int], None]


def statistics_of(
    net: Net,
    asked: Asked,
    reference: Reference | None = None,
    seed: int = 0,
    cache: Path | None = None,
    progress: Report = lambda _, __: None,
    own: int | None = None,
) -> Statistics:
    """The statistics a method asks for, from text the model writes by itself and, if given, a reference too.

    ``own``: how many texts the model writes (default TEXTS); 0 where the reference alone is to be read.
    Kept in ``cache`` (default: ``cache_folder()``) under the model's fingerprint and what was asked; a
    file that is damaged or for something else is made anew, and a folder that cannot be written to is done
    without.
    """
    length = min(LENGTH, (net.anatomy.context or LENGTH) - 1)
    count = TEXTS if own is None else own
    if count < (reference is None):
        raise UsageError(f"{count} texts of the model's own; expected 1 or more, or 0 beside other reference text")
    parts = [f"{count} x {length} own tokens, seed {seed}"] if count else []
    name = ", ".join([*parts, reference.name] if reference else parts)
    given = windows(net, reference.texts) if reference else []
    kinds = {
        layer: (_kind(asked.inputs, width), _kind(asked.outputs, net.hidden)) for layer, width in enumerate(net.widths)
    }
    model = fingerprint(net, {})
    read = hashlib.sha256(json.dumps([item.ids for item in given]).encode()).hexdigest()
    wanted = {"format": FORMAT, "body": model.body, "layers": model.layers, "text": name, "given": read,
              "kinds": sorted(kinds.items()), "samples": asked.samples, "torch": torch.__version__}  # fmt: skip
    key = hashlib.sha256(json.dumps(wanted).encode()).hexdigest()
    path = (cache or cache_folder()) / f"statistics-{key[:32]}.safetensors"
    found = _load(path, key, net, kinds, name)
    if found is None:
        with settled(net.model):
            tokens = net.sample(count, length, seed) if count else []
        found = gather(net, [*tokens, *given], asked, name, seed, progress)
        try:
            write_atomically(path, _serialise(found, key))
        except OSError as error:  # the repair goes on
            log.warning(
                "statistics cannot be kept in %s (%s) and are gathered again next time; LMREPAIR_CACHE names a folder",
                path.parent,
                error.strerror or error,
            )
    return found


def cache_folder() -> Path:
    """Where statistics are kept: LMREPAIR_CACHE, or lmrepair in the user's cache folder."""
    chosen, above = os.environ.get("LMREPAIR_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if chosen or above:
        return Path(chosen) if chosen else Path(str(above)) / "lmrepair"
    try:
        return Path.home() / ".cache" / "lmrepair"
    except RuntimeError:  # a user without a home: no folder at all, where nothing is found and nothing can be kept
        return Path(os.devnull) / "lmrepair"


def _kind(asked: str, width: int) -> str:
    return asked if asked != "auto" else "full" if width <= FULL_WIDTH else "sampled"


def gather(
    net: Net,
    tokens: Sequence[Tokens],
    asked: Asked,
    name: str,
    seed: int = 0,
    progress: Report = lambda _, __: None,
) -> Statistics:
    """Read the texts once, with the gradients of tokens sampled from the model itself (the true Fisher).

    The loss of a text is summed over its positions, so that the gradient at one holds its effect on later
    ones. Every position that a token follows counts alike (at a text's last one nothing is predicted);
    sampled moments keep positions drawn without replacement.
    """
    layers = range(net.layers)
    batches = net.batches(tokens, TOKENS_AT_ONCE)
    count = sum(len(item.ids) - 1 for item in tokens)
    generator = torch.Generator(net.device).manual_seed(seed)
    drawn = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[: asked.samples]
    kept = torch.zeros(count, dtype=torch.bool).index_fill_(0, drawn, True)
    inputs = {layer: _Sum(_kind(asked.inputs, net.widths[layer])) for layer in layers}
    outputs = {layer: _Sum(_kind(asked.outputs, net.hidden)) for layer in layers}
    at = 0
    with settled(net.model):
        for number, batch in enumerate(batches):
            with torch.enable_grad(), net.watch(layers) as watched:
                logits = net.logits(batch).float()
                said = torch.multinomial(logits.detach().softmax(dim=1), 1, generator=generator).squeeze(1)
                loss = F.cross_entropy(logits, said, reduction="sum")
                made = torch.autograd.grad(loss, [watched.outputs[layer] for layer in layers])
            real = F.pad(batch.mask[:, 1:], (0, 1)).reshape(-1).bool()
            rows = kept[at : at + int(real.sum())].to(net.device)
            at += len(rows)
            for layer, slope in zip(layers, made, strict=True):
                inputs[layer].add(watched.inputs[layer].detach().reshape(len(real), -1)[real], rows)
                outputs[layer].add(slope.reshape(len(real), -1)[real], rows)
            progress(number + 1, len(batches))
    return Statistics(
        {layer: inputs[layer].moment(count) for layer in layers},
        {layer: outputs[layer].moment(count) for layer in layers},
        name,
        count,
    )


class _Sum:
    """A moment while its rows come in."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.total: Tensor | None = None
        self.rows: list[Tensor] = []

    def add(self, x: Tensor, sampled: Tensor) -> None:
        x = x.float()
        if self.kind == "sampled":
            self.rows.append(x[sampled].cpu())
            return
        part = x.T @ x if self.kind == "full" else x.square().sum(dim=0)
        self.total = part if self.total is None else self.total + part

    def moment(self, count: int) -> Moment:
        if self.kind == "sampled":
            return Moment("sampled", torch.cat(self.rows))
        assert self.total is not None
        mean = (self.total / count).cpu()
        return Moment.identity(len(mean), float(mean.mean())) if self.kind == "none" else Moment(self.kind, mean)


def _serialise(statistics: Statistics, key: str) -> bytes:
    tensors = {}
    for part, moments in (("inputs", statistics.inputs), ("outputs", statistics.outputs)):
        for layer, moment in moments.items():
            tensors[f"{part}.{layer}"] = moment.values.contiguous()
    digest = _digest(tensors)
    record = json.dumps({"key": key, "digest": digest, "tokens": statistics.tokens}, sort_keys=True)
    return safetensors.torch.save(tensors, {"lmrepair": record})


def _digest(tensors: Mapping[str, Tensor]) -> str:
    state = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        state.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        state.update(bytes(tensor.contiguous().view(torch.uint8).numpy()))
    return state.hexdigest()


def _load(path: Path, key: str, net: Net, kinds: Mapping[int, tuple[str, str]], name: str) -> Statistics | None:
    """The statistics in a file, or None where it is missing, damaged, or for something else."""
    wanted = {f"inputs.{layer}": (kind, net.widths[layer]) for layer, (kind, _) in kinds.items()}
    wanted |= {f"outputs.{layer}": (kind, net.hidden) for layer, (_, kind) in kinds.items()}
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            record = json.loads((file.metadata() or {}).get("lmrepair", "{}"))
            if not isinstance(record, dict) or record.get("key") != key or set(file.keys()) != set(wanted):
                return None
            tensors = {part: file.get_tensor(part) for part in wanted}
    except (OSError, safetensors.SafetensorError, ValueError, RecursionError):
        return None
    tokens = record.get("tokens")
    if type(tokens) is not int or tokens < 1 or not all(_fits(tensors[part], *form) for part, form in wanted.items()):
        return None
    if record.get("digest") != _digest(tensors):
        return None
    moments = {part: Moment(_stored(kind), tensors[part]) for part, (kind, _) in wanted.items()}
    inputs, outputs = ({layer: moments[f"{part}.{layer}"] for layer in kinds} for part in ("inputs", "outputs"))
    return Statistics(inputs, outputs, name, tokens)


def _fits(values: Tensor, kind: str, width: int) -> bool:
    shape = {"full": (width, width), "sampled": (len(values) if values.dim() else 0, width)}.get(kind, (width,))
    return values.dtype == torch.float32 and tuple(values.shape) == shape and bool(values.isfinite().all())


def _stored(kind: str) -> str:
    return "diagonal" if kind == "none" else kind


def windows(net: Net, texts: Sequence[str]) -> list[Tokens]:
    """The first WINDOW tokens of each text, every token after the first to be predicted."""
    length = min(WINDOW, net.anatomy.context or WINDOW)
    found = []
    for index, text in enumerate(texts):
        ids = net.tokenizer(text, verbose=False)["input_ids"][:length]
        if len(ids) > 1:
            found.append(Tokens(str(index), tuple(ids[:1]), tuple(ids[1:])))
    if not found:
        raise FailuresError("the reference text is too short: expected texts of two tokens or more")
    return found
