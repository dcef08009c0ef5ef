"""The structure of a network: everything but its weights. And the changes that a pass makes to it.

A trace of a network is valid until its structure changes. It is never valid for a network that
changes its state or draws random numbers in a pass.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as of_all_modules
from torch.nn.utils import parametrize

from robsparse.compute import randomness
from robsparse.compute.machine import is_out_of_memory
from robsparse.compute.perturb import batch_norm_mode
from robsparse.fast.proof import IMAGES

_OF_EVERY_MODULE = vars(nn.Module()).keys() - {"training"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_PLAIN = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device, torch.Size)


def hooks_on_all_modules() -> bool:
    """Return whether torch calls a hook for every module of this process."""
    return any(getattr(of_all_modules, f"_global{kind}") for kind in _HOOKS)


def structure(model: nn.Module, *, attributes: bool = True) -> list[tuple[object, ...]]:
    """Return the modules with their types, code, modes and hooks, and optionally other attributes.

    If two structures are equal, a trace of one network is valid for the other. Weights, buffers and
    parametrisations are not included.
    """
    return [
        (hooks_on_all_modules(),),
        *(_traits(m, model, attributes) for m in _modules(model)),
    ]


def _traits(module: nn.Module, model: nn.Module, attributes: bool) -> tuple[object, ...]:
    own = vars(module)
    return (
        None if module is model else _Is(module),
        type(module),
        type(module).forward,
        module.training,
        hooked(module),
        _Is(own.get("forward")),
        attributes and {k: _comparable(v) for k, v in own.items() if k not in _OF_EVERY_MODULE},
    )


def forbidden(model: nn.Module) -> str:
    """Return why the structure of a network does not allow a trace, or "" if it does."""
    if hooks_on_all_modules():
        return "there are hooks on all modules"
    names = {id(module): name for name, module in model.named_modules()}
    for module in _modules(model):
        name = names[id(module)]
        where = f"'{name}'" if name else "the network"
        if module.training:
            return f"{where} is in train mode"
        if hooked(module):
            return f"{where} has hooks"
        if "forward" in vars(module):
            return f"{where} has a custom forward"
    return ""


class Observed:
    """The state of a network and of the global random numbers at one moment."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.model, self.device = model, device
        self.structure = structure(model)
        self.random = randomness.state(device)
        self.attributes = [
            (container, copy.copy(container))
            for module in _modules(model)
            for container in (vars(module), *vars(module).values())
            if isinstance(container, dict | list | set)
        ]
        self.buffers = [
            (module, name, buffer, buffer.clone())
            for module in _modules(model)
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]

    def changed(self) -> str:
        """Return a text about a change since then, or ""."""
        if _drawn(self.random, randomness.state(self.device)):
            return "it draws random numbers"
        if structure(self.model) != self.structure:
            return "its forward pass changes its attributes"
        if not all(map(self._kept, self.buffers)):
            return "its forward pass changes its buffers"
        return ""

    def restore(self) -> None:
        """Restore the state of the network and the random numbers."""
        for container, before in self.attributes:
            container.clear()
            (container.extend if isinstance(container, list) else container.update)(before)
        for _, _, buffer, values in self.buffers:
            if not torch.equal(buffer.nan_to_num(), values.nan_to_num()):
                buffer.copy_(values)
        randomness.restore(self.random, self.device)

    @staticmethod
    def _kept(entry: tuple[nn.Module, str, Tensor, Tensor]) -> bool:
        """Return whether a buffer is still the same tensor with the same values."""
        module, name, buffer, before = entry
        same = module._buffers.get(name) is buffer
        return same and torch.equal(buffer.nan_to_num(), before.nan_to_num())


@contextmanager
def observed(model: nn.Module, device: torch.device) -> Iterator[Observed]:
    """Observe what passes inside the block change, and undo all changes after it."""
    seen = Observed(model, device)
    try:
        yield seen
    finally:
        seen.restore()


def runs(model: nn.Module, x_NCHW: Tensor) -> bool:
    """Return whether a network accepts images in this memory format. It is not changed."""
    with observed(model, x_NCHW.device), batch_norm_mode(model, "eval"), torch.no_grad():
        try:
            model(x_NCHW[:IMAGES])
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            reason = " ".join(str(error).split())[:200]
            print(f"layout: channels first, because this network needs it ({reason})", flush=True)
            return False
    return True


def _modules(model: nn.Module) -> list[nn.Module]:
    """Return all modules but parametrisations. These are evaluated with the weights."""
    found = [m.parametrizations for m in model.modules() if parametrize.is_parametrized(m)]
    left_out = {id(part) for one in found if isinstance(one, nn.Module) for part in one.modules()}
    return [module for module in model.modules() if id(module) not in left_out]


def hooked(module: nn.Module) -> bool:
    """Return whether the module has a hook that may change a pass.

    A hook with the attribute `only_reads` changes none. The pass of a view does not call it.
    """
    hooks = (hook for name in _HOOKS for hook in (getattr(module, name, None) or {}).values())
    return any(not getattr(hook, "only_reads", False) for hook in hooks)


class _Is:
    """Compares by identity: equal to another `_Is` with the same object."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Is) and self.value is other.value

    __hash__ = None  # type: ignore[assignment]


def _comparable(value: Any) -> Any:
    """Return a copy that compares plain values by value and everything else by identity."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, dict):
        return {key: _comparable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_comparable(item) for item in value]
    return set(value) if isinstance(value, set | frozenset) else _Is(value)


def _drawn(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Return whether the global random states differ."""
    pairs = zip(before.values(), now.values(), strict=True)
    return any(not torch.equal(a, b) if isinstance(a, Tensor) else a != b for a, b in pairs)
