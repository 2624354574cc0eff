"""Launch twice without a GPU, by a driver that notes what reaches its launch function.

    python tests/support/fake_launches.py cuda|hip

Not in the interpreter, whose kernels are of another kind: `test_launched.py` runs this in a process
of its own. The launchers are Triton's; only what would call the driver's library is replaced.
"""

import dataclasses
import os
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch
from triton import knobs
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from bench import driver
from bngd_triton.kernels import devices
from bngd_triton.kernels.fused_step import FusedStep
from bngd_triton.options import Options
from bngd_triton.records import functional_inputs, functional_tensors

CPU = torch.device("cpu")


def flat(arguments):
    """With tensors by their addresses, and without metadata that is for hooks alone."""
    kinds = ("HookChain", "LazyDict")
    return [
        one.data_ptr() if isinstance(one, torch.Tensor) else one
        for one in arguments
        if type(one).__name__ not in kinds
    ]


def assert_agree(ordinary, quick):
    """The same arguments, of the same types."""
    assert len(ordinary) == len(quick)
    for one, other in zip(ordinary, quick):
        assert flat(one) == flat(other)
        assert list(map(type, flat(one))) == list(map(type, flat(other)))
        assert driver.STREAM in other


class Counted:
    """Steps, what they launch, and how often Triton's dispatch is asked."""

    def __init__(self, backend):
        self.launched = []
        self.dispatched = 0
        driver.install(backend, self._launch)
        run = JITFunction.run

        def noting(kernel, *args, **kwargs):
            self.dispatched += 1
            return run(kernel, *args, **kwargs)

        mock.patch.object(JITFunction, "run", noting).start()
        # a slice with spans and a tile, in two batches
        shapes = [(n, kind) for kind in (torch.float32, torch.bfloat16) for n in (9000, 16)]
        params, grads = ([torch.zeros(n, dtype=kind) for n, kind in shapes] for _ in range(2))
        self.options = [Options()]
        momenta = [torch.zeros(n) for n, _ in shapes]
        self.members = functional_tensors(params, grads, momenta, None, None, self.options[0])
        self.inputs = functional_inputs(params, True, None, None, None)

    def _launch(self, *arguments):
        # 3.6 passes the kernel's arguments in line, 3.7 in a tuple
        flat = arguments[:-1] + arguments[-1] if type(arguments[-1]) is tuple else arguments
        self.launched.append(flat)

    def run(self, prepared):
        """What a step launches, and how often it asks Triton's dispatch."""
        self.launched, self.dispatched = [], 0
        prepared.update(self.members, self.options, self.inputs)
        return self.launched, self.dispatched

    def measure_and_move(self, prepared):
        """The step of sharded tensors, whose tables are new every time."""
        self.launched, self.dispatched = [], 0
        tables = prepared.measure(self.members, self.options, self.inputs)
        prepared.update_by(tables, self.inputs)
        return self.launched, self.dispatched, tables


def main(backend):
    """Check every launch of a step in either form."""
    assert os.environ.get("TRITON_INTERPRET", "0") != "1"
    counted = Counted(backend)
    name = {"cuda": "sm_90", "hip": "gfx942"}[backend]
    usual = devices.TABLE[name].tuning

    for form, launches in (("two-launch", 6), ("single-launch", 4)):
        tuning = dataclasses.replace(usual, form=form)
        prepared = FusedStep(counted.members, counted.options, tuning)
        ordinary, dispatches = counted.run(prepared)
        assert (len(ordinary), dispatches) == (launches, launches), (len(ordinary), dispatches)
        quick, dispatches = counted.run(prepared)
        assert (len(quick), dispatches) == (launches, 0), (len(quick), dispatches)
        assert_agree(ordinary, quick)

        # the launch gets what it is given, not what it was given
        clock = counted.inputs.clocks[CPU] = counted.inputs.clocks[CPU].clone()
        for launched, dispatches in (counted.run(prepared), counted.run(prepared)):
            assert dispatches == 0
            assert any(one is clock for one in launched[0]), "the tiles' clock"

        # the driver's launcher calls them
        hook = knobs.runtime.launch_enter_hook
        hook.add(print)
        for launched in counted.run(prepared)[0]:
            assert any(one is hook for one in launched), "a profiler does not see every launch"
        hook.remove(print)

    apart = FusedStep(counted.members, counted.options, usual, sharded=True)
    # two of statistics, one that publishes, two updates
    ordinary, dispatches, _ = counted.measure_and_move(apart)
    assert (len(ordinary), dispatches) == (5, 5)
    quick, dispatches, tables = counted.measure_and_move(apart)
    assert (len(quick), dispatches) == (5, 0)
    first = min(table.data_ptr() for table in tables)
    for launched in quick[:2]:
        assert first in flat(launched), "not this step's table"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        main(sys.argv[1])
    print("launches agree")
