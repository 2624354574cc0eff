"""What the package is to Python."""

from __future__ import annotations

import importlib.util

import bngd_triton.kernels


def test_the_folder_kernels_is_empty_under_its_bare_name() -> None:
    # as where a checkout's root is on sys.path, and a library looks for Hugging Face's `kernels`
    spec = importlib.util.spec_from_file_location("kernels", bngd_triton.kernels.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert not [name for name in vars(module) if not name.startswith("__")]
    assert callable(bngd_triton.kernels.fused_step_)
