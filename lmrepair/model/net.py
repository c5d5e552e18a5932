"""A model with its tokenizer and anatomy: neuron-major weights, FFN coefficients, gradients, greedy text.

A neuron is column j of an FFN output projection: the vector [d] it writes to the residual stream.
Everything here is neuron-major: weights, deltas and gradients of a layer are [neurons, d]. The neurons of a
mixture of experts are counted through, expert by expert; how they are stored is the anatomy's business.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers import GenerationConfig

from lmrepair.errors import ModelError, NotFiniteError
from lmrepair.failures import Failure, Tokens, tokenize
from lmrepair.model.anatomy import (
    Anatomy,
    altered,
    bare,
    find,
    first_infinite,
    in_shards,
    not_finite,
    passing,
    seen,
    settled as settled,
    together,
    weight,
)
from lmrepair.model.batches import TOKENS_AT_ONCE, Batch, Inputs, Preference, Reading, Sites, Watched, drawn, in_turn
from lmrepair.model.source import Source

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Net:
    """A causal language model ready to be read and repaired.

    Holds no state of its own beside what it was made from; ``name`` is how results refer to it, ``source``
    where it came from, ``placing_seconds`` how long its parts were looked for, ``in_shards`` whether its weights
    lie on several ranks, all of which run the same code.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str = "", source: Source | None = None) -> None:
        """Place the parts of the model. Raises ModelError for a model that cannot be placed or edited."""
        self.model = model
        self.tokenizer = tokenizer
        self.name = name or str(getattr(model.config, "name_or_path", "")) or type(model).__name__
        self.source = source or Source()
        began = time.perf_counter()
        with settled(model):
            self.in_shards = in_shards(model)
            self.anatomy: Anatomy = find(model)
        self.placing_seconds = time.perf_counter() - began

    @property
    def runs_in_shards(self) -> bool:
        """Whether what runs are shards: backward passes that are vectorised do not know them."""
        return self.in_shards and self.anatomy.ffns[0].stacks[0].owner is None

    @property
    def layers(self) -> int:
        return len(self.anatomy.ffns)

    @property
    def widths(self) -> tuple[int, ...]:
        return self.anatomy.widths

    @property
    def hidden(self) -> int:
        return self.anatomy.hidden

    @property
    def device(self) -> torch.device:
        """Where the head is. A layer may lie elsewhere: what is read of it, and is written to it, comes and goes."""
        return weight(self.anatomy.head).device

    @property
    def dtype(self) -> torch.dtype:
        return self.anatomy.ffns[0].dtype

    @property
    def pad(self) -> int:
        """A token id to pad with: it is masked, so any that the model has an embedding for will do."""
        return self._embedded(self.tokenizer.pad_token_id)

    def _embedded(self, *tokens: int | None) -> int:
        """The first of the token ids that the model has an embedding for; 0 where none is."""
        table = self.model.get_input_embeddings().weight
        return next((token for token in tokens if token is not None and 0 <= token < len(table)), 0)

    @property
    def bytes(self) -> int:
        """Of all weights; in shards, on all ranks together."""
        return sum(parameter.numel() * parameter.element_size() for parameter in self.model.parameters())

    @property
    def ends(self) -> frozenset[int]:
        """The tokens at which ``generate`` stops."""
        config = self.model.generation_config
        ends = None if config is None else config.eos_token_id
        return frozenset([ends] if isinstance(ends, int) else ends or ())

    def columns(self, layer: int) -> Tensor:
        """The neurons of a layer, [m, d], to be read: a view of a dense layer's, a copy of a mixture's."""
        return self.anatomy.ffns[layer].neurons().to(self.device)

    def every_site(self) -> Sites:
        return Sites({layer: torch.arange(width) for layer, width in enumerate(self.widths)})

    def tokenize(self, failures: Sequence[Failure]) -> list[Tokens]:
        """Token ids of the failures, checked against the model's context and vocabulary."""
        found = [tokenize(failure, self.tokenizer, self.anatomy.context) for failure in failures]
        for tokens in found:
            if max(tokens.ids) >= self.anatomy.vocabulary:
                raise ModelError(
                    f"token {max(tokens.ids)} of failure {tokens.id!r} is outside the head's vocabulary of "
                    f"{self.anatomy.vocabulary}; the tokenizer does not belong to this model"
                )
        return found

    def batches(self, tokens: Sequence[Tokens], at_once: int = TOKENS_AT_ONCE) -> list[Batch]:
        """The failures in order, in as few batches as keep each below ``at_once`` padded tokens."""
        return [self._batch(group) for group in in_turn(tokens, at_once)]

    def _batch(self, tokens: Sequence[Tokens]) -> Batch:
        return Batch.of(tokens, self.pad, self.device)

    def logits(self, batch: Batch, rows: Tensor | None = None) -> Tensor:
        """Logits [n, V] at flat positions of a batch (default: where its target tokens are predicted).

        The head is run on those positions alone; gradients are recorded if the caller enabled them.
        """
        logits, _ = self.logits_and_states(batch, rows)
        return logits

    def logits_and_states(
        self, batch: Batch, rows: Tensor | None = None, shown: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Logits [n, V] and what the head made them from, [1, n, d]; with gradients, part of their graph.

        ``shown``: the head is run on so many of the positions only (default: all). Raises NotFiniteError where
        a position has no largest logit.
        """
        chosen = batch.rows if rows is None else rows
        states: list[Tensor] = []

        def choose(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            states.append(given[0].reshape(-1, given[0].shape[-1]).to(self.device)[chosen][None])
            together(states[0], self.anatomy.around)
            return (states[0][:, :shown], *given[1:])

        handle = self.anatomy.head.register_forward_pre_hook(choose)
        try:
            with passing(self.model):
                output = self.model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)
        finally:
            handle.remove()
        logits: Tensor = output.logits[0]
        if not bool(logits.detach().amax(dim=-1).isfinite().all()):
            raise self._not_finite(batch.ids, batch.mask)
        return logits, states[0]

    def _not_finite(self, ids: Tensor, mask: Tensor) -> NotFiniteError:
        with torch.no_grad():
            where = first_infinite(self.model, lambda: self.model(input_ids=ids, attention_mask=mask, use_cache=False))
        return NotFiniteError(not_finite(where, self.dtype))

    def prefer(self, batches: Sequence[Batch]) -> Preference:
        """What the model prefers at every target position of the batches: one forward pass each."""
        with torch.inference_mode():
            return Preference.join([Preference.of(self.logits(batch), batch.wanted) for batch in batches])

    def read(
        self,
        batches: Sequence[Batch],
        sites: Sites,
        focus: Tensor | None = None,
        margin: float | None = None,
    ) -> Reading:
        """One forward and one backward pass over each batch, kept at the chosen neurons.

        ``focus`` [N] (bool) narrows the cross-entropy to some positions. With a ``margin``, the last
        backward pass is left out if every position in focus is preferred by more: nothing is left to do.
        """
        sizes = [len(batch.rows) for batch in batches]
        parts = [None] * len(batches) if focus is None else list(focus.split(sizes))
        total = sum(sizes) if focus is None else int(focus.sum())
        preferences: list[Preference] = []
        coefficients: dict[int, list[Tensor]] = {layer: [] for layer in sites.layers}
        gradients: dict[int, Tensor] = {}
        for number, (batch, part) in enumerate(zip(batches, parts, strict=True)):
            with torch.enable_grad(), self.watch(sites.layers) as watched:
                logits = self.logits(batch)
                with torch.no_grad():
                    preferences.append(Preference.of(logits, batch.wanted))
                if margin is not None and number + 1 == len(batches):
                    joint = Preference.join(preferences)
                    if joint.holds(focus, margin):
                        return Reading(joint, True)
                losses = F.cross_entropy(logits.float(), batch.wanted, reduction="none")
                loss = (losses if part is None else losses[part]).sum() / total
                made = torch.autograd.grad(loss, [watched.outputs[layer] for layer in sites.layers])
            for layer, gradient in zip(sites.layers, made, strict=True):
                z = self._chosen(watched.inputs[layer], sites, layer)
                coefficients[layer].append(z[batch.rows])
                dense = z.T @ gradient.reshape(-1, self.hidden).float()
                gradients[layer] = gradients[layer].add_(dense) if layer in gradients else dense
        joined = {layer: torch.cat(rows) for layer, rows in coefficients.items()}
        return Reading(Preference.join(preferences), False, joined, gradients)

    def _chosen(self, z: Tensor, sites: Sites, layer: int) -> Tensor:
        """The coefficients [B·T, k] of the chosen neurons, in float32."""
        flat = z.detach().reshape(-1, z.shape[-1])
        columns = sites.columns[layer]
        return (flat if len(columns) == flat.shape[-1] else flat[:, columns.to(flat.device)]).float()

    @contextmanager
    def watch(self, layers: Sequence[int]) -> Iterator[Watched]:
        """Keep the layers' coefficients and FFN outputs during forward passes (not in inference mode).

        The graph starts at the lowest of these outputs: below it, no gradient is recorded.
        """
        inputs, outputs = Inputs(), dict[int, Tensor]()
        shape: list[int] = []

        def started(_: nn.Module, __: Any, named: dict[str, Any]) -> None:
            shape[:] = named["input_ids"].shape

        def ran(layer: int, read: Callable[[], Tensor], output: Tensor, fed: bool) -> Tensor:
            form = tuple(shape)
            inputs.made[layer] = lambda: read().reshape(*form, -1).to(self.device)
            outputs[layer] = output.reshape(*form, -1).to(self.device)
            if not torch.is_grad_enabled():
                return output
            if not fed:
                outputs[layer] = outputs[layer].detach().requires_grad_()
            # What is differentiated by must not be changed in place by a residual add.
            return outputs[layer].to(output.device, copy=True)

        with ExitStack() as hooks:
            hooks.callback(self.model.register_forward_pre_hook(started, with_kwargs=True).remove)
            for layer in layers:
                hooks.enter_context(seen(self.anatomy.ffns[layer], partial(ran, layer), self.hidden))
            yield Watched(inputs, outputs)

    @contextmanager
    def altered(self, layer: int, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """A layer's FFN puts out ``change`` of its output [B·T, d] for the length of a block."""

        def here(output: Tensor) -> Tensor:
            return change(output.to(self.device)).to(output.device)

        with altered(self.anatomy.ffns[layer], here):
            yield

    def alone(self, module: nn.Module, given: Tensor) -> Tensor:
        """What the head or the final norm makes of values outside of the model's passes."""
        made: Tensor = bare(module, given) if self.anatomy.around else module(given)
        return made

    def generate(self, tokens: Sequence[Tokens]) -> list[tuple[int, ...]]:
        """Free-running greedy completions, each as long as its target unless the model ends it before.

        Prompts of equal length run together, so that nothing is padded. Penalties and sampling that the
        model's own generation config may ask for are left out: this is plain greedy decoding.
        """
        made: dict[int, tuple[int, ...]] = {}
        groups: dict[int, list[int]] = {}
        for index, item in enumerate(tokens):
            groups.setdefault(len(item.prompt), []).append(index)
        for group in groups.values():
            prompts = torch.tensor([tokens[index].prompt for index in group], device=self.device)
            longest = max(len(tokens[index].target) for index in group)
            with torch.inference_mode(), _decoding(self, longest):
                output = self.model.generate(input_ids=prompts, attention_mask=torch.ones_like(prompts))
            for index, row in zip(group, output[:, prompts.shape[1] :].tolist(), strict=True):
                made[index] = tuple(row[: len(tokens[index].target)])
        return [made[index] for index in range(len(tokens))]

    def sample(self, count: int, length: int, seed: int = 0, begun: Sequence[Sequence[int]] = ()) -> list[Tokens]:
        """Texts of ``length`` tokens that the model writes by itself, sampled from its own distribution.

        They start from the token that texts of this model start with, the second half of them with what is
        ``begun``, in turn (token ids, all of one length, the first of which is not counted). They do not stop at
        ends of text. Raises ModelError for a model whose logits are no finite numbers.
        """
        first = self._embedded(self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        others = [list(begun[at % len(begun)]) for at in range(count // 2 if begun else 0)]
        starts = torch.full((count - len(others), 1), first, device=self.device)
        generator = torch.Generator(self.device).manual_seed(seed)
        with torch.inference_mode():
            self.logits(self._batch([Tokens("start", (first,), (first,))]))
        written = 0
        if others:
            written = len(others[0]) - 1
            starts = torch.cat([self._drawn(starts, written, generator), torch.tensor(others, device=self.device)])
        rows = self._drawn(starts, length - written, generator).tolist()
        return [Tokens(str(at), (row[0],), tuple(row[1:])) for at, row in enumerate(rows)]

    def _drawn(self, starts: Tensor, length: int, generator: torch.Generator) -> Tensor:
        """Token ids [n, T + length] that go on from ``starts`` [n, T], drawn one by one."""

        def only_drawn(_: Tensor, logits: Tensor) -> Tensor:
            return torch.full_like(logits, -torch.inf).scatter_(1, drawn(logits, generator)[:, None], 0.0)

        with torch.inference_mode(), _decoding(self, length, True):
            made: Tensor = self.model.generate(
                input_ids=starts, attention_mask=torch.ones_like(starts), logits_processor=[only_drawn]
            )
        return made


@contextmanager
def _decoding(net: Net, length: int, sampled: bool = False) -> Iterator[None]:
    """Plain greedy decoding, whatever the model's own settings; ``sampled``: of exactly ``length`` tokens.

    Raises NotFiniteError where the head puts out what nothing can be chosen from.
    """
    model, kept = net.model, net.model.generation_config

    def look(_: nn.Module, __: Any, made: Tensor) -> None:
        if not bool(made[..., -1, :].amax(dim=-1).isfinite().all()):
            raise NotFiniteError(not_finite("", net.dtype))

    handle = net.anatomy.head.register_forward_hook(look)
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=length,
        pad_token_id=net.pad,
        eos_token_id=kept.eos_token_id if kept is not None and not sampled else None,
        bos_token_id=net.tokenizer.bos_token_id,
    )
    try:
        with passing(model):
            yield
    finally:
        handle.remove()
        model.generation_config = kept
