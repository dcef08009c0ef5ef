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

from robsparse.models._layers import TensorFlowConv2d

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

    def refresh(self) -> "View":
        """Form all weights anew from the network's; returns the view."""
        with torch.no_grad():
            for layer in self.layers:
                layer.refresh()
        return self

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return self.run(x_NCHW.contiguous(memory_format=_layout(x_NCHW)))


def view_of(model: nn.Module) -> nn.Module:
    """The network's frozen view with its weights of now, or the network itself if it has none.

    The network is expected to be in eval mode. Views are kept as long as their networks.
    """
    view = _VIEWS.get(model)
    if view is None or view.kinds != kinds(model):
        try:
            view = View(model)
        except ValueError as error:
            print(f"frozen view: none of this network, {error}; it runs as it is", flush=True)
            view = _Plain(model)
        _VIEWS[model] = view
    return view.refresh()


def kinds(model: nn.Module) -> tuple[type, ...]:
    """What a view depends on besides the weights."""
    return tuple(type(module) for module in model.modules())


class _Plain(nn.Module):
    """Stands for the view of a network that has none."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.__dict__["model"] = weakref.ref(model)
        self.kinds = kinds(model)

    def refresh(self) -> nn.Module:
        return self.model()


class _Tracer(fx.Tracer):
    """Sees layers with weights as they are, parametrised or not."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        weighted = isinstance(m, nn.Conv2d | nn.Linear | nn.BatchNorm2d)
        return weighted or super().is_leaf_module(m, module_qualified_name)


class _Layer(nn.Module):
    """A convolution or linear layer, with the batch norm after it if there is one."""

    def __init__(self, layer: nn.Module, norm: nn.BatchNorm2d | None) -> None:
        super().__init__()
        self.__dict__["layer"], self.__dict__["norm"] = layer, norm
        self.__dict__["apply"] = _how(layer)

    def refresh(self) -> None:
        """weight * g and (bias - mean) * g + beta, with g = gamma / sqrt(variance + eps)."""
        weight, bias = self.layer.weight.detach(), self.layer.bias
        if self.norm is not None:
            scale, shift = scale_and_shift(self.norm)
            weight = weight * scale.view(-1, *[1] * (weight.ndim - 1))
            bias = shift if bias is None else bias * scale + shift
        if weight.ndim == 4:
            weight = weight.contiguous(memory_format=_layout(weight))
        self.weight, self.bias = weight, bias if bias is None else bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        return self.apply(x, self.weight, self.bias)


def _layout(tensor: Tensor) -> torch.memory_format:
    """What convolutions want: channels last on a GPU; on a CPU it was slower where measured."""
    return torch.channels_last if tensor.is_cuda else torch.contiguous_format


class _Norm(nn.Module):
    """Batch norm that no layer takes up."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.__dict__["norm"] = norm

    def refresh(self) -> None:
        scale, shift = scale_and_shift(self.norm)
        self.scale, self.shift = scale.view(-1, 1, 1), shift.view(-1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.shift, x, self.scale)


def scale_and_shift(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Batch norm in eval mode as x * scale + shift, one of each a channel."""
    scale = (norm.running_var + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach()
    shift = -norm.running_mean * scale
    return scale, shift if norm.bias is None else shift + norm.bias.detach()


def _how(layer: nn.Module) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """The layer as a function of x, weight and bias."""
    if isinstance(layer, nn.Linear):
        return F.linear
    if isinstance(layer, TensorFlowConv2d):
        return lambda x, weight, bias: layer._conv_forward(layer.padded(x), weight, bias)
    return layer._conv_forward


def _fold(graph: fx.Graph, modules: dict[str, nn.Module], root: nn.Module) -> list[nn.Module]:
    """Rewrite a traced graph to use frozen layers, which become modules of `root`."""
    layers: list[nn.Module] = []

    def replace(node: fx.Node, layer: nn.Module) -> None:
        node.target = f"{_NAME}{len(layers)}"
        root.add_module(node.target, layer)
        layers.append(layer)

    for node in list(graph.nodes):
        if node.op == "get_attr":
            raise ValueError(f"it uses the tensor '{node.target}' outside a layer")
        module = modules.get(node.target) if node.op == "call_module" else None
        if isinstance(module, nn.Conv2d | nn.Linear):
            _require_plain(module)
            norm = _norm_after(node, modules)
            if norm is not None:
                norm.replace_all_uses_with(node)
                graph.erase_node(norm)
            replace(node, _Layer(module, modules[norm.target] if norm is not None else None))
        elif isinstance(module, nn.BatchNorm2d) and node.users:
            replace(node, _Norm(module))
        elif isinstance(module, nn.ReLU):
            node.op, node.target = "call_function", torch.relu
        elif module is not None and node.users:
            _adopt(root, node, module, len(layers))
    _rectify_in_place(graph)
    graph.lint()
    return layers


def _norm_after(node: fx.Node, modules: dict[str, nn.Module]) -> fx.Node | None:
    """The batch norm that alone uses what a convolution gives."""
    users = list(node.users)
    if len(users) == 1 and users[0].op == "call_module":
        found = modules[users[0].target]
        if isinstance(found, nn.BatchNorm2d) and found.track_running_stats:
            return users[0]
    return None


def _require_plain(module: nn.Module) -> None:
    """Raise ValueError for a layer that does something else than its kind."""
    known = (nn.Conv2d.forward, nn.Linear.forward, TensorFlowConv2d.forward)
    if type(module).forward not in known:
        raise ValueError(f"{type(module).__name__} has a forward of its own")


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
