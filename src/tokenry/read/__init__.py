"""read: what does a token carry?"""

from ..lazy import exports

_HOMES = {
    "DifficultyLabels": "difficulty_probe",
    "EntropyProfile": "difficulty_probe",
    "LMHeadNeurons": "lm_head_neurons",
    "NeuronMap": "neuron_map",
    "Overlap": "neuron_map",
    "Reading": "reading",
    "clamp_effect": "lm_head_neurons",
    "entropy_profile": "difficulty_probe",
    "label_by_entropy": "difficulty_probe",
    "token_entropy": "difficulty_probe",
    "top_tokens": "directions",
}
__all__ = sorted(_HOMES)
__getattr__ = exports(__name__, _HOMES)
