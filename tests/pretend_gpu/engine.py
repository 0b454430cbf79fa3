"""autograd's engine once more, in Python, for gradients on a GPU that is not there.

torch's own asks the driver for a context as soon as a gradient is on a GPU. All else it does is to call the
nodes of the graph, each after all that lead to it, and to add up what they pass on.
"""

import heapq
from collections import Counter, defaultdict

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge


def run_backward(engine, outputs, grads, retain_graph, create_graph, inputs, *more, **options):
    """In place of torch's engine where an output is on the GPU: each node after all that lead to it."""
    if not any(x.is_cuda for x in outputs):
        return engine(outputs, grads, retain_graph, create_graph, inputs, *more, **options)
    assert not create_graph, "no second derivatives"
    wanted = {get_gradient_edge(x)[:2]: i for i, x in enumerate(inputs)}
    found: list[Tensor | None] = [None] * len(inputs)
    edges = [get_gradient_edge(x)[:2] for x in outputs]
    waiting = leads_to([node for node, _ in edges])
    due: dict = defaultdict(dict)  # node → {number of its output: what has reached it}
    for (node, number), grad in zip(edges, grads):
        reach(due[node], number, grad)
    starts = {node for node, _ in edges if not waiting[node]}
    ready = [entry(node) for node in starts]
    heapq.heapify(ready)
    with torch.no_grad():
        while ready:
            *_, node = heapq.heappop(ready)
            given = fitting(node, due.pop(node, {}))
            for i, grad in enumerate(given):
                if (node, i) in wanted:
                    found[wanted[node, i]] = grad
            if hasattr(node, "variable"):
                if (
                    options["accumulate_grad"]
                    and (not inputs or (node, 0) in wanted)
                    and given[0] is not None
                ):
                    accumulate(node.variable, given[0])
                continue
            passed = apply(node, given) if any(x is not None for x in given) else ()
            for i, (following, number) in enumerate(node.next_functions):
                if following is None:
                    continue
                reach(due[following], number, passed[i] if i < len(passed) else None)
                waiting[following] -= 1
                if not waiting[following]:
                    heapq.heappush(ready, entry(following))
    return tuple(found)


def entry(node) -> tuple:
    """Nodes that were made last come first, as in torch's engine: sums are then in its order."""
    return -node._sequence_nr(), id(node), node


def leads_to(nodes: list) -> Counter:
    """Node → how many nodes of the graph below `nodes` pass something on to it."""
    waiting, seen, left = Counter(), set(), [*nodes]
    while left:
        node = left.pop()
        if node in seen:
            continue
        seen.add(node)
        for following, _ in node.next_functions:
            if following is not None:
                waiting[following] += 1
                left.append(following)
    return waiting


def reach(sums: dict, number: int, grad: Tensor | None) -> None:
    if grad is not None:
        sums[number] = sums[number] + grad if number in sums else grad


def fitting(node, sums: dict) -> list:
    """What has reached a node, as the engine passes it on: on its device, of its shape and dtype."""
    given = []
    for i, due in enumerate(node._input_metadata):
        grad = sums.get(i)
        if grad is not None:
            if grad.device != due.device:
                raise RuntimeError(f"{node.name()}: a gradient on {grad.device}, expected on {due.device}")
            grad = grad.sum_to_size(due.shape) if grad.shape != due.shape else grad
            grad = grad.to(due.dtype)
        given.append(grad)
    return given


def apply(node, given: list) -> tuple:
    if isinstance(node, torch.autograd.function.BackwardCFunction):  # a function written in Python
        meta = node._input_metadata
        given = [
            torch.zeros(due.shape, dtype=due.dtype, device=due.device) if grad is None else grad
            for grad, due in zip(given, meta)
        ]
        passed = node.apply(*given)
    else:
        passed = node(*given)
    return passed if isinstance(passed, tuple) else (passed,)


def accumulate(leaf: Tensor, grad: Tensor) -> None:
    if leaf.grad is None:
        leaf.grad = grad.clone()
    else:
        leaf.grad += grad
