"""`monkeyjump bench`: what an adapter costs in time and memory, side by side with PEFT's own methods.

Every figure is measured for all candidates in one run. Times are interleaved (one round runs every
candidate once, the next round in the opposite order), so that a machine that gets slower does so for
all of them, and ratios are taken within a round. Memory is measured in a process of its own each.

    settings.py    what is measured, and its checks
    candidates.py  a name -> a model
    timing.py      interleaved rounds, medians, ratios with their intervals
    passes.py      what one timed pass is: training step, forward, prefill, decode
    memory.py      saved activations, exactly; peak memory of a process
    child.py       the process that measures the peak of one candidate
    size.py        parameters, files, k-means
    run.py         all sections -> one record
    report.py      the record -> tables, JSON, the columns of the paper's Figure 2
    figure.py      those columns as a picture
"""
