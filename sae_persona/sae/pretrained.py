"""SAEs of SAELens' registry, by release and id. SAELens downloads them and knows the layout of each.

Its import takes seconds and half a gigabyte, so it happens inside `load_pretrained` only.
"""

from collections.abc import Collection
from difflib import get_close_matches
from pathlib import Path

from sae_persona.errors import FormatError, ModelError, RunError
from sae_persona.sae import saelens
from sae_persona.sae.model import SAE


def load_pretrained(release: str, sae_id: str) -> SAE:
    """The SAE ``sae_id`` of a release in SAELens' registry, or of a Hugging Face repository OWNER/NAME in its layout.

    A scale of the input that the registry knows is folded by SAELens; all else as `saelens.build` does it. Metadata
    gain ``release`` and ``sae_id``, and ``l0`` where the registry has it.

    ModelError: no such release or id. RunError: it is not in the cache and the hub cannot be reached, or refuses.
    FormatError: SAELens cannot read it, or it is no plain SAE.
    """
    from huggingface_hub.errors import EntryNotFoundError
    from sae_lens import SAE as SAELensSAE
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    releases = get_pretrained_saes_directory()
    known = releases.get(release)
    if known is None and "/" not in release:
        raise ModelError(_unknown("release", release, releases, "SAELens' registry"))
    if known is not None and sae_id not in known.saes_map:
        raise ModelError(_unknown("SAE", sae_id, known.saes_map, release))
    try:
        theirs = SAELensSAE.from_pretrained(release, sae_id, device="cpu")
    except (OSError, EntryNotFoundError) as error:
        raise RunError(
            f"cannot fetch {sae_id} of {release}: {_first_line(error)}: check the connection and the name, or download "
            "the folder elsewhere and pass its path"
        ) from error
    except (KeyError, ValueError, RuntimeError) as error:
        raise FormatError(f"SAELens cannot read {sae_id} of {release}: {_first_line(error)}") from error
    sae = saelens.build(theirs.cfg.to_dict(), theirs.state_dict(), Path(release, sae_id))
    sae.metadata |= {"release": release, "sae_id": sae_id}
    if known is not None and known.expected_l0.get(sae_id):
        sae.metadata.setdefault("l0", known.expected_l0[sae_id])
    return sae


def _unknown(what: str, name: str, known: Collection[str], where: str) -> str:
    near = get_close_matches(name, known, n=3, cutoff=0.3) or sorted(known)[:3]
    return f"there is no {what} {name!r} in {where}: the nearest of {len(known)} are {', '.join(near)}"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
