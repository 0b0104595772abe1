"""Grouped matrix products: rows sorted by expert times each expert's weight, and their gradients.

    grouped_matmul   out[r] = rows[r]·W_eᵀ or rows[r]·W_e, e the expert of row r
    grouped_outer    out[e] = Σ over the rows r of e of left[r] ⊗ right[r]
    grouped_linear   grouped_matmul, differentiable: dx by grouped_matmul, dW by grouped_outer

Saved for backward by grouped_linear: x and W. An expert without rows is allowed. Rows past the last expert's are not
computed: the output is undefined there.
On a CPU with bf16 arithmetic, bf16 rows are padded to equal numbers for each expert and multiplied in one batch:
oneDNN compiles a kernel for each new shape, which takes ten times its run, and routing gives new shapes every step.
Triton (grouped_gemm_triton.py): one kernel over a table of tiles kept on the device; the host does not wait.

Shapes: R rows, E experts, O output width, I input width, C rows of each expert after padding.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from trinity_kernels.linear import linear_grad_weight, multiplies_in_fp32, product
from trinity_kernels.op import Op

MOST_PADDING = 4
"""Padded rows over rows, above which the experts are multiplied one after the other."""


def _grouped_matmul(rows: Tensor, weight_EOI: Tensor, ends_E: Tensor, transpose: bool) -> Tensor:
    """Each expert's rows times its weight; not differentiable, see grouped_linear.

    Args:
        rows: [R, I] with transpose, else [R, O]; sorted by expert.
        weight_EOI: [E, O, I], same dtype.
        ends_E: [E] int32, the row after each expert's last.
        transpose: multiply by the weight's transpose.
    Returns:
        [R, O], or [R, I] without transpose; same dtype.
    """
    if not len(rows):  # no kernel launch, and no wait for the group sizes
        return rows.new_empty(0, weight_EOI.shape[1 if transpose else 2])
    if _grouped_by_torch(rows):
        return F.grouped_mm(rows, weight_EOI.mT if transpose else weight_EOI, offs=ends_E)
    if pads(rows):
        padding = _Padding.of(ends_E, rows)
        if padding is not None:
            padded_ECO = torch.bmm(padding.pad(rows), weight_EOI.mT if transpose else weight_EOI)
            return padding.unpad(padded_ECO, len(rows))
    out = rows.new_empty(rows.shape[0], weight_EOI.shape[1 if transpose else 2])
    for expert, (start, end) in enumerate(_spans(ends_E)):
        weight = weight_EOI[expert].t() if transpose else weight_EOI[expert]
        product(rows[start:end], weight, out=out[start:end])
    return out


def _grouped_outer(left_RO: Tensor, right_RI: Tensor, ends_E: Tensor) -> Tensor:
    """Σ over each expert's rows of left ⊗ right; not differentiable.

    Args:
        left_RO, right_RI: [R, O] and [R, I], one dtype, sorted by expert.
        ends_E: [E] int32, the row after each expert's last.
    Returns:
        [E, O, I], same dtype, summed in at least fp32; zeros for an expert without rows.
    """
    shape = (len(ends_E), left_RO.shape[1], right_RI.shape[1])
    if not len(left_RO):
        return left_RO.new_zeros(shape)
    if _grouped_by_torch(left_RO):
        return F.grouped_mm(left_RO.t(), right_RI, offs=ends_E)
    if pads(left_RO):
        padding = _Padding.of(ends_E, left_RO)
        if padding is not None:
            return torch.bmm(padding.pad(left_RO).mT, padding.pad(right_RI))
    out = left_RO.new_empty(shape)
    for expert, (start, end) in enumerate(_spans(ends_E)):
        linear_grad_weight(left_RO[start:end], right_RI[start:end], out=out[expert])
    return out


def refuses(rows: Tensor, other: Tensor, *_: object, **__: object) -> str | None:
    """Why the Triton kernels do not support the operands (float64, rows that TMA cannot read), or None."""
    if rows.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it takes 16-bit and 32-bit numbers, not {rows.dtype}"
    for width in (rows.shape[-1], other.shape[-1]):
        if width * rows.element_size() % 16:
            return f"rows of {width} numbers are no multiple of 16 bytes"
    return None


grouped_matmul = Op(_grouped_matmul, "trinity_kernels.grouped_gemm_triton:matmul", refuses)
grouped_outer = Op(_grouped_outer, "trinity_kernels.grouped_gemm_triton:outer", refuses)


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor, kernel: str) -> Tensor:
        ctx.save_for_backward(x_RI, weight_EOI, ends_E)
        ctx.kernel = kernel
        return grouped_matmul(x_RI, weight_EOI, ends_E, True, kernel=kernel)

    @staticmethod
    def backward(ctx, grad_RO: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x_RI, weight_EOI, ends_E = ctx.saved_tensors
        grad_RO = grad_RO.contiguous()
        grad_x = grouped_matmul(grad_RO, weight_EOI, ends_E, False, kernel=ctx.kernel)
        return grad_x, grouped_outer(grad_RO, x_RI, ends_E, kernel=ctx.kernel), None, None


def grouped_linear(x_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor, kernel: str = "auto") -> Tensor:
    """Each expert's rows through its linear layer, differentiable.

    Args:
        x_RI: [R, I] contiguous, sorted by expert; R is the last of ends_E.
        weight_EOI: [E, O, I] contiguous, same dtype.
        ends_E: [E] int32, the row after each expert's last.
        kernel: "auto", "triton" or "reference".
    Returns:
        [R, O], same dtype.
    """
    return _GroupedLinear.apply(x_RI, weight_EOI, ends_E, kernel)


def _grouped_by_torch(x: Tensor) -> bool:
    # torch's grouped GEMM keeps the group sizes on the device: no host sync. It does not support float64, and in fp32
    # on a CPU it is no faster than a loop.
    return x.is_cuda and x.dtype == torch.bfloat16


def pads(x: Tensor) -> bool:
    """Whether products of x are computed by oneDNN, which compiles a kernel for each number of rows."""
    return x.device.type == "cpu" and x.dtype == torch.bfloat16 and not multiplies_in_fp32(x)


class _Padding(NamedTuple):
    """Rows sorted by expert, padded with zeros to C rows of each expert.

    place_R: [R] int64, each row's place among the E·C.
    experts, most: E and C.
    """

    place_R: Tensor
    experts: int
    most: int

    @classmethod
    def of(cls, ends_E: Tensor, rows: Tensor) -> "_Padding | None":
        """C is the largest number of rows, rounded up to few values; None if most rows would be padding."""
        sizes_E = ends_E.diff(prepend=ends_E.new_zeros(1)).long()
        experts, most = len(ends_E), _rounded_up(int(sizes_E.max()))
        if not most or experts * most > MOST_PADDING * len(rows):
            return None
        first_E = torch.arange(experts) * most - (ends_E - sizes_E)
        used = int(ends_E[-1])
        return cls(torch.arange(used) + first_E.repeat_interleave(sizes_E, output_size=used), experts, most)

    def pad(self, rows_RI: Tensor) -> Tensor:
        """[E, C, I]."""
        padded = rows_RI.new_zeros(self.experts * self.most, rows_RI.shape[1])
        padded.index_copy_(0, self.place_R, rows_RI[: len(self.place_R)])
        return padded.view(self.experts, self.most, -1)

    def unpad(self, padded_ECO: Tensor, rows: int) -> Tensor:
        """[R, O], `rows` of them; those past the last expert's have any value."""
        place_R = self.place_R
        if len(place_R) < rows:
            place_R = torch.cat((place_R, place_R.new_zeros(rows - len(place_R))))
        return padded_ECO.flatten(0, 1).index_select(0, place_R)


def _rounded_up(rows: int) -> int:
    """The next of eight sizes between two powers of two, so that few kernels are compiled."""
    step = 1 << max(0, (rows - 1).bit_length() - 4)
    return -(-rows // step) * step


def _spans(ends_E: Tensor) -> list[tuple[int, int]]:
    ends = ends_E.tolist()
    return list(zip([0, *ends[:-1]], ends))
