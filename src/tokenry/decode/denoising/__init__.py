"""denoising: masked-diffusion decoding: its loop, state, rules, transforms and caches."""
