"""Moments while texts are read: sums over positions, in one pass forward and, where gradients count, one backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from lmrepair.errors import NotFiniteError
from lmrepair.failures import Tokens
from lmrepair.model.anatomy import not_finite
from lmrepair.model.batches import Batch, drawn
from lmrepair.model.head import Head
from lmrepair.model.net import Net, settled
from lmrepair.model.statistics.moments import Asked, Moment, OnDemand, Statistics, blocks
from lmrepair.model.statistics.packing import strips

FULL_WIDTH = 2048  # "auto" keeps moments full up to this width, sampled above it; of a mixture, block by block,
BLOCKS = 1 << 24  # up to so many numbers a layer, and the diagonal above that
READ_AT_ONCE = 104  # padded tokens in one pass: what a backward pass needs of them is held meanwhile

Report = Callable[[int, int], None]


def gather(
    net: Net,
    tokens: Sequence[Tokens],
    asked: Asked,
    name: str,
    seed: int = 0,
    progress: Report = lambda _, __: None,
) -> Statistics:
    """Read the texts once, where it is asked for with the gradients of tokens sampled from the model itself (the true
    Fisher).

    The loss of a text is summed over its positions, so that the gradient at one holds its effect on later
    ones. Every position that a token follows counts alike (at a text's last one nothing is predicted);
    sampled moments keep positions drawn without replacement.
    """
    sums = Sums.of(net, tokens, asked, seed)
    for done, total in sums.read():
        progress(done, total)
    return sums.statistics(name)


@dataclass
class Sums:
    """The moments of some texts as far as they are read: ``done`` of the ``batches``, ``at`` of ``count`` positions.

    ``kept`` [count]: which positions sampled moments keep. ``outputs``: of no layer where no gradient is read.
    ``totals``: layer → Σ‖z‖², Σ‖δ‖², Σ‖z‖²‖δ‖², where positions are ``weighted``; none where they all count alike.
    """

    net: Net
    batches: list[Batch]
    inputs: dict[int, Sum]
    outputs: dict[int, Sum]
    head: Head
    kept: Tensor
    generator: torch.Generator
    weighted: bool = False
    totals: dict[int, Tensor] = field(default_factory=dict)
    done: int = 0
    at: int = 0

    @staticmethod
    def of(net: Net, tokens: Sequence[Tokens], asked: Asked, seed: int) -> Sums:
        """Nothing read yet."""
        count = sum(len(item.ids) - 1 for item in tokens)
        sampled = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[: asked.samples]
        kept = torch.zeros(count, dtype=torch.bool).index_fill_(0, sampled, True)
        inputs = {
            layer: Sum(kind_for(asked.inputs, place.widths), place.widths)
            for layer, place in enumerate(net.anatomy.ffns)
        }
        kind = kind_for(asked.outputs, (net.hidden,))
        outputs = {layer: Sum(kind) for layer in range(net.layers)} if asked.slopes else {}
        for layer, place in enumerate(net.anatomy.ffns):  # side by side, not between what passes leave
            inputs[layer].begin(sum(place.widths), net.device)
            if layer in outputs:
                outputs[layer].begin(net.hidden, net.device)
        generator = torch.Generator(net.device).manual_seed(seed)
        with settled(net.model):
            head = Head.of(net, tokens[0])
        return Sums(net, net.batches(tokens, READ_AT_ONCE), inputs, outputs, head, kept, generator, asked.weighted)

    def read(self) -> Iterator[tuple[int, int]]:
        """Read on, batch by batch; yields how many are read, of how many."""
        while self.done < len(self.batches):
            with settled(self.net.model):
                self._read(self.batches[self.done])
            self.done += 1
            yield self.done, len(self.batches)

    def _read(self, batch: Batch) -> None:
        net, layers = self.net, list(self.outputs)
        with torch.set_grad_enabled(bool(layers)), net.watch(list(self.inputs)) as watched:
            seen = self.head.seen(batch)
            outputs = [watched.outputs[layer] for layer in layers]
            made = torch.autograd.grad(seen, outputs, self._slopes(seen)) if layers else ()
        if not layers:
            self._checked(seen)
        real = F.pad(batch.mask[:, 1:], (0, 1)).reshape(-1).bool()
        rows = self.kept[self.at : self.at + int(real.sum())].to(net.device)
        self.at += len(rows)
        steep = dict(zip(layers, made, strict=True))
        for layer, one in self.inputs.items():
            z = watched.inputs[layer].detach().reshape(len(real), -1)[real]
            if layer in steep:
                slopes = steep[layer].reshape(len(real), -1)[real]
                if self.weighted:
                    z, slopes = self._weighted(layer, z.float(), slopes.float())
                self.outputs[layer].add(slopes, rows)
            one.add(z, rows)

    def _weighted(self, layer: int, z: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor]:
        """z ‖δ‖ and δ ‖z‖, position by position."""
        sizes, steep = z.norm(dim=1, keepdim=True), slopes.norm(dim=1, keepdim=True)
        squares = torch.cat([sizes, steep, sizes * steep], dim=1).double().square().sum(dim=0).cpu()
        self.totals[layer] = self.totals[layer] + squares if layer in self.totals else squares
        return z * steep, slopes * sizes

    def _scales(self, layer: int) -> tuple[float, float]:
        """What the two moments of a layer are multiplied by, so that tr C · tr F is the mean of ‖z‖²‖δ‖²."""
        if layer not in self.totals:
            return 1.0, 1.0
        _, steep, both = self.totals[layer].tolist()
        return (self.at / steep, steep / both) if both > 0 else (1.0, 1.0)

    def _slopes(self, seen: Tensor) -> Tensor:
        """The gradient of the loss of sampled tokens where the head reads, a block of positions at a time."""
        found: list[Tensor] = []
        for start in range(0, len(seen), self.head.positions):
            part = seen[start : start + self.head.positions].detach().requires_grad_()
            logits = self.head.logits(part).float()
            self._checked(logits.detach())
            said = drawn(logits.detach(), self.generator)
            found += torch.autograd.grad(F.cross_entropy(logits, said, reduction="sum"), part)
        return torch.cat(found)

    def _checked(self, values: Tensor) -> None:
        if not bool(values.isfinite().all()):
            raise NotFiniteError(not_finite("", self.net.dtype))

    def statistics(self, name: str) -> Statistics:
        """What was read, each layer's moment put together when it is asked for."""
        count = self.at

        def outputs(layer: int) -> Moment:
            if not self.outputs:
                return Moment.identity(self.net.hidden)
            return self.outputs[layer].moment(count, self._scales(layer)[1])

        return Statistics(
            OnDemand(self.inputs, lambda layer: self.inputs[layer].moment(count, self._scales(layer)[0]), keep=False),
            OnDemand(self.inputs, outputs, keep=False),
            name,
            count,
        )

    def state(self) -> dict[str, Tensor]:
        """All that is needed to go on later."""
        found = {"done": torch.tensor([self.done, self.at]), "generator": self.generator.get_state()}
        for part, sums in (("inputs", self.inputs), ("outputs", self.outputs)):
            for layer, one in sums.items():
                found |= {f"{part}.{layer}.{number}": piece for number, piece in enumerate(one.parts)}
        return found | {f"totals.{layer}": squares for layer, squares in self.totals.items()}

    def resume(self, state: Mapping[str, Tensor]) -> None:
        """Go on where the ``state`` of sums over the same texts stood."""
        self.done, self.at = state["done"].tolist()
        self.generator.set_state(state["generator"])
        for part, sums in (("inputs", self.inputs), ("outputs", self.outputs)):
            for layer, one in sums.items():
                names = (f"{part}.{layer}.{number}" for number in range(len(state)))
                device = "cpu" if one.kind == "sampled" else self.net.device
                one.parts = [state[name].to(device, copy=True) for name in names if name in state]
        self.totals = {layer: state[f"totals.{layer}"].clone() for layer in self.inputs if f"totals.{layer}" in state}


def kind_for(asked: str, widths: Sequence[int]) -> str:
    """How a moment of experts of these widths (or of one) is kept where it is left open.

    "full" is never kept across more than FULL_WIDTH neurons of several experts: then it is a block for each.
    """
    if asked not in ("auto", "full") or sum(widths) <= FULL_WIDTH:
        return asked if asked != "auto" else "full"
    if len(widths) == 1:
        return asked if asked != "auto" else "sampled"
    bounded = asked == "full" or max(widths) * sum(widths) <= BLOCKS
    return "blocks" if bounded else "diagonal"


@dataclass
class Sum:
    """A moment while its rows come in: strips of the sum of x xᵀ, blocks of it, the sum of x², or rows."""

    kind: str
    widths: tuple[int, ...] = ()
    parts: list[Tensor] = field(default_factory=list)

    def begin(self, width: int, device: torch.device) -> None:
        """Make room for what is summed up, of a full moment and of blocks; the others take little."""
        if self.kind == "full":
            shapes = [(rows.stop - rows.start, width - rows.start) for rows in strips(width)]
        else:
            shapes = [(max(self.widths), width)] if self.kind == "blocks" else []
        self.parts = [torch.zeros(shape, device=device) for shape in shapes]

    def add(self, x: Tensor, sampled: Tensor) -> None:
        """Take rows x [n, w]; a sampled moment keeps some of them."""
        x = x.float()
        if self.kind == "sampled":
            self.parts = [torch.cat([*self.parts, x[sampled].cpu()])]
            return
        if not self.parts:
            self.begin(x.shape[1], x.device)
        if self.kind == "blocks":
            for one in blocks(self.widths):
                mine = x[:, one][x[:, one].any(dim=1)]  # of the tokens that the expert saw
                self.parts[0][: one.stop - one.start, one].addmm_(mine.T, mine)
            return
        if self.kind != "full":
            self.parts = [sum(self.parts, x.square().sum(dim=0))]
            return
        for part, rows in zip(self.parts, strips(x.shape[1]), strict=True):
            part.addmm_(x[:, rows].T, x[:, rows.start :])

    def moment(self, count: int, scale: float = 1.0) -> Moment:
        """The mean over ``count`` positions, times ``scale``."""
        if self.kind == "sampled":
            return Moment("sampled", self.parts[0] * scale**0.5)
        if self.kind == "blocks":
            some = blocks(self.widths)
            found = [(self.parts[0][: one.stop - one.start, one] / count * scale).cpu() for one in some]
            return Moment.of_blocks([(block + block.T) / 2 for block in found])
        if self.kind != "full":
            mean = (self.parts[0] / count * scale).cpu()
            return Moment.identity(len(mean), float(mean.mean())) if self.kind == "none" else Moment(self.kind, mean)
        width = self.parts[0].shape[1]
        values = torch.empty(width, width)
        for part, rows in zip(self.parts, strips(width), strict=True):
            mean = (part / count * scale).cpu()
            square = mean[:, : rows.stop - rows.start]
            square.copy_((square + square.T) / 2)  # a product's rounding need not be symmetric
            values[rows.start :, rows] = mean.T
            values[rows, rows.start :] = mean
        return Moment("full", values)
