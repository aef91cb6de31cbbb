"""Families of text-to-image models, one file each, behind one interface.

registry     `load_pipeline`, `abstract_pipeline`, `FAMILIES`
base         `Pipeline`, and what a family has to define
flux1, flux2, qwen_image, z_image
guidance     what families take for guidance; schedule: noise levels; sampler: from noise to latents
"""
