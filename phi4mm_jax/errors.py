"""The errors a caller may want to catch. Each message names the input, the cause and the remedy."""


class InputError(ValueError):
    """A prompt, image, audio clip or argument that cannot be processed."""


class ConfigError(ValueError):
    """A `config.json` that asks for something this implementation does not support."""


class CheckpointError(ValueError):
    """A checkpoint with a missing, extra, misshapen or otherwise unusable file or tensor."""
