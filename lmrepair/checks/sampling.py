"""Completions from a model: greedy or sampled, each cut by its task's own stop rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lmrepair.checks.tasks import Task
from lmrepair.errors import FailuresError
from lmrepair.failures import prompt_ids
from lmrepair.measure import decoder
from lmrepair.model import Net, settled

AT_ONCE = 16  # prompts side by side


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

    Prompts of one length run side by side, so that nothing is padded. Raises FailuresError for a prompt that
    fills the model's context.
    """
    groups: dict[int, list[tuple[int, tuple[int, ...]]]] = {}
    for index, task in enumerate(tasks):
        ids = prompt_ids(task.failure("?"), net.tokenizer)
        groups.setdefault(len(ids), []).append((index, ids))
    found: dict[int, Written] = {}
    for group in groups.values():
        for start in range(0, len(group), AT_ONCE):
            part = group[start : start + AT_ONCE]
            chosen = [tasks[index] for index, _ in part]
            texts = _write(net, chosen, [ids for _, ids in part], length, 0.0, None)
            found.update({index: text for (index, _), text in zip(part, texts, strict=True)})
            if report is not None:
                report(len(found), len(tasks))
    return [found[index] for index in range(len(tasks))]


def write_samples(net: Net, task: Task, count: int, length: int, temperature: float, seed: int) -> list[Written]:
    """``count`` completions of one task, sampled from the model's own distribution at a temperature above 0."""
    ids = prompt_ids(task.failure("?"), net.tokenizer)
    generator = torch.Generator().manual_seed(seed)
    return _write(net, [task] * count, [ids] * count, length, temperature, generator)


def nats(net: Net, tasks: Sequence[Task], completions: Sequence[str]) -> list[float]:
    """How unlikely the model finds each completion: cross-entropy summed over its tokens, in nats.

    Infinite where the tokenizer cannot write it, or the context has no room for it.
    """
    found = []
    for task, completion in zip(tasks, completions, strict=True):
        try:
            batches = net.batches(net.tokenize([task.failure(completion)]))
        except FailuresError:
            found.append(float("inf"))
            continue
        with settled(net.model):
            found.append(float(net.prefer(batches).loss.double().sum()))
    return found


def _write(
    net: Net,
    tasks: Sequence[Task],
    prompts: Sequence[tuple[int, ...]],
    length: int,
    temperature: float,
    generator: torch.Generator | None,
) -> list[Written]:
    """Token by token with the model's cache; a row that has ended is fed on and not looked at."""
    context, wide = net.anatomy.context, len(prompts[0])
    room = length if context is None else min(length, context - wide)
    if room < 1:
        raise FailuresError(f"task {tasks[0].id!r} takes {wide} tokens, which leaves no room for a completion")
    ends, fed, cache = end_tokens(net), torch.tensor(prompts, device=net.device), None
    made: list[list[int]] = [[] for _ in tasks]
    done: list[Written | None] = [None] * len(tasks)
    with settled(net.model), torch.inference_mode():
        for step in range(room):
            mask = torch.ones(len(tasks), wide + step, dtype=torch.long, device=net.device)
            output = net.model(input_ids=fed, attention_mask=mask, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            chosen = _choose(output.logits[:, -1], temperature, generator)
            for row, token in enumerate(chosen.tolist()):
                if done[row] is None:
                    done[row] = _step(net, tasks[row], prompts[row], made[row], token, token in ends)
            if all(one is not None for one in done):
                break
            fed = chosen[:, None].to(net.device)
    texts = [_text(net, prompt, ids) for prompt, ids in zip(prompts, made, strict=True)]
    return [
        one or Written(task.cut(text), "", len(ids))
        for one, task, text, ids in zip(done, tasks, texts, made, strict=True)
    ]


def _step(net: Net, task: Task, prompt: Sequence[int], made: list[int], token: int, end: bool) -> Written | None:
    """Take on one token; what was written, if it ends here."""
    if end:
        return Written(task.cut(_text(net, prompt, made)), decoder(net)([token]), len(made) + 1)
    made.append(token)
    text = _text(net, prompt, made)
    at = task.end(text)
    if at == len(text):
        return None
    rest = text[at:]
    return Written(text[:at], rest[: len(rest) - len(rest.lstrip("\n"))], len(made))


def _choose(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """The next tokens [B], from logits [B, V]."""
    if temperature == 0:
        return logits.argmax(dim=1).cpu()
    chances = (logits.float().cpu() / temperature).softmax(dim=1)
    return torch.multinomial(chances, 1, generator=generator).squeeze(1)


def _text(net: Net, prompt: Sequence[int], ids: Sequence[int]) -> str:
    """What ids add to the prompt's last token, decoded behind it: some tokenizers drop a text's first space."""
    tail, decode = list(prompt[-1:]), decoder(net)
    return decode(tail + list(ids))[len(decode(tail)) :]


def end_tokens(net: Net) -> frozenset[int]:
    """The tokens with which this model ends its text."""
    own = net.tokenizer.eos_token_id
    return net.ends if own is None else net.ends | {own}
