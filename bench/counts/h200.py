"""Every figure of an H200 that the model goes by."""

# NVIDIA H100 Tensor Core GPU Architecture whitepaper, SXM5, whose processors an H200 has: 132 SMs
SMS = 132
# each with 4 schedulers that issue an instruction for 32 threads in a clock
ISSUE = 4 * 32
# and 64 lanes of float64
FLOAT64 = 64
# CUDA C++ Programming Guide, throughput of arithmetic instructions, compute capability 9.0: results
# of a conversion from or to 64-bit types in a clock
CONVERSIONS = 16
# 65 536 registers, given out by 8 to a thread and by warp; at most 16 programs of 128 threads
REGISTERS = 65_536
THREADS = 2048
# boost clock, Hz
CLOCK = 1.98e9
# bytes a second of a copy, of 4.8e12 by the datasheet: as others measured
COPY = 4.3e12
# bytes that the driver reports; what of it holds data read through either half is not published, so
# the model goes by both of these
L2 = 60_000_000
L2_MODELLED = (50_000_000, 30_000_000)
# clocks from a load to its use, assumed: (device memory, L2) at the low and at the high end
LATENCIES = ((600, 280), (900, 350))


def programs(registers: int, warps: int = 4) -> int:
    """How many programs of some warps fit the registers of an SM."""
    by_warp = -(-registers // 8) * 8 * 32
    # a scheduler has a quarter of the registers, and each warp is one scheduler's
    return min(THREADS // (32 * warps), 4 * (REGISTERS // 4 // by_warp) // warps)
