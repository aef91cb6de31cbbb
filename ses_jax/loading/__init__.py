"""Weights and where they lie: from the hub or a folder, published or converted, onto devices that programs run on.

hub          `resolve` a source to a folder; read one network of it
tokenizers   transformers' tokenizers
folder       convert whole checkpoint folders, either way
network      one network's folder, in either form
configs      what its config says, and which file its weights are in
adapters     LoRA and its relatives, merged into weights while these are read
lora_files   where adapters come from
checkpoint   params on disk in our own form (Orbax)
rows         large stacks of layers in it, a layer at a time
partition    meshes of devices, and where each leaf of the params lies on them
formats      how kernels lie in a TPU's memory
programs     what is compiled, and kept for later calls
compiler     what XLA is told of a program, by its device
"""
