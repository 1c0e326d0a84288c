"""The one error a user can cause: input that is refused in one sentence."""


class InputError(ValueError):
    """Input that cannot be used. The message names the value, the allowed range and the remedy."""
