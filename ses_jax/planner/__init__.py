"""What a search needs and how long it takes, said without weights and without the device.

plan         `plan`, `Plan`
workload     the programs of a search as shapes
flops        floating point operations of a traced program
footprint    bytes of its temporaries
devices      what is known of accelerators
"""
