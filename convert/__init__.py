"""Weights between the published layout (safetensors) and our params: one strict engine, one table per network.

    published tensors --(table of rules)--> params --(the same table)--> published tensors

`ses-jax convert`, or `python -m ses_jax.convert`, converts whole checkpoint folders, either way.
"""
