"""The search itself, and rendering without one.

search       `search`, `generate`: the public calls
models       the pipeline and the reward of a search, loaded and kept for the next one
runner       generations, final renders, results of one or more prompts at once
outline      a search as shapes, and its programs lowered
tasks        a search made ready: prompts encoded, noise split, weights placed
generation   the compiled part
looks        cheaper looks at candidates, before the full previews of the best
previews     few-step images of candidates, and their scores
program      what a compiled generation is given and gives
denoising    rows of noise to images, on meshes and in chunks
config       `SearchConfig` and the other settings
settings     what a setting is
fidelity     which looks there are
evaluations  what a network evaluation is
base         a noise that searches start from, where it is given
result       `SearchResult` and its folder
watching     what is seen of a search while it runs
repeat       the command, the call and the text that stand for a result
records      what a search notes down
cost         what it took: network evaluations, FLOPs, seconds
progress     what it shows
resume       what it saves on its way
memory       how many candidates at a time fit on a device
flops        floating point operations of a traced program
files        files that appear whole or not at all
"""
