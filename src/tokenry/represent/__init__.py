"""represent: what do the tokens amount to?"""

from ..lazy import exports

_HOMES = {
    "PROMPTS": "prompts",
    "PromptEmbedder": "prompts",
    "clean_up": "prompts",
    "Prepending": "token_prepending",
    "TokenPrepending": "token_prepending",
    "TokenPrependingTransformer": "sentence_transformer",
}
__all__ = sorted(_HOMES)
__getattr__ = exports(__name__, _HOMES)
