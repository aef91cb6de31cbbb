"""Results taken elsewhere and back: other programs' noise, pictures that say how they were made, commands to repeat.

export       a found noise as a folder for diffusers or ComfyUI
comfyui      the workflow and the custom node of ComfyUI
noises       noise from arrays, tensors and files, in any layout that a family's noise has elsewhere
pictures     PNG, JPEG and WebP files that carry their settings
repeat       the command, the Python call and the text that stand for a result
flux1, flux2, qwen_image, z_image
             what diffusers and ComfyUI call the settings of a family, and how they lay out its noise
layouts      what the families share
"""
