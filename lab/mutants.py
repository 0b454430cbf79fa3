"""Mutants: what could have been written by mistake, one way at a time, in one function.

Of each call neighbouring arguments swapped, one left out, one negated, the call replaced by its first one; of
a tuple an element left out or two swapped; a name replaced by another of its kind (policy and ref, gamma
and lam), a flag by the next one of its type; +, −, *, / and comparisons turned round, conditions negated,
numbers one larger, statements left out. Text (f-strings, errors that are raised) is left alone.
"""

import ast
import copy
import importlib
import inspect
import os
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from nanoalign import UserError

NOT_ONE = 77  # exit status of a process that was to negate what has no negative
SIBLINGS = """
policy ref critic
model policy
old_logp ref_logp
logp old reference
old_v v old_values values
advantages returns
a g
ids mask
x m
chosen rejected
rows eval_rows held_out
pairs eval_pairs
examples eval_examples
soft eval_soft
labels eval_labels
blocks eval_blocks
score kl entropy
worth score
weight share
prompts held_out
margin score
logp ratio
indices group
prm orm
"""  # names of one kind, a line each
OTHERS = """
config tokenizer policy ref critic model models optimizer order run device autocast rows eval_rows held_out
prompts pairs eval_pairs examples eval_examples batch batches shown texts asked drawn reward prm orm found
everyone content path paths record stages files shape text checks kind who comparisons thumbs
"""  # names of what is no number, so that nobody has to try to negate it
SIGNS = [
    (ast.Add, ast.Sub), (ast.Mult, ast.Div), (ast.Eq, ast.NotEq), (ast.Lt, ast.GtE), (ast.Gt, ast.LtE),
    (ast.And, ast.Or), (ast.In, ast.NotIn), (ast.Is, ast.IsNot), (ast.BitOr, ast.BitAnd),
]  # fmt: skip
OPPOSITE = dict(SIGNS) | {b: a for a, b in SIGNS} | {ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult}


@dataclass
class Mutant:
    """A function with one change."""

    file: str  # the module's name
    function: str
    line: int
    before: str
    after: str
    code: ast.FunctionDef

    @property
    def name(self) -> str:
        return f"{self.before} → {self.after}"


def next_flags(config_class) -> dict[str, str]:
    """Each flag → the next one of its type."""
    kinds = {}
    for field in fields(config_class):
        kinds.setdefault(type(field.default), []).append(field.name)
    return {name: names[i - len(names) + 1] for names in kinds.values() for i, name in enumerate(names)}


def negated(value):
    """What `main` gets in place of an argument: its negative; a value that has none ends the child."""
    if isinstance(value, (bool, np.bool_)):
        return not value
    if isinstance(value, (torch.Tensor, np.ndarray)) and value.dtype in (torch.bool, np.dtype(bool)):
        return ~value
    if isinstance(value, (int, float, torch.Tensor, np.ndarray, np.number)):
        return -value
    os._exit(NOT_ONE)


def call(name: str, *args: ast.expr) -> ast.Call:
    return ast.Call(ast.Name(name, ast.Load()), list(args), [])


def swaps(items: list) -> Iterator[list]:
    for i in range(len(items) - 1):
        if ast.dump(items[i]) != ast.dump(items[i + 1]):
            yield [*items[:i], items[i + 1], items[i], *items[i + 2 :]]


def without_one(items: list) -> Iterator[list]:
    for i in range(len(items)):
        yield items[:i] + items[i + 1 :]


def changed(node, **parts):
    """The node with some parts replaced."""
    new = copy.copy(node)
    for name, part in parts.items():
        setattr(new, name, part)
    return new


def may_be_a_number(node: ast.expr) -> bool:
    """Is it worth a run to find out? Constants are changed elsewhere."""
    if isinstance(node, (ast.Name, ast.Attribute)):
        return (node.id if isinstance(node, ast.Name) else node.attr) not in OTHERS.split()
    return isinstance(node, (ast.Call, ast.BinOp, ast.Compare, ast.Subscript, ast.BoolOp))


def needs(node: ast.Call, module) -> int:
    """How many positional arguments a call cannot do without."""
    function = getattr(module, node.func.id, None) if isinstance(node.func, ast.Name) else None
    if not callable(function):
        return min(1, len(node.args))
    parameters = inspect.signature(function).parameters.values()
    by_place = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty]
    return len({p.name for p in by_place} - {keyword.arg for keyword in node.keywords})


def of_call(node: ast.Call, module: ModuleType) -> Iterator[ast.expr]:
    """A call with its arguments confused."""
    fewer = [node.args[:-1]] if len(node.args) > needs(node, module) else []
    for args in (*swaps(node.args), *fewer):
        yield changed(node, args=args)
    for keywords in without_one(node.keywords):
        yield changed(node, keywords=keywords)
    for i, arg in enumerate(node.args):
        if may_be_a_number(arg):
            yield changed(node, args=[*node.args[:i], call("negated", arg), *node.args[i + 1 :]])
    for i, keyword in enumerate(node.keywords):
        if keyword.arg and may_be_a_number(keyword.value):
            other = changed(keyword, value=call("negated", keyword.value))
            yield changed(node, keywords=[*node.keywords[:i], other, *node.keywords[i + 1 :]])
    if node.args and not isinstance(node.args[0], ast.Starred):
        yield node.args[0]


