"""The residual stream that enters an MoE layer's block, before the norm: what the block's output is added to.

No family is known by name. The tensor that reaches a layer's experts is what some module of its transformer layer has just put
out, its norm as a rule; what that module was given is the residual stream.
Shapes: T tokens of one call, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from equipoise.models.adapters import Handle
from equipoise.models.blocks import moe_blocks
from equipoise.models.layers import MoELayer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ResidualStream:
    """A context manager that remembers, while a transformer layer runs, what each of its modules made of what.

    Args:
        model: the model.
        layers: its MoE layers.

    Attributes:
        unseen: paths of the layers whose experts were given what no module had put out as it is; for those, the input of the
            experts stands for the residual stream.

    Raises:
        ModelError: a stack without a list of layers.
    """

    def __init__(self, model: PreTrainedModel, layers: Sequence[MoELayer]) -> None:
        self._blocks = [(model.get_submodule(path), {id(x.experts) for x in held}) for path, held in moe_blocks(layers).items()]
        self._made: dict[int, tuple[Tensor, Tensor]] = {}
        self._handles: list[Handle] = []
        self.unseen: set[str] = set()

    def __enter__(self) -> ResidualStream:
        for block, experts in self._blocks:
            self._handles.append(block.register_forward_pre_hook(self._forget))
            for name, module in block.named_modules():
                inside = any(id(block.get_submodule(name.rsplit(".", n)[0])) in experts for n in range(name.count(".") + 1))
                if name and not inside:
                    self._handles.append(module.register_forward_hook(self._remember, with_kwargs=True))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._made.clear()

    def before(self, layer: MoELayer, hidden_TD: Tensor) -> Tensor:
        """[T, D] what the norm before a layer was given, while its experts are being called.

        Args:
            layer: the layer.
            hidden_TD: [T, D] what its experts are given.
        """
        _, given = self._made.get(hidden_TD.data_ptr(), (None, None))
        if given is None or given.numel() != hidden_TD.numel():
            self.unseen.add(layer.path)
            return hidden_TD
        return given.reshape(hidden_TD.shape)

    def _forget(self, *_: Any) -> None:
        self._made.clear()

    def _remember(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if not isinstance(output, Tensor) or given is None or given.shape != output.shape:
            return
        if output.data_ptr() != given.data_ptr():  # a dropout that does nothing hands on what it was given
            # The output is kept beside its input, so that nothing else can be stored at its address meanwhile.
            self._made.setdefault(output.data_ptr(), (output, given.detach()))
