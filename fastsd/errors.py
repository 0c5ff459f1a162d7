"""Every error that fastsd raises on purpose.

    FastsdError
    ├── UsageError          an argument is wrong: unknown, misspelt, out of range (a ValueError)
    │   └── UnknownName     an attribute that we do not have (an AttributeError too)
    ├── CheckpointError     a model folder or file cannot be read, or its keys do not fit
    ├── ArtifactError       an exported engine cannot be written or used
    │   ├── DamagedArtifact    a file is missing, cut or changed
    │   ├── StaleArtifact      made for another format, machine, version or other weights
    │   └── UntrustedArtifact  native code from elsewhere
    ├── MissingDependency   an optional package is needed; the message names the extra to install
    ├── NumericsError       NaN or infinity in latents or picture
    └── OutOfMemory         the device's memory does not suffice

A message says what was given, what was expected and what to do. Knows nothing of the rest.
"""


class FastsdError(Exception):
    """Any failure that fastsd explains; the base of the tree above."""


class UsageError(FastsdError, ValueError):
    """Refuse an argument: say what was given, what was expected, what to do."""


class UnknownName(UsageError, AttributeError):
    """Refuse an attribute: say what stands in its place."""


class CheckpointError(FastsdError):
    """Refuse a checkpoint: say which file or key, what was expected, what to do."""


class ArtifactError(FastsdError):
    """Refuse an exported engine: say which file or part, why, and how to get a good one."""


class DamagedArtifact(ArtifactError):
    """Refuse an artifact whose files are not those that were exported."""


class StaleArtifact(ArtifactError):
    """Refuse an artifact of another format, machine, library version or source weights."""


class UntrustedArtifact(ArtifactError):
    """Refuse native code that this user did not export; the message says how to trust it."""


class MissingDependency(FastsdError, ImportError):
    """Name the extra that installs what is missing."""


class NumericsError(FastsdError):
    """Report NaN or infinity, with where it appeared and what usually helps."""


class OutOfMemory(FastsdError, MemoryError):
    """Report that memory ran out, with what lowers the need."""
