"""Errors that a caller may want to catch. Each message names the input, the cause and the remedy."""


class InputError(ValueError):
    """Prompt, image, audio clip or argument that cannot be processed."""


class MediaError(InputError):
    """Image, audio clip or video that cannot be opened, decoded or used."""


class ContextLengthError(InputError):
    """Prompt that is longer than the context."""


class ConfigError(ValueError):
    """Unsupported setting in `config.json`."""


class CheckpointError(ValueError):
    """Checkpoint with a missing, extra, misshapen or otherwise unusable file or tensor."""
