"""Python in processes in which Triton compiles, whatever this one does."""

import os
import subprocess
import sys

from support.checkout import ROOT


def python(*command):
    """The exit status and all output of `python *command`, run in the root of the checkout."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = (sys.executable, *command)
    done = subprocess.run(command, text=True, capture_output=True, env=environment, cwd=ROOT)
    return done.returncode, done.stdout + done.stderr
