"""Times and memory of networks, each contender in a process of its own.

    driver (comparison)  --JSON lines-->  worker (one contender): load, prepare, time, memory

A fresh process for each contender keeps allocators, thread pools and compilers from helping or hindering one another.
The driver lets the workers run in turn, round after round, all others stopped, so that a drift of the machine's speed
meets all of them alike; see :mod:`bcos_rt.benchmark.comparison`.

``bcos-rt bench`` measures what an installed package has; ``bench/explain.py`` of the repository adds contenders.
"""
