"""Ctrl-C and full disks at odd places: whatever happens, nothing is left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mixtures
import pytest
import safetensors
import safetensors.torch
import torch
from torch.overrides import _get_current_function_mode_stack

from lmrepair.model import CachedFile, settled
from tests import oracle_models


def test_a_ctrl_c_in_an_expert_leaves_nothing_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch calls no hook behind a KeyboardInterrupt, not even those that it is told to call always."""
    net = mixtures.net("mixtral")
    (batch,) = net.batches(net.tokenize(oracle_models.FAILURES[:1]))
    experts: Any = net.model.model.layers[1].mlp.experts

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    with torch.no_grad(), pytest.raises(KeyboardInterrupt), net.watch((0, 1)):
        handle = experts.register_forward_pre_hook(stopped)
        try:
            net.logits(batch)
        finally:
            handle.remove()
    assert not _get_current_function_mode_stack()
    with torch.no_grad(), net.watch((0, 1)):
        net.logits(batch)
        assert not torch.is_grad_enabled()


def test_a_ctrl_c_on_the_way_into_evaluation_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = oracle_models.net().model
    model.train()
    model.requires_grad_(True)

    def stopped(mode: bool = True) -> None:
        model.training = mode
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "eval", lambda: stopped(False))
    with pytest.raises(KeyboardInterrupt), settled(model):
        raise AssertionError("the block is not reached")
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_disk_that_is_full_for_safetensors_ends_no_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a full disk safetensors raises an error of its own."""

    def full(*_: object) -> None:
        raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    error = CachedFile.of(tmp_path, "statistics", ["wanted"]).write({"a": torch.ones(2)}, {})
    assert "No space left" in str(error)
    assert not list(tmp_path.iterdir())
