"""tokenize: how does raw input become tokens?"""

from ..lazy import exports

_HOMES = {
    "KL3M": "kl3m",
    "train_char_bpe": "kl3m",
    "train_domain_bpe": "kl3m",
    "custom_tokens": "custom",
    "boundary_stability": "measures",
    "term_lengths": "measures",
    "token_size_profile": "measures",
    "tokens_per_character": "measures",
    "ocr_errors": "noise",
    "TokenizerReport": "report",
    "load_tokenizer": "report",
    "token_pieces": "report",
    "tokenizer_report": "report",
}
__all__ = sorted(_HOMES)
__getattr__ = exports(__name__, _HOMES)
