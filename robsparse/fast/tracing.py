"""The forward pass of a network as a program. Its weights are an argument.

A program is a trace. Every convolution and linear layer, with the batch norm, the addition of
another map and the ReLU after it, and every other batch norm with its ReLU is replaced by a layer
from a `Snapshot`. A program is valid until the
structure of the network changes. Changes of the weights do not matter.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from robsparse.base.errors import one_line
from robsparse.compute.machine import is_out_of_memory
from robsparse.fast.execution import Execution
from robsparse.fast.folded_layers import (
    ConvolutionSource,
    LinearSource,
    NormSource,
    Snapshot,
    Source,
    fold,
    require_plain,
)
from robsparse.kernels.pools import max_pool, mean_pool
from robsparse.models._layers import Normalise

_SUMS = (operator.add, operator.iadd, torch.add)


class Program:
    """The forward pass of a network without its weights: (snapshot, x_NCHW) -> logits_NK.

    sources: the source of each folded layer.
    graph: the program for torch, which records the gradient. Backends other than `eager` use it.
    """

    def __init__(self, sources: Sequence[Source], graph: fx.GraphModule) -> None:
        self.sources = tuple(sources)
        self.graph = graph
        self.execution: Execution | None
        try:
            self.execution = Execution(graph, self.sources)
        except ValueError:
            self.execution = None

    def run(self, snapshot: Snapshot, x_NCHW: Tensor) -> Tensor:
        """Return the logits. On a CPU, an `Execution` computes them if there is one."""
        if self.execution is None or x_NCHW.is_cuda:
            return self.graph(snapshot, x_NCHW)
        return self.execution(snapshot, x_NCHW)

    def snapshot(self, dtype: torch.dtype | None = None) -> Snapshot:
        """Return the folded layers with the current weights. dtype: see `Snapshot`."""
        return fold(self.sources, dtype)


def trace(model: nn.Module, x_NCHW: Tensor) -> Program:
    """Return the program of a network in eval mode.

    x_NCHW: images to run the trace on.

    Raises:
        ValueError: if the code of the network cannot be traced, or a program cannot represent it.
    """
    try:
        graph = _Tracer().trace(model)
    except Exception as error:  # code can raise any error when it is traced
        raise ValueError(f"it cannot be traced ({one_line(error)})") from error
    _require_nothing_rewritten(model, graph, x_NCHW)
    for node in reversed(graph.nodes):
        if not node.users and node.op not in ("placeholder", "output"):
            graph.erase_node(node)  # nothing uses its result
    folder = _Folder(graph, dict(model.named_modules()))
    return Program(folder.sources, fx.GraphModule(folder.root, graph))


class _Tracer(fx.Tracer):
    """Traces each layer with weights or constants as one call, also if it is parametrised."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        weighted = isinstance(m, nn.Conv2d | nn.Linear | nn.BatchNorm2d | Normalise)
        return weighted or super().is_leaf_module(m, module_qualified_name)


def rectified_norms(model: nn.Module) -> dict[str, bool]:
    """Return the batch norms that a ReLU follows, by name: whether a sum of maps is between them.

    The result has no other use than the sum or the ReLU, and that of the sum none but the ReLU. The
    mode of the network counts. It is empty for a network that cannot be traced.
    """
    try:
        graph = _Tracer().trace(model)
    except Exception:  # code can raise any error when it is traced
        return {}
    modules = dict(model.named_modules())
    found: dict[str, set[bool | None]] = {}
    for node in graph.nodes:
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        if type(module) is nn.BatchNorm2d:
            found.setdefault(str(node.target), set()).add(_summed_before_relu(node, modules))
    return {
        name: bool(summed)
        for name, (summed, *others) in found.items()
        if not others and summed is not None
    }


def _summed_before_relu(node: fx.Node, modules: dict[str, nn.Module]) -> bool | None:
    """Return whether a sum is between a node and the ReLU after it. None: there is no such ReLU."""
    total = _only_user(node, _is_sum_of_two)
    relu = _only_user(total or node, lambda user: _is_relu(user, modules))
    return None if relu is None else total is not None


# ---------------------------------------------------------------- tensors changed in place


def _require_nothing_rewritten(model: nn.Module, graph: fx.Graph, x_NCHW: Tensor) -> None:
    """Raise ValueError if a traced network changes a tensor in place that is used again."""
    watching = _Watching(model, graph=graph)
    watching.extra_traceback = False  # only the message of an error
    with torch.no_grad():
        try:
            watching.run(x_NCHW.clone())
        except _RewrittenError:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise ValueError(f"its trace does not run ({one_line(error)})") from error


class _RewrittenError(ValueError):
    pass


class _Watching(fx.Interpreter):
    """Runs a traced network, and raises _RewrittenError if it changes a tensor that is used again.

    It also writes the shape of each tensor into the `meta` of its node. PyTorch counts the changes
    of all tensors that share memory together. The caller uses the images again.
    """

    def run_node(self, n: fx.Node) -> Any:
        last_uses = self.user_to_last_uses.get(n, [])
        gone = {node for node in last_uses if node.op != "placeholder"}
        needed = [value for node, value in self.env.items() if node not in gone]
        tensors = [value for value in needed if isinstance(value, Tensor)]
        before = [tensor._version for tensor in tensors]
        result = super().run_node(n)
        if [tensor._version for tensor in tensors] != before:
            raise _RewrittenError(f"'{n.name}' changes a tensor in place that is used again")
        n.meta["shape"] = result.shape if isinstance(result, Tensor) else None
        return result


