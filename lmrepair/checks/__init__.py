"""Tests that decide: tasks, the sandbox that runs completions, verdicts, and the way from failing to passing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lmrepair import door

if TYPE_CHECKING:
    from lmrepair.checks.fixing import (
        Budget as Budget,
        Fixed as Fixed,
        Item as Item,
        Run as Run,
        Search as Search,
        fix as fix,
        protected as protected,
        runs as runs,
        search as search,
    )
    from lmrepair.checks.rewording import reworded as reworded
    from lmrepair.checks.running import Checker as Checker, Verdict as Verdict, kinds as kinds
    from lmrepair.checks.sampling import (
        Written as Written,
        nats as nats,
        write_greedy as write_greedy,
        write_samples as write_samples,
    )
    from lmrepair.checks.sandbox import (
        Limits as Limits,
        Ran as Ran,
        Sandbox as Sandbox,
        available as available,
        strongest as strongest,
    )
    from lmrepair.checks.syntax import Forbidden as Forbidden, forbidden as forbidden
    from lmrepair.checks.tasks import Task as Task, read_task as read_task, read_tasks as read_tasks

__getattr__, __dir__ = door(__name__)
