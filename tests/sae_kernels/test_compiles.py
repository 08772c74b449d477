"""The kernels as production calls them, compiled for sm_90 without a GPU: no register spills, no excess of memory.

Run as a program, in a process of its own without the interpreter, it prints a line of JSON for each compiled kernel.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

SHARED = 232448  # bytes that a block may have on sm_90
N, K = 256, 32
SHAPES = {"odd": (80, 1003, 3), "realistic": (768, 65536, 64)}  # d, n_latents, and k of select and rescore
TIGHT = ("_encode_kernel", "_select_kernel", "_row_update_kernel", "_decode_error_kernel", "_rescore_kernel")
TIGHT += ("_group_sums_kernel", "_winners_kernel", "_null_counts_kernel")


def compiled() -> list[dict]:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_nothing_spills_and_everything_fits():
    found = compiled()
    assert {one["kernel"] for one in found} >= {
        *TIGHT,
        "_decode_prefixes_kernel",
        "_fill_kernel",
        "_keep_auxk_kernel",
        "_edit_rows_kernel",
    }
    for one in found:
        assert one["shared"] <= SHARED, one
        if one["kernel"] in TIGHT:
            assert one["stack"] == 0, f"registers spill: {one}"


class _NoDevice:
    """A driver that knows what to compile for, and has nothing to run it on."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")


def _report_each_kernel() -> None:
    """From here on, a launch compiles and prints what it compiled."""
    import triton
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    driver.set_active(_NoDevice())
    launch, seen = JITFunction.run, set()
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"

    def run(self, *args, grid, warmup, **settings):
        kernel = launch(self, *args, grid=grid, warmup=True, **settings)
        if kernel.hash not in seen:
            seen.add(kernel.hash)
            with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                Path(file.name).write_bytes(kernel.asm["cubin"])
                usage = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True)
            registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout).groups()
            line = {"kernel": self.fn.__name__, "registers": int(registers), "stack": int(stack)}
            line |= {"shared": kernel.metadata.shared, "warps": kernel.metadata.num_warps}
            sys.stdout.write(json.dumps(line | {"args": [str(a.dtype)[6:] for a in args if torch.is_tensor(a)]}) + "\n")
        return kernel

    JITFunction.run = run


