"""What the kernels do on a GPU of which there is none here: counted, and modelled on paper.

    python -m bench.counts [--quick] [--check] [--out FILE] [--docs]

`kernels` runs the PTX of each kernel on NumPy and counts; `usual_path` reads its machine code;
`h200` has every figure of the GPU; `bounds` with `latency`, `whole_steps` and `l2` make times of
the counts. No time here was measured.
"""

import sys
from pathlib import Path

# the machine that executes PTX is a part of the tests
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
