"""A frozen view of a network: what it computes in eval mode with the weights that it has now.

Ten of eleven passes of adversarial training, and all passes of an attack, want nothing but outputs
and the gradient of the input. The view forms each weight once, folds batch norm into the
convolution before it, lays tensors out as the device's convolutions want them, and rectifies in
place. Its outputs are those of the network to rounding.
"""

import operator
import weakref
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from robsparse.backends import Backend
from robsparse.frozen_layers import Norm, Weighted, require_plain
from robsparse.small_maps import NARROW

_VIEWS: "weakref.WeakKeyDictionary[nn.Module, View]" = weakref.WeakKeyDictionary()
_NAME = "frozen"  # of the view's own layers in its graph
_SUMS = (operator.add, torch.add)


class View(nn.Module):
    """The frozen view of one network; call `refresh` after its weights have changed.

    Raises ValueError when the network's code does not let itself be traced, or when a layer has
    a forward of its own.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.kinds = kinds(model)
        try:
            graph = _Tracer().trace(model)
        except Exception as error:  # whatever code does that is not made of tensors alone
            raise ValueError(f"it cannot be traced ({type(error).__name__}: {error})") from error
        root = nn.Module()
        self.layers = _fold(graph, dict(model.named_modules()), root)
        # Not a submodule: the network's own modules in it must not be found twice.
        self.__dict__["run"] = fx.GraphModule(root, graph)
        self.backends: dict[str, Backend] = {}
        self.use("eager")

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
        with torch.no_grad():
            for layer in self.layers:
                layer.refresh(dtype)
        convolutions = [layer for layer in self.layers if isinstance(layer, Weighted)]
        columns = any(layer.live <= NARROW for layer in convolutions)
        for layer in convolutions:
            layer.columns = columns
        return self

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return self.backend(x_NCHW).to(x_NCHW.dtype)


def view_of(
    model: nn.Module, dtype: torch.dtype | None = None, backend: str = "eager"
) -> nn.Module:
    """The network's frozen view with its weights of now, or the network itself if it has none.

    The network is expected to be in eval mode. Views are kept as long as their networks.
    dtype: as for `View.refresh`; backend: as for `Backend`.
    """
    view = _VIEWS.get(model)
    if view is None or view.kinds != kinds(model):
        try:
            view = View(model)
        except ValueError as error:
            print(f"frozen view: none of this network, {error}; it runs as it is", flush=True)
            view = _Plain(model)
        _VIEWS[model] = view
    return view.use(backend).refresh(dtype)


def kinds(model: nn.Module) -> tuple[type, ...]:
    """What a view depends on besides the weights."""
    return tuple(type(module) for module in model.modules())


class _Plain(nn.Module):
    """Stands for the view of a network that has none."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.__dict__["model"] = weakref.ref(model)
        self.kinds = kinds(model)

    def use(self, _: str) -> "_Plain":
        return self

    def refresh(self, _: torch.dtype | None) -> nn.Module:
        return self.model()


class _Tracer(fx.Tracer):
    """Sees layers with weights as they are, parametrised or not."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        weighted = isinstance(m, nn.Conv2d | nn.Linear | nn.BatchNorm2d)
        return weighted or super().is_leaf_module(m, module_qualified_name)


def _fold(graph: fx.Graph, modules: dict[str, nn.Module], root: nn.Module) -> list[nn.Module]:
    """Rewrite a traced graph to use frozen layers, which become modules of `root`."""
    layers: list[nn.Module] = []

    def replace(node: fx.Node, layer: nn.Module) -> None:
        node.target = f"{_NAME}{len(layers)}"
        root.add_module(node.target, layer)
        layers.append(layer)

    for node in list(graph.nodes):
        if not node.users and node.op != "output":
            continue  # nothing needs it, or a layer has taken it up
        if node.op == "get_attr":
            raise ValueError(f"it uses the tensor '{node.target}' outside a layer")
        module = modules.get(node.target) if node.op == "call_module" else None
        if isinstance(module, nn.Conv2d | nn.Linear):
            require_plain(module)
            norm = _only_user(node, lambda user: _is_norm(user, modules))
            found = modules[norm.target] if norm is not None else None
            _take_up(norm, node)
            relu = _only_user(node, lambda user: _is_relu(user, modules))
            _take_up(relu, node)
            replace(node, Weighted(module, found, relu is not None))
        elif isinstance(module, nn.BatchNorm2d):
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
    module = modules.get(node.target) if node.op == "call_module" else None
    return isinstance(module, nn.BatchNorm2d) and module.track_running_stats


def _is_relu(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return isinstance(modules.get(node.target), nn.ReLU)
    return node.op == "call_function" and node.target in (F.relu, torch.relu)


def _adopt(root: nn.Module, node: fx.Node, module: nn.Module, number: int) -> None:
    """Let the view call a module without weights of the network."""
    name = f"own{number}_{node.name}"
    root.add_module(name, module)
    node.target = name


def _rectify_in_place(graph: fx.Graph) -> None:
    """ReLU in place where nothing else uses its input, and no backward pass needs it."""
    for node in graph.nodes:
        if node.op == "call_function" and node.target in (F.relu, torch.relu):
            [source] = node.args
            fresh = str(source.target).startswith(_NAME) or source.target in _SUMS
            node.target = torch.relu_ if fresh and len(source.users) == 1 else torch.relu
            node.kwargs = {}
