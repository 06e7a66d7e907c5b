from __future__ import annotations

import pytest
import torch

from streamcollapse.stream.slots import LayerSlot, carved_bytes


def test_tensors_are_carved_side_by_side_and_aligned() -> None:
    slot = LayerSlot(4 * 64, torch.device("cpu"))
    with slot.lease():
        a = slot.carve((3, 5), torch.float32)
        b = slot.carve((7,), torch.bfloat16)
        c = slot.carve((2, 0), torch.float32)
        a.fill_(1.0)
        b.fill_(2.0)
        assert b.data_ptr() - a.data_ptr() == 64
        assert (a.shape, b.shape, c.shape) == ((3, 5), (7,), (2, 0))
        assert a.sum() == 15
        slot.carve((32,), torch.float32)
        with pytest.raises(AssertionError, match="sized for the largest layer"):
            slot.carve((1,), torch.uint8)
    with slot.lease():
        assert slot.carve((3, 5), torch.float32).data_ptr() == a.data_ptr()


def test_a_lease_is_exclusive_and_ends_with_its_body() -> None:
    slot = LayerSlot(64, torch.device("cpu"))
    with pytest.raises(AssertionError, match="under a lease only"):
        slot.carve((1,), torch.float32)
    with slot.lease(), pytest.raises(AssertionError, match="in use"), slot.lease():
        pass
    with pytest.raises(ValueError, match="x"), slot.lease():
        raise ValueError("x")
    with slot.lease():
        pass


@pytest.mark.parametrize(("size", "taken"), [(0, 0), (1, 64), (64, 64), (65, 128)])
def test_alignment(size: int, taken: int) -> None:
    assert carved_bytes(size) == taken
