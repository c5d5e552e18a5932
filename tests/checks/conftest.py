"""The sandbox that this machine has; without one, what needs it skips and says so."""

from __future__ import annotations

import pytest

from lmrepair.checks import Checker, Limits, Sandbox, strongest
from lmrepair.errors import UsageError


@pytest.fixture(scope="session")
def sandbox() -> Sandbox:
    try:
        return strongest()
    except UsageError as error:
        pytest.skip(f"needs a sandbox: {error}")


@pytest.fixture(scope="session")
def checker(sandbox: Sandbox) -> Checker:
    return Checker(sandbox, Limits(cpu=2, wall=30.0, memory=256 << 20))
