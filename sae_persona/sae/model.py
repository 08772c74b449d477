"""The sparse autoencoder: one class, the sparsity rule is a value that it holds."""

from hashlib import sha256
from typing import Any, NamedTuple

import torch
from sae_kernels import ops
from torch import Tensor, nn

from sae_persona.errors import FormatError, ModelError
from sae_persona.sae import sparsity
from sae_persona.sae.sparsity import Rule, Threshold
from sae_persona.types import HookPoint, SparseLatents

DENSE_ENTRIES = 2**21  # pre-activations held at once by `encode`: 8 MiB, which caches and allocators like


class LatentRows(NamedTuple):
    """Rows of m latents: enc [m, d_in], bias and threshold [m] (0 under rules that have none), dec [m, d_out]."""

    enc: Tensor
    bias: Tensor
    threshold: Tensor
    dec: Tensor


class SAE(nn.Module):
    """Encode residual activations as few latents; decode them as a sum of directions.

        pre_acts = x @ w_enc.T + b_enc          acts = rule(pre_acts)          reconstruction = acts @ w_dec + b_dec

        w_enc, w_dec   [n_latents, d_in]   fp32, rows of w_dec of unit norm
        b_enc, b_dec   [n_latents], [d_in]
        metadata       JSON values, among them ``model`` and ``hook`` (``layers.12.resid_post``) where known

    A transcoder reads one place and predicts another, so its ``w_dec`` is [n_latents, d_out] and its ``b_dec``
    [d_out]; with a skip connection it also adds ``x @ w_skip.T``, w_skip [d_out, d_in]. It can be encoded and
    measured; what takes the reconstruction for x (quality, edits) refuses it by `check_rebuilds`.
    Dunefsky et al., 2024 (2406.11944); skips: Paulo et al., 2025 (2501.18823).

    Nothing is subtracted from or multiplied with x, so activations are in units of the residual stream: raising one by
    1 moves the reconstruction by 1 along its direction. The weights carry no gradient; the inputs may.
    """

    w_enc: nn.Parameter
    b_enc: nn.Parameter
    w_dec: nn.Parameter
    b_dec: nn.Parameter
    threshold: Tensor | None
    w_skip: Tensor | None

    def __init__(
        self,
        w_enc: Tensor,
        b_enc: Tensor,
        w_dec: Tensor,
        b_dec: Tensor,
        rule: Rule,
        metadata: dict[str, Any] | None = None,
        *,
        transcodes: bool = False,
        w_skip: Tensor | None = None,
    ) -> None:
        super().__init__()
        for name, weight in (("w_enc", w_enc), ("b_enc", b_enc), ("w_dec", w_dec), ("b_dec", b_dec)):
            self.register_parameter(name, nn.Parameter(weight.detach().contiguous(), requires_grad=False))
        # a buffer, so that the threshold follows the weights to another device
        self.register_buffer("threshold", rule.threshold if isinstance(rule, Threshold) else None)
        self.register_buffer("w_skip", w_skip)
        self.transcodes = transcodes
        self._rule = rule
        self.metadata = dict(metadata or {})

    @property
    def rule(self) -> Rule:
        """The sparsity rule at inference."""
        return self._rule if self.threshold is None else Threshold(self.threshold)

    @property
    def n_latents(self) -> int:
        return self.w_enc.shape[0]

    @property
    def d_in(self) -> int:
        return self.w_enc.shape[1]

    @property
    def d_out(self) -> int:
        """Width of what it predicts: d_in, unless it is a transcoder."""
        return self.w_dec.shape[1]

    @property
    def hook(self) -> HookPoint:
        """Where the SAE reads. FormatError if its file does not say."""
        if "hook" not in self.metadata:
            raise FormatError(
                "this SAE does not say which hook point it reads: set metadata.hook, layers.12.resid_post"
            )
        return HookPoint.parse(self.metadata["hook"])

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the weights and the rule, in hex: the same for equal SAEs on any device."""
        digest = sha256(repr(type(self.rule).__name__).encode())
        digest.update(repr(getattr(self.rule, "k", None)).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())  # a width of 1 has odd strides
        return digest.hexdigest()

    def check_width(self, d: int) -> None:
        """ModelError unless the SAE reads activations of width ``d``."""
        if d != self.d_in:
            raise ModelError(
                f"the SAE reads width {self.d_in}, the activations have {d}: use the model it was made for"
            )

    def check_rebuilds(self) -> None:
        """ModelError if it is a transcoder or has a skip connection: its latents do not add up to what it reads."""
        if self.transcodes or self.w_skip is not None:
            raise ModelError(
                "this SAE is a transcoder: it predicts another place than the one it reads, so it can be encoded and "
                "measured, not spliced in or edited: use an SAE of the residual stream"
            )

    def pre_acts(self, x: Tensor) -> Tensor:
        """[n, d_in] -> [n, n_latents], dense: `encode` and `latents_at` never hold that for many tokens."""
        self.check_width(x.shape[-1])
        return torch.nn.functional.linear(x, self.w_enc, self.b_enc)

    def encode(self, x: Tensor) -> SparseLatents:
        """The latents that fire on each token of x [n, d_in]. ModelError on another width."""
        rows = max(1, DENSE_ENTRIES // self.n_latents)
        return sparsity.cat([self.rule.select(self.pre_acts(part)) for part in x.split(rows)])

    def decode(self, latents: SparseLatents) -> Tensor:
        """The reconstruction [n, d_out], without a skip connection's part."""
        return ops.sparse_decode(latents.acts, latents.idx, self.w_dec, latents.offsets) + self.b_dec

    def predict(self, x: Tensor) -> Tensor:
        """All that is made of x [n, d_in]: its reconstruction or, from a transcoder, another place's [n, d_out]."""
        y = self.decode(self.encode(x))
        return y if self.w_skip is None else y + x @ self.w_skip.T

    def latents_at(self, x: Tensor, idx: Tensor) -> Tensor:
        """Activations of the chosen latents, zeros included: [..., d_in] and [m] int64 -> [..., m].

        With a local rule only those rows of the encoder are read, and the answer is the same.
        """
        self.check_width(x.shape[-1])
        rule = self.rule
        if not isinstance(rule, sparsity.TopK):
            return rule.gate(torch.nn.functional.linear(x, self.w_enc[idx], self.b_enc[idx]), idx)
        flat = x.reshape(-1, self.d_in)
        room = DENSE_ENTRIES * (16 if x.is_cuda else 1)  # one reading of the encoder for a step of many sequences
        parts = flat.split(max(1, room // self.n_latents))
        acts = torch.cat([rule.among(self.pre_acts(part), idx) for part in parts])
        return acts.view(*x.shape[:-1], len(idx))

    def directions(self, idx: Tensor) -> Tensor:
        """Decoder directions of the chosen latents: [m] -> [m, d_out]."""
        return self.w_dec[idx]

    def rows(self, idx: Tensor) -> LatentRows:
        """All that belongs to the chosen latents [m] alone, in fp32."""
        threshold = self.b_enc.new_zeros(len(idx)) if self.threshold is None else self.threshold[idx].clamp(min=0)
        parts = self.w_enc[idx], self.b_enc[idx], threshold, self.w_dec[idx]
        return LatentRows(*(part.detach().float() for part in parts))
