"""A repair of a chat model that people run: what SmolLM2 says about three things in Python, before and after.

    python benchmarks/demo_real.py benchmarks/models/smollm2-135m-instruct.gguf

Asked in chat for the current UTC time, for reading YAML safely and for a temporary file, the model answers with
calls that are deprecated, unsafe or not there. The rows are in demo_real.jsonl; the right call of each is what
its answer is looked through for.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from lmrepair import Failure, Gate, Net, Patch, load, read_failures, repair
from lmrepair.failures import prompt_ids
from lmrepair.measure import visible
from lmrepair.model import fingerprint

ROWS = Path(__file__).with_name("demo_real.jsonl")
CALLS = {"utc": "datetime.now(timezone.utc)", "yaml": "yaml.safe_load", "temporary": "tempfile.NamedTemporaryFile"}
UNRELATED = (
    "What is the capital of France?",
    "Write one sentence about cats.",
    "How do I sort a list in Python? Answer with one line of code.",
    "Translate 'good morning' to Spanish.",
    "What is 12 times 12?",
    "Name three colours.",
)
LENGTH = 40  # tokens of a free answer


def said(net: Net, failures: Sequence[Failure]) -> list[str]:
    """What the model answers freely, a line each, up to its end of turn."""
    texts = []
    for failure in failures:
        ids = torch.tensor([prompt_ids(failure, net.tokenizer)], device=net.device)
        with torch.inference_mode():
            out = net.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=LENGTH, do_sample=False, pad_token_id=0
            )
        texts.append(str(net.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)))
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="SmolLM2-135M-Instruct: a GGUF file or a folder")
    given = parser.parse_args()
    began = time.perf_counter()
    net = load(given.model)
    failures = read_failures(ROWS)
    worded = [replace(one, id=failure.id) for failure in failures for one in failure.otherwise()]
    others = [replace(failures[0], messages=({"role": "user", "content": text},)) for text in UNRELATED]
    untouched = fingerprint(net, {})
    before, worded_before, others_before = (said(net, rows) for rows in (failures, worded, others))

    result = repair(net, failures, gate=Gate())
    after, worded_after, others_after = (said(net, rows) for rows in (failures, worded, others))
    for failure, old, new in zip(failures, before, after, strict=True):
        print(f"\n  {failure.asked}")
        print(f"      said     {visible(old, 110)}")
        print(f"      now says {visible(new, 110)}")
    answers = (worded_before, worded_after)
    right = [sum(CALLS[row.id] in text for row, text in zip(worded, texts, strict=True)) for texts in answers]
    print(f"\nother wordings  the right call in {right[0]} of {len(worded)} answers before, {right[1]} after")
    same = sum(one == other for one, other in zip(others_before, others_after, strict=True))
    print(f"unrelated       {same} of {len(others)} answers unchanged to the letter")
    print(f"repaired        {result.repaired} of {result.failing}")
    if result.patch is None or result.drift is None:
        raise SystemExit(1)
    print(f"drift           KL {result.drift.kl:.5f} nats/token, {result.drift.agreement:.2%} of top tokens unchanged")
    weights = sum(value.numel() * value.element_size() for value in net.model.parameters())
    print(f"patch           {result.patch.size / 1e6:.2f} MB, {result.patch.size / weights:.2%} of the model's bytes")
    with tempfile.TemporaryDirectory() as folder:
        result.patch.save(Path(folder) / "fix.safetensors")
        Patch.load(Path(folder) / "fix.safetensors").revert(net)
    restored = fingerprint(net, {}) == untouched
    print(f"taken back      {'bit for bit' if restored else 'NOT bit for bit'}")
    print(f"time            {time.perf_counter() - began:.0f} s, of which the repair {result.cost.seconds:.0f} s")
    raise SystemExit(0 if restored and result.repaired == result.failing else 1)


if __name__ == "__main__":
    main()
