"""Programs of the single launch that take turns in every order, in Triton's interpreter."""

from __future__ import annotations

import inspect
import random
import threading
from typing import Any

import pytest
import torch

from bngd_triton.kernels import Tuning
from bngd_triton.options import Options
from support.kernel_cases import LANES, LR, TILES
from support.twins import Twins, random_tensors


class Shuffled:
    """Runs the interpreter's programs as threads of which one runs at a time.

    At every atomic another one, drawn by a seeded generator, may go on: arrivals out of order,
    chunks that wait, programs that come late.
    """

    def __init__(self, seed: int, patience: int = 20000) -> None:
        self.draw = random.Random(seed)
        self.turn = threading.Condition()
        self.alive: list[int] = []
        self.running = -1
        self.patience = patience
        self.failed: BaseException | None = None

    def switch(self) -> None:
        """Let any program go on, and return when it is this one's turn again."""
        me = int(threading.current_thread().name)
        self.patience -= 1
        if self.patience < 0:
            raise TimeoutError("programs wait forever")
        with self.turn:
            self.pass_on()
            self.turn.wait_for(lambda: self.running == me or self.failed)
        if self.failed:
            raise self.failed

    def pass_on(self) -> None:
        if self.alive:
            # unfair: a slow program is overtaken by a whole wave, so that others wait for it
            self.running = self.alive[int(len(self.alive) * self.draw.random() ** 4)]
        self.turn.notify_all()

    def run(self, program: Any, programs: int) -> None:
        def one(me: int) -> None:
            try:
                with self.turn:
                    self.turn.wait_for(lambda: self.running == me or self.failed)
                if not self.failed:
                    program()
            except BaseException as error:
                self.failed = self.failed or error
            with self.turn:
                self.alive.remove(me)
                self.pass_on()

        threads = [
            threading.Thread(target=one, args=(i,), name=str(i), daemon=True)
            for i in range(programs)
        ]
        self.alive = list(range(programs))
        for thread in threads:
            thread.start()
        with self.turn:
            self.pass_on()
        for thread in threads:
            thread.join()
        if self.failed:
            raise self.failed


class AllAtOnce:
    """A kernel whose first program runs all of them, for the interpreter's loop over programs."""

    def __init__(self, kernel: Any, programs: int, scheduler: Shuffled) -> None:
        self.kernel, self.programs, self.scheduler = kernel, programs, scheduler
        self.started = False
        # what the interpreter asks of a function
        self.__name__ = kernel.__name__
        self.__globals__ = kernel.__globals__
        self.__signature__ = inspect.signature(kernel)

    def __call__(self, **arguments: Any) -> None:
        if not self.started:
            self.started = True
            self.scheduler.run(lambda: self.kernel(**arguments), self.programs)


@pytest.fixture
def schedulers(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> list[Shuffled]:
    """Each single launch takes the first of these, while there are any."""
    if device.type != "cpu":
        pytest.skip("a GPU interleaves programs itself")
    from triton.runtime import interpreter

    waiting: list[Shuffled] = []
    builder, executor = interpreter.interpreter_builder, interpreter.GridExecutor
    atomic, run = builder.create_atomic_rmw, executor.__call__
    current: list[Shuffled] = []

    def interleaved(*args: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():
            current[-1].switch()
        return atomic(*args)

    def call(self: Any, *args: Any, **kwargs: Any) -> None:
        if waiting and self.fn.__name__ == "_single_kernel":
            current.append(waiting.pop(0))
            self.fn = AllAtOnce(self.fn, self.grid[0], current[-1])
        run(self, *args, **kwargs)

    monkeypatch.setattr(builder, "create_atomic_rmw", interleaved)
    monkeypatch.setattr(executor, "__call__", call)
    return waiting


@pytest.mark.parametrize(
    ("programs", "tuning"), [(2, TILES), (5, LANES), (9, TILES)], ids=["2", "5, lanes", "9"]
)
def test_interleaved_programs(
    tuning: Tuning, programs: int, device: torch.device, schedulers: list[Shuffled]
) -> None:
    """Bits do not depend on who does what when; nobody waits forever; counters end at zero."""
    tensors = random_tensors([(901,), (300,), (16,), (700,)], device)
    twins = Twins(tensors, Options(LR, weight_decay=0.1), tuning, programs)
    for seed in range(3):
        schedulers.append(Shuffled(seed))
        # the last step's factors must not do
        twins.new_gradients()
        twins.step()
        assert not schedulers, "it was used"
