"""What a network is besides its weights, and what a pass of it changes.

Whatever has followed a network's code once (a trace) is out of date when its structure changes, and
never valid for a network whose passes change its state or draw random numbers.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.utils import parametrize

from robsparse.compute import randomness
from robsparse.compute.machine import is_out_of_memory
from robsparse.compute.perturb import batch_norm_mode
from robsparse.fast.proof import IMAGES

_OF_EVERY_MODULE = vars(nn.Module()).keys() - {"training"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_PLAIN = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device, torch.Size)


def structure(model: nn.Module, *, attributes: bool = True) -> list[tuple[object, ...]]:
    """Modules, their types and code, modes and hooks and, if asked for, their other attributes.

    Two structures compare as equal if a trace of the one network is a trace of the other. Weights,
    buffers and parametrisations are not part of it.
    """
    return [
        (bool(_has_any_global_hook()),),
        *(_traits(m, model, attributes) for m in _modules(model)),
    ]


def _traits(module: nn.Module, model: nn.Module, attributes: bool) -> tuple[object, ...]:
    own = vars(module)
    return (
        None if module is model else _Is(module),
        type(module),
        type(module).forward,
        module.training,
        _hooked(module),
        _Is(own.get("forward")),
        attributes and {k: _comparable(v) for k, v in own.items() if k not in _OF_EVERY_MODULE},
    )


def forbidden(model: nn.Module) -> str:
    """Why no trace of a network can stand for it, as far as its structure says; "" if it can."""
    if _has_any_global_hook():
        return "there are hooks on all modules"
    names = {id(module): name for name, module in model.named_modules()}
    for module in _modules(model):
        name = names[id(module)]
        where = f"'{name}'" if name else "the network"
        if module.training:
            return f"{where} is in train mode"
        if _hooked(module):
            return f"{where} has hooks"
        if "forward" in vars(module):
            return f"{where} has a forward of its own"
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
        """What has changed since then, in words, or ""."""
        if _drawn(self.random, randomness.state(self.device)):
            return "it draws random numbers"
        if structure(self.model) != self.structure:
            return "its forward pass changes its attributes"
        if not all(map(self._kept, self.buffers)):
            return "its forward pass changes its buffers"
        return ""

    def restore(self) -> None:
        """Make all of it what it was."""
        for container, before in self.attributes:
            container.clear()
            (container.extend if isinstance(container, list) else container.update)(before)
        for _, _, buffer, values in self.buffers:
            if not torch.equal(buffer.nan_to_num(), values.nan_to_num()):
                buffer.copy_(values)
        randomness.restore(self.random, self.device)

    @staticmethod
    def _kept(entry: tuple[nn.Module, str, Tensor, Tensor]) -> bool:
        """Whether a buffer is the tensor that it was, with the values that it had."""
        module, name, buffer, before = entry
        same = module._buffers.get(name) is buffer
        return same and torch.equal(buffer.nan_to_num(), before.nan_to_num())


@contextmanager
def observed(model: nn.Module, device: torch.device) -> Iterator[Observed]:
    """See what passes inside the block change, and undo it."""
    seen = Observed(model, device)
    try:
        yield seen
    finally:
        seen.restore()


def runs(model: nn.Module, x_NCHW: Tensor) -> bool:
    """Whether a network takes images that lie in memory so; nothing of it is changed."""
    with observed(model, x_NCHW.device), batch_norm_mode(model, "eval"), torch.no_grad():
        try:
            model(x_NCHW[:IMAGES])
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            said = " ".join(str(error).split())[:200]
            print(f"layout: channels first, this network takes no other ({said})", flush=True)
            return False
    return True


def _modules(model: nn.Module) -> list[nn.Module]:
    """All modules but parametrisations: what these compute is read with the weights."""
    found = [m.parametrizations for m in model.modules() if parametrize.is_parametrized(m)]
    left_out = {id(part) for one in found if isinstance(one, nn.Module) for part in one.modules()}
    return [module for module in model.modules() if id(module) not in left_out]


def _hooked(module: nn.Module) -> bool:
    return any(getattr(module, name, None) for name in _HOOKS)


class _Is:
    """Equal to what holds the same object."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Is) and self.value is other.value

    __hash__ = None  # type: ignore[assignment]


def _comparable(value: Any) -> Any:
    """Plain values and those in plain containers as they are now, everything else by identity."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, dict):
        return {key: _comparable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_comparable(item) for item in value]
    return set(value) if isinstance(value, set | frozenset) else _Is(value)


def _drawn(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether the global random numbers are somewhere else."""
    pairs = zip(before.values(), now.values(), strict=True)
    return any(not torch.equal(a, b) if isinstance(a, Tensor) else a != b for a, b in pairs)
