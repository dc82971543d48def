"""Numbers found by measuring, on which speed depends and nothing else; beside each what found it.

Whoever changes one measures again, on two kinds of processor, by ``python -m benchmarks.rounds`` where only
a workload is named; ``benchmarks/RESULTS.md`` has the figures.
"""

CHUNK_BYTES = 24 << 20
"""Weights, inputs and gradients that a chunk may touch: a third of the last cache (W4, chunk by chunk)."""

MOST_CLIENTS = 64
"""Clients of a chunk: from there on only memory grows (``benchmarks.scaling``)."""

STACKED_BYTES = 1 << 20
"""Weights that stacking may hold: one core's second cache (``benchmarks.scaling``)."""

SMALL = 8
"""Clients in ``STACKED_BYTES`` from which on stacking beats one after another (``benchmarks.scaling``)."""

SMALL_PRIVATE = 24
"""The same of private steps, which hold a gradient of each example too (``benchmarks.privacy cost``)."""

GROUP = 64
"""Clients one after another in one call, whose updates are only averaged (``benchmarks.general``)."""

LARGE = 1 << 23
"""Multiplications of a product from which on bfloat16 is worth the way there and back (W1, W4 in bf16)."""

CLOSING = 1 << 13
"""Weights of a last layer up to which one loop takes its whole step (``benchmarks.kernels``: W1, W4)."""

OWN_PRODUCTS = 1 << 14
"""Numbers of a model from which on loops take a private lock-step's products (W3)."""

TALL = 600
"""Rows of a product at a time: with thousands at once the library is a sixth slower (W4)."""

SPARSE_RATE = 2.5
"""How much faster a product with zeros and all is, for each number in it (W1: a fifth is not 0)."""

LEFT_OUT = 1 / 8
"""Share of the inputs that are 0 in all examples from which on products do without them (W1)."""

AGAIN = 8
"""Times that the same clients must come together before their examples are put into one matrix (W1)."""

CHUNKS_KEPT = 128 << 20
"""Bytes of data and Gram matrices that are kept from round to round (W4)."""

MEMORY_KEPT = 32 << 20
"""Bytes of clients' copies that are lent again: new pages cost more than filling them (W3)."""

GRADIENTS_WRITTEN = 64 << 20
"""Numbers that the gradients of a client's batch may have, where a front's are written out (W5)."""

RATE_ALL = 95.0
"""Operations a nanosecond of one product for all clients (``dual.pays``; W1, one core, AVX-512)."""

RATE_COPIES = 50.0
"""Of each client's few rows with its own copy of a weight."""

RATE_MET = 45.0
"""Of coefficients with the rows of a first layer's examples."""

RATE_WRITTEN = 40.0
"""Of rows that are written down with those before."""

RATE_WHOLE = 80.0
"""Of whole visits, one after another in a core's cache (W1 on the digits)."""

CALLS = 2500.0
"""Nanoseconds that the calls of a layer's step in lock-step cost each of ten clients (the same)."""
