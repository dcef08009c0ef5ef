"""Runs a traced network on a CPU, with a backward pass of its own to the images.

torch would record every operation and its inputs. This module needs less: an attack asks for the
gradient of the images only. Convolutions are computed by their fastest forms. In the backward pass,
a form adds the gradients of a map that has several users, and applies the gate of the ReLU that
made this map, while it writes its result. All other operations (pooling, linear layers and so on)
are recorded by torch, one at a time.
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from robsparse.fast.folded_layers import ConvolutionSource, NormSource, Snapshot, Source
from robsparse.fast.forms import Form, gated
from robsparse.kernels.geometry import Pair
from robsparse.kernels.pools import max_pool, mean_pool

# Images that run together. With more, the maps of a network do not fit into the caches of a core.
BLOCK = 64


# Functions that are fast and right for maps in every layout. All other functions get maps with
# channels first: torch 2.13 computes a wrong gradient of batch norm for some layouts of one image.
_ANY_LAYOUT = {
    operator.add, operator.sub, operator.mul, operator.truediv, operator.neg, torch.add, torch.sub,
    torch.mul, torch.relu, torch.sigmoid, torch.tanh, torch.nn.functional.relu,
    torch.nn.functional.silu, torch.nn.functional.gelu, "mean", "sum", "size", "dim", "add", "mul",
    max_pool, mean_pool,
}  # fmt: skip

# Operators that change a tensor in place. A later step or the backward pass may need this tensor.
_IN_PLACE = (operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ipow)


@dataclass(frozen=True)
class Step:
    """One operation. Values are numbered; value 0 is the batch of images.

    result: number of its value. inputs: numbers of the values that it reads.
    call: (layers, values) -> result.
    layer: number of a folded layer that can have a form, or None.
    rectified: whether a form of it applies a ReLU.
    last: numbers of the values that no later step reads.
    """

    result: int
    inputs: tuple[int, ...]
    call: Callable[[Sequence[Any], list[Any]], Any]
    layer: int | None = None
    rectified: bool = False
    last: tuple[int, ...] = ()


@dataclass
class Tape:
    """What the backward pass needs.

    forms: the form of each step that was computed by one. outputs: the results of rectified forms.
    recorded: inputs and result of each other step, as torch recorded them.
    """

    forms: dict[int, Form]
    outputs: dict[int, Tensor]
    recorded: dict[int, tuple[dict[int, Tensor], Tensor]]


class Execution:
    """Runs the graph of a program.

    Raises:
        ValueError: if the graph has an operation that changes a tensor in place, or returns
            something else than one tensor.
    """

    def __init__(self, graph: fx.GraphModule, sources: Sequence[Source]) -> None:
        self.steps, self.output = _steps(graph, sources)
        self.makers = {step.result: step for step in self.steps}
        self.sizes: dict[torch.Size, dict[int, Pair]] = {}

    def __call__(self, snapshot: Snapshot, x_NCHW: Tensor) -> Tensor:
        """Return the logits. Their gradient reaches the images only."""
        blocks = [self._block(snapshot, block) for block in x_NCHW.split(BLOCK)]
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks)

    def _block(self, snapshot: Snapshot, x_NCHW: Tensor) -> Tensor:
        forms = self._forms(snapshot, x_NCHW)
        if torch.is_grad_enabled() and x_NCHW.requires_grad:
            return _Passes.apply(x_NCHW, self, snapshot, forms)
        return self.forward(snapshot, forms, x_NCHW.detach(), None)

    def _forms(self, snapshot: Snapshot, x_NCHW: Tensor) -> dict[int, Form]:
        """Return the form of each folded layer that has one, by the number of the layer."""
        shape = x_NCHW.shape[1:]
        if shape not in self.sizes:
            sizes: dict[int, Pair] = {}
            self.forward(snapshot, {}, x_NCHW[:1].detach(), None, sizes)
            self.sizes[shape] = sizes
        return snapshot.forms(self.sizes[shape], len(x_NCHW))

    @torch.no_grad()
    def forward(
        self,
        snapshot: Snapshot,
        forms: dict[int, Form],
        x_NCHW: Tensor,
        tape: Tape | None,
        sizes: dict[int, Pair] | None = None,
    ) -> Tensor:
        """Return the logits.

        tape: filled for the backward pass. sizes: filled with the sizes of the maps of layers.
        """
        values: list[Any] = [None] * (len(self.steps) + 1)
        values[0] = x_NCHW
        for step in self.steps:
            form = None if step.layer is None else forms.get(step.layer)
            if sizes is not None and step.layer is not None:
                height, width = values[step.inputs[0]].shape[2:]
                sizes[step.layer] = height, width
            if form is not None:
                other = values[step.inputs[1]] if len(step.inputs) > 1 else None
                result = form.output(values[step.inputs[0]], other, rectified=step.rectified)
                if tape is not None:
                    tape.forms[step.result] = form
                    if step.rectified:
                        tape.outputs[step.result] = result
            elif tape is None:
                result = step.call(snapshot.layers, values)
            else:
                result = _record(step, snapshot, values, tape)
            values[step.result] = result
            for number in step.last:
                values[number] = None
        return values[self.output]

    @torch.no_grad()
    def backward(self, tape: Tape, upstream: Tensor) -> Tensor | None:
        """Return the gradient of the images."""
        gradients: dict[int, Tensor] = {self.output: upstream}
        waiting = [0] * (len(self.steps) + 1)
        for step in self.steps:
            for number in step.inputs:
                waiting[number] += 1
        gated_already: set[int] = set()
        for step in reversed(self.steps):
            gradient = gradients.pop(step.result, None)
            if gradient is None:
                for number in step.inputs:
                    waiting[number] -= 1
            elif (form := tape.forms.get(step.result)) is not None:
                if step.rectified and step.result not in gated_already:
                    gradient = gated(gradient, None, tape.outputs[step.result])
                for number in step.inputs[1:]:
                    waiting[number] -= 1
                    _accumulate(gradients, number, gradient)
                source = step.inputs[0]
                waiting[source] -= 1
                # The last contribution to a gradient also applies the gate of its ReLU.
                gate = tape.outputs.get(source) if waiting[source] == 0 else None
                if gate is not None:
                    gated_already.add(source)
                gradients[source] = form.input_gradient(gradient, gradients.get(source), gate)
            else:
                for number in step.inputs:
                    waiting[number] -= 1
                _backward_recorded(tape, step, gradient, gradients)
        return gradients.get(0)


class _Passes(torch.autograd.Function):
    """The forward and the backward pass of an execution."""

    @staticmethod
    def forward(
        ctx: Any, x_NCHW: Tensor, execution: Execution, snapshot: Snapshot, forms: dict[int, Form]
    ) -> Tensor:
        ctx.execution, ctx.tape, ctx.like = execution, Tape({}, {}, {}), x_NCHW
        return execution.forward(snapshot, forms, x_NCHW.detach(), ctx.tape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, None, None, None]:
        gradient = ctx.execution.backward(ctx.tape, upstream)
        return None if gradient is None else gradient.to(ctx.like.dtype), None, None, None


class _Start(torch.autograd.Function):
    """A scalar whose gradient with respect to a tensor is the given one.

    torch.autograd.grad also accepts a gradient to start from. It then imports its compiler for
    symbolic shapes, which takes a third of a second in every job.
    """

    @staticmethod
    def forward(ctx: Any, result: Tensor, gradient: Tensor) -> Tensor:
        ctx.gradient = gradient
        return result.new_zeros(())

    @staticmethod
    def backward(ctx: Any, one: Tensor) -> tuple[Tensor, None]:
        return ctx.gradient, None


def _record(step: Step, snapshot: Snapshot, values: list[Any], tape: Tape) -> Any:
    """Compute a step. torch records it for a gradient of each tensor that it reads."""
    leaves = {
        number: values[number].detach().requires_grad_()
        for number in step.inputs
        if isinstance(values[number], Tensor) and values[number].is_floating_point()
    }
    with torch.enable_grad():
        given = [leaves.get(number, value) for number, value in enumerate(values)]
        result = step.call(snapshot.layers, given)
    if isinstance(result, Tensor):
        if result.requires_grad:
            tape.recorded[step.result] = leaves, result
        return result.detach()
    if isinstance(result, tuple | list) and any(isinstance(part, Tensor) for part in result):
        raise ValueError("a step returns several tensors")
    return result


def _backward_recorded(
    tape: Tape, step: Step, gradient: Tensor, gradients: dict[int, Tensor]
) -> None:
    if step.result not in tape.recorded:
        return
    leaves, result = tape.recorded[step.result]
    with torch.enable_grad():
        start = _Start.apply(result, gradient.to(result.dtype))
    found = torch.autograd.grad(start, list(leaves.values()), retain_graph=True, allow_unused=True)
    for number, part in zip(leaves, found, strict=True):
        if part is not None:
            _accumulate(gradients, number, part)


def _accumulate(gradients: dict[int, Tensor], number: int, part: Tensor) -> None:
    gradients[number] = gradients[number] + part if number in gradients else part


# ---------------------------------------------------------------- steps of a graph


def _steps(graph: fx.GraphModule, sources: Sequence[Source]) -> tuple[list[Step], int]:
    """Return the steps of a graph, and the number of the value that it returns."""
    numbers: dict[fx.Node, int] = {}
    nodes: list[fx.Node] = []
    output: Any = None
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            if node.target != "snapshot_of_weights":
                if numbers:
                    raise ValueError("it has several inputs")
                numbers[node] = 0
        elif node.op == "output":
            output = node.args[0]
        else:
            numbers[node] = len(numbers)
            nodes.append(node)
    if output not in numbers:
        raise ValueError("its output is not one tensor")
    last = {read: node for node in nodes for read in node.all_input_nodes}
    modules = dict(graph.named_modules())
    steps = []
    for node in nodes:
        done = tuple(numbers[read] for read in numbers if last.get(read) is node)
        steps.append(_step(node, numbers, modules, sources, done))
    return steps, numbers[output]


def _step(
    node: fx.Node,
    numbers: dict[fx.Node, int],
    modules: dict[str, Any],
    sources: Sequence[Source],
    last: tuple[int, ...],
) -> Step:
    if getattr(node.target, "__name__", "") == "apply_layer":
        number: Any = node.args[1]
        read = tuple(numbers[n] for n in node.args[2:] if isinstance(n, fx.Node))
        source = sources[number]
        has_forms = isinstance(source, ConvolutionSource | NormSource)
        return Step(
            numbers[node], read,
            lambda layers, values: layers[number](*(values[n] for n in read)),
            number if has_forms else None, has_forms and source.rectified, last,
        )  # fmt: skip
    function = _function(node, modules)
    any_layout = node.target in _ANY_LAYOUT

    def call(layers: Sequence[Any], values: list[Any]) -> Any:
        def value_of(read: fx.Node) -> Any:
            value = values[numbers[read]]
            return value if any_layout else _channels_first(value)

        given: Any = fx.map_arg((node.args, node.kwargs), value_of)
        return function(*given[0], **given[1])

    return Step(numbers[node], tuple(numbers[n] for n in node.all_input_nodes), call, last=last)


def _channels_first(value: Any) -> Any:
    return value.contiguous() if isinstance(value, Tensor) and value.ndim == 4 else value


def _function(node: fx.Node, modules: dict[str, Any]) -> Callable[..., Any]:
    """Return the function that a node calls.

    Raises:
        ValueError: if it changes a tensor in place.
    """
    target: Any = node.target
    if target is torch.relu_:
        return torch.relu
    if node.op == "call_module":
        target = modules[str(target)]
    name = str(getattr(target, "__name__", target if node.op == "call_method" else ""))
    changes = name.endswith("_") and not name.endswith("__")
    inplace = getattr(target, "inplace", False) or node.kwargs.get("inplace")
    if target in _IN_PLACE or changes or inplace:
        raise ValueError(f"'{node.name}' changes a tensor in place")
    return _method(name) if node.op == "call_method" else target


def _method(name: str) -> Callable[..., Any]:
    return lambda tensor, *given, **named: getattr(tensor, name)(*given, **named)
