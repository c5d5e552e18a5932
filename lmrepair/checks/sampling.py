"""Completions from a model: greedy or sampled, each cut by its task's own stop rule."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lmrepair.checks.tasks import Task
from lmrepair.errors import FailuresError
from lmrepair.failures import prompt_ids
from lmrepair.measure import decoder
from lmrepair.model import Choose, Net, Prompt, settled, write


@dataclass(frozen=True)
class Written:
    """What a model wrote: ``completion``, cut by the task's stop rule, and ``closing``, the line ends or the end
    token with which it closed it (empty where the length did).

    ``tokens``: how many were written, with what made the rule stop it or the end token.
    """

    completion: str
    closing: str
    tokens: int

    @property
    def target(self) -> str:
        """What a repair has to bring about: the completion, and that it ends there."""
        return self.completion + self.closing


def write_greedy(
    net: Net, tasks: Sequence[Task], length: int, report: Callable[[int, int], None] | None = None
) -> list[Written]:
    """The greedy completion of each task, at most ``length`` tokens long.

    Raises FailuresError for a prompt that fills the model's context.
    """
    return _written(net, tasks, length, lambda _, logits: logits.argmax(dim=1), report)


def write_samples(
    net: Net, tasks: Sequence[Task], count: int, length: int, temperature: float, seeds: Sequence[int]
) -> list[list[Written]]:
    """``count`` completions of each task, sampled from the model's own distribution at a temperature above 0.

    A task's samples follow from its own seed, whatever is written beside them.
    """
    drawn = [torch.rand(length, count, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    shares = torch.cat(drawn, dim=1) if drawn else torch.empty(length, 0)
    steps = [0] * (count * len(tasks))

    def choose(rows: Sequence[int], logits: Tensor) -> Tensor:
        chances = (logits.float().cpu() / temperature).softmax(dim=1).cumsum(dim=1)
        share = 1 - torch.stack([shares[steps[row], row] for row in rows])
        for row in rows:
            steps[row] += 1
        return torch.searchsorted(chances, share[:, None] * chances[:, -1:]).squeeze(1)

    found = _written(net, [task for task in tasks for _ in range(count)], length, choose)
    return [found[at * count : (at + 1) * count] for at in range(len(tasks))]


def nats(net: Net, tasks: Sequence[Task], completions: Sequence[str]) -> list[float]:
    """How unlikely the model finds each completion: cross-entropy summed over its tokens, in nats.

    Infinite where the tokenizer cannot write it, or the context has no room for it.
    """
    found, items = [math.inf] * len(tasks), []
    for index, (task, completion) in enumerate(zip(tasks, completions, strict=True)):
        try:
            items.append((index, net.tokenize([task.failure(completion)])[0]))
        except FailuresError:
            continue
    if items:
        with settled(net.model):
            losses = net.prefer(net.batches([tokens for _, tokens in items])).loss.double()
        parts = losses.split([len(tokens.target) for _, tokens in items])
        for (index, _), part in zip(items, parts, strict=True):
            found[index] = float(part.sum())
    return found


def _written(
    net: Net,
    tasks: Sequence[Task],
    length: int,
    choose: Choose,
    report: Callable[[int, int], None] | None = None,
) -> list[Written]:
    prompts = [prompt_ids(task.failure("?"), net.tokenizer) for task in tasks]
    context, ends = net.anatomy.context, end_tokens(net)
    for task, prompt in zip(tasks, prompts, strict=True):
        if context is not None and len(prompt) >= context:
            raise FailuresError(f"task {task.id!r} takes {len(prompt)} tokens, which leaves no room for a completion")

    def ended(row: int, ids: list[int]) -> bool:
        if ids[-1] in ends:
            return True
        text = _text(net, prompts[row], ids)
        return tasks[row].end(text) < len(text)

    made = write(net, prompts, length, choose, ended, report)
    return [_closed(net, *row, ends) for row in zip(tasks, prompts, made, strict=True)]


def _closed(net: Net, task: Task, prompt: Prompt, ids: list[int], ends: frozenset[int]) -> Written:
    """Written tokens as a completion and what closed it."""
    if ids and ids[-1] in ends:
        return Written(task.cut(_text(net, prompt, ids[:-1])), decoder(net)(ids[-1:]), len(ids))
    text = _text(net, prompt, ids)
    at = task.end(text)
    rest = text[at:]
    return Written(text[:at], rest[: len(rest) - len(rest.lstrip("\n"))], len(ids))


def _text(net: Net, prompt: Sequence[int], ids: Sequence[int]) -> str:
    """What ids add to the prompt's last token, decoded behind it: some tokenizers drop a text's first space."""
    tail, decode = list(prompt[-1:]), decoder(net)
    return decode(tail + list(ids))[len(decode(tail)) :]


def end_tokens(net: Net) -> frozenset[int]:
    """The tokens with which this model ends its text."""
    own = net.tokenizer.eos_token_id
    return net.ends if own is None else net.ends | {own}
