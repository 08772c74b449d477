"""The HDF5 files of this stage: a format number, written whole, and one way for a bad one to fail."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py

from sae_persona.errors import FormatError
from sae_persona.runs import write_whole

FORMAT = 2


def write_h5(path: Path, kind: str, fill: Callable[[h5py.File], None]) -> None:
    """Write an HDF5 file of a kind ("latents", "examples"), whole or not at all. RunError if the disk refuses."""

    def write(temporary: Path) -> None:
        with h5py.File(temporary, "w") as file:
            file.attrs["kind"], file.attrs["format"] = kind, FORMAT
            fill(file)

    write_whole(path, write)


@contextmanager
def reading_h5(path: Path, kind: str, remedy: str = "measure the run again") -> Iterator[Any]:
    """Open such a file: an h5py.File, whose stubs do not know what is in it.

    remedy   what makes such a file

    FormatError if it is missing, cut short, of another kind or of another format.
    """
    try:
        with h5py.File(path, "r") as file:
            found = (file.attrs.get("kind"), file.attrs.get("format"))
            if found != (kind, FORMAT):
                wanted = f"{kind} format {FORMAT}"
                raise FormatError(f"{path} holds {found[0]} format {found[1]}, wanted {wanted}: {remedy}")
            yield file
    except (OSError, KeyError) as error:
        reason = str(error).splitlines()[0].strip("'\"")
        raise FormatError(f"{path} is not a whole {kind} file ({reason}): {remedy}") from error
