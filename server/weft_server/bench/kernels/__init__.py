"""`weft bench kernels`: each operator by its package's entry point, against its definition, the roofline and
other libraries' kernels.

`case` is what a measurement is made of; `lora`, `linear`, `attention`, `pointwise` and `transfer` name the
cases, a few lines each; `main` checks and times them.
"""
