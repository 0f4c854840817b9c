"""Which modules of a model have their weight read past their forward, and by whom: what _reads.py
finds in the code of the classes, applied to the modules that are there."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from ._reads import EACH, Path, reads_of

_CALLING = ("forward", "__call__")
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True)
class Reader:
    """Who reads a module's weight."""

    where: str  # "BeitAttention.forward"
    called: bool  # whether some code calls the module too, or hands it on


def readers(model: nn.Module) -> dict[nn.Module, Reader]:
    """Of every module whose weight the code of another module uses as a tensor; also of one whose
    bias alone it uses, where nothing calls the module."""
    weights: dict[nn.Module, str] = {}
    biases: dict[nn.Module, str] = {}
    used: set[nn.Module] = set()
    for module in model.modules():
        try:
            found_here = reads_of(module)
        except Exception:  # code unlike any other: a layer more to recognize by never being called
            continue
        for method, reads in found_here.items():
            where = f"{type(module).__name__}.{method}"
            for paths, found in ((reads.weights, weights), (reads.biases, biases)):
                for path in paths:
                    for target in _resolve(module, path):
                        found.setdefault(target, where)
            for path in reads.used:
                used.update(_resolve(module, path[:-1] if path[-1] in _CALLING else path))
    for module in [*used]:
        used.update(_contents(module))
    result = {target: Reader(where, target in used) for target, where in weights.items()}
    for target, where in biases.items():
        if target not in used:
            result.setdefault(target, Reader(where, False))
    return result


def dtype_readers(model: nn.Module) -> dict[nn.Module, str]:
    """Who reads the dtype of a module's weight, to cast what it hands to the module, as T5 does:
    "T5DenseActDense.forward"."""
    found: dict[nn.Module, str] = {}
    for module in model.modules():
        try:
            found_here = reads_of(module)
        except Exception:
            continue
        for method, reads in found_here.items():
            for path in reads.dtypes:
                for target in _resolve(module, path):
                    found.setdefault(target, f"{type(module).__name__}.{method}")
    return found


def _resolve(module: nn.Module, path: Path) -> Iterator[nn.Module]:
    """The modules below `module` at a path; none where it names something else."""
    if not path:
        yield module
        return
    children = module._modules
    names = children.keys() if path[0] == EACH else (path[0],)
    for name in names:
        child = children.get(name)
        if child is not None:
            yield from _resolve(child, path[1:])


def _contents(module: nn.Module) -> Iterator[nn.Module]:
    """What a container calls, or whoever got it."""
    if isinstance(module, _CONTAINERS):
        for child in module.children():
            yield child
            yield from _contents(child)