def _call_all(d: int, n_latents: int, k: int) -> None:
    from sae_kernels.auxk import keep_auxk, prune_auxk, row_dots, scaled_rows
    from sae_kernels.bias_update import bias_update, column_sums
    from sae_kernels.compact import batch_topk, jump, new_entries
    from sae_kernels.decode_error import columns_for, decode_error, group_sums
    from sae_kernels.edit_rows import edit_rows
    from sae_kernels.encode import chunk_for, encode
    from sae_kernels.null_counts import null_counts
    from sae_kernels.packed_lists import packed_lists
    from sae_kernels.prepare import prepare
    from sae_kernels.rescore import rescore
    from sae_kernels.row_update import Shape, block_sums, row_update
    from sae_kernels.scalars import begin, clip_factor, conclude, new_scalars
    from sae_kernels.select import select
    from sae_kernels.values import BETAS, AuxGrads, Latents, Rows
    from sae_kernels.winners import winners

    bf16, fp8, int32 = torch.bfloat16, torch.float8_e4m3fn, torch.int32

    def room(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype)

    z, z8, w, w8 = (room(m, d, dtype=dtype) for m in (N, n_latents) for dtype in (bf16, fp8))
    of_tokens, of_latents, entries = room(N), room(n_latents), N * K
    prepare(room(N, d, dtype=bf16), None, room(d), 1.0, z=z)
    outliers = {"z8": z8, "z8_scale": of_tokens, "side": 32}
    prepare(room(N, d, dtype=bf16), room(d, dtype=int32), room(d), 1.0, z=z, **outliers)
    chunk = chunk_for(n_latents, k)
    padded = -(-n_latents // chunk) * chunk
    pre, maxima = room(N, padded, dtype=bf16), room(N, padded // chunk, dtype=bf16)
    outs = {"pre": pre, "maxima": maxima}
    scales = {"x_scale": of_tokens, "w_scale": of_latents}
    encode(z, w, of_latents, **outs)
    encode(z8, w8, of_latents, **outs, **scales)
    encode(z8, w8, of_latents, **outs, **scales, side=32, x_side=z, w_side=w)
    select(pre, maxima, n_latents, k)
    select(pre, maxima, n_latents, (k + 1) // 2)
    rescore(room(N, k, dtype=int32), z, w, of_latents, (k + 1) // 2)
    batch_topk(pre, maxima, n_latents, K // 8)
    jump(pre, maxima, of_latents, 0.1, new_entries(N, 4 * entries, n_latents, "cpu"))

    idx, token = torch.zeros(entries, dtype=int32), torch.zeros(entries, dtype=int32)
    blocks, offsets, prefixes = -(-d // columns_for(d)), room(N + 1, dtype=int32), torch.zeros(5, dtype=int32)
    parts = {"d_acts": room(blocks, entries), "squares": room(blocks, N), "whole": room(blocks, N), "token": token}
    for planes in (None, prefixes):
        pull = room(1 if planes is None else 5, N, d, dtype=bf16)
        args = (room(entries), idx, offsets, w, of_latents, z, room(d), 0.1)
        decode_error(*args, **parts, pull=pull, prefixes=planes)
        sums = room(*pull.shape)
        group_sums(*args[:5], sums=sums, prefixes=planes)
        decode_error(*args, **parts, pull=pull, prefixes=planes, sums=sums)
    winners(room(2, N, k), room(N, k, dtype=int32), 1, n_latents)
    lists = packed_lists(idx, token, room(entries), parts["d_acts"], n_latents, near=room(entries))

    scalars = new_scalars("cpu")
    begin(scalars, 1e-3, 3, BETAS)
    counts = {"active": room(N, dtype=int32), "n_dead": room(1, dtype=int32)}
    conclude(scalars, parts["squares"])
    conclude(scalars, parts["squares"], **counts)
    clip_factor(scalars, of_latents, 1.0)
    sums, bias = column_sums(z), room(d)
    bias_update(bias, bias, bias, sums, scalars, scale=0.1)
    bias_update(bias, bias, bias, sums, scalars, scale=0.1, norms=bias)

    silent, low = room(n_latents, dtype=torch.int64), room(n_latents, d, dtype=torch.int16)
    topk = Latents(of_latents, of_latents, of_latents, silent)
    jumping = Latents(*[of_latents] * 3, silent, *[of_latents] * 3)
    aux = AuxGrads(room(64, d, dtype=bf16), room(n_latents, dtype=int32), room(64))
    sums = block_sums(lists, z, pull, scalars, threshold=of_latents, prefixes=prefixes)
    m, m16 = (room(n_latents, d, dtype=dtype) for dtype in (torch.float32, bf16))
    row_update(Rows(w, low, m, m), lists, z, scalars, sums=sums, latents=topk)
    row_update(Rows(w, low, m16, m16, None, w8, of_latents, of_latents), lists, z, scalars, sums=sums, latents=topk)
    row_update(Rows(w, low, m, m, of_latents), lists, z, scalars, sums=sums)
    row_update(Rows(w, low, m, m, of_latents), lists, z, scalars, sums=sums, shape=Shape(256, 2))
    plain = Rows(w, low, m16, m16, of_latents)
    norms = room(n_latents, blocks)
    row_update(plain, lists, z, scalars, sums=sums, latents=jumping, aux=aux)
    row_update(plain, lists, z, scalars, sums=sums, latents=jumping, aux=aux, norms=norms)
    row_update(plain, lists, pull, scalars, sums=sums, prefixes=prefixes, aux=aux)
    row_update(plain, lists, pull, scalars, sums=sums, prefixes=prefixes, aux=aux, norms=norms)

    dead = room(min(4096, n_latents // 8 * 8), dtype=int32)
    kept = keep_auxk(pre, dead, n_latents, d // 2)
    prune_auxk(room(2, *kept.shape, dtype=bf16), d // 2, 1, kept=kept)
    rows = scaled_rows(w, of_latents, dead)
    row_dots(rows, rows)
    edits, of_edits = room(8, d), room(8)
    edit_rows(z, room(N, 8, dtype=torch.bool), edits, of_edits, of_edits, edits, room(8, 4))

    row, offsets, by_latent = (
        room(N, dtype=torch.int64),
        room(n_latents + 1, dtype=torch.int64),
        [of_latents.double()] * 3,
    )
    for dtypes, wide in (((int32, torch.int8), False), ((int32, torch.int8), True), ((torch.float32,) * 2, False)):
        value, labels = room(N, dtype=dtypes[0]), room(N, 1024, dtype=dtypes[1])
        null_counts(value, row, offsets, labels, *by_latent, n=1000, two_sided=True, wide=wide)


if __name__ == "__main__":
    _report_each_kernel()
    for shape in SHAPES.values():
        _call_all(*shape)
