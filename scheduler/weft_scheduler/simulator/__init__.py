"""Traces replayed through the real scheduler on a simulated device, in virtual time.

trace, readers, servegen        what is asked for, and when
shapes, gpus, device_model      how long a device takes for it
device, paging, jobs            the device, its adapters, its finetune jobs
simulation                      the loop
recorder, report, timeline      what was measured
capacity                        how many devices a trace needs
fitted                          a device as a real run learnt it
"""
