"""The errors of the pipeline. Each message is one line for the user: place, value, remedy."""

from __future__ import annotations

from graphhash.errors import GraphHashError


class ServeError(GraphHashError, RuntimeError):
    """The server cannot start. The message is one line."""


class ConfigError(GraphHashError, ValueError):
    """A setting that is unknown, of the wrong type, impossible, or in contradiction with another one."""


class TrackingError(GraphHashError, RuntimeError):
    """The MLflow store cannot be reached, or refused what it was given."""


class RegistryError(GraphHashError, RuntimeError):
    """A bundle that must not take the alias."""


class TuneError(GraphHashError, RuntimeError):
    """No trial of a search came to its end."""


class CompareError(GraphHashError, RuntimeError):
    """Cells of a comparison failed."""


class JobError(GraphHashError, RuntimeError):
    """The cluster cannot be reached, or the job did not succeed."""


class RunFolderError(GraphHashError, RuntimeError):
    """The run folder is in use by another process, cannot be written, or lacks what a stage needs."""
