"""The slots of one layer that share a precision: their storage, and the product of sorted rows with it.

Shapes: N rows sorted by slot, I inputs and O outputs of a matrix, D model width, F expert width, G slots of the group.
`up` is [gate; up] in gated experts.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from equipoise.execution.kernels import (
    BLOCK_ROWS,
    FEW_ROWS,
    ConvertedKernel,
    FloatKernel,
    Kernel,
    Slots,
    blocks,
    compute_dtype,
    grouped_linear,
    spread,
)
from equipoise.execution.kernels_int8 import Int8Kernel, has_int8_kernel
from equipoise.execution.kernels_nibbles import NibbleKernel, fits_nibbles, has_nibble_kernel
from equipoise.precisions import Precision
from equipoise.quantization.codes import float_from_fp8, unpack, unpack_zeros
from equipoise.quantization.codes import pack as pack_codes
from equipoise.quantization.formats import FLOAT_DTYPES, QuantizedMatrix, dequantize, empty_storage, quantize, to_float
from equipoise.quantization.hadamard import rotate

Activation = Callable[[Tensor], Tensor]
Packed = Int8Kernel | NibbleKernel
# Smaller matrices are converted to floats several at a time, which is less work than a call for each (measured).
LARGE_ELEMENTS = 1 << 17
PACKING = threading.RLock()
"""Held while storage changes its layout, as forwards may run in several threads."""


class SlotGroup(nn.Module):  # type: ignore[misc]
    """G slots of one precision: float weights stacked, or packed codes beside their scales and zero points.

    A group in the model's own precision holds parameters and follows `model.to(dtype)`; the others hold buffers
    whose storage stays what the plan says, and are converted as they are used.
    """

    def __init__(
        self,
        form: Precision,
        slots: int,
        shapes: Sequence[tuple[int, int]],
        *,
        native: bool,
        biases: bool,
        dtype: torch.dtype,
        device: torch.device,
        rotated: bool = False,
    ) -> None:
        """Empty storage.

        Args:
            form: storage format.
            slots: number of slots G.
            shapes: (out, in) of up and of down.
            native: whether `form` is the model's own precision.
            biases: whether experts have biases.
            dtype: the model's dtype.
            device: where the weights live.
            rotated: whether `down` is stored rotated (`quantization.hadamard`), so that its inputs must be; never floats.
        """
        super().__init__()
        self.form, self.native, self.columns = form, native, [columns for _, columns in shapes]
        self.has_biases, self.int8_activations = biases, False
        self.rotated = rotated and not form.is_float
        self._packed: dict[str, Packed] = {}
        bias_dtype = dtype if native or dtype.itemsize == 2 else FLOAT_DTYPES.get(form.name, torch.bfloat16)
        for name, (rows, columns) in zip(("up", "down"), shapes, strict=True):
            if form.is_float:
                self._hold(name, (slots, rows, columns), dtype if native else FLOAT_DTYPES[form.name], device)
            else:
                for part, (shape, kind) in empty_storage(rows, columns, form).items():
                    self._hold(f"{name}_{part}", (slots, *shape), kind, device)
            if biases:
                self._hold(f"{name}_bias", (slots, rows), bias_dtype, device)

    def _hold(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        tensor = torch.empty(shape, dtype=dtype, device=device)
        if self.native:
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        else:
            self.register_buffer(name, tensor)

    def __len__(self) -> int:
        return len(next(iter([*self.parameters(), *self.buffers()])))

    @property
    def nbytes(self) -> int:
        """Bytes of all slots, scales and biases counted."""
        return sum(t.nbytes for t in [*self.parameters(), *self.buffers()])

    @property
    def shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """(out, in) of up and of down."""
        return self._shape("up"), self._shape("down")

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def write(
        self, slot: int, matrices: Sequence[Tensor | QuantizedMatrix], biases: Sequence[Tensor], method: str = "rtn"
    ) -> None:
        """Store one expert.

        Args:
            slot: index within the group.
            matrices: up [2F or F, D] and down [D, F], as weights or, in a quantized group, ready in its format.
            biases: of up and of down, or none.
            method: rounding of weights given to a quantized group.

        Raises:
            ModelError: NaN or infinite weights.
        """
        self.unpack()
        for name, matrix in zip(("up", "down"), matrices, strict=True):
            if isinstance(matrix, Tensor) and self.form.is_float:
                # A native slot is a copy in the model's own dtype, whatever the plan's model was loaded in.
                getattr(self, name)[slot] = to_float(matrix, self.form) if not self.native else matrix
                continue
            ready = quantize(matrix, self.form, method) if isinstance(matrix, Tensor) else matrix
            assert isinstance(matrix, QuantizedMatrix) or not self.rotated, "weights for rotated slots are rotated before"
            assert ready.precision == self.form, f"a {ready.precision.name} matrix for slots of {self.form.name}"
            for part, tensor in self.stored(name).items():
                tensor[slot] = getattr(ready, part)
        for name, bias in zip(("up_bias", "down_bias"), biases, strict=False):
            getattr(self, name)[slot] = bias

    def stored(self, name: str) -> dict[str, Tensor]:
        """The stored tensors of "up" or "down" of a quantized group, by the field of `QuantizedMatrix`."""
        return {
            part: getattr(self, f"{name}_{part}") for part in ("packed", "scales", "zeros") if hasattr(self, f"{name}_{part}")
        }

    def forward(self, x_TD: Tensor, row_N: Tensor, count_G: Tensor, activate: Activation) -> Tensor:
        """Outputs of the experts in these slots, without gate weights.

        Args:
            x_TD: inputs.
            row_N: which of them each row is, rows sorted by slot.
            count_G: rows of each slot.
            activate: what lies between up and down.

        Returns:
            [N, D] in the dtype of the inputs.
        """
        on_cpu = x_TD.device.type == "cpu"
        if self.native and not on_cpu:  # without waiting for the device to tell the counts
            hidden_NF = activate(self._biased("up", grouped_linear(x_TD[row_N], self.up, count_G), count_G))
            return self._biased("down", grouped_linear(hidden_NF, self.down, count_G), count_G)
        counts = count_G.tolist()
        up, down = (self._kernel(name, x_TD, max(counts)) for name in ("up", "down"))
        rows = up.rows(x_TD)
        parts, start = [], 0
        for slots, numbers in blocks(counts, BLOCK_ROWS if on_cpu else len(row_N)):
            stop = start + sum(numbers)
            up_NF = up.linear(rows[row_N[start:stop]], slots, numbers).to(x_TD.dtype)
            hidden_NF = activate(self._biased("up", up_NF, slots, numbers))
            if self.rotated:
                hidden_NF = rotate(hidden_NF)
            y_ND = down.linear(down.rows(hidden_NF), slots, numbers).to(x_TD.dtype)
            parts.append(self._biased("down", y_ND, slots, numbers))
            start = stop
        if not parts:
            return x_TD.new_empty(0, x_TD.shape[1])
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _biased(self, name: str, y_NO: Tensor, slots: Sequence[int] | Tensor, counts: Sequence[int] = ()) -> Tensor:
        """Products with the bias of their slot; the counts of all slots may be given instead, as one tensor."""
        if not self.has_biases:
            return y_NO
        bias_GO = getattr(self, f"{name}_bias").to(y_NO.dtype)
        if isinstance(slots, Tensor):
            return y_NO + bias_GO.repeat_interleave(slots, dim=0, output_size=len(y_NO))
        return y_NO + spread(bias_GO, slots, counts)

    def _kernel(self, name: str, x: Tensor, most: int) -> Kernel:
        """The fastest way to multiply inputs like these with "up" or "down".

        Args:
            name: which matrix.
            x: the layer's inputs.
            most: the largest number of rows that a slot has.
        """
        rows, columns = self._shape(name)
        large = rows * columns >= LARGE_ELEMENTS
        pack = self._packing(name, x) if large else None
        if pack is not None:
            return self._packed_kernel(name, pack)
        self.unpack()
        dtype = compute_dtype(x, rounded=self.int8_activations and large and not self.native)
        if self.form.is_float:
            weight: Tensor = getattr(self, name)
            if weight.dtype == dtype or (self.native and most <= FEW_ROWS):
                return FloatKernel(weight)
            return ConvertedKernel(lambda slots, rows, dtype: weight[slots, rows].to(dtype), weight.shape[1], dtype)
        stored = self.stored(name)
        codes, scales = stored["packed"], stored["scales"]
        if self._has_output_scales(name):
            # On the products they cost less than on the weights.
            read = float_from_fp8 if self.form.is_fp8 else Tensor.to
            of = lambda slots, rows, dtype: read(codes[slots, rows], dtype)  # noqa: E731
            return ConvertedKernel(of, codes.shape[1], dtype, scales[..., 0])

        def weights(slots: Slots, rows: slice, dtype: torch.dtype) -> Tensor:
            zeros = None
            if "zeros" in stored:
                words = (
                    slice(None)
                    if rows.start is None
                    else slice(self.form.zero_rows(rows.start), self.form.zero_rows(rows.stop))
                )
                zeros = stored["zeros"][slots, words]
            return dequantize(codes[slots, rows], scales[slots, rows], zeros, columns, self.form, dtype)

        return ConvertedKernel(weights, codes.shape[1], dtype)

    def _shape(self, name: str) -> tuple[int, int]:
        """(O, I) of "up" or "down"."""
        stored: Tensor = getattr(self, name if self.form.is_float else f"{name}_packed")
        return stored.shape[1], self.columns[name == "down"]

    def _has_output_scales(self, name: str) -> bool:
        return self.form.bits == 8 and self.form.symmetric and getattr(self, f"{name}_scales").shape[-1] == 1

    def _packing(self, name: str, x: Tensor) -> Callable[[str], Packed] | None:
        """How a CPU kernel wants "up" or "down" laid out, if there is one for inputs like these."""
        if self.form.is_float or x.device.type != "cpu" or hasattr(self, "_hf_hook"):  # accelerate moves storage about
            return None
        if self.form.bits == 8:
            fast = self.int8_activations and not self.form.is_fp8 and self._has_output_scales(name) and has_int8_kernel()
            return self._pack_int8 if fast else None
        rounds = self.int8_activations or x.dtype == torch.bfloat16
        fast = rounds and fits_nibbles(self.form.bits, *self._shape(name), self.form.group) and has_nibble_kernel()
        return self._pack_nibbles if fast else None

    def _packed_kernel(self, name: str, pack: Callable[[str], Packed]) -> Packed:
        """The kernel that holds "up" or "down"; the first time, the stored codes are laid out anew and given up."""
        with PACKING, torch.inference_mode(False), torch.no_grad():
            if name not in self._packed:
                self._packed[name] = pack(name)
                for part in ("packed", "scales") if isinstance(self._packed[name], NibbleKernel) else ("packed",):
                    # Shape and type stay, so that bytes are counted as before.
                    self._buffers[f"{name}_{part}"] = getattr(self, f"{name}_{part}").to("meta")
        return self._packed[name]

    def _pack_int8(self, name: str) -> Int8Kernel:
        stored = self.stored(name)
        return Int8Kernel.pack(stored["packed"], stored["scales"][..., 0])

    def _pack_nibbles(self, name: str) -> NibbleKernel:
        stored, (rows, columns) = self.stored(name), self._shape(name)
        zeros = unpack_zeros(stored["zeros"], rows, self.form) if "zeros" in stored else None
        codes = (unpack(slot, columns, self.form) for slot in stored["packed"])
        return NibbleKernel.pack(self.form.bits, codes, stored["scales"], zeros)

    def like(self, slots: int, form: Precision | None = None, native: torch.dtype | None = None) -> SlotGroup:
        """An empty group for slots of the same experts.

        Args:
            slots: number of slots.
            form: storage format; this group's own when omitted.
            native: the model's dtype, needed for another format.
        """
        held: dict[str, Tensor] = {**self._parameters, **self._buffers}
        # What a kernel has laid out anew has no device of its own; kernels with layouts run on the CPU.
        device = next((t.device for t in held.values() if t.device.type != "meta"), torch.device("cpu"))
        shapes = [self._shape("up"), self._shape("down")]
        with torch.inference_mode(False):
            if form is not None and form != self.form:
                assert native is not None, "another format needs the model's dtype"
                group = SlotGroup(
                    form, slots, shapes, native=form.is_float and FLOAT_DTYPES[form.name] == native, biases=self.has_biases,
                    dtype=native, device=device, rotated=self.rotated,
                )  # fmt: skip
                group.int8_activations = self.int8_activations
                return group
            group = SlotGroup.__new__(SlotGroup)
            nn.Module.__init__(group)
            for name in ("form", "native", "columns", "has_biases", "int8_activations", "rotated"):
                setattr(group, name, getattr(self, name))
            group._packed = {}
            for name, tensor in held.items():
                group._hold(name, (slots, *tensor.shape[1:]), tensor.dtype, device)
        return group

    def contents(self) -> dict[str, Tensor]:
        """All stored tensors by name, as `unpack` puts them back, while a kernel's own layout stays in use.

        Forwards may be running in other threads.
        """
        with PACKING:
            laid_out = dict(self._packed)
            tensors: dict[str, Tensor] = {**self._parameters, **self._buffers}
        with torch.inference_mode(False), torch.no_grad():
            for name, kernel in laid_out.items():
                tensors[f"{name}_packed"] = pack_codes(kernel.codes(), self.form)
                if isinstance(kernel, NibbleKernel):
                    tensors[f"{name}_scales"] = kernel.row_scales()
        return tensors

    def unpack(self) -> None:
        """Put the stored tensors back, bit for bit, where a kernel had laid them out anew: before they are read or moved."""
        if not self._packed:
            return
        with PACKING, torch.inference_mode(False), torch.no_grad():
            for name, kernel in self._packed.items():
                self._buffers[f"{name}_packed"] = pack_codes(kernel.codes(), self.form)
                if isinstance(kernel, NibbleKernel):
                    self._buffers[f"{name}_scales"] = kernel.row_scales()
            self._packed.clear()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SlotGroup:
        self.unpack()
        if self.native:
            return super()._apply(fn, recurse)  # type: ignore[no-any-return]

        def keep_storage(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_storage, recurse)  # type: ignore[no-any-return]

    def _save_to_state_dict(self, *args: Any, **options: Any) -> None:
        self.unpack()
        super()._save_to_state_dict(*args, **options)

    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        self.unpack()
        super()._load_from_state_dict(*args, **options)

    def __getstate__(self) -> dict[str, Any]:
        self.unpack()  # opaque layouts can be neither copied nor pickled
        return self.__dict__

    def extra_repr(self) -> str:
        """Precision and number of slots, for printed models."""
        return f"{self.form.name}, slots={len(self)}"
