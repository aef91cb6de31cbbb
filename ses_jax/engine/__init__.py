"""The search itself, and rendering without one.

search       `search`, `generate`: the public calls
models       the pipeline and the reward of a search, loaded and kept for the next one
runner       generations, final renders, results of one or more prompts at once
outline      a search as shapes, and its programs lowered
tasks        a search made ready: prompts encoded, noise split, weights placed
generation   the compiled part
looks        of it, cheaper looks at candidates before their full previews
previews     of it, few-step images and their scores
program      what it is given and gives
denoising    of it, rows of noise to images
config       `SearchConfig` and the other settings
settings     what a setting is
fidelity     which looks there are
evaluations  what a network evaluation is
result       `SearchResult` and its folder
records      what a search notes down
cost         what it took: network evaluations, FLOPs, seconds
progress     what it shows
resume       what it saves on its way
memory       how many candidates at a time fit on a device
flops        floating point operations of a traced program
"""
