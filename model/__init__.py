"""Reference stack: a small, really trained text-to-video system that proves the kernels.

A procedural world (:mod:`model.world`) renders captioned clips, a causal video VAE
(:mod:`model.vae`) compresses them, and a packed diffusion transformer generates them.
"""
