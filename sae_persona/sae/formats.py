"""SAEs on disk: ours are written in SAELens' layout, by json and safetensors alone; those of others are read.

Each layout's words stay in its own file: `saelens`, `sparsify`, `dictionary_learning`; `pretrained` has SAELens' hub.
"""

from pathlib import Path
from typing import Any

from sae_persona.activations.lm import LM
from sae_persona.runs import read_json
from sae_persona.sae import dictionary_learning, pretrained, saelens, sparsify
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


def load_sae(source: str | Path, sae_id: str | None = None) -> SAE:
    """Read an SAE that we, SAELens, sparsify or dictionary_learning wrote, in fp32 on the CPU.

    source   the SAE's folder; with ``sae_id`` a release of SAELens' registry, which is downloaded unless it is cached

    Input normalisation is folded into the weights, and decoder rows are brought to unit norm with the activations
    scaled up in turn, which leaves reconstructions as they were; so activations are the file's times the norm of its
    decoder row. Rows that have norm 1 within fp32 rounding stay as they are, to the bit. Only in a TopK SAE that chose
    its k by unscaled pre-activations do rows keep their norms: there the scale decides who fires.

    Metadata keep the file's words; ``model`` and ``hook`` are added where they tell it.

    FormatError: no such folder, not JSON, broken weights, another architecture, missing tensors, wrong shapes, an
    input normalisation that no weights can hold. With ``sae_id`` also ModelError and RunError, as `load_pretrained`.
    """
    if sae_id is not None:
        return pretrained.load_pretrained(str(source), sae_id)
    layout, config = _opened(Path(source))
    return layout.read(config, Path(source))


def is_sae(folder: str | Path) -> bool:
    """Whether a folder has the config of an SAE, and not of a language model or a run."""
    config = Path(folder) / dictionary_learning.CONFIG
    return (Path(folder) / CONFIG).is_file() or (
        config.is_file() and dictionary_learning.wrote(read_json(config, "SAE config"))
    )


def sae_facts(folder: str | Path) -> dict[str, Any]:
    """What the config of an SAE folder says, without its weights: a dict of the same names for every layout.

    format, architecture, d_in, d_out, n_latents, k, hook, model, l0, tokens, dead, normalisation, dtype; None for what
    the file does not say. FormatError as `load_sae`, as far as the config goes.
    """
    layout, config = _opened(Path(folder))
    return layout.facts(config, Path(folder))


def _opened(folder: Path) -> tuple[Any, Any]:
    """The module of the layout that the folder's config is of, and the config."""
    if not (folder / CONFIG).is_file() and (folder / dictionary_learning.CONFIG).is_file():
        config = read_json(folder / dictionary_learning.CONFIG, "SAE config")
        if dictionary_learning.wrote(config):
            return dictionary_learning, config
    config = read_json(folder / CONFIG, "SAE config")
    return (sparsify if sparsify.wrote(config) else saelens), config
