"""What patches change on text they were not made for: KL and agreement against the untouched model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import torch

from lmrepair.errors import FailuresError
from lmrepair.failures import Tokens, read_lines
from lmrepair.net import Net, settled
from lmrepair.patch import Patch

LENGTH = 256  # tokens read of one text
LOGITS_AT_ONCE = 1 << 24  # numbers: 64 MB in float32


@dataclass(frozen=True)
class Drift:
    """Change of predictions on reference text.

    ``kl``: mean KL(before ‖ after), nats per token. ``agreement``: share of tokens whose most likely
    successor stayed the same. ``tokens``: how many were read.
    """

    kl: float
    agreement: float
    tokens: int


@dataclass(frozen=True)
class Reference:
    """Texts to measure drift on; ``name`` says which, with a digest of their content."""

    name: str
    texts: tuple[str, ...]


def read_reference(path: str | Path | None = None) -> Reference:
    """Reference text from a file: JSON lines with ``text``, or plain text. Default: the set that ships.

    Raises FailuresError for a file that is missing, empty or not UTF-8.
    """
    source = Path(str(files("lmrepair") / "embedded" / "reference.jsonl")) if path is None else Path(path)
    if source.suffix == ".jsonl":
        texts = []
        for number, row in read_lines(source):
            if not isinstance(row.get("text"), str):
                raise FailuresError(f'{source}, line {number}: no text; expected reference text as {{"text": …}}')
            texts.append(row["text"])
    else:
        try:
            texts = [source.read_text(encoding="utf-8")]
        except (OSError, UnicodeDecodeError) as error:
            raise FailuresError(f"{source}: cannot be read as UTF-8 text ({error})") from error
    if not any(text.strip() for text in texts):
        raise FailuresError(f"{source}: no reference text in it")
    content = hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).hexdigest()[:12]
    return Reference(f"{'default' if path is None else source.name}@{content}", tuple(texts))


def measure_drift(
    net: Net,
    patches: Sequence[Patch],
    reference: Reference,
    progress: Callable[[int, int], None] | None = None,
) -> list[Drift]:
    """The drift of each patch on its own, against the net as it is now.

    The untouched model reads each batch once, whatever the number of patches.
    """
    sums = torch.zeros(len(patches), 2, dtype=torch.float64)
    count = 0
    with settled(net.model), torch.inference_mode():
        batches = net.batches(windows(net, reference.texts), max(LENGTH, LOGITS_AT_ONCE // net.anatomy.vocabulary))
        for number, batch in enumerate(batches):
            before = net.logits(batch).double().log_softmax(dim=1)
            likely, probabilities = before.argmax(dim=1), before.exp()
            certainty = torch.linalg.vecdot(probabilities, before)
            count += len(before)
            for index, patch in enumerate(patches):
                with patch.on(net):
                    after = net.logits(batch).double()
                # Σ p (log p − log q), with log q = logit − logsumexp and Σ p = 1
                kl = certainty - torch.linalg.vecdot(probabilities, after) + after.logsumexp(dim=1)
                same = after.argmax(dim=1) == likely
                sums[index] += torch.stack([kl.clamp(min=0).sum(), same.double().sum()]).cpu()
            if progress is not None:
                progress(number + 1, len(batches))
    return [Drift(float(kl) / count, float(same) / count, count) for kl, same in sums]


def windows(net: Net, texts: Sequence[str]) -> list[Tokens]:
    """The first LENGTH tokens of each text, every token after the first to be predicted."""
    length = min(LENGTH, net.anatomy.context or LENGTH)
    found = []
    for index, text in enumerate(texts):
        ids = net.tokenizer(text, verbose=False)["input_ids"][:length]
        if len(ids) > 1:
            found.append(Tokens(str(index), tuple(ids[:1]), tuple(ids[1:])))
    if not found:
        raise FailuresError("the reference text is too short: expected texts of two tokens or more")
    return found
