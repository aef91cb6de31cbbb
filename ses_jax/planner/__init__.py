"""What a search needs and how long it takes, said without weights and without the device.

plan         `plan`, `Plan`
tables       plans for people
advice       what makes a search fit
need         bytes, candidates at a time and seconds on a machine
compilation  what a device's own compiler says, without the device
workload     the programs of a search as shapes
footprint    bytes of its temporaries
buffers      which arrays are in memory at once
splits       where a mesh splits its arrays
hlo          what is in an optimised program
topologies   devices that need not be there, for compilers
devices      what is known of accelerators
"""
