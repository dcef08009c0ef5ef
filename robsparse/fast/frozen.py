"""A frozen view of a network: what it computes in eval mode with the weights that it has now.

Ten of eleven passes of adversarial training, and all passes of an attack, want nothing but outputs
and the gradient of the input. The view forms each weight once, folds batch norm into the
convolution before it, lays tensors out as the device's convolutions want them, and rectifies in
place. Its outputs are those of the network to rounding.

A view is compared with its network before it is used (`robsparse.fast.proof`): on the images at
hand when it is made, again when the structure of the network has changed, and for images of another
shape, type or device. The network itself is used where they differ, and where the network does
what a view cannot follow: hooks, random numbers, state that a pass changes, a tensor rewritten in
place that is used again, a module in train mode. One line says why.
"""

import operator
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from robsparse.compute.machine import computing, is_out_of_memory
from robsparse.fast import proof
from robsparse.fast.backends import Backend
from robsparse.fast.frozen_layers import Norm, Weighted, require_plain
from robsparse.fast.small_maps import NARROW
from robsparse.fast.structure import forbidden, observed, structure

_NAME = "frozen"  # of the view's own layers in its graph
_SUMS = (operator.add, torch.add)


class View(nn.Module):
    """The frozen view of one network; call `refresh` after its weights have changed.

    Where the view fails on images that the network takes, the network is used from there on, and
    one line says so.

    Raises ValueError when the network's code does not let itself be traced, or does what a view
    cannot follow. x_NCHW: images to trace with.
    """

    def __init__(self, model: nn.Module, x_NCHW: Tensor) -> None:
        super().__init__()
        try:
            graph = _Tracer().trace(model)
        except Exception as error:  # whatever code does that is not made of tensors alone
            raise ValueError(f"it cannot be traced ({in_short(error)})") from error
        _require_nothing_rewritten(model, graph, x_NCHW)
        for node in reversed(graph.nodes):
            if not node.users and node.op not in ("placeholder", "output"):
                graph.erase_node(node)  # nothing needs it
        root = nn.Module()
        self.layers = _fold(graph, dict(model.named_modules()), root)
        # Not a submodule: the network's own modules in it must not be found twice.
        self.__dict__["run"] = fx.GraphModule(root, graph)
        self.__dict__["model"] = weakref.ref(model)
        self.failed = False
        self.dtype: torch.dtype | None = None
        self.backends: dict[str, Backend] = {}
        self.use("eager").eval()

    def use(self, backend: str) -> "View":
        """Run as `Backend` says from here on; returns the view."""
        if backend not in self.backends:
            self.backends[backend] = Backend(backend, self.run)
        self.__dict__["backend"] = self.backends[backend]
        return self

    def refresh(self, dtype: torch.dtype | None = None) -> "View":
        """Form all weights anew from the network's; returns the view.

        dtype: what convolutions of an fp32 network compute in and pass on, e.g. bfloat16.
        """
        before = [layer.memory() for layer in self.layers]
        with torch.no_grad():
            for layer in self.layers:
                layer.refresh(dtype)
        after = [layer.memory() for layer in self.layers]
        if any(old is not new for old, new in zip(before, after, strict=True)):
            for backend in self.backends.values():
                backend.started.clear()  # a CUDA graph reads the memory that it was captured with
        self.dtype = dtype
        convolutions = [layer for layer in self.layers if isinstance(layer, Weighted)]
        columns = any(layer.live <= NARROW for layer in convolutions)
        for layer in convolutions:
            layer.columns = columns
        return self

    def forward(self, x_NCHW: Tensor) -> Tensor:
        if self.failed:
            return self.model()(x_NCHW)
        try:
            return self.backend(x_NCHW, self.dtype).to(x_NCHW.dtype)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            logits_NK = self.model()(x_NCHW)  # raises what the network itself has against them
            _say(f"it fails ({in_short(error)})")
            self.failed = True
            return logits_NK


