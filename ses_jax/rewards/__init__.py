"""How good an image is for a prompt, as numbers to maximise.

spec          `load_reward`, `RewardSpec`: rewards from names, functions and mappings of these to weights
device_parts  the parts that run on the device, as one pure function
meaning       what a user's function computes, to be compared
reward        `Reward`: one or more parts, published scorers or functions of the user
scorers       the published scorers, `KINDS`
host          calls of users' functions
mixture       parts to one score
images        what people hand over as images and prompts, as arrays and strings
preprocess    images to the pixels that a scorer sees
resample      the resize of Pillow, on the device
"""
