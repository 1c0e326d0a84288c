"""decode.denoising"""
