"""Floats as integers of the same order, and the k-th largest of them by search: parts of kernels.

The search starts from bounds that are near each other and takes a third a round: about six rounds for bf16 and 15 for
fp32, all in registers. A NaN without its sign bit, as a GPU makes it, counts as larger than everything, and
-0 as less than 0.
"""

import triton
import triton.language as tl


@triton.jit
def ordered(x, SHIFT: tl.constexpr):
    """int32 that orders like x. SHIFT 16 for values that bf16 holds exactly: neighbours are then 1 apart."""
    bits = x.to(tl.float32).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits) >> SHIFT


@triton.jit
def kth_largest(key, k, low, high):
    """The largest integer that at least k of the fewer than 65536 keys reach.

    At least k reach low, and none is above high.
    """
    while low < high:
        # two thresholds a round, their counts in the halves of one integer, since a sum over warps is what takes time;
        # in 64 bits, since high - low may not fit 32
        third = ((high.to(tl.int64) - low + 2) // 3).to(tl.int32)
        first = low + third
        second = tl.minimum(first.to(tl.int64) + third, high.to(tl.int64)).to(tl.int32)
        counts = tl.sum(tl.where(key >= second, 0x10001, tl.where(key >= first, 1, 0)))
        reach_first, reach_second = (counts & 0xFFFF) >= k, ((counts >> 16) & 0xFFFF) >= k
        low = tl.where(reach_second, second, tl.where(reach_first, first, low))
        high = tl.where(reach_second, high, tl.where(reach_first, second - 1, first - 1))
    return low


@triton.jit
def among_largest(key, k, level):
    """Which keys are among the k largest, the k-th largest being level; of equal ones the first."""
    chosen = key >= level
    if tl.sum(chosen.to(tl.int32)) > k:  # seldom, and a scan costs as much as several rounds of the search
        equal = key == level
        room = k - tl.sum((key > level).to(tl.int32))
        chosen = (key > level) | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= room))
    return chosen


@triton.jit
def places(chosen):
    """The place of each chosen one among them: 0, 1, ..."""
    return tl.cumsum(chosen.to(tl.int32), 0) - 1
