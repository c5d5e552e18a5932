"""Slow, obvious float64 versions of every formula; nothing here comes from the package.

A model is a Hugging Face causal LM, ``matrix`` one of its FFN output projections (Linear or Conv1D), a
sequence a pair (prompt ids, target ids). Gradients, deltas and priors are neuron-major, [neurons, d], as
in the package. Every sequence is run on its own, without padding.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

Sequences = Sequence[tuple[Sequence[int], Sequence[int]]]


# --- semantic bases, steers, priors ---------------------------------------------------------------


def bases(head: Tensor, gain: Tensor | None = None, rtol: float = 1e-9) -> Tensor:
    """Row v: column v of the pseudo-inverse of the head [V, d], or of head·diag(gain)."""
    u = head.double()
    if gain is not None:
        u = u @ torch.diag(gain.double())
    return torch.linalg.pinv(u, rtol=rtol).T


def steers(head: Tensor, wanted: Sequence[int], said: Sequence[int], gain: Tensor | None = None) -> Tensor:
    """Rows b_wanted − b_said."""
    table = bases(head, gain)
    return torch.stack([table[w] - table[s] for w, s in zip(wanted, said, strict=True)])


def by_spread(rows: Tensor) -> Tensor:
    """Each row divided by its inter-quartile range."""
    out = []
    for row in rows.double().numpy():
        low, high = np.quantile(row, 0.25), np.quantile(row, 0.75)
        out.append(torch.from_numpy(row / (high - low)))
    return torch.stack(out)


def prior(z: Tensor, s: Tensor, rtol: float = 1e-5) -> Tensor:
    """P [k, d] of least Frobenius norm among those that bring Z P [N, d] nearest to S."""
    return torch.linalg.pinv(z.double(), rtol=rtol) @ s.double()


def prior_by_lstsq(z: Tensor, s: Tensor, rtol: float = 1e-5) -> Tensor:
    """The same by LAPACK's minimum-norm least squares."""
    return torch.linalg.lstsq(z.double(), s.double(), rcond=rtol, driver="gelsd").solution


def closed_form(z: Tensor, r: Tensor, m: Tensor, ridge: float = 0.0, rtol: float = 1e-5) -> Tensor:
    """M Zᵀ (Z M Zᵀ + εI)⁻¹ R [k, d] for a dense metric M; with ε = 0 by the pseudo-inverse of Z M^½ itself."""
    z, r, m = z.double(), r.double(), m.double()
    if ridge:
        return m @ z.T @ torch.linalg.inv(z @ m @ z.T + ridge * torch.eye(len(z), dtype=torch.float64)) @ r
    sizes, vectors = torch.linalg.eigh(m)
    root = vectors @ torch.diag(sizes.clamp(min=0).sqrt()) @ vectors.T
    return root @ torch.linalg.pinv(z @ root, rtol=rtol) @ r


def damped(rows: Tensor, damping: float, diagonal: bool = False) -> Tensor:
    """C + damping·mean(diag C)·I [k, k] for C = E[x xᵀ] over rows x, or for its diagonal alone."""
    c = sum(torch.outer(row, row) for row in rows.double()) / len(rows)
    c = torch.diag(c.diagonal()) if diagonal else c
    return c + damping * c.diagonal().mean() * torch.eye(len(c), dtype=torch.float64)


def null_space(rows: Tensor, threshold: float) -> Tensor:
    """I − QQᵀ [k, k], Q the principal directions of rows whose second moment exceeds threshold·mean(diag)."""
    _, sizes, right = torch.linalg.svd(rows.double(), full_matrices=False)
    moments = sizes**2 / len(rows)
    keep = moments > threshold * float((rows.double() ** 2).mean())
    q = right[keep].T
    return torch.eye(rows.shape[1], dtype=torch.float64) - q @ q.T


# --- steps ----------------------------------------------------------------------------------------


def star_step(p: Tensor, g: Tensor, rate: float) -> Tensor:
    """η·P̂ entry by entry: the size of the prior, against the gradient's sign; no gradient, no move."""
    step = torch.zeros_like(p)
    for row in range(p.shape[0]):
        for column in range(p.shape[1]):
            size, slope = abs(float(p[row, column])), float(g[row, column])
            if slope > 0:
                step[row, column] = -rate * size
            elif slope < 0:
                step[row, column] = rate * size
    return step


def sgd_steps(model: Any, at: Sequence[int], sequences: Sequences, rate: float, steps: int) -> dict[int, Tensor]:
    """Layer → change [m, d] of its FFN output projection after plain SGD on the mean cross-entropy."""
    return _optimised(model, at, sequences, steps, lambda weights: torch.optim.SGD(weights, lr=rate))


