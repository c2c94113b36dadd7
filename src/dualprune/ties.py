"""Which filters a network ties together: residual sums and depthwise convolutions, read off its graph.

Where the outputs of two layers are added, or go through a depthwise convolution, channel i is only empty, and can only
be removed, if filter i of every layer of the tie is zero. `attach(..., ties=tied_filters(model, example))` prunes them so.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from dualprune.errors import DualpruneError
from dualprune.scope import matches, parameter_name


def tied_filters(model: nn.Module, example: Any, *, ignore: Iterable[str] = ()) -> list[list[str]]:
    """Return the groups of weights whose filters (`Filter`, dim 0) the network ties one to one, for `attach(ties=…)`.

    The graph is that of Torch-Pruning (Fang et al. 2023), traced on a copy by one forward pass; the model is not touched.

    Args:
        model: the module; its outputs must need gradients.
        example: an input batch (tensor, tuple of arguments, or mapping of keywords), on the model's device.
        ignore: globs over parameter names that are not going to be pruned: ties with one of them are left out, and then
            none of their other members may lose filters if channels are to be removed.

    Raises:
        DualpruneError: torch-pruning is not installed, the model cannot be traced, or filters are tied in another way
            than one to one (slices, padded shortcuts, transposed convolutions); the message names the tie.
    """
    if isinstance(ignore, str):
        ignore = [ignore]
    unwanted, found = list(ignore), list[list[str]]()
    groups, names = _groups(model, example)
    order = {name: place for place, name in enumerate(dict.fromkeys(names.values()))}
    for items in _joined(groups, names):
        tie = sorted({names[module] for module, *_ in items}, key=order.__getitem__)
        if len(tie) > 1 and not any(_named(name, unwanted) for name in tie):
            _check_one_to_one(items, names)
            found.append(tie)
    return sorted(found, key=lambda tie: order[tie[0]])


Item = tuple[nn.Module, list[int], list[int]]  # a layer, its filters, and those of the group's first layer they go with


def _groups(model: nn.Module, example: Any) -> tuple[list[list[Item]], dict[nn.Module, str]]:
    """Return what loses filters together in a copy of the model, and its layers' weights by name: a shared one by its first."""
    try:
        import torch_pruning
    except ImportError:
        raise DualpruneError('tied_filters needs Torch-Pruning: pip install "dualprune[shrink]"') from None
    twin = copy.deepcopy(model).eval().requires_grad_(True)
    first, names = dict[int, str](), dict[nn.Module, str]()
    for name, module in twin.named_modules():
        if isinstance(module, nn.Linear | _ConvNd):
            weight = module._parameters.get("weight")  # one that is computed from others is a new tensor at each look
            short = parameter_name(f"{name}.weight" if name else "weight")
            names[module] = first.setdefault(id(module if weight is None else weight), short)
    groups, seen = list[list[Item]](), set[nn.Module]()
    try:
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on parameters outside of layers, which have no filters
            graph = torch_pruning.DependencyGraph().build_dependency(twin, example, _forward, verbose=False)
            for layer in [m for m in names if m in graph.module2node]:
                if layer not in seen:
                    groups.append(_out_items(graph, layer, names))
                    seen |= {module for module, *_ in groups[-1]}
    except Exception as error:
        raise DualpruneError(
            f"tied_filters could not trace the model on this example ({type(error).__name__}: {error}): "
            "pass a batch that model(example) takes, or write the ties by hand"
        ) from error
    return groups, names


def _forward(model: nn.Module, example: Any) -> Any:
    if isinstance(example, Mapping):
        return model(**example)
    return model(*example) if isinstance(example, tuple | list) else model(example)


def _out_items(graph: Any, layer: nn.Module, names: dict[nn.Module, str]) -> list[Item]:
    """Return the layers that lose filters with those of `layer`."""
    pruner = graph.get_pruner_of_module(layer)
    group = graph.get_pruning_group(layer, pruner.prune_out_channels, list(range(pruner.get_out_channels(layer))))
    return [
        (item.dep.target.module, list(item.idxs), list(item.root_idxs))
        for item in group
        if item.dep.target.module in names and graph.is_out_channel_pruning_fn(item.dep.handler)
    ]


def _joined(groups: Iterable[list[Item]], names: Mapping[nn.Module, str]) -> list[list[Item]]:
    """Return the groups, those that share a weight made one."""
    joined = list[list[Item]]()
    for items in groups:
        own = {names[module] for module, *_ in items}
        met = [other for other in joined if not own.isdisjoint(names[module] for module, *_ in other)]
        joined = [other for other in joined if other not in met] + [[item for part in (*met, items) for item in part]]
    return joined


def _check_one_to_one(items: list[Item], names: dict[nn.Module, str]) -> None:
    counts = {names[module]: _filters(module) for module, *_ in items}
    plain = all(idxs == roots and len(idxs) == _filters(module) for module, idxs, roots in items)
    turned = [names[module] for module, *_ in items if isinstance(module, _ConvTransposeNd)]
    if plain and not turned and len(set(counts.values())) == 1:
        return
    listed = ", ".join(f"{name} ({count})" for name, count in counts.items())
    why = "a transposed convolution keeps its filters in dim 1" if turned else "slices, concatenations or padded shortcuts"
    raise DualpruneError(
        f"these filters are tied, but not one to one ({why}): {listed}. Do not prune filters of them: "
        f"ignore them here (ignore=[…]) and in attach, or write a tie by hand"
    )


def _filters(module: nn.Module) -> int:
    return int(module.out_features if isinstance(module, nn.Linear) else module.out_channels)  # type: ignore[arg-type]


def _named(name: str, globs: Iterable[str]) -> bool:
    return any(matches(glob, name) for glob in globs)
