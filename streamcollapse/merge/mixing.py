"""Linear combinations of tensors: accumulated in float32, rounded once, in pieces that stay in the processor's cache.

Elementwise, so the result does not depend on the size of the pieces. Pure: never writes into an argument but ``out``.
"""

from collections.abc import Sequence

import torch

Terms = Sequence[tuple[float, torch.Tensor]]

_PIECE_ELEMENTS = 1 << 18  # 1 MiB of float32: accumulator and operand fit into a core's second-level cache
_DEVICE_PIECE_ELEMENTS = 1 << 24  # 64 MiB: a kernel launch costs less than a piece takes; larger ones only cost memory


def mixing_bytes(num_elements: int, dtype: torch.dtype) -> int:
    """Bytes that mixing a tensor of ``num_elements`` makes on a device and lets go of: sum, operand and rounded sum."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return min(num_elements, _DEVICE_PIECE_ELEMENTS) * (2 * wide.itemsize + dtype.itemsize)


def mix_tensors(terms: Terms, dtype: torch.dtype) -> torch.Tensor:
    """sum of coefficient * tensor over ``terms`` in order, accumulated in float32 and rounded once to ``dtype``.

    A single term with coefficient 1 that has this dtype is returned as it is.
    """
    if _is_copy(terms) and terms[0][1].dtype == dtype:
        return terms[0][1]
    out = torch.empty(terms[0][1].shape, dtype=dtype, device=terms[0][1].device)
    mix_into(out, terms, dtype)
    return out


def mix_into(out: torch.Tensor, terms: Terms, dtype: torch.dtype) -> None:
    """Like ``mix_tensors``, with the result, rounded to ``dtype``, converted into ``out`` (contiguous, same shape).

    float64 weights are accumulated in float64.
    """
    if _is_copy(terms):
        out.copy_(terms[0][1].to(dtype))
        return
    flat_out, flat_terms = out.view(-1), [(c, t.reshape(-1)) for c, t in terms]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    piece = min(_PIECE_ELEMENTS if out.device.type == "cpu" else _DEVICE_PIECE_ELEMENTS, flat_out.numel())
    total = torch.empty(piece, dtype=wide, device=out.device)
    operand = torch.empty(piece, dtype=wide, device=out.device)
    for start in range(0, flat_out.numel(), piece):
        end = min(start + piece, flat_out.numel())
        size = end - start
        for number, (coefficient, tensor) in enumerate(flat_terms):
            target = operand if number else total
            target[:size].copy_(tensor[start:end])
            if number:
                total[:size].add_(operand[:size], alpha=coefficient)
            else:
                total[:size].mul_(coefficient)
        flat_out[start:end].copy_(total[:size].to(dtype))


def _is_copy(terms: Terms) -> bool:
    return len(terms) == 1 and terms[0][0] == 1.0
