"""What layers compute in a forward."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn


@contextmanager
def outputs_of(layers: Iterable[nn.Module]) -> Iterator[list[Any]]:
    """Collect the outputs of layers, in the order of their calls, within the context."""
    found: list[Any] = []
    with ExitStack() as hooks:
        for layer in layers:
            hook = layer.register_forward_hook(lambda *call: found.append(call[-1]))
            hooks.callback(hook.remove)
        yield found
