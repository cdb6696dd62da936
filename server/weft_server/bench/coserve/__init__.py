"""`weft bench coserve`: how much finetuning fits beside inference, for Weft and for its rivals.

One run on one machine, engine against engine, without HTTP. Every contender is a process of its own that is
told over a pipe what to run (`process`, `child`), with the same weights, adapters and arrivals in real time.

    workload          the requests of a window
    window            what a contender is asked to run, and what it answers
    replay            arrivals by the clock, and when each token came
    weft_contender    one `Engine`: inference, training, co-serving or alternating iterations
    peer_generator    transformers + PEFT, continuous batching
    peer_trainer      transformers + PEFT, a training loop
    turns             how the two peers take turns
    measures          attainment, percentiles and what was kept, of windows
    tuning            threads, wait policy and priority of each contender
    options           what a run measures; `main` the phases of a run, in order
    results           everything that was found; `report` and `figure` show it
"""
