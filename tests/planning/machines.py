"""A machine to plan for, so that forecasts do not hang on the one that tests run on."""

from smidgen.planning.planner import Machine

MACHINE = Machine(
    gflops=50.0,
    weights_per_s=5e9,
    disk_bytes_per_s=1e9,
    framework_bytes=280_000_000,
    library_bytes=100_000_000,
    threads=2,
)
