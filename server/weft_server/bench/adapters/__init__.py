"""`weft bench adapters`: what it takes until an adapter can be used, from every place that it may lie in.

`main` is the command; `route` the way into the arena and its stages; `stores` where the adapter is put, a
Redis server of the benchmark's own included; `page_cache` and `bare_redis` what ceilings are measured with;
`peer` PEFT's load of the same files; `report` the tables.
"""
