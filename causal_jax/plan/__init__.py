"""Will it fit, and how fast could it be: a config compiled ahead of time for chips nobody here has.

chips.py     generations and topologies          hlo.py      the compiled text: collectives, traffic
programs.py  the step, prefill, decoding         flops.py    operations of the traced program
estimate.py  memory, roofline, advice            search.py   other meshes, remat, microbatches
show.py      table and picture                   __main__.py the command
"""
