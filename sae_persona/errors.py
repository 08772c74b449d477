"""What can go wrong through no fault of ours, as one small tree.

    SaePersonaError
    ├── ConfigError   a setting that cannot be            (also a ValueError)
    ├── DataError     texts, labels or activations        (also a ValueError)
    ├── ModelError    a model, layer or hook point        (also a LookupError)
    ├── FormatError   a file that we cannot read          (also a ValueError)
    └── RunError      a run folder or the machine         (also a RuntimeError)

A message is one line: what was wanted, what came, what to do. The command line prints it and exits 2.
"""


class SaePersonaError(Exception):
    """The parent of every error that a caller can cause."""


class ConfigError(SaePersonaError, ValueError):
    """A setting is out of its range, or two settings exclude each other."""


class DataError(SaePersonaError, ValueError):
    """Texts, labels or activations are missing, empty, of one class or not finite."""


class ModelError(SaePersonaError, LookupError):
    """A model, layer or hook point does not exist, or is not the one that is wanted."""


class FormatError(SaePersonaError, ValueError):
    """A file is corrupt, of another version or not what its name says."""


class RunError(SaePersonaError, RuntimeError):
    """A run folder is incomplete or in the way, or the disk refused."""
