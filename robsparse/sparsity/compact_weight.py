"""Weights without memory for dormant connections.

`CompactTheta` makes the weight of a layer from the values at some positions. The weight is a
`CompactWeight`: it has the shape of a dense weight, but holds active values only.
"""

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_map_only

from robsparse.sparsity.layers import Prunable, parametrisation, prunable, trained_weight

# What torch may read of a compact weight without its values.
_DESCRIPTIONS = {
    cast(Any, getattr(Tensor, name)).__get__
    for name in ("shape", "dtype", "device", "requires_grad", "ndim", "is_cpu", "is_cuda")
} | {Tensor.numel, Tensor.size}


class CompactWeight(Tensor):
    """A weight that is 0 except at some positions. It holds the values at these positions only.

    Every function of torch gets the dense weight (`dense`), with gradients. A sparse kernel can use
    positions and values.

    positions: int64, increasing indices into the flat weight.
    active_values: 1-D, one value for each position. Gradients flow through it.
    """

    positions: Tensor
    active_values: Tensor
    zeros: Callable[[], Tensor]

    @staticmethod
    def __new__(
        cls, shape: torch.Size, positions: Tensor, values: Tensor, zeros: Callable[[], Tensor]
    ) -> "CompactWeight":
        """Return a weight. `zeros` returns a new flat tensor of zeros, with any signs."""
        make = cast(Any, Tensor)._make_wrapper_subclass
        weight = make(cls, shape, dtype=values.dtype, requires_grad=values.requires_grad)
        weight.positions, weight.active_values, weight.zeros = positions, values, zeros
        return cast(CompactWeight, weight)

    def __init__(self, *given: object) -> None:
        """Do nothing: `__new__` sets all attributes."""

    def dense(self) -> Tensor:
        """Return the weight as a dense tensor."""
        with torch._C.DisableTorchFunctionSubclass():
            shape = self.shape
        return self.zeros().index_copy(0, self.positions, self.active_values).view(shape)

    def scaled(self, scale: Tensor | None) -> "CompactWeight":
        """Return a copy without gradient. `scale` has a factor for each output, or is None."""
        with torch._C.DisableTorchFunctionSubclass():
            shape = self.shape
        values, weights = self.active_values.detach(), shape.numel()
        output = self.positions // (weights // shape[0])
        values = values.clone() if scale is None else values * scale[output]
        return CompactWeight(shape, self.positions, values, lambda: values.new_zeros(weights))

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _DESCRIPTIONS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        return func(*tree_map_only(cls, CompactWeight.dense, args),
                    **tree_map_only(cls, CompactWeight.dense, kwargs))  # fmt: skip

    @classmethod
    def __torch_dispatch__(cls, func: Any, *_: object) -> Any:
        raise NotImplementedError(f"{func} needs the values of a compact weight: use `dense`")


class Theta(nn.Module):
    """Parametrisation theta -> sign * theta where theta > 0, else exactly 0.

    After the active set is fixed, theta no longer changes it, and the result is sign * theta there.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fixed = False

    def active(self, theta: Tensor) -> Tensor:
        """Return the active positions (bool, the weight's shape)."""
        raise NotImplementedError

    def fix(self, active: Tensor) -> None:
        """Fix the active set; `active` has the shape of theta (bool)."""
        self.fixed = True

    def get_extra_state(self) -> bool:
        """Return whether the active set is fixed; a checkpoint stores it beside the sign."""
        return self.fixed

    def set_extra_state(self, state: bool) -> None:
        """Restore the value of a checkpoint."""
        self.fixed = state


class CompactTheta(Theta):
    """A `Theta` without memory for dormant connections.

    theta is 1-D: it has an entry for each active position, above 0 until the active set is fixed.

    shape: shape of the weight.
    positions: int32, the increasing active positions in the flat weight.
    negative: uint8, one bit for each weight (`numpy.packbits`): 1 if its sign is -1.
    """

    positions: Tensor
    negative: Tensor

    def __init__(self, theta: Tensor, sign: Tensor) -> None:
        """Hold the positions where theta > 0. `theta` and `sign` have the shape of the weight."""
        super().__init__()
        self.shape = theta.shape
        self.register_buffer("positions", (theta.flatten() > 0).nonzero().squeeze(1).int())
        self.register_buffer("negative", torch.from_numpy(np.packbits(sign.flatten().numpy() < 0)))

    def forward(self, theta: Tensor) -> CompactWeight:
        positions = self.positions
        byte, bit = positions >> 3, 7 - (positions & 7)
        signs = 1 - 2 * (self.negative[byte] >> bit & 1).to(theta.dtype)
        zeros = lambda: self._zeros(theta.dtype)  # noqa: E731
        return CompactWeight(self.shape, positions.long(), signs * theta, zeros)

    def active(self, theta: Tensor) -> Tensor:
        mask = torch.zeros(self.shape.numel(), dtype=torch.bool)
        mask[self.positions] = True
        return mask.view(self.shape)

    def _zeros(self, dtype: torch.dtype) -> Tensor:
        """Return zeros with the signs of the weights, as a product of sign and 0 has them."""
        bits = np.unpackbits(self.negative.numpy(), count=self.shape.numel())
        return torch.where(torch.from_numpy(bits).bool(), -0.0, 0.0).to(dtype)


def hold_compactly(module: Prunable, theta: Tensor, sign: Tensor) -> None:
    """Parametrise the weight of a layer with a `CompactTheta`. The arguments are its own."""
    layer = CompactTheta(theta, sign)
    parametrize.register_parametrization(module, "weight", layer, unsafe=True)
    trained_weight(module).data = theta.flatten()[layer.positions]
    parameters = cast(Any, module).parametrizations.weight
    parameters.register_load_state_dict_pre_hook(_resize)


def _resize(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Give theta and positions the lengths of a state dict before it is loaded."""
    length = len(state[f"{prefix}0.positions"])
    layer, theta = cast(Any, module)[0], cast(Any, module).original
    layer.positions = layer.positions.new_empty(length)
    theta.data = theta.data.new_empty(length)


def held_layers(model: nn.Module) -> list[tuple[Tensor, CompactTheta]]:
    """Return theta and the parametrisation of each prunable layer."""
    return [
        (trained_weight(module), parametrisation(module, CompactTheta))
        for module in prunable(model).values()
    ]
