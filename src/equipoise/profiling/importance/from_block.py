"""Forward passes that begin at a transformer block, for many passes that differ only from there on.

A change to one block leaves what is computed before it as it was. The blocks before it are skipped, each handing on what it
was given, and the block takes the input that a whole pass gave it; all else is the model's own code. Whether a model bears
that is not derived from its architecture but tried: the loss of such a pass must be that of the whole pass, to the last bit.
Shapes: N batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from equipoise.models.layers import MoELayer
from equipoise.profiling.sequences import Batch

Loss = Callable[[Batch], float]


class Start:
    """Where passes over some batches begin.

    Attributes:
        layer: the MoE layer whose block it is.
        skipped: blocks before it in its list; none where passes are whole.
    """

    def __init__(self, layer: MoELayer, batches: Sequence[Batch], loss: Loss) -> None:
        """Whole passes.

        Args:
            layer: the MoE layer that will be changed.
            batches: N inputs.
            loss: runs the model on one of them.
        """
        self.layer, self.skipped = layer, list[nn.Module]()
        self._batches, self._loss = batches, loss
        self._block: nn.Module | None = None
        self._inputs: list[Tensor] = []

    @classmethod
    def at(cls, layer: MoELayer, batches: Sequence[Batch], loss: Loss, base: Sequence[float], before: Start | None) -> Start:
        """Passes that begin at a layer's block, or whole ones where the model does not bear it.

        Args:
            layer: the MoE layer that will be changed.
            batches: N inputs.
            loss: runs the model on one of them.
            base: [N] losses of whole passes.
            before: an earlier start on the same batches, from which this one is reached in less time.
        """
        start = cls(layer, batches, loss)
        earlier, block = _blocks(layer)
        if not earlier or block is None:
            return start
        nearer = before if before is not None and before._block in earlier else cls(layer, batches, loss)
        seen = [_seen(nearer, n, earlier, block) for n in range(len(batches))]
        if any(hidden is None for hidden in seen):
            return start
        start._inputs = [hidden for hidden in seen if hidden is not None]
        start.skipped, start._block = earlier, block
        if any(start.loss(n) != base[n] for n in range(len(batches))):
            return cls(layer, batches, loss)
        return start

    def loss(self, n: int) -> float:
        """Loss of batch n as the model is now; nothing before the block may have changed."""
        with self._begun(n):
            return self._loss(self._batches[n])

    @contextmanager
    def _begun(self, n: int) -> Iterator[None]:
        if self._block is None:
            yield
            return
        hidden = self._inputs[n]
        with ExitStack() as undo:
            for block in self.skipped:
                undo.enter_context(_handing_on(block))
            handle = self._block.register_forward_pre_hook(
                lambda _, args, kwargs: _replaced(args, kwargs, hidden), with_kwargs=True, prepend=True
            )
            undo.callback(handle.remove)
            yield


def _blocks(layer: MoELayer) -> tuple[list[nn.Module], nn.Module | None]:
    """The blocks before a layer's own in the outermost list that holds it, and its own."""
    for outer, inner in zip(layer.ancestors, layer.ancestors[1:], strict=False):
        if isinstance(outer, nn.ModuleList):
            blocks = list(outer)
            at = next(i for i, block in enumerate(blocks) if block is inner)
            return blocks[:at], inner
    return [], None


def _seen(start: Start, n: int, earlier: Sequence[nn.Module], block: nn.Module) -> Tensor | None:
    """What the block is given in a pass; None if blocks before it give something else than one tensor like their input."""
    given: list[Tensor] = []
    plain = True

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = _hidden(args, kwargs)
        if isinstance(hidden, Tensor):
            given.append(hidden)

    def check(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        nonlocal plain
        hidden = _hidden(args, kwargs)
        plain &= isinstance(output, Tensor) and isinstance(hidden, Tensor) and output.shape == hidden.shape

    with ExitStack() as undo:
        undo.callback(block.register_forward_pre_hook(note, with_kwargs=True).remove)
        for one in earlier:
            if one not in start.skipped:
                undo.callback(one.register_forward_hook(check, with_kwargs=True).remove)
        start.loss(n)
    return given[0].detach() if plain and len(given) == 1 else None


@contextmanager
def _handing_on(block: nn.Module) -> Iterator[None]:
    """A block that puts out what it is given."""
    own = block.__dict__.get("forward")
    block.forward = lambda *args, **kwargs: _hidden(args, kwargs)
    try:
        yield
    finally:
        if own is None:
            del block.forward
        else:
            block.forward = own


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else kwargs.get("hidden_states")


def _replaced(args: tuple[Any, ...], kwargs: dict[str, Any], hidden: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})