def _optimised(model: Any, at: Sequence[int], sequences: Sequences, steps: int, make: Any) -> dict[int, Tensor]:
    twin = _twin(model)
    weights = {layer: _matrices(twin)[layer].weight for layer in at}
    for parameter in twin.parameters():
        parameter.requires_grad_(False)
    for weight in weights.values():
        weight.requires_grad_(True)
    start = {layer: weight.detach().clone() for layer, weight in weights.items()}
    optimiser = make(list(weights.values()))
    for _ in range(steps):
        optimiser.zero_grad()
        _mean_loss(twin, sequences).backward()
        optimiser.step()
    return {
        layer: _neuron_major(_matrices(twin)[layer], weight.detach() - start[layer])
        for layer, weight in weights.items()
    }


def mint_steps(
    model: Any,
    prompt: Sequence[int],
    target: Sequence[int],
    position: int,
    factor: float,
    patches: int,
    variant: str = "delta",
    used: Sequence[Tensor] = (),
) -> list[tuple[list[tuple[int, int]], tuple[int, int], float, dict[int, Tensor]]]:
    """MINT on one mistake, patch by patch: (candidates, winner, its p(said) − p(wanted), layer → change [m, d]).

    Each drift is made orthogonal to the ``used`` ones by least squares.
    """
    twin, wanted = _twin(model).requires_grad_(False), target[position]
    stored = [matrix.weight if type(matrix).__name__ == "Conv1D" else matrix.weight.T for matrix in _matrices(twin)]
    start = [weight.clone() for weight in stored]
    table = bases(twin.get_output_embeddings().weight)
    count = len(stored)

    def chances() -> Tensor:
        return twin(input_ids=torch.tensor([[*prompt, *target[:position]]])).logits[0, -1].softmax(0)

    scores = {}
    for layer in range(count // 2, count):
        found = gradient_times_activation(twin, layer, prompt, target, [(position, 0)])[0]
        scores.update({(layer, neuron): abs(float(value)) for neuron, value in enumerate(found)})
    candidates = sorted(scores, key=lambda place: -scores[place])[:10]
    made = []
    for _ in range(patches):
        others = chances()
        others[wanted] = -1.0
        said = int(others.argmax())
        outcomes = {}
        for layer, neuron in candidates:
            at = (layer + 1) / count
            drift = at * (table[wanted] - table[said])
            if variant == "basis":
                drift = at * table[wanted] + (1 - at) * twin.get_input_embeddings().weight[prompt[-1]]
            if used:
                rows = torch.stack(list(used)).T
                drift = drift - rows @ (torch.linalg.pinv(rows) @ drift)
            drift = drift / (max(drift.tolist()) - min(drift.tolist()))
            kept = stored[layer][neuron].clone()
            moved = (kept + factor * drift) / (1 + factor)
            stored[layer][neuron] = moved
            now = chances()
            outcomes[layer, neuron] = (float(now[said] - now[wanted]), moved)
            stored[layer][neuron] = kept
        winner = min(outcomes, key=lambda place: outcomes[place][0])
        stored[winner[0]][winner[1]] = outcomes[winner][1]
        changes = {layer: stored[layer] - start[layer] for layer in range(count)}
        made.append((candidates, winner, outcomes[winner][0], changes))
    return made


def adam_steps(model: Any, at: Sequence[int], sequences: Sequences, rate: float, steps: int) -> dict[int, Tensor]:
    """Layer → change [m, d] of its FFN output projection after torch's own Adam on the mean cross-entropy."""
    return _optimised(model, at, sequences, steps, lambda weights: torch.optim.Adam(weights, lr=rate))


# --- what a model does ----------------------------------------------------------------------------


def logits(model: Any, ids: Sequence[int]) -> Tensor:
    """Float64 logits [len(ids), V] of one sequence."""
    with torch.no_grad():
        return _twin(model)(input_ids=torch.tensor([list(ids)])).logits[0]


def mistakes(model: Any, prompt: Sequence[int], target: Sequence[int]) -> list[tuple[int, int, int, float]]:
    """(position, wanted, said, gap) by one full forward pass for each prefix; a tie is a mistake."""
    twin, found = _twin(model), []
    for position, wanted in enumerate(target):
        ids = [*prompt, *target[:position]]
        with torch.no_grad():
            last = twin(input_ids=torch.tensor([ids])).logits[0, -1]
        rivals = [(float(value), -token) for token, value in enumerate(last.tolist()) if token != wanted]
        best, negative = max(rivals)
        if best >= float(last[wanted]):
            found.append((position, wanted, -negative, best - float(last[wanted])))
    return found


def greedy(model: Any, prompt: Sequence[int], length: int) -> list[int]:
    """The most likely token, again and again, without a cache."""
    twin, ids = _twin(model), list(prompt)
    for _ in range(length):
        with torch.no_grad():
            ids.append(int(twin(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def losses(model: Any, sequences: Sequences) -> Tensor:
    """Cross-entropy [N] of every target token, in nats."""
    with torch.no_grad():
        return torch.cat(_losses(_twin(model), sequences))


def coefficients(model: Any, at: int, sequences: Sequences) -> Tensor:
    """Z [N, m]: what the FFN output projection reads where the target tokens are predicted."""
    twin, rows, seen = _twin(model), [], []
    handle = _matrices(twin)[at].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    for prompt, target in sequences:
        with torch.no_grad():
            twin(input_ids=torch.tensor([[*prompt, *target]]))
        rows.append(seen.pop()[0][len(prompt) - 1 : len(prompt) - 1 + len(target)])
    handle.remove()
    return torch.cat(rows)


def gradients(model: Any, sequences: Sequences, focus: Sequence[bool] | None = None) -> list[Tensor]:
    """For each layer, [m, d]: gradient of the mean cross-entropy (of the positions in focus)."""
    twin = _twin(model)
    weights = [matrix.weight for matrix in _matrices(twin)]
    _mean_loss(twin, sequences, focus).backward()
    return [_neuron_major(matrix, w.grad) for matrix, w in zip(_matrices(twin), weights, strict=True)]


def skipped_loss(model: Any, at: int, prompt: Sequence[int], target: Sequence[int], position: int) -> float:
    """Cross-entropy of one target token with one layer's FFN writing nothing."""
    twin = _twin(model)
    matrix = _matrices(twin)[at]
    with torch.no_grad():
        matrix.weight.zero_()
        if getattr(matrix, "bias", None) is not None:
            matrix.bias.zero_()
    return float(losses(twin, [(prompt, target)])[position])


def gradient_times_activation(
    model: Any,
    at: int,
    prompt: Sequence[int],
    target: Sequence[int],
    wrong: Sequence[tuple[int, int]],
    by: str = "probability",
) -> Tensor:
    """z·∂f/∂z [mistakes, m] at the positions of the mistakes, f summed over them.

    ``wrong`` lists (position, rival); f is the wanted token's probability, or (``by`` "contrast") its
    logit minus the rival's.
    """
    twin, kept = _twin(model), []

    def keep(_: Any, given: tuple[Tensor, ...]) -> None:
        given[0].retain_grad()
        kept.append(given[0])

    _matrices(twin)[at].register_forward_pre_hook(keep)
    out = twin(input_ids=torch.tensor([[*prompt, *target]])).logits[0]
    value = torch.zeros((), dtype=torch.float64)
    for position, rival in wrong:
        row = out[len(prompt) - 1 + position]
        wanted = target[position]
        value = value + (row[wanted] - row[rival] if by == "contrast" else row.softmax(0)[wanted])
    value.backward()
    (z,) = kept
    return torch.stack([(z * z.grad)[0, len(prompt) - 1 + position].detach() for position, _ in wrong])


def drift(before: Any, after: Any, texts: Sequence[Sequence[int]]) -> tuple[float, float, int]:
    """Mean KL(before ‖ after) in nats a token, share of equal argmaxes, tokens; all but a text's first token."""
    divergence, same, count = 0.0, 0, 0
    for ids in texts:
        old, new = logits(before, ids)[:-1].log_softmax(1), logits(after, ids)[:-1].log_softmax(1)
        for p, q in zip(old, new, strict=True):
            divergence += float((p.exp() * (p - q)).sum())
            same += int(p.argmax() == q.argmax())
            count += 1
    return divergence / count, same / count, count


# --- helpers --------------------------------------------------------------------------------------


def _twin(model: Any) -> Any:
    """A float64 copy in evaluation mode whose parameters want gradients."""
    return copy.deepcopy(model).double().eval().requires_grad_(True)


def _matrices(model: Any) -> list[Any]:
    if hasattr(model, "transformer"):
        return [block.mlp.c_proj for block in model.transformer.h]
    return [block.mlp.down_proj for block in model.model.layers]


def _neuron_major(matrix: Any, tensor: Tensor) -> Tensor:
    """[m, d] from what a projection stores: transformers' Conv1D keeps [m, d], Linear [d, m]."""
    return tensor.clone() if type(matrix).__name__ == "Conv1D" else tensor.T.clone()


def _losses(model: Any, sequences: Sequences) -> list[Tensor]:
    found = []
    for prompt, target in sequences:
        out = model(input_ids=torch.tensor([[*prompt, *target]])).logits[0].log_softmax(1)
        found += [-out[len(prompt) - 1 + at, token][None] for at, token in enumerate(target)]
    return found


def _mean_loss(model: Any, sequences: Sequences, focus: Sequence[bool] | None = None) -> Tensor:
    every = _losses(model, sequences)
    chosen = every if focus is None else [loss for loss, wanted in zip(every, focus, strict=True) if wanted]
    return torch.cat(chosen).mean()
