"""The folded view of a network: a fast copy for eval mode with the weights at one moment.

Ten of eleven passes of adversarial training, and all passes of an attack, need only outputs and the
gradient of the input. The view computes each weight once, folds batch norm into the convolution
before it, uses the fast memory format of the device, and applies ReLU in place. Its outputs are
those of the network up to rounding.

A view is compared with its network (`robsparse.fast.proof`) before it is used. This is repeated
when the structure of the network changes, and for images of another shape, type or device. If they
differ, the network is used. The network is also used if a view cannot represent it. The reasons
are: hooks, random numbers, a pass that changes the state, a tensor that is changed in place and
used again, or a module in train mode. One line gives the reason.
"""

import weakref
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from robsparse.base.errors import one_line
from robsparse.compute.machine import computing, is_out_of_memory
from robsparse.fast import proof
from robsparse.fast.backends import Backend
from robsparse.fast.folded_layers import Snapshot
from robsparse.fast.structure import forbidden, observed, structure
from robsparse.fast.tracing import Program, trace


class View(nn.Module):
    """A fast copy of a network for eval mode with the weights at one moment: x_NCHW -> logits_NK.

    It never changes. If it fails on images that the network accepts, the network replaces this view
    and all later ones, and one line reports it.
    """

    def __init__(
        self, network: nn.Module, status: "Status", snapshot: Snapshot, backend: Backend
    ) -> None:
        super().__init__()
        self.network = weakref.ref(network)  # not a submodule: a view has no parameters
        self.status, self.snapshot, self.backend = status, snapshot, backend
        self.eval()

    def forward(self, x_NCHW: Tensor) -> Tensor:
        if self.status.reason:
            return self._network()(x_NCHW)
        try:
            return self.backend(self.snapshot, x_NCHW).to(x_NCHW.dtype)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            logits_NK = self._network()(x_NCHW)  # raises an error if the network fails on them too
            self.status.reason = f"it fails ({one_line(error)})"
            _print(self.status.reason)
            return logits_NK

    def _network(self) -> nn.Module:
        network = self.network()
        assert network is not None  # the user of a view has a reference to its network
        return network


def folded_view(
    network: nn.Module,
    x_NCHW: Tensor,
    dtype: torch.dtype | None = None,
    backend: str = "eager",
) -> nn.Module:
    """Return the folded view of a network with its current weights, or the network without a view.

    Args:
        network: A network in eval mode.
        x_NCHW: Real images on the device of the network. The view and the network are compared on
            the first of them, unless this was already done for images of this kind.
        dtype: Precision of the convolutions of an fp32 network, e.g. bfloat16.
        backend: The name of a `Backend`.
    """
    if not len(x_NCHW):
        return network
    first = x_NCHW[: proof.IMAGES].contiguous()
    status = _status_of(network, first)
    if status.program is None or status.reason:
        return network
    return View(network, status, status.program.snapshot(dtype), status.backend(backend))


def runs_on(view: nn.Module) -> Literal["view", "network"]:
    """Return "view" or "network": what computes the outputs of a result of `folded_view`."""
    return "view" if isinstance(view, View) and not view.status.reason else "network"


def _print(reason: str) -> None:
    print(f"folded view: not used for this network, {reason}; using the network", flush=True)


# ---------------------------------------------------------------- making and comparing


@dataclass
class Status:
    """Whether the folded view of a network may be used, and the values that all its views share.

    structure: the structure of the network at the comparison, with or without `attributes`.
    program: the traced program, or None if there is none.
    reason: why the view is not used, or "" if it is used.
    proven: the kinds of images on which view and network were compared.
    """

    structure: list[tuple[object, ...]]
    program: Program | None = None
    reason: str = ""
    attributes: bool = True
    proven: set[tuple[object, ...]] = field(default_factory=set)
    backends: dict[str, Backend] = field(default_factory=dict)

    def backend(self, name: str) -> Backend:
        """Return the named backend. All views share it, so it starts once."""
        if name not in self.backends:
            assert self.program is not None
            self.backends[name] = Backend(name, self.program.run, self.program.graph)
        return self.backends[name]

    def prove(self, network: nn.Module, program: Program, x_NCHW: Tensor) -> None:
        """Compare view and network on some images. If they differ, use the network."""
        with observed(network, x_NCHW.device) as seen, computing("fp32", x_NCHW.device):
            reason = _compared(network, program, x_NCHW)
            if reason and program.execution is not None:
                program.execution = None  # torch runs the program instead
                reason = _compared(network, program, x_NCHW)
            reason = seen.changed() or reason
        self.proven.add(_kind(x_NCHW))
        if reason:
            self.give_up(network, reason)

    def give_up(self, network: nn.Module, reason: str) -> None:
        """Use the network until its structure changes.

        The structure is stored without attributes. Otherwise, an attribute that every pass changes
        would cause a new attempt before every pass.
        """
        self.program, self.reason = None, reason
        self.attributes, self.structure = False, structure(network, attributes=False)


_STATUS: "weakref.WeakKeyDictionary[nn.Module, Status]" = weakref.WeakKeyDictionary()


def _status_of(network: nn.Module, x_NCHW: Tensor) -> Status:
    """Return the status of the view of a network. If its structure has changed, make a new one.

    View and network are compared on the images, unless this was done for images of this kind.
    """
    status = _STATUS.get(network)
    before = status.reason if status is not None else ""
    if status is None or status.structure != structure(network, attributes=status.attributes):
        status = _STATUS[network] = _try(network, x_NCHW)
    elif status.program and not status.reason and _kind(x_NCHW) not in status.proven:
        status.prove(network, status.program, x_NCHW)
    if status.reason not in ("", before):
        _print(status.reason)
    return status


def _kind(x_NCHW: Tensor) -> tuple[object, ...]:
    return x_NCHW.shape[1:], x_NCHW.dtype, x_NCHW.device


def _try(network: nn.Module, x_NCHW: Tensor) -> Status:
    """Try to trace a network. Its state and the global random states are not changed."""
    status = Status(structure(network))
    if reason := forbidden(network):
        status.give_up(network, reason)
        return status
    with observed(network, x_NCHW.device) as seen:
        try:
            status.program = trace(network, x_NCHW)
        except ValueError as error:
            reason = str(error)
        reason = reason or seen.changed()
    if reason or status.program is None:
        status.give_up(network, reason)
    else:
        status.prove(network, status.program, x_NCHW)
    return status


def _compared(network: nn.Module, program: Program, x_NCHW: Tensor) -> str:
    """Return why a view must not be used, or "". An error is a reason too."""
    try:
        return _difference(network, program, x_NCHW)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return f"view and network cannot be compared ({one_line(error)})"


def _difference(network: nn.Module, program: Program, x_NCHW: Tensor) -> str:
    """Return why a view must not be used, or "". It is compared in the precision of the network.

    Two passes of the network, with and without a gradient, are compared too. They show whether its
    outputs depend on anything but the images.
    """
    snapshot = program.snapshot()
    modes = (True, False)
    own = [proof.passes(network, x_NCHW, gradient=mode) for mode in modes]
    if reason := proof.difference(own[0]._replace(gradient=None), own[1]):
        return f"two of its passes over the same images differ ({reason})"
    for mode, plain in zip(modes, own, strict=True):
        fast = proof.passes(lambda x: program.run(snapshot, x), x_NCHW, gradient=mode)
        if reason := proof.difference(plain, fast):
            return f"the results of the view differ ({reason})"
    return ""
