"""Studies: many runs from one file, compared by one table.

spec.py        reads and checks a study's file
arms.py        combines factors to arms, each with a config and a name
matching.py    lengths of the runs, so that arms cost equally many steps, images or FLOP
identity.py    digests that identify cells, data and protocols
cells.py       cells and baselines; plan.py checks a study and makes them
jobs.py        the state of each, and the files that workers read; cost.py: hours from measured steps
records.py     results of finished cells as small JSON files
worker.py      trains and evaluates one cell, in a process of its own
local.py       the queue of this machine; array.py: one Slurm array
statistics.py  paired differences, intervals and the number of seeds
summary.py     figures of all arms; report.py, figures.py: tables and plots of them
"""
