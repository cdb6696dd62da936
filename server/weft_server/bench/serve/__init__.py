"""`weft bench serve`: open-loop load over HTTP, on a running server or one that it starts itself.

Requests leave at the trace's times whether or not earlier ones have been answered, as users' do; how late the
client was itself is part of the result.

    arguments    flags
    workload     who asks what when
    server       starting and stopping `weft serve`
    target       the server that the load is sent to, with its tenants and adapters
    client       one request over a connection that is kept, streamed
    load         requests at their times
    tenants      keys, adapters and finetune jobs of the tenants
    measures     latencies, goodput, errors, lag
    main         the phases in order; `report` and `figure` show them
"""
