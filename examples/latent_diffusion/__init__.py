"""A small latent diffusion trainer: photographs, VAE, latents, denoiser, LoRA, report.

Each file is one concern; `pipeline.py` is the order in which they are used.
"""
