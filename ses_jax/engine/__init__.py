"""The search itself, and rendering without one.

search       `search`, `generate`: the public calls
output       the folder that a search is saved to
models       the pipeline and the reward of a search, loaded and kept for the next one
runner       searches for one or more prompts at once
finals       what they found, and its images
generations  compiled steps until the budget is spent
hosted       a generation whose reward has parts on the host
identity     what a search is, for its result and for whoever continues it
ahead        programs compiled while others run
outline      a search as shapes, and its programs lowered
cases        which prompts, with which seeds
tasks        a search made ready: prompts encoded, noise split, weights placed
generation   the compiled part
looks        cheaper looks at candidates, before the full previews of the best
gradients    full previews with the gradients of their scores
previews     few-step images of candidates, and their scores
program      what a compiled generation is given and gives
denoising    rows of noise to images, on meshes and in chunks
config       `SearchConfig` and the other settings
placement    the settings that say which model, and where
settings     what a setting is
fidelity     which looks there are
evaluations  what a network evaluation is
base         a noise that searches start from, where it is given
result       `SearchResult` and its folder
lock         one process at a time in a folder
stopping     Ctrl-C and SIGTERM
repeat       the command, the call and the text that stand for a result
saved        a result's folder read again
watching     what is seen of a search while it runs
records      what a search notes down
cost         what it took: network evaluations, FLOPs, seconds
progress     what it shows
resume       what it saves on its way
kept         what it knew in the end, to go on with a larger budget
memory       how many candidates at a time fit on a device
flops        floating point operations of a traced program
files        files that appear whole or not at all
"""
