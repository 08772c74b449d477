"""How every kernel is compared with its oracle."""

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace

import pytest
import torch
from torch import Tensor


def mapped(change: Callable[[Tensor], Tensor], value):
    """The same arguments, every tensor in them changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {name: mapped(change, one) for name, one in value.items()}
    if is_dataclass(value):
        return replace(value, **{f.name: mapped(change, getattr(value, f.name)) for f in fields(value)})
    return value


def doubled(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x.clone()


def distance(x: Tensor, exact: Tensor) -> float:
    """Of the row that is furthest off, as a share of the longest row."""
    assert x.shape == exact.shape, f"{list(x.shape)} in place of {list(exact.shape)}"
    x = x.double()
    assert torch.equal(x.isnan(), exact.isnan()), f"NaN in {int((x.isnan() ^ exact.isnan()).sum())} wrong places"
    different = x != exact  # inf - inf is NaN
    off, exact = torch.where(different, x - exact, 0).nan_to_num(0), exact.nan_to_num(0, 0, 0)
    if off.ndim < 2:
        off, exact = off.reshape(-1, 1), exact.reshape(-1, 1)
    largest = exact.norm(dim=-1).max()
    return float(off.norm(dim=-1).max() / largest) if largest > 0 else float(off.abs().max())


@pytest.fixture
def agrees() -> Callable:
    """Assert that an op is no further from the fp64 answer than twice plain torch's own distance in the same dtype.

    agrees(run, op, oracle, args, dtype): ``run(op, args, dtype)`` gives the results by name, in that dtype where they
    are floats; integers must be equal.
    """

    def check(run: Callable, op: Callable, oracle: Callable, args: dict, dtype: torch.dtype) -> None:
        got, plain = run(op, mapped(torch.clone, args), dtype), run(oracle, mapped(torch.clone, args), dtype)
        exact = run(oracle, mapped(doubled, args), torch.float64)
        assert got.keys() == exact.keys()
        for name, answer in exact.items():
            if not answer.is_floating_point():
                assert torch.equal(got[name], answer), f"{name}: {got[name]} in place of {answer}"
                continue
            error, allowed = distance(got[name], answer), distance(plain[name], answer)
            eps = torch.finfo(got[name].dtype).eps
            assert error <= 2 * allowed + eps, f"{name}: {error:.1e} off, plain torch {allowed:.1e}"

    return check
