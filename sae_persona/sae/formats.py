"""SAEs on disk: ours are written in SAELens' layout, by json and safetensors alone; those of others are read.

Each layout's words stay in its own file: `saelens`, `sparsify`, `dictionary_learning`; `pretrained` has SAELens' hub.
"""

from pathlib import Path
from typing import Any

from sae_persona.activations.lm import LM
from sae_persona.runs import read_json
from sae_persona.sae import saelens
from sae_persona.sae.model import SAE
from sae_persona.types import HookPoint

CONFIG, WEIGHTS = saelens.CONFIG, saelens.WEIGHTS


def hook_metadata(lm: LM, hook: HookPoint) -> dict[str, str]:
    """What says where an SAE belongs: our ``model`` and ``hook``, and the keys that SAELens and its users read."""
    names = {"model": lm.name, "hook": str(hook), "model_name": lm.name}
    names["hook_name"] = f"blocks.{hook.layer}.hook_{hook.site}"
    below = hook.layer if hook.site == "resid_post" else hook.layer - 1
    if below >= 0:  # what enters the first block is no block's output
        names["hf_hook_name"] = f"{lm.blocks_path}.{below}"
    return names


def save_sae(sae: SAE, folder: str | Path, *, metadata: dict[str, Any] | None = None) -> None:
    """Write ``sae`` as a folder, whole or not at all; ``metadata`` joins its own.

    RunError if the disk refuses, FormatError for a TopK transcoder, which SAELens' layout does not have.
    """
    saelens.write(sae, Path(folder), {**sae.metadata, **(metadata or {})})


def load_sae(folder: str | Path) -> SAE:
    """Read an SAE that we or SAELens wrote, in fp32 on the CPU.

    Input normalisation is folded into the weights, and decoder rows are brought to unit norm with the activations
    scaled up in turn, which leaves reconstructions as they were; so activations are the file's times the norm of its
    decoder row. Rows that have norm 1 within fp32 rounding stay as they are, to the bit. Only in a TopK SAE that chose
    its k by unscaled pre-activations do rows keep their norms: there the scale decides who fires.

    Metadata keep the file's words; ``hook`` is added where they tell it.

    FormatError: no such folder, not JSON, broken weights, another architecture, missing tensors, wrong shapes, an
    input normalisation that no weights can hold.
    """
    folder = Path(folder)
    return saelens.read(read_json(folder / CONFIG, "SAE config"), folder)
