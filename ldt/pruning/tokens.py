"""The outputs of layers as feature maps, also those of layers that process tokens."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from inspect import signature
from typing import Any

from torch import Tensor, nn

Shapes = list[tuple[int, int]]


@cache
def _takes_shape(kind: type[nn.Module]) -> bool:
    """Return whether modules of a type are told the size of the map that their tokens are."""
    return "hw_shape" in signature(kind.forward).parameters


class Places:
    """Where the tokens of a forward lie: the sizes of the maps that they come from."""

    def __init__(self) -> None:
        self.images = 0
        self._levels: Shapes = []
        self._block: Shapes = []

    @contextmanager
    def recorded(self, model: nn.Module) -> Iterator["Places"]:
        """Note them in every forward within the context."""

        def image_input(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            self.images, self._levels, self._block = len(inputs[0]), [], []

        def levels(_module: nn.Module, _inputs: object, output: Any) -> None:
            maps = (output,) if isinstance(output, Tensor) else output
            self._levels = [(m.shape[2], m.shape[3]) for m in maps]

        def block(module: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            given = dict(zip(signature(module.forward).parameters, inputs, strict=False))
            height, width = {**given, **named}["hw_shape"]
            self._block = [(int(height), int(width))]

        children = dict(model.named_children())
        with ExitStack() as hooks:
            if "backbone" in children:
                hook = children["backbone"].register_forward_pre_hook(image_input)
                hooks.callback(hook.remove)
            if "neck" in children:
                hooks.callback(children["neck"].register_forward_hook(levels).remove)
            for module in model.modules():
                if _takes_shape(type(module)):
                    hook = module.register_forward_pre_hook(block, with_kwargs=True)
                    hooks.callback(hook.remove)
            yield self

    def maps(self, value: Tensor) -> list[tuple[Tensor, bool]]:
        """Return a layer's output as maps [N, C, h, w], and of each whether it has positions.

        Tokens [N, L, C] as many as the cells of the maps of all levels become one map a level;
        others (queries, windows) a map of one column without positions.
        """
        if value.ndim != 3:
            return [(value, True)]
        for shapes in (self._levels, self._block):
            if shapes and value.shape[1] == sum(h * w for h, w in shapes):
                levels = value.split([h * w for h, w in shapes], 1)
                return [
                    (own.transpose(1, 2).unflatten(2, shape), True)
                    for own, shape in zip(levels, shapes, strict=True)
                ]
        windows = bool(self.images) and len(value) % self.images == 0
        value = value.reshape(self.images if windows else len(value), -1, value.shape[2])
        return [(value.transpose(1, 2)[..., None], False)]
