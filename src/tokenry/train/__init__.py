"""train: how to teach with token-level signal?"""

from ..lazy import exports

_HOMES = {
    "DeadEndValueModel": ".dead_end",
    "FTPO": "ftpo",
    "FTPOCollator": "ftpo",
    "FTPOConfig": "ftpo",
    "FTPOOutput": "losses",
    "FTPOTrainer": "ftpo",
    "FinalTokenDPOTrainer": "ftpo",
    "SkipDecodeConfig": "skipdecode",
    "SkipDecodeTrainer": "skipdecode",
    "final_token_dpo_loss": "losses",
    "ftpo_loss": "losses",
    "score_pairs": "ftpo",
    "MaskedDiffusionTrainer": "diffusion",
    "masked_diffusion_loss": "diffusion",
    "Rectifier": "rectifier",
    "RectifierCollator": "rectifier",
    "RectifierConfig": "rectifier",
    "RectifierTrainer": "rectifier",
    "keep_extremes": "rectifier",
    "read_episodes": "rectifier",
    "sarsa_loss": "rectifier",
    "TiDARLoss": "tidar",
    "TiDARTrainer": "tidar",
    "TrainMethod": "method",
    "balance_pairs": "pairs",
    "pairs_from_rewinds": "pairs",
    "pairs_from_text": "pairs",
    "read_pairs": "pairs",
    "lora_last_layers": "lora",
    "merged": "lora",
    "save_adapter": "lora",
    "tidar_loss": "tidar",
}
__all__ = sorted(_HOMES)
__getattr__ = exports(__name__, _HOMES)
