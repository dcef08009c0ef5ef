"""The folded view of a network: what it computes in eval mode with the weights of one moment.

Ten of eleven passes of adversarial training, and all passes of an attack, need nothing but outputs
and the gradient of the input. The view forms each weight once, folds batch norm into the
convolution before it, lays tensors out as the device's convolutions want them, and rectifies in
place. Its outputs are those of the network to rounding.

A view is compared with its network before it is used (`robsparse.fast.proof`): on the first images,
again when the structure of the network has changed, and for images of another shape, type or
device. The network itself is used where they differ, and where the network does what a view cannot
follow: hooks, random numbers, state that a pass changes, a tensor rewritten in place that is used
again, a module in train mode. One line gives the reason.
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
    """What one network computes in eval mode with the weights of one moment: x_NCHW -> logits_NK.

    It never changes. Where it fails on images that the network takes, the network is used from
    there on, in place of this view and of all later ones, and one line says so.
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
            logits_NK = self._network()(x_NCHW)  # raises what the network itself has against them
            self.status.reason = f"it fails ({one_line(error)})"
            _print(self.status.reason)
            return logits_NK

    def _network(self) -> nn.Module:
        network = self.network()
        assert network is not None  # who uses a view holds its network
        return network


def view_of(
    network: nn.Module,
    x_NCHW: Tensor,
    dtype: torch.dtype | None = None,
    backend: str = "eager",
) -> nn.Module:
    """The folded view of a network with its weights of now, or the network itself if it has none.

    Args:
        network: In eval mode.
        x_NCHW: Real images on the network's device. The view is compared with the network on the
            first of them, where that has not been done for such images.
        dtype: What convolutions of an fp32 network compute in, e.g. bfloat16.
        backend: How the view runs: see `Backend`.
    """
    if not len(x_NCHW):
        return network
    first = x_NCHW[: proof.IMAGES].contiguous()
    status = _status_of(network, first)
    if status.program is None or status.reason:
        return network
    return View(network, status, status.program.snapshot(dtype), status.backend(backend))


def runs_on(view: nn.Module) -> Literal["view", "network"]:
    """What computes the outputs of something that `view_of` returned."""
    return "view" if isinstance(view, View) and not view.status.reason else "network"


def _print(reason: str) -> None:
    print(f"folded view: not used for this network, {reason}; the network itself runs", flush=True)


# ---------------------------------------------------------------- making and comparing


@dataclass
class Status:
    """Whether the folded view of a network may be used, and what all its views share.

    structure: of the network when this was found out, with or without `attributes`. program: None
    where there is none. reason: why there is no view, or why it is not used; "" where it is.
    proven: the kinds of images that view and network were compared on.
    """

    structure: list[tuple[object, ...]]
    program: Program | None = None
    reason: str = ""
    attributes: bool = True
    proven: set[tuple[object, ...]] = field(default_factory=set)
    backends: dict[str, Backend] = field(default_factory=dict)

    def backend(self, name: str) -> Backend:
        """The named backend, which starts once for all views."""
        if name not in self.backends:
            assert self.program is not None
            self.backends[name] = Backend(name, self.program.run)
        return self.backends[name]

    def prove(self, network: nn.Module, program: Program, x_NCHW: Tensor) -> None:
        """Compare view and network on some images; use the network where they differ."""
        with observed(network, x_NCHW.device) as seen, computing("fp32", x_NCHW.device):
            try:
                reason = _difference(network, program, x_NCHW)
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                reason = f"the two cannot be compared ({one_line(error)})"
            reason = seen.changed() or reason
        self.proven.add(_kind(x_NCHW))
        if reason:
            self.give_up(network, reason)

    def give_up(self, network: nn.Module, reason: str) -> None:
        """Use the network from here on, as long as its structure stays the same.

        Attributes are left out of the structure: those that every pass changes must not be a
        reason to try again before every pass.
        """
        self.program, self.reason = None, reason
        self.attributes, self.structure = False, structure(network, attributes=False)


_STATUS: "weakref.WeakKeyDictionary[nn.Module, Status]" = weakref.WeakKeyDictionary()


def _status_of(network: nn.Module, x_NCHW: Tensor) -> Status:
    """What is known about the view of a network, found out anew where its structure has changed.

    The images are compared on where that has not been done for such images.
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
    """Try to trace a network; it, its state and global random numbers stay as they are."""
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


def _difference(network: nn.Module, program: Program, x_NCHW: Tensor) -> str:
    """Why a view must not be used, or ""; its weights have the network's own precision.

    The passes with and without a gradient are two passes of the network too, which show whether
    its outputs depend on anything but the images.
    """
    snapshot = program.snapshot()
    modes = (True, False)
    own = [proof.passes(network, x_NCHW, gradient=mode) for mode in modes]
    if reason := proof.difference(own[0]._replace(gradient=None), own[1]):
        return f"two of its passes over the same images differ ({reason})"
    for mode, plain in zip(modes, own, strict=True):
        fast = proof.passes(lambda x: program.run(snapshot, x), x_NCHW, gradient=mode)
        if reason := proof.difference(plain, fast):
            return f"a view computes something else ({reason})"
    return ""
