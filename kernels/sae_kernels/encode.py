"""Encode: the pre-activations of a batch, and the largest of every chunk of 32 or 64 of them.

    pre[i, l]     = x_scale[i] * w_scale[l] * sum_j x[i, j] * w[l, j] + sum_j<side x_side[i, j] * w_side[l, j] + b[l]
    maxima[i, c]  = max of pre[i, l] over chunk * c <= l < chunk * (c + 1), as rounded in pre

    x             [n, d]                  fp32 | bf16 | e4m3    d * element size a multiple of 16 bytes
    w             [n_latents, d]          as x
    b             [n_latents]             fp32
    x_scale       None or [n]             fp32                  with e4m3
    w_scale       None or [n_latents]     fp32
    x_side        None or [n, d]          bf16                  only the first `side` columns are read; side = 32 or 64
    w_side        None or [n_latents, d]  bf16
    pre           [n, padded]             fp32 | bf16           padded: n_latents in whole chunks
    maxima        [n, padded / chunk]     as pre                chunk 32 or 64: `chunk_for` says which is faster

Summed in fp32 and rounded once. Columns of `pre` from n_latents on are -inf. The top k
of a row lie in the k chunks with the largest maxima, so `select` reads k chunks of it in place of all: the
maxima come free with the product. One program a multiprocessor takes tile after tile, loads by TMA.
Oracle: `reference.encode`.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

DTYPES = (torch.float32, torch.bfloat16, torch.float8_e4m3fn)


@dataclass(frozen=True)
class Tile:
    """Rows, latents and columns of a tile; tiles of rows that share latents in the cache; one loop or two.

    halves   write the tile in two: half the shared memory, which makes room for another stage of loads
    """

    n: int
    latents: int
    d: int
    group: int
    flatten: bool
    stages: int = 3
    warps: int = 8
    halves: bool = False


@triton.jit
def _store_tile(
    acc, pre_desc, maxima_ptr, at_n, at_l, n, n_chunks, BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    pre = acc.to(pre_desc.dtype)
    pre_desc.store([at_n, at_l], pre)
    largest = tl.max(tl.reshape(pre.to(tl.float32), (BLOCK_N, BLOCK_L // CHUNK, CHUNK)), 2)
    i, c = at_n + tl.arange(0, BLOCK_N), at_l // CHUNK + tl.arange(0, BLOCK_L // CHUNK)
    inside = (i < n)[:, None] & (c < n_chunks)[None, :]
    tl.store(maxima_ptr + i[:, None].to(tl.int64) * n_chunks + c[None, :], largest, mask=inside)


@triton.jit
def _encode_kernel(
    x_desc, w_desc, pre_desc, x_side_desc, w_side_desc, b_ptr, x_scale_ptr, w_scale_ptr, maxima_ptr,
    n, n_latents, d, n_chunks,
    BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr, CHUNK: tl.constexpr,
    SCALED: tl.constexpr, SIDE: tl.constexpr, N_PROGRAMS: tl.constexpr, FLATTEN: tl.constexpr,
    HALVES: tl.constexpr,
):  # fmt: skip
    # grid (N_PROGRAMS,): program p writes tiles p, p + N_PROGRAMS, ... of pre and maxima
    tiles_n, tiles_l = tl.cdiv(n, BLOCK_N), tl.cdiv(n_latents, BLOCK_L)
    for tile in tl.range(tl.program_id(0), tiles_n * tiles_l, N_PROGRAMS, flatten=FLATTEN):
        first = tile // (GROUP * tiles_l) * GROUP
        rows = tl.minimum(tiles_n - first, GROUP)
        at_n = (first + tile % (GROUP * tiles_l) % rows) * BLOCK_N
        at_l = tile % (GROUP * tiles_l) // rows * BLOCK_L
        acc = tl.zeros((BLOCK_N, BLOCK_L), tl.float32)
        for step in range(tl.cdiv(d, BLOCK_D)):
            x = x_desc.load([at_n, step * BLOCK_D])
            w = w_desc.load([at_l, step * BLOCK_D])
            acc = tl.dot(x, w.T, acc, input_precision="ieee")
        i, latent = at_n + tl.arange(0, BLOCK_N), at_l + tl.arange(0, BLOCK_L)
        if SCALED:
            acc *= tl.load(w_scale_ptr + latent, mask=latent < n_latents, other=0.0)[None, :]
            acc *= tl.load(x_scale_ptr + i, mask=i < n, other=0.0)[:, None]
        if SIDE > 0:
            acc = tl.dot(x_side_desc.load([at_n, 0]), w_side_desc.load([at_l, 0]).T, acc)
        acc += tl.load(b_ptr + latent, mask=latent < n_latents, other=float("-inf"))[None, :]
        if HALVES:
            half: tl.constexpr = BLOCK_L // 2
            left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_N, 2, half)), (0, 2, 1)))
            _store_tile(left, pre_desc, maxima_ptr, at_n, at_l, n, n_chunks, BLOCK_N, half, CHUNK)
            _store_tile(right, pre_desc, maxima_ptr, at_n, at_l + half, n, n_chunks, BLOCK_N, half, CHUNK)
        else:
            _store_tile(acc, pre_desc, maxima_ptr, at_n, at_l, n, n_chunks, BLOCK_N, BLOCK_L, CHUNK)


def chunk_for(n_latents: int, k: int) -> int:
    """The chunk that leaves `select` the fewest values to look at: n_latents / chunk maxima, then k chunks."""
    return 32 if n_latents <= 2048 * k else 64


def tile_for(n_latents: int, d: int, dtype: torch.dtype, side: int) -> Tile:
    """The tile that was fastest for such a product, measured on an H200."""
    if dtype == torch.float32:
        return Tile(64, 64, 32, 8, flatten=False, stages=2, warps=4)  # exact fp32 runs without tensor cores
    if dtype == torch.bfloat16:
        return Tile(128, 256, 64, 16, flatten=True, halves=n_latents > 2**15)
    if side:
        return Tile(128, 256, 128, 8, flatten=True, halves=True)
    return Tile(128, 256, 128, 16, flatten=True, stages=4, halves=True)


def encode(
    x: Tensor,
    w: Tensor,
    b: Tensor,
    *,
    pre: Tensor,
    maxima: Tensor,
    x_scale: Tensor | None = None,
    w_scale: Tensor | None = None,
    side: int = 0,
    x_side: Tensor | None = None,
    w_side: Tensor | None = None,
    tile: Tile | None = None,
) -> None:
    """Fill ``pre`` and ``maxima``."""
    (n, d), n_latents, padded = x.shape, len(w), pre.shape[1]
    if x.dtype not in DTYPES or w.dtype != x.dtype or w.shape[1] != d:
        raise ValueError(f"w must be {x.dtype} [n_latents, {d}] like x, one of {DTYPES}, got {w.dtype} {list(w.shape)}")
    if d * x.element_size() % 16:
        raise ValueError(f"rows must be a multiple of 16 bytes, got {d} columns of {x.dtype}: pad them")
    chunk = padded // maxima.shape[1]
    if (
        pre.shape != (n, padded)
        or maxima.shape != (n, padded // chunk)
        or padded % chunk
        or not 0 <= padded - n_latents < chunk
    ):
        wanted = f"[{n}, {n_latents} in whole chunks] and [{n}, chunks]"
        raise ValueError(f"pre and maxima must be {wanted}, got {list(pre.shape)}, {list(maxima.shape)}")
    if chunk not in (32, 64):
        raise ValueError(f"maxima must be of 32 or 64 columns of pre, got {chunk}")
    t = tile or tile_for(n_latents, d, x.dtype, side)
    programs = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 2
    x_desc = TensorDescriptor.from_tensor(x, [t.n, t.d])
    w_desc = TensorDescriptor.from_tensor(w, [t.latents, t.d])
    pre_desc = TensorDescriptor.from_tensor(pre, [t.n, t.latents // 2 if t.halves else t.latents])
    x_side_desc = TensorDescriptor.from_tensor(x_side, [t.n, side]) if side else x_desc
    w_side_desc = TensorDescriptor.from_tensor(w_side, [t.latents, side]) if side else w_desc
    _encode_kernel[(min(programs, triton.cdiv(n, t.n) * triton.cdiv(n_latents, t.latents)),)](
        x_desc, w_desc, pre_desc, x_side_desc, w_side_desc,
        b, x_scale, w_scale, maxima, n, n_latents, d, maxima.shape[1],
        BLOCK_N=t.n, BLOCK_L=t.latents, BLOCK_D=t.d, GROUP=t.group, CHUNK=chunk, SCALED=x_scale is not None, SIDE=side,
        N_PROGRAMS=programs, FLATTEN=t.flatten, HALVES=t.halves, num_warps=t.warps, num_stages=t.stages,
    )  # fmt: skip
