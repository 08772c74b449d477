"""One training step through the Triton kernels. Formulas: `step.py`; the kernels' contracts: `sae_kernels`.

    x -> z (bf16)        prepare        centred, scaled, outliers first; e4m3 beside it
    z -> pre, maxima     encode         a slice of tokens at a time
    pre -> acts, idx     select | rescore | batch_topk | jump
    acts -> pull         decode_error   error, loss and gradients of the activations
    idx -> lists         packed_lists   entries by latent
    lists -> weights     row_update     gradient, Adam and norm of each row; biases and counters with it

Where ranks share the latents, they exchange their choice after select, and what they rebuilt within decode_error, in
fp32: the error is what is left of x by it, and bf16 would round it at every rank by as much as x itself was. Both are
small beside the product: n * k and n * d numbers. The sums are the same to the bit on all ranks, so b_dec stays so.

The host waits for the device nowhere in it. A batch whose loss is not finite leaves every weight as it was and is
counted in FLAGGED.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from sae_kernels.bias_update import bias_update, column_sums
from sae_kernels.compact import batch_topk, jump, new_entries
from sae_kernels.decode_error import columns_for, decode_error, group_sums
from sae_kernels.encode import chunk_for, encode
from sae_kernels.packed_lists import latent_order, packed_lists
from sae_kernels.prepare import FP8, prepare
from sae_kernels.rescore import rescore
from sae_kernels.row_update import Shape, block_sums, row_update, shape_for
from sae_kernels.scalars import begin, clip_factor, conclude, new_scalars
from sae_kernels.select import select
from sae_kernels.values import BETAS, FLAGGED, LOSS, AuxGrads, Entries, PackedLists, Rows
from sae_kernels.winners import winners
from torch import Tensor

from sae_persona.errors import ConfigError
from sae_persona.sae.kernel_auxk import EVERY, AuxKept, DeadSet, LateNumber, agree, dead_set, keep, room_for
from sae_persona.sae.kernel_plan import GRAPH_BELOW, KernelConfig, padded
from sae_persona.sae.kernel_seen import ROWS, KernelSeen
from sae_persona.sae.kernel_state import KernelState
from sae_persona.sae.kernel_streams import Streams
from sae_persona.sae.shard import ALONE, Shard
from sae_persona.sae.sparsity import BatchTopK, JumpReLU, TopK, TrainingRule
from sae_persona.sae.step import Weights, threshold_lr

BESIDE = Shape(256, 2)  # of the decoder's update beside the product, which leaves it few registers
WARM = 3  # steps before one is captured as a graph
MOST_GRAPHS = 4  # kept: one for each size of batch and of the room for dead latents


class KernelStep:
    """As `PlainStep`, on a GPU.

    weights  are copied; from a CPU too, so that they need not fit the GPU beside their copies
    device   to work on; None: where the weights are
    config   how it is computed
    shard    as for `PlainStep`
    rms      [d_in] root mean square of the normalised activations; tells fp8 which dimensions are outliers

    In Triton's interpreter it runs on a CPU with precision fp32, for tests.
    """

    def __init__(
        self,
        weights: Weights,
        rule: TrainingRule,
        *,
        config: KernelConfig,
        threshold: Tensor | None = None,
        prefixes: tuple[int, ...] = (),
        multi_topk: bool = False,
        k_aux: int | None,
        auxk_coef: float,
        dead_after: int,
        clip: float | None = None,
        mean: Tensor | None = None,
        scale: float = 1.0,
        rms: Tensor | None = None,
        device: torch.device | str | None = None,
        shard: Shard = ALONE,
    ) -> None:
        if config.precision == "fp8" and not isinstance(rule, TopK):
            raise ConfigError(f"precision fp8 is for rule topk, got {type(rule).__name__}: use bf16")
        if multi_topk:
            raise ConfigError("multi_topk runs in plain torch, not through the kernels: pass kernels=None")
        self.n_latents, self.d_in = weights.w_enc.shape
        self.shard = shard
        first, self.n_all = shard.placed(self.n_latents)
        self.device = weights.w_enc.device if device is None else torch.device(device)
        self.rule, self.config, self.clip, self.scale = rule, config, clip, scale
        self.most_k = rule.k
        self.k_aux = self.d_in // 2 if k_aux is None else k_aux
        self.auxk_coef, self.dead_after = auxk_coef, dead_after
        self.state = KernelState.make(weights, threshold, config, self.device, rms)
        columns = self.state.order.long()
        self._mean = None if mean is None else mean.float()
        self.mean = torch.zeros(self.d_in, device=self.device) if self._mean is None else self._mean[columns]
        own = [max(0, size - first) for size in prefixes]
        self.prefixes = torch.tensor(own, dtype=torch.int32, device=self.device) if len(prefixes) > 1 else None
        self.scalars = new_scalars(self.device)
        self.fp8, self.recall = config.precision == "fp8", None
        self.steps = 0
        self._dead_count, self._late_recall = LateNumber(self.device), LateNumber(self.device)
        self._n_dead = self._room = 0
        self._dead: DeadSet | None = None
        self._warm: dict[tuple[int, int], int] = {}
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}
        self._graphs: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, KernelSeen, DeadSet | None]] = {}
        self.streams = Streams(self.device)
        self._read_later: object = None  # by the decoder's update
        if shard.world > 1:
            self._check_shared()

    def __call__(self, x: Tensor, lr: float) -> KernelSeen:
        """Take one step on x [n, d_in] with learning rate ``lr``."""
        self.steps += 1
        self._count_dead()
        with self.streams.step(overlap=self.config.overlap and not self._small(len(x))):
            z = self._prepared(x)
            return self._replayed(z, lr) if self._replays(len(x)) else self._eager(z, lr)

    def set_k(self, k: int) -> None:
        """As `PlainStep.set_k`. A graph holds the k that it was captured with, so the graphs of another k end here."""
        assert 1 <= k <= self.n_latents, f"k must be between 1 and {self.n_latents}, got {k}"
        if k == self.rule.k:
            return
        self.rule = replace(self.rule, k=k)
        self.most_k = max(self.most_k, k)
        self._graphs.clear()
        self._warm.clear()  # kernels are compiled for a range of k, which cannot be done while a graph is captured

    @property
    def weights(self) -> Weights:
        """Copies in fp32, decoder rows of norm 1."""
        self.wait()
        return self.state.weights

    @property
    def threshold(self) -> Tensor | None:
        return self.state.latents.threshold

    @property
    def silent(self) -> Tensor:
        return self.state.latents.silent

    @property
    def dead(self) -> Tensor:
        """Which latents are dead: [n_latents] bool."""
        return self.silent >= self.dead_after

    @property
    def loss(self) -> Tensor:
        """The main loss of the last step, on the device: [] fp32."""
        return self.scalars[LOSS]

    @property
    def flagged(self) -> int:
        """Steps that changed nothing, since their loss was not finite."""
        return int(self.scalars[FLAGGED])

    def wait(self) -> None:
        """Let the current stream wait for the decoder's update."""
        self.streams.wait()

    @property
    def numbers(self) -> dict[str, Any]:
        """What lasts from one step to the next on the host: JSON values. The host waits for what is on its way."""
        found = {"steps": self.steps, "side": self.state.side, "fp8": self.fp8, "recall": self.recall}
        found |= {"most_k": self.most_k, "n_dead": self._n_dead, "room": self._room}
        return found | {"dead_count": self._dead_count.read(), "late_recall": self._late_recall.read()}

    def go_on(self, numbers: Mapping[str, Any], *, same_block: bool) -> None:
        """Go on from such numbers; ``same_block`` if they were this rank's. The state's tensors are there already.

        With other blocks it is found out anew how many latents are dead: the first steps are without AuxK.
        """
        n = numbers
        self._graphs.clear()
        self.state = replace(self.state, side=n["side"])
        if self._mean is not None:
            self.mean = self._mean[self.state.order.long()]
        self.steps, self.fp8, self.recall, self.most_k = n["steps"], n["fp8"], n["recall"], n["most_k"]
        self._late_recall.write(torch.tensor(n["late_recall"], device=self.device))
        if same_block:
            self._n_dead, self._room = n["n_dead"], n["room"]
            self._dead_count.write(torch.tensor(n["dead_count"], device=self.device))

    def auxk_share(self, left: Tensor) -> float:
        """AuxK's share of the loss of a step that left so much of the error."""
        assert self._dead is not None, "AuxK leaves nothing without dead latents"
        share = min(1.0, float(self._dead.n_dead) / self.k_aux)
        return self.auxk_coef * share * float(left.float().square().sum()) / len(left)

    def _check_shared(self) -> None:
        least = self.n_all // self.shard.world
        if self._n_selected > least or self.rule.k > least:
            raise ConfigError(f"k must be at most the {least} latents of a rank, got {self.rule.k}: use fewer ranks")
        if self.config.precision == "fp8":
            raise ConfigError("precision fp8 is not sharded on GPUs yet: use bf16")

    def _eager(self, z: Tensor, lr: float) -> KernelSeen:
        self._dead = self._dead_set()
        entries, kept = self._encoded(z, self._dead)
        if self._recall_is_due:
            self._check_recall(z, entries)
        self.wait()
        begin(self.scalars, lr, self.steps, BETAS)
        return self._learn(z, entries, self._dead, kept)

    def _replayed(self, z: Tensor, lr: float) -> KernelSeen:
        """The same as a graph: one launch in place of forty."""
        begin(self.scalars, lr, self.steps, BETAS)
        key = len(z), self._room
        if key not in self._graphs:
            if len(self._graphs) == MOST_GRAPHS:
                self._graphs.pop(next(iter(self._graphs)))
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                dead = self._dead_set()
                entries, kept = self._encoded(z, dead)
                seen = self._learn(z, entries, dead, kept)
            self._graphs[key] = graph, seen, dead
        graph, seen, self._dead = self._graphs[key]
        graph.replay()
        return seen

    def _learn(self, z: Tensor, entries: Entries, dead: DeadSet | None, kept: Tensor | None) -> KernelSeen:
        n, state, full = len(z), self.state, None
        if self.shard.world > 1:
            entries, full = self._agreed(entries)
        planes = 1 if self.prefixes is None else len(self.prefixes)
        capacity = len(entries.acts)
        pull = self._buffer("pull", z.dtype, planes, n, z.shape[1])
        blocks = -(-z.shape[1] // columns_for(z.shape[1]))
        token = self._buffer("token", torch.int32, capacity)
        d_acts = self._buffer("d_acts", torch.float32, blocks, capacity)
        squares, whole = (self._buffer(name, torch.float32, blocks, n) for name in ("squares", "whole"))
        assert state.decoder.inverse_norm is not None, "a decoder's rows have norms"
        # who fired which latent does not wait for the decode
        with self.streams.aside():
            order = latent_order(entries.idx, self.n_latents)
        read = (entries.acts, entries.idx, entries.offsets, state.decoder.high, state.decoder.inverse_norm)
        sums = None
        if self.shard.world > 1:
            sums = self._buffer("sums", torch.float32, *pull.shape)
            group_sums(*read, sums=sums, prefixes=self.prefixes)
            self.shard.sum(sums)
        decode_error(
            *read, z, state.b_dec, 2 / n, pull=pull, token=token, d_acts=d_acts, squares=squares, whole=whole,
            prefixes=self.prefixes, sums=sums,
        )  # fmt: skip
        self.streams.join()
        lists = packed_lists(
            entries.idx, token, entries.acts, d_acts, self.n_latents, near=entries.near, order=order
        )  # fmt: skip
        self._conclude(squares, entries, dead, n if kept is None else len(kept))
        aux_enc = aux_dec = left = None
        if dead is not None and kept is not None:
            error = pull[-1] if planes == 1 else pull[-1] * planes
            aux_enc, aux_dec, left = AuxKept(dead, kept, self.shard).gradients(error, z, state.decoder)
        self._update(z, pull, lists, aux_enc, aux_dec)
        return KernelSeen(self, self.rule, z, whole, entries, left, full)

    def _update(
        self, z: Tensor, pull: Tensor, lists: PackedLists, aux_enc: AuxGrads | None, aux_dec: AuxGrads | None
    ) -> None:
        state, scale = self.state, 2 / len(z)
        threshold, moments = state.latents.threshold, (state.b_dec, state.b_dec_m, state.b_dec_v)
        with self.streams.aside():
            columns = column_sums(pull[0])
            if self.clip is None:
                bias_update(*moments, columns, self.scalars, scale=scale)
        sums = block_sums(lists, z, pull, self.scalars, threshold=threshold, prefixes=self.prefixes)
        faster = threshold_lr(1.0, self.d_in)
        encoder = {"sums": sums, "latents": state.latents, "aux": aux_enc, "threshold_faster": faster}
        decoder = {"sums": sums, "scale": scale, "prefixes": self.prefixes, "aux": aux_dec}
        if self.clip is not None:
            self.streams.join()
            size = self.n_latents * -(-z.shape[1] // shape_for(z.shape[1]).columns)
            norms = torch.empty(2 * size + z.shape[1], device=self.device)
            enc, dec, b = norms.split([size, size, z.shape[1]])
            row_update(self._encoder, lists, z, self.scalars, norms=enc, **encoder)
            row_update(state.decoder, lists, pull, self.scalars, norms=dec, **decoder)
            bias_update(*moments, columns, self.scalars, scale=scale, norms=b)
            if self.shard.world > 1:
                norms = torch.cat([self.shard.sum(norms[: 2 * size].sum(dim=0, keepdim=True)), b])
            clip_factor(self.scalars, norms, self.clip)
            bias_update(*moments, columns, self.scalars, scale=scale)
        row_update(self._encoder, lists, z, self.scalars, **encoder)
        self.streams.join()
        shape = BESIDE if self.streams.overlapping else None
        with self.streams.later():
            row_update(state.decoder, lists, pull, self.scalars, shape=shape, **decoder)
        # not to be freed, and so overwritten, before the next step has waited
        self._read_later = (lists, aux_dec, sums, pull)

    def _conclude(self, squares: Tensor, entries: Entries, dead: DeadSet | None, n_aux: int) -> None:
        found = {}
        if isinstance(self.rule, JumpReLU):
            found |= {"active": entries.active, "k": self.rule.k, "sparsity_coef": self.rule.coef}
        if dead is not None:
            found |= {
                "n_dead": dead.n_dead,
                "auxk_coef": self.auxk_coef * squares.shape[1] / n_aux,
                "k_aux": self.k_aux,
            }
        conclude(self.scalars, squares, **found)

    # ---- encoding

    def _prepared(self, x: Tensor) -> Tensor:
        """z, and its e4m3 copy, of a batch [n, d_in]."""
        n, d, fp32 = len(x), self.state.encoder.high.shape[1], self.config.precision == "fp32"
        z = self._buffer("z", torch.float32 if fp32 else torch.bfloat16, n, d)
        fp8 = {}
        if self.fp8:
            fp8 = {"z8": self._buffer("z8", FP8, n, d), "z8_scale": self._buffer("z8_scale", torch.float32, n)}
        prepare(
            x, self.state.order if self.state.side else None, self.mean, self.scale, z=z, side=self.state.side, **fp8
        )
        return z

    def _encoded(self, z: Tensor, dead: DeadSet | None) -> tuple[Entries, Tensor | None]:
        """What fires on the batch; the AuxK activations of the dead latents."""
        n, rule = len(z), self.rule
        tokens = n if isinstance(rule, BatchTopK) else min(n, self.config.slice_tokens or n)
        chunk = chunk_for(self.n_latents, self._n_selected)
        pre = self._buffer("pre", z.dtype, tokens, padded(self.n_latents, chunk))
        maxima = self._buffer("maxima", z.dtype, tokens, pre.shape[1] // chunk)
        n_aux = max(1, round(n * self.config.auxk_tokens))
        kept = None if dead is None else self._buffer("kept", z.dtype, n_aux, len(dead.idx))
        entries, picked = None, []
        for at in range(0, n, tokens):
            part = slice(at, min(at + tokens, n))
            here, peaks = pre[: part.stop - at], maxima[: part.stop - at]
            self._encode(z, part, here, peaks)
            if isinstance(rule, BatchTopK):
                ranks = {} if self.shard.world == 1 else {"total": self.shard.sum, "before": self.shard.before}
                entries = batch_topk(here, peaks, self.n_latents, rule.k, **ranks)
            elif isinstance(rule, JumpReLU):
                # by the largest k so far: while it falls, L0 lags behind
                entries = entries or new_entries(n, int(self.config.spare * self.most_k * n), self.n_latents, z.device)
                assert self.threshold is not None, "JumpReLU has thresholds"
                jump(here, peaks, self.threshold, rule.bandwidth, entries, first=at)
            else:
                picked.append(self._topk(z[part], here, peaks))
            if dead is not None and kept is not None and at < n_aux:
                keep(here[: n_aux - at], dead, self.n_latents, self.k_aux, kept[part])
        if kept is not None:
            agree(kept, self.k_aux, self.shard)
        return entries or self._even(picked), kept

    def _encode(self, z: Tensor, part: slice, pre: Tensor, maxima: Tensor) -> None:
        encoder, b = self.state.encoder, self.state.latents.b
        if not self.fp8:
            encode(z[part], encoder.high, b, pre=pre, maxima=maxima)
            return
        assert encoder.fp8 is not None, "fp8 has a copy"
        z8, scale = self._buffer("z8", FP8, *z.shape), self._buffer("z8_scale", torch.float32, len(z))
        encode(
            z8[part], encoder.fp8, b, pre=pre, maxima=maxima, x_scale=scale[part], w_scale=encoder.fp8_scale,
            side=self.state.side, x_side=z[part], w_side=encoder.high,
        )  # fmt: skip

    def _topk(self, z: Tensor, pre: Tensor, maxima: Tensor) -> tuple[Tensor, Tensor]:
        k = self.rule.k
        if not self.fp8:
            return select(pre, maxima, self.n_latents, k)
        _, candidates = select(pre, maxima, self.n_latents, self._n_selected)
        return rescore(candidates, z, self.state.encoder.high, self.state.latents.b, k)

    def _even(self, picked: list[tuple[Tensor, Tensor]]) -> Entries:
        """As CSR, k entries a token, on all ranks together."""
        acts, idx = picked[0] if len(picked) == 1 else (torch.cat(parts) for parts in zip(*picked, strict=True))
        if self.shard.world > 1:
            return winners(self.shard.gather(acts), idx, self.shard.rank, self.n_latents)
        n, k = acts.shape
        offsets = torch.arange(0, (n + 1) * k, k, dtype=torch.int32, device=acts.device)
        return Entries(acts.flatten(), idx.flatten(), offsets)

    def _agreed(self, entries: Entries) -> tuple[Entries, Tensor | None]:
        """With what fires on all ranks; and of how many ranks not everything has found room."""
        if isinstance(self.rule, TopK):
            return entries, None  # with which it came
        if isinstance(self.rule, BatchTopK):
            return replace(entries, active=self.shard.sum(entries.offsets[-1:].clone())), None
        assert entries.active is not None, "JumpReLU counts active latents"
        is_full = (entries.offsets[-1:] == len(entries.acts)).int()
        counts = self.shard.sum(torch.cat([entries.active, is_full]))
        return replace(entries, active=counts[:-1]), counts[-1:]

    @property
    def _n_selected(self) -> int:
        """Pre-activations that are kept of each token, or of the average one, before any rescoring."""
        k = math.ceil(self.config.candidates * self.rule.k) if self.fp8 else self.rule.k
        return min(k, self.n_latents)

    @property
    def _encoder(self) -> Rows:
        rows = self.state.encoder
        return rows if self.fp8 or rows.fp8 is None else Rows(rows.high, rows.low, rows.m, rows.v)

    # ---- what the host decides, a few steps late

    def _count_dead(self) -> None:
        if self.auxk_coef == 0 or self.k_aux == 0 or (self.steps - 1) % EVERY:
            return
        self._n_dead = int(self._dead_count.read())
        # every rank makes as much room as the one with most dead, since they exchange what is in it
        self._room = room_for(self._n_dead, -(-self.n_all // self.shard.world), self.shard.world)
        self._dead_count.write(self.shard.max(self.dead.sum().float()))

    def _dead_set(self) -> DeadSet | None:
        if self._room == 0:
            return None
        found = dead_set(self.silent, self.dead_after, self._room, self.steps if self._crowded else 0)
        return found if self.shard.world == 1 else replace(found, n_dead=self.shard.sum(found.n_dead.clone()))

    @property
    def _crowded(self) -> bool:
        """More latents are dead than there is ever room for: they take turns."""
        return self._n_dead > self._room

    @property
    def _recall_is_due(self) -> bool:
        return self.fp8 and self.steps % self.config.recall_every == 0

    def _check_recall(self, z: Tensor, entries: Entries) -> None:
        """Measure what was found of some tokens' true top k, before the weights move; act on the last measurement."""
        if self.steps > self.config.recall_every:
            self.recall = self._late_recall.read()
            if self.recall < self.config.min_recall:
                self.fp8 = False
                self._graphs.clear()
                return
        rows, k = min(self.config.recall_rows, len(z)), self.rule.k
        some = z[:rows].float()
        exact = torch.cat([some @ part.float().T for part in self.state.encoder.high.split(ROWS)], dim=1)
        exact += self.state.latents.b
        best = exact.topk(k, dim=1).indices
        hit = torch.zeros_like(exact, dtype=torch.bool).scatter_(1, entries.idx.view(-1, k)[:rows].long(), True)
        self._late_recall.write(hit.gather(1, best).float().mean())

    # ---- streams, graphs and memory

    def _small(self, n: int) -> bool:
        """Launching the kernels takes as long as running them."""
        if self.config.graph is not None:
            return self.config.graph
        return 2.0 * n * self.d_in * self.n_latents < GRAPH_BELOW

    def _replays(self, n: int) -> bool:
        """The step is a graph; not before its kernels have been compiled, nor while dead latents take turns."""
        if self.device.type != "cuda" or self.shard.world > 1 or not self._small(n):
            return False
        if self._crowded or self._recall_is_due:
            return False
        key = n, self._room
        self._warm[key] = self._warm.get(key, 0) + 1
        return self._warm[key] > WARM

    def _buffer(self, name: str, dtype: torch.dtype, *shape: int) -> Tensor:
        """Memory kept between steps under a name, as much of it as asked for."""
        size = 1
        for length in shape:
            size *= length
        kept = self._buffers.get((name, dtype))
        if kept is None or len(kept) < size:
            self._graphs.clear()
            kept = self._buffers[name, dtype] = torch.empty(size, dtype=dtype, device=self.device)
        return kept[:size].view(shape)
