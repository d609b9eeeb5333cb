"""Errors that a user can act on: one sentence saying what, where, why, and what to type next."""


class BrainToTextError(Exception):
    """Base of every error raised on purpose; front doors print it without a traceback."""


class ConfigError(BrainToTextError):
    """A configuration key, value or combination that cannot work."""


class DataError(BrainToTextError):
    """A dataset, file or trial that breaks the schema, is damaged or has changed."""


class StorageError(BrainToTextError):
    """A bucket, prefix, object or folder that cannot be reached, read or written."""


class CheckpointError(BrainToTextError):
    """A checkpoint that cannot be written, read, or resumed from."""


class TrainingError(BrainToTextError):
    """A run that cannot go on: divergence, out of memory, no data to train on."""


class JobError(BrainToTextError):
    """A SageMaker job, image or account that is not as it must be."""
