"""Patches of mixtures of experts: in files, on disks that store experts in stacks or one by one, in adapters."""

from __future__ import annotations

from pathlib import Path

import mixtures
import pytest
from factored import digests, factored, made_up
from oracle_models import FAILURES, State
from safetensors import safe_open
from safetensors.torch import save_file

from lmrepair import Net, Patch, UsageError, WrongModelError, load
from lmrepair.patch import combine, difference, exact, read_base, rewrite, save_model


def patched(family: str, how: str = "neurons", seed: int = 0) -> tuple[Net, Patch]:
    """The untouched net, and a patch for it: of some neurons, or of whole layers as factors."""
    net = mixtures.net(family)
    patch = made_up(net, FAILURES[:2], seed)
    return net, factored(net, patch) if how == "factors" else patch


# Mixtral's experts are saved one by one, GPT-OSS's in stacks; a dense layer stands beside a mixture in GLM 4.
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "glm4_moe"])
@pytest.mark.parametrize("how", ["neurons", "factors"])
def test_a_checkpoint_is_patched_and_comes_back(family: str, how: str, tmp_path: Path) -> None:
    net, patch = patched(family, how)
    save_model(net, tmp_path / "source")
    patch.save(tmp_path / "patch")
    patch = Patch.load(tmp_path / "patch")
    done = rewrite(tmp_path / "source", patch, False, tmp_path / "patched")
    before, after = digests(tmp_path / "source"), digests(tmp_path / "patched")
    assert {name for name in before if before[name] != after[name]} == set(done.files)
    assert len(done.names) > len(patch.changes) or family == "gpt_oss"
    with pytest.raises(WrongModelError, match="already applied"):
        rewrite(tmp_path / "patched", patch, False, tmp_path / "twice")
    with pytest.raises(WrongModelError, match="not applied"):
        rewrite(tmp_path / "source", patch, True, tmp_path / "twice")
    rewrite(tmp_path / "patched", patch, True, tmp_path / "back")
    assert digests(tmp_path / "back") == before
    assert patch.is_applied(load(tmp_path / "patched"))


def test_another_mixture_is_refused(tmp_path: Path) -> None:
    net, patch = patched("mixtral")
    save_model(net, tmp_path / "source")
    path = tmp_path / "source" / "model.safetensors"
    with safe_open(path, "pt") as file:
        held = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    name = next(name for name in held if name.endswith("experts.3.w2.weight"))
    held[name][0, 0] += 1
    save_file(held, path, {"format": "pt"})
    with pytest.raises(WrongModelError, match="no experts of layer"):
        rewrite(tmp_path / "source", patch, False, tmp_path / "no")
    with pytest.raises(WrongModelError):
        patch.apply(load(tmp_path / "source"))
    assert not (tmp_path / "no").exists()


def test_patches_of_a_mixture_add_up_and_come_back() -> None:
    net, first = patched("qwen2_moe")
    before = State.of(net)
    second = made_up(net, FAILURES[1:2], seed=1)
    both = combine([first, second])
    assert both.fingerprint.experts == {0: ((4, 24), (1, 40)), 1: ((4, 24), (1, 40))}
    assert difference(first, second)
    both.apply(net)
    assert before.changed(net)
    both.revert(net)
    assert not before.changed(net)


def test_adapters_for_experts_are_refused() -> None:
    net, patch = patched("mixtral")
    with pytest.raises(UsageError, match="mixtures of experts, and adapters for experts are not written"):
        exact(patch, dict(enumerate(net.widths)))
    with pytest.raises(UsageError, match="mixtures of experts"):
        read_base(Path("none.gguf"), patch)
