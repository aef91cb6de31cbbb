"""Families of text-to-image models, one file each, behind one interface.

registry     `load_pipeline`, `abstract_pipeline`, `FAMILIES`
base         `Pipeline`, and what a family has to define
flux1        FLUX.1 dev and schnell
flux2        FLUX.2 dev, klein and klein base
qwen_image   Qwen-Image
z_image      Z-Image and Z-Image-Turbo
guidance     what families take for guidance, and the two branches of the classifier-free kind
schedule     noise levels
sampler      from noise to latents
"""