def of_name(node: ast.Name, bound: set[str]) -> Iterator[ast.Name]:
    """Another name of the kind, of those that the function binds."""
    for kind in map(str.split, SIBLINGS.splitlines()):
        kind = [name for name in kind if name in bound]
        if node.id in kind:
            yield changed(node, id=kind[kind.index(node.id) - len(kind) + 1])


def variants(node: ast.AST, module: ModuleType, flags: dict[str, str], bound: set[str]) -> Iterator[ast.AST]:
    """What a node could be by mistake."""
    match node:
        case ast.Call():
            yield from of_call(node, module)
        case ast.Tuple(ctx=ast.Load()) | ast.List(ctx=ast.Load()):
            for elements in (*swaps(node.elts), *without_one(node.elts)):
                yield changed(node, elts=elements)
        case ast.Name(ctx=ast.Load()):
            yield from of_name(node, bound)
        case ast.Attribute(value=ast.Name(id="config"), ctx=ast.Load()) if node.attr in flags:
            yield changed(node, attr=flags[node.attr])
        case ast.BinOp() | ast.BoolOp() if type(node.op) in OPPOSITE:
            yield changed(node, op=OPPOSITE[type(node.op)]())
            if isinstance(node.op, ast.Mult):
                yield node.left
        case ast.Compare():
            yield changed(node, ops=[OPPOSITE[type(node.ops[0])](), *node.ops[1:]])
        case ast.UnaryOp():
            yield node.operand
        case ast.If() | ast.IfExp():
            yield changed(node, test=ast.UnaryOp(ast.Not(), node.test))
        case ast.Constant(value=bool()):
            yield changed(node, value=not node.value)
        case ast.Constant(value=int() | float()):
            yield changed(node, value=node.value + 1)
        case ast.Expr() | ast.AugAssign():
            yield ast.Pass()


def places(parent: ast.AST, line: int) -> Iterator[tuple[ast.AST, str, int | None, int]]:
    """Every node below one → (its parent, the field it is in, its index there, its line), but for text."""
    for field, value in ast.iter_fields(parent):
        many = isinstance(value, list)
        for i, node in enumerate(value if many else [value]):
            if isinstance(node, ast.AST) and not isinstance(node, (ast.JoinedStr, ast.Raise)):
                at = getattr(node, "lineno", line)
                yield parent, field, i if many else None, at
                yield from places(node, at)


def put(parent: ast.AST, field: str, i: int | None, node: ast.AST) -> None:
    """Put a node into its place."""
    if i is None:
        setattr(parent, field, node)
    else:
        getattr(parent, field)[i] = node


def bound_in(function: ast.FunctionDef) -> set[str]:
    """The names that a function gives to something."""
    arguments = {node.arg for node in ast.walk(function) if isinstance(node, ast.arg)}
    names = (node for node in ast.walk(function) if isinstance(node, ast.Name))
    return arguments | {name.id for name in names if isinstance(name.ctx, ast.Store)}


def source(file: str, function: str) -> ast.FunctionDef:
    """A function of a module, as it is written."""
    tree = ast.parse(Path(importlib.import_module(file).__file__).read_text(encoding="utf-8"))
    [found] = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function]
    return found


def mutant_by_hand(file: str, function: str, before: str, after: str) -> Mutant:
    """A function in which one text stands for another."""
    original = source(file, function)
    text = ast.unparse(original)
    if before not in text:
        raise UserError(
            f"{file}.{function} has no {before!r}: lab/mutation_reasons.py is of an older edition."
        )
    mutated = ast.parse(text.replace(before, after)).body[0]
    return Mutant(file, function, original.lineno, before, after, mutated)


def mutants_of(file: str, function: str) -> list[Mutant]:
    """All mutants of a function of a module, each once."""
    module, original = importlib.import_module(file), source(file, function)
    flags = next_flags(module.Config) if is_dataclass(getattr(module, "Config", None)) else {}
    found, seen = [], {ast.unparse(original)}
    for parent, field, i, line in places(ast.Module(original.body, []), original.lineno):
        node = getattr(parent, field) if i is None else getattr(parent, field)[i]
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # a docstring
        for other in variants(node, module, flags, bound_in(original)):
            put(parent, field, i, other)
            text = ast.unparse(ast.fix_missing_locations(original))
            put(parent, field, i, node)
            if text not in seen:
                seen.add(text)
                before, after = (ast.unparse(x).split("\n")[0] for x in (node, other))
                found.append(Mutant(file, function, line, before, after, ast.parse(text).body[0]))
    return found