def view_of(
    model: nn.Module,
    x_NCHW: Tensor,
    dtype: torch.dtype | None = None,
    backend: str = "eager",
) -> nn.Module:
    """The network's frozen view with its weights of now, or the network itself if it has none.

    x_NCHW: real images on the network's device; the view is compared with the network on the
    first of them, where that has not been done for such images. dtype: as for `View.refresh`;
    backend: as for `Backend`. Views are kept as long as their networks.
    """
    if not len(x_NCHW):
        return model
    first = x_NCHW[: proof.IMAGES].contiguous()
    kept = _KEPT.get(model)
    said = kept.reason if kept is not None else ""
    if kept is None or kept.structure != structure(model, attributes=kept.attributes):
        kept = _KEPT[model] = _make(model, first)
    elif kept.view is not None and _kind(first) not in kept.proven:
        kept.prove(model, first)
    if kept.reason not in ("", said):
        _say(kept.reason)
    if kept.view is None or kept.view.failed:
        return model
    return kept.view.use(backend).refresh(dtype)


def used(network: nn.Module) -> Literal["view", "network"]:
    """What computes the outputs of something that `view_of` returned."""
    return "view" if isinstance(network, View) and not network.failed else "network"


def in_short(error: Exception) -> str:
    """An error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _say(reason: str) -> None:
    print(f"frozen view: none of this network, {reason}; it runs as it is", flush=True)


# ---------------------------------------------------------------- making and comparing


@dataclass
class _Kept:
    """What is known about the view of one network.

    view: None if there is none, for a `reason`. structure: of the network when this was found
    out, with or without `attributes`. proven: the kinds of images that the view was compared on.
    """

    structure: list
    view: View | None = None
    reason: str = ""
    attributes: bool = True
    proven: set = field(default_factory=set)

    def prove(self, model: nn.Module, x_NCHW: Tensor) -> None:
        """Compare the view with the network on some images; give it up where they differ."""
        with observed(model, x_NCHW.device) as seen, computing("fp32", x_NCHW.device):
            try:
                said = _compare(model, self.view, x_NCHW)
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                said = f"the two cannot be compared ({in_short(error)})"
            said = seen.changed() or said
        self.proven.add(_kind(x_NCHW))
        if said:
            self.give_up(model, said)

    def give_up(self, model: nn.Module, reason: str) -> None:
        """Use the network from here on.

        Attributes are left out of the structure: those that every pass changes must not be a
        reason to try again before every pass.
        """
        self.view, self.reason = None, reason
        self.attributes, self.structure = False, structure(model, attributes=False)


_KEPT: "weakref.WeakKeyDictionary[nn.Module, _Kept]" = weakref.WeakKeyDictionary()


def _kind(x_NCHW: Tensor) -> tuple:
    return x_NCHW.shape[1:], x_NCHW.dtype, x_NCHW.device


def _make(model: nn.Module, x_NCHW: Tensor) -> _Kept:
    """Try to make a view; the network, its state and global random numbers stay as they are."""
    kept = _Kept(structure(model))
    if said := forbidden(model):
        kept.give_up(model, said)
        return kept
    with observed(model, x_NCHW.device) as seen:
        try:
            kept.view, said = View(model, x_NCHW), ""
        except ValueError as error:
            said = str(error)
        said = said or seen.changed()
    if said:
        kept.give_up(model, said)
    else:
        kept.prove(model, x_NCHW)
    return kept


def _compare(model: nn.Module, view: View, x_NCHW: Tensor) -> str:
    """Why a view is not to be believed, or ""; its weights are formed in the network's precision.

    The passes with and without a gradient are two passes of the network too, which show whether
    its outputs depend on anything but the images.
    """
    view.refresh()
    modes = (True, False)
    own = [proof.passes(model, x_NCHW, gradient=mode) for mode in modes]
    if said := proof.difference(own[0]._replace(gradient=None), own[1]):
        return f"two of its passes over the same images differ ({said})"
    for mode, plain in zip(modes, own, strict=True):
        fast = proof.passes(view.run, x_NCHW, gradient=mode)
        if said := proof.difference(plain, fast):
            return f"a view computes something else ({said})"
    return ""


# ---------------------------------------------------------------- tracing and folding


class _Tracer(fx.Tracer):
    """Sees layers with weights as they are, parametrised or not."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        weighted = isinstance(m, nn.Conv2d | nn.Linear | nn.BatchNorm2d)
        return weighted or super().is_leaf_module(m, module_qualified_name)


