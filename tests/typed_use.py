"""What a type checker says of a user's code: `.ci/types` demands each error that is named here."""

import torch

from bngd_triton import BNGD
from bngd_triton.kernels import fused_step_
from bngd_triton.reference import normalize_gradient, step_

params = list(torch.nn.Linear(3, 3).parameters())
BNGD(params, 1e-2, 0.9, granularity="row", normalizer="cdf", master_weights=None)
BNGD(params, granularity="rows")  # type: ignore[arg-type]
BNGD(params, nonfinite="ignore")  # type: ignore[arg-type]
BNGD(params, betas=(0.9, 0.999))  # type: ignore[arg-type]
BNGD(params, 1e-2, 0.9, 1e-4)  # type: ignore[arg-type]
normalize_gradient(params[0], normalizer="z-score")  # type: ignore[arg-type]
step_(params, params, None, lr=0.1, granularity="rows")  # type: ignore[arg-type]
fused_step_(params, params, None, lr=0.1, granularity="rows")  # type: ignore[arg-type]
