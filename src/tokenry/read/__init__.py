"""read: what does a token carry?"""

from ..lazy import exports

_HOMES = {
    "LMHeadNeurons": "lm_head_neurons",
    "NeuronMap": "neuron_map",
    "Overlap": "neuron_map",
    "Reading": "reading",
    "clamp_effect": "lm_head_neurons",
    "top_tokens": "directions",
}
__all__ = sorted(_HOMES)
__getattr__ = exports(__name__, _HOMES)
