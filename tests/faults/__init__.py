"""The fault campaign: a study is killed, starved and torn while it runs, and must end as one that was left alone.

`python -m tests.faults` runs it from the project's root; `--help` says more. Two parts:

* `campaign` makes the quick profile through DVC and kills it at random moments, again and again.
* the scenarios make each other fault once, on a small study (`study.py`), for real wherever that can be done.

What happened inside the processes is told by witnesses that Python starts with them (`inside/sitecustomize.py`).
"""