# ---------------------------------------------------------------- folding


def apply_layer(snapshot: Snapshot, number: int, *given: Any, **named: Any) -> Tensor:
    """Return the result of a folded layer. This is one step of a program."""
    return snapshot.layers[number](*given, **named)


class _Folder:
    """Changes a traced graph in place: its layers come from a snapshot.

    sources: the sources of these layers. root: all other modules that the graph calls.
    """

    def __init__(self, graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
        self.graph, self.modules = graph, modules
        self.sources: list[Source] = []
        self.root = nn.Module()
        with graph.inserting_before(next(iter(graph.nodes))):
            self.snapshot = graph.placeholder("snapshot_of_weights")
        for node in list(graph.nodes):
            if node.users or node.op not in ("call_module", "call_function"):
                self._fold(node)  # all others are already part of a layer
        _rectify_in_place(graph)
        graph.lint()

    def _fold(self, node: fx.Node) -> None:
        if node.op == "get_attr":
            raise ValueError(f"it uses the tensor '{node.target}' outside a layer")
        if node.op == "call_method" and node.target == "view":
            node.target = "reshape"  # folded layers may use another memory format
        module = self._module(node)
        if isinstance(module, nn.Conv2d | nn.Linear):
            require_plain(module)
            user = _only_user(node, lambda user: self._norm(user) is not None)
            norm = None if user is None else self._norm(user)
            _merge(user, node)
            if isinstance(module, nn.Conv2d):
                _merge_sum(node)
                self._replace(node, ConvolutionSource(module, norm, self._merge_relu(node)))
            else:
                self._replace(node, LinearSource(module, norm, self._merge_relu(node)))
        elif (norm := self._norm(node)) is not None:
            self._replace(node, NormSource(norm, self._merge_relu(node)))
        elif isinstance(module, nn.ReLU):
            node.op, node.target = "call_function", torch.relu
        elif type(module) is nn.Identity:
            _merge(node, node.all_input_nodes[0])
        elif type(module) is nn.AdaptiveAvgPool2d:
            node.op, node.target = "call_function", mean_pool
            node.args = (*node.args, module.output_size)
        elif type(module) is nn.MaxPool2d and not module.return_indices:
            node.op, node.target = "call_function", max_pool
            node.args = (*node.args, module.kernel_size, module.stride)
            names = ("padding", "dilation", "ceil_mode")
            node.kwargs = {name: getattr(module, name) for name in names}
        elif module is not None:
            name = f"own{len(self.sources)}_{node.name}"
            self.root.add_module(name, module)
            node.target = name

    def _merge_relu(self, node: fx.Node) -> bool:
        """Merge a ReLU that is the only user of a layer into its node. Return whether there was."""
        relu = _only_user(node, lambda user: _is_relu(user, self.modules))
        _merge(relu, node)
        return relu is not None

    def _replace(self, node: fx.Node, source: Source) -> None:
        """Let a node call a layer of the snapshot."""
        node.op, node.target = "call_function", apply_layer
        node.args = (self.snapshot, len(self.sources), *node.args)
        self.sources.append(source)

    def _module(self, node: fx.Node) -> nn.Module | None:
        """Return the module that a node calls, or None."""
        return self.modules.get(str(node.target)) if node.op == "call_module" else None

    def _norm(self, node: fx.Node) -> nn.BatchNorm2d | None:
        """Return the batch norm that a node calls, or None. It must use running statistics."""
        module = self._module(node)
        if not isinstance(module, nn.BatchNorm2d):
            return None
        require_plain(module)
        running = module.running_mean is not None and module.running_var is not None
        return module if running else None


def _is_relu(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    module = modules.get(str(node.target)) if node.op == "call_module" else None
    return isinstance(module, nn.ReLU) or _calls_relu(node)


def _is_sum_of_two(node: fx.Node) -> bool:
    plain = node.op == "call_function" and node.target in _SUMS and not node.kwargs
    return plain and len(node.all_input_nodes) == 2


def _only_user(node: fx.Node, fits: Callable[[fx.Node], bool]) -> fx.Node | None:
    """Return the only node that uses the result of a node, if `fits` accepts it."""
    users = list(node.users)
    return users[0] if len(users) == 1 and fits(users[0]) else None


def _merge(user: fx.Node | None, node: fx.Node) -> None:
    """Merge the next node, `user`, into the node of a layer."""
    if user is not None:
        user.replace_all_uses_with(node)
        user.graph.erase_node(user)


def _merge_sum(node: fx.Node) -> None:
    """Merge the addition of another map of the same shape into the node of a convolution.

    The node moves to the place of the addition, where the other map is known.
    """
    total = _only_user(node, _is_sum_of_two)
    if total is not None:
        others = [term for term in total.all_input_nodes if term is not node]
        shapes = {str(term.meta.get("shape")) for term in (node, others[0], total)}
        if len(shapes) == 1 and shapes != {"None"}:
            total.append(node)
            node.args = (*node.args, others[0])
            _merge(total, node)


def _calls_relu(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in (F.relu, torch.relu)


def _rectify_in_place(graph: fx.Graph) -> None:
    """Apply ReLU in place if nothing else uses its input and no backward pass needs it."""
    for node in graph.nodes:
        if _calls_relu(node):
            [source] = node.all_input_nodes
            fresh = source.op == "call_function" and source.target in (apply_layer, *_SUMS)
            node.target = torch.relu_ if fresh and len(source.users) == 1 else torch.relu
            node.args, node.kwargs = (source,), {}