def _require_nothing_rewritten(model: nn.Module, graph: fx.Graph, x_NCHW: Tensor) -> None:
    """Raise ValueError when a traced network rewrites a tensor in place that is used again."""
    watching = _Watching(model, graph=graph)
    watching.extra_traceback = False  # of errors: the message alone
    with torch.no_grad():
        try:
            watching.run(x_NCHW.clone())
        except _RewrittenError:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise ValueError(f"what was traced of it does not run ({in_short(error)})") from error


class _RewrittenError(ValueError):
    pass


class _Watching(fx.Interpreter):
    """Runs a traced network. Raises _RewrittenError when it rewrites a tensor that is used again.

    PyTorch counts the changes of a tensor together with those of all that share its memory. The
    images belong to the caller, who uses them again.
    """

    def run_node(self, n: fx.Node) -> Any:
        gone = {node for node in self.user_to_last_uses.get(n, []) if node.op != "placeholder"}
        live = [value for node, value in self.env.items() if node not in gone]
        tensors = [value for value in live if isinstance(value, Tensor)]
        before = [tensor._version for tensor in tensors]
        result = super().run_node(n)
        if [tensor._version for tensor in tensors] != before:
            raise _RewrittenError(f"'{n.name}' rewrites a tensor in place that is used again")
        return result


def _fold(graph: fx.Graph, modules: dict[str, nn.Module], root: nn.Module) -> list[nn.Module]:
    """Rewrite a traced graph to use frozen layers, which become modules of `root`."""
    layers: list[nn.Module] = []

    def replace(node: fx.Node, layer: nn.Module) -> None:
        node.target = f"{_NAME}{len(layers)}"
        root.add_module(node.target, layer)
        layers.append(layer)

    for node in list(graph.nodes):
        if not node.users and node.op in ("call_module", "call_function"):
            continue  # a layer has taken it up
        if node.op == "get_attr":
            raise ValueError(f"it uses the tensor '{node.target}' outside a layer")
        if node.op == "call_method" and node.target == "view":
            node.target = "reshape"  # layers lay tensors out as they want
        module = modules.get(node.target) if node.op == "call_module" else None
        if isinstance(module, nn.Conv2d | nn.Linear):
            require_plain(module)
            norm = _only_user(node, lambda user: _is_norm(user, modules))
            found = modules[norm.target] if norm is not None else None
            _take_up(norm, node)
            relu = _only_user(node, lambda user: _is_relu(user, modules))
            _take_up(relu, node)
            replace(node, Weighted(module, found, relu is not None))
        elif module is not None and _is_norm(node, modules):
            replace(node, Norm(module))
        elif isinstance(module, nn.ReLU):
            node.op, node.target = "call_function", torch.relu
        elif module is not None:
            _adopt(root, node, module, len(layers))
    _rectify_in_place(graph)
    graph.lint()
    return layers


def _only_user(node: fx.Node, fits: Callable[[fx.Node], bool]) -> fx.Node | None:
    """The node that alone uses what a layer gives, if it is of the kind."""
    users = list(node.users)
    return users[0] if len(users) == 1 and fits(users[0]) else None


def _take_up(user: fx.Node | None, node: fx.Node) -> None:
    """Let a layer's node stand for the one after it too."""
    if user is not None:
        user.replace_all_uses_with(node)
        user.graph.erase_node(user)


def _is_norm(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether a node is batch norm with statistics of its own; without, it follows the batch."""
    module = modules.get(node.target) if node.op == "call_module" else None
    if not isinstance(module, nn.BatchNorm2d):
        return False
    require_plain(module)
    return module.running_mean is not None and module.running_var is not None


def _is_relu(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return isinstance(modules.get(node.target), nn.ReLU)
    return node.op == "call_function" and node.target in (F.relu, torch.relu)


def _adopt(root: nn.Module, node: fx.Node, module: nn.Module, number: int) -> None:
    """Let the view call a module of the network as it is."""
    name = f"own{number}_{node.name}"
    root.add_module(name, module)
    node.target = name


def _rectify_in_place(graph: fx.Graph) -> None:
    """ReLU in place where nothing else uses its input, and no backward pass needs it."""
    for node in graph.nodes:
        if node.op == "call_function" and node.target in (F.relu, torch.relu):
            [source] = node.all_input_nodes
            fresh = str(source.target).startswith(_NAME) or source.target in _SUMS
            node.target = torch.relu_ if fresh and len(source.users) == 1 else torch.relu
            node.args, node.kwargs = (source,), {}
