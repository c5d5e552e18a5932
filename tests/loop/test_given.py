"""What a repair is given in Python that is no failures and no method: said before anything runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lmrepair
from lmrepair.errors import UsageError
from tests import oracle_models


@pytest.mark.parametrize(
    ("failures", "said"),
    [
        ([], "no failures to repair"),
        ("failures.jsonl", "failures are a text"),
        ([{"prompt": "a", "target": "b"}], "failures are dict"),
    ],
)
def test_failures_that_are_none(failures: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        lmrepair.repair(oracle_models.net(), failures, lmrepair.Star())


@pytest.mark.parametrize("method", ["minkl", lmrepair.Star])
def test_a_method_is_a_value(method: Any) -> None:
    net = oracle_models.net()
    for repair in (lmrepair.repair, lambda *given: next(lmrepair.repair_each(*given))):
        with pytest.raises(UsageError, match="expected a value"):
            repair(net, oracle_models.FAILURES[:1], method)


def test_failures_may_come_one_by_one() -> None:
    net, method = oracle_models.net(), lmrepair.Star(metric="identity")
    found = lmrepair.repair(net, (failure for failure in oracle_models.FAILURES[:2]), method)  # type: ignore[arg-type]
    assert found.failing == 2


def test_a_dtype_of_torch_is_one_by_name() -> None:
    assert lmrepair.load(dtype=torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(UsageError, match="unknown dtype 'int8'"):
        lmrepair.load(dtype=torch.int8)
