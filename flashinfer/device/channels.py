"""Channels between the warps of a Hopper kernel: who may touch which shared memory, and when.

A producer fills tiles, by TMA or by asynchronous copies of its threads; consumer warpgroups read them. "Full" is an
mbarrier on which the bytes arrive. "Empty" is a named hardware barrier: mbarrier.arrive costs a barrier of the whole
warpgroup in Gluon's lowering, a named one does not. The n-th tile of a ring lies in stage n modulo STAGES; both
sides count n alike. `tests/unit/test_channels.py` holds a model of the protocol.
"""

import math

from flashinfer.device.gluon import aggregate, constexpr_function, copy_arrive, fence_async_shared, gl, jit, mbarrier

CONSUMER_THREADS = gl.constexpr(128)
# Hardware barriers from here to 15 are those that the compiler leaves free, with up to three roles.
FIRST_BARRIER = gl.constexpr(6)


@jit
def _named_barrier(WHAT: gl.constexpr, barrier, threads):
    gl.inline_asm_elementwise(
        "bar." + WHAT + " $1, $2; mov.u32 $0, $1;",
        "=r,r,r,~{memory}",
        [gl.to_tensor(barrier), gl.to_tensor(threads)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@jit
def named_sync(barrier, threads):
    """Wait on hardware barrier `barrier` until `threads` threads have come to it, those that only arrive included."""
    _named_barrier("sync", barrier, threads)


@jit
def named_arrive(barrier, threads):
    """Count the calling threads at hardware barrier `barrier` and go on."""
    _named_barrier("arrive", barrier, threads)


@aggregate
class Ring:
    """Tiles that go from the producer to every consumer.

    parts `[stages * PARTS, rows, columns]`: as the consumers read them. boxes: the same memory as TMA fills it, BOXES a
    tile. full: one mbarrier a stage, of count 1 under TMA, of one a producer thread where these copy, of both where
    copies come beside TMA's boxes. EMPTY: hardware barrier of stage 0, the next ones are those of the next stages.
    SHIFT: log2 of STAGES, -1 where that is no power of two. COPIED: the producer's threads copy what products read,
    instead of TMA. Two rings may share `full` and EMPTY where their tiles come and go together: one of them is
    acquired, expected, waited for and released.
    """

    parts: gl.shared_memory_descriptor
    boxes: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    STAGES: gl.constexpr
    SHIFT: gl.constexpr
    PARTS: gl.constexpr
    BOXES: gl.constexpr
    BYTES: gl.constexpr
    EMPTY: gl.constexpr
    THREADS: gl.constexpr
    COPIED: gl.constexpr

    @constexpr_function
    def __init__(self, parts, boxes, full, STAGES, EMPTY, CONSUMERS, PRODUCER_THREADS, COPIED):
        self.parts = parts
        self.boxes = boxes
        self.full = full
        self.STAGES = gl.constexpr(STAGES)
        self.SHIFT = gl.constexpr(STAGES.bit_length() - 1 if STAGES & (STAGES - 1) == 0 else -1)
        self.PARTS = gl.constexpr(parts.shape[0] // STAGES)
        self.BOXES = gl.constexpr(boxes.shape[0] // STAGES)
        self.BYTES = gl.constexpr(math.prod(parts.shape) // STAGES * parts.dtype.primitive_bitwidth // 8)
        self.EMPTY = gl.constexpr(EMPTY)
        self.THREADS = gl.constexpr(CONSUMERS * CONSUMER_THREADS.value + PRODUCER_THREADS)
        self.COPIED = gl.constexpr(COPIED)

    @jit
    def stage(self, n):
        if self.SHIFT >= 0:
            return n & (self.STAGES - 1)
        else:
            return n % self.STAGES

    @jit
    def phase(self, n):
        """Parity of the round in which tile n comes to its stage."""
        if self.SHIFT >= 0:
            return (n >> self.SHIFT) & 1
        else:
            return (n // self.STAGES) & 1

    @jit
    def acquire(self, n):
        """Producer: wait until the stage of tile n is free."""
        if n >= self.STAGES:
            named_sync(self.EMPTY + self.stage(n), self.THREADS)

    @jit
    def expect(self, n, BESIDE: gl.constexpr = 0):
        """Producer, before TMA: announce the bytes of tile n, and BESIDE bytes of another ring's that come with it."""
        mbarrier.expect(self.full.index(self.stage(n)), self.BYTES + BESIDE)

    @jit
    def expect_nothing(self, n):
        """Producer: no bytes come in the place of tile n, which consumers wait for but do not release."""
        mbarrier.expect(self.full.index(self.stage(n)), 0)

    @jit
    def box(self, n, i):
        """Where box i of tile n lies."""
        return self.boxes.index(self.stage(n) * self.BOXES + i)

    @jit
    def landing(self, n):
        """Producer: the mbarrier on which the boxes of tile n arrive."""
        return self.full.index(self.stage(n))

    @jit
    def deliver(self, n):
        """Producer, after its copies: tile n is full once those of all threads have landed; nothing waits."""
        copy_arrive(self.full.index(self.stage(n)), increment_count=False)

    @jit
    def drain(self, n, BEYOND: gl.constexpr = 0):
        """Producer: after n tiles, meet the consumers' last releases; a barrier must not be left half counted.

        BEYOND: places acquired after those tiles.
        """
        for i in range(gl.maximum(n + BEYOND - self.STAGES, 0), n):
            named_sync(self.EMPTY + self.stage(i), self.THREADS)

    @jit
    def wait(self, n, pred=True):
        """Consumer: wait until tile n has arrived, if `pred`."""
        mbarrier.wait(self.full.index(self.stage(n)), self.phase(n), pred=pred)
        if self.COPIED:
            # Threads write through the generic proxy, products read through the asynchronous one.
            fence_async_shared()

    @jit
    def part(self, n, i):
        """Part i of tile n: for consumers after `wait`, for a copying producer after `acquire`."""
        return self.parts.index(self.stage(n) * self.PARTS + i)

    @jit
    def release(self, n):
        """Consumer: tile n has been read; every warpgroup releases every tile."""
        named_arrive(self.EMPTY + self.stage(n), self.THREADS)


@aggregate
class Turns:
    """Warpgroups take turns at the tensor cores, so that one computes exponentials while another multiplies.

    FlashAttention-3's ping-pong (Shah et al., arXiv 2407.08608, section 3.1), for COUNT warpgroups of which this is
    number ME. FIRST: hardware barrier of warpgroup 0, the next ones are those of the next warpgroups.
    """

    FIRST: gl.constexpr
    ME: gl.constexpr
    COUNT: gl.constexpr

    @constexpr_function
    def __init__(self, FIRST, ME, COUNT):
        self.FIRST = gl.constexpr(FIRST)
        self.ME = gl.constexpr(ME)
        self.COUNT = gl.constexpr(COUNT)

    @jit
    def begin(self):
        """Warpgroup 0 has the first turn."""
        if self.ME == self.COUNT - 1:
            named_arrive(self.FIRST, 2 * CONSUMER_THREADS)

    @jit
    def take(self):
        named_sync(self.FIRST + self.ME, 2 * CONSUMER_THREADS)

    @jit
    def give(self):
        named_arrive(self.FIRST + (self.ME + 1) % self.COUNT, 2 * CONSUMER_THREADS)

    @jit
    def end(self):
        """Take the turn that nobody wants any more."""
        if self.ME == 0:
            named_sync(self.FIRST, 2 * CONSUMER_THREADS)
