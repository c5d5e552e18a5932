"""A second device that is none: tensors in ordinary memory that say they lie elsewhere and refuse company.

Within ``elsewhere()`` every call of torch is looked at. Tensors that were sent to ``ELSEWHERE`` mix with no tensor that
was not (a single number, an index and copies may, as with a GPU), what is made of them lies there too, and numpy cannot
read them. The numbers are those of a CPU, so whatever comes out has to be the same bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from lmrepair.model import digests

ELSEWHERE = torch.device("privateuseone", 0)
ANYWHERE = {"copy_", "as_subclass", "__deepcopy__"}  # tensors may lie apart
INDEXED = {"__getitem__", "__setitem__"}  # what is there may be indexed by what is not
READ = {"numpy", "__array__"}


class Elsewhere(Tensor):
    """A tensor that says it lies on the other device."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return called(func, args, kwargs or {})

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied = sent(back(self).detach().clone())
        return nn.Parameter(copied, self.requires_grad) if isinstance(self, nn.Parameter) else copied


def sent(tensor: Tensor) -> Tensor:
    """A tensor as if it lay elsewhere."""
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.as_subclass(Elsewhere)


def back(tensor: Tensor) -> Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.as_subclass(Tensor)


def called(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One call of torch, refused where it mixes what lies apart."""
    name = getattr(func, "__name__", "")
    tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
    there = [one for one in tensors if isinstance(one, Elsewhere)]
    if name == "__get__" and there:
        attribute = getattr(getattr(func, "__self__", None), "__name__", "")
        if attribute == "device":
            return ELSEWHERE
        if attribute in ("is_cuda", "is_meta"):
            return False
    if name == "_has_compatible_shallow_copy_type":
        return False
    if name == "histc" and there:  # of whole numbers a GPU makes one, a CPU does not
        return sent(_run(func, (args[0].float(), *args[1:]), kwargs))
    if name in READ and there:
        raise TypeError("can't convert a tensor that lies elsewhere to numpy; use Tensor.cpu() first")
    target = _target(name, args, kwargs)
    if target is not None or name == "cpu":
        given, named = _without_device(args, kwargs)
        made = _run(func, given, named) if name != "cpu" else args[0].clone()
        return tree_map(lambda one: _put(one, target == ELSEWHERE), made)
    _refuse_mixed(name, args, tensors, there)
    made = _run(func, args, kwargs)
    if func is torch.autograd.grad:
        wanted = args[1] if len(args) > 1 else kwargs["inputs"]
        wanted = [wanted] if isinstance(wanted, Tensor) else wanted
        return tuple(
            one if one is None else _put(one, isinstance(like, Elsewhere))
            for one, like in zip(made, wanted, strict=True)
        )
    first = args[0] if args else None
    goes = isinstance(first, Elsewhere) if name in ANYWHERE | INDEXED else bool(there)
    return tree_map(lambda one: _put(one, goes) if isinstance(one, Tensor) else one, made)


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


def _put(one: Any, there: bool) -> Any:
    if not isinstance(one, Tensor) or isinstance(one, Elsewhere) == there:
        return one
    return sent(one) if there else back(one)


def _target(name: str, args: Any, kwargs: dict[str, Any]) -> torch.device | None:
    """Where a call says that its result is to lie."""
    device = kwargs.get("device")
    if device is None and name == "to":
        for value in args[1:]:
            if isinstance(value, Tensor):
                device = ELSEWHERE if isinstance(value, Elsewhere) else "cpu"
            elif isinstance(value, torch.device | str):
                device = value
    return None if device is None else torch.device(device)


def _without_device(args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    named = {key: "cpu" if key == "device" else value for key, value in kwargs.items()}
    return tuple("cpu" if isinstance(value, torch.device) else value for value in args), named


def _refuse_mixed(name: str, args: Any, tensors: Sequence[Tensor], there: Sequence[Tensor]) -> None:
    if not there or name in ANYWHERE or name == "grad":
        return
    apart = [one for one in tensors if not isinstance(one, Elsewhere) and one.dim() > 0]
    if name in INDEXED and isinstance(args[0], Elsewhere):
        apart = [one for one in apart if len(args) > 2 and one is args[2]]
    if apart:
        raise RuntimeError(f"{name}: expected all tensors on one device, found {ELSEWHERE} and cpu")


class _Mode(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return called(func, args, kwargs or {})


@contextmanager
def elsewhere() -> Iterator[None]:
    """Look at every call of torch for the length of a block, in the threads that hash as well; random numbers come
    from the CPU's generators."""
    generator = torch.Generator

    def pool(workers: int | None = None) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(workers, initializer=lambda: _Mode().__enter__())

    with (
        patch.object(torch, "Generator", lambda device="cpu": generator("cpu")),
        patch.object(digests, "ThreadPoolExecutor", pool),
        _Mode(),
    ):
        yield


def split(model: nn.Module, there: Sequence[str]) -> nn.Module:
    """The model with some of its modules elsewhere, each given its inputs where it lies, as accelerate does it."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    for name in there:
        for part in model.get_submodule(name).modules():
            for key, parameter in list(part._parameters.items()):
                if parameter is not None:
                    part._parameters[key] = nn.Parameter(sent(parameter.data), requires_grad=False)
            for key, buffer in list(part._buffers.items()):
                if buffer is not None:
                    part._buffers[key] = sent(buffer)
    leaves = [name for name, part in model.named_modules() if name and (name in there or _is_leaf(name, part, there))]
    for name in leaves:
        device = ELSEWHERE if name in there else torch.device("cpu")
        add_hook_to_module(model.get_submodule(name), AlignDevicesHook(execution_device=device, place_submodules=False))
    hook = AlignDevicesHook(execution_device=torch.device("cpu"), io_same_device=True, place_submodules=False)
    add_hook_to_module(model, hook)
    return model


def _is_leaf(name: str, part: nn.Module, there: Sequence[str]) -> bool:
    """Whether a module is one of the parts that a device map names: a block, or what lies beside the blocks."""
    inside = any(name.startswith(f"{other}.") for other in there)
    numbers = [piece.isdigit() for piece in name.split(".")]
    block = numbers[-1] and sum(numbers) == 1
    return not inside and (block or (not any(numbers) and not any(True for _ in part.children())))
