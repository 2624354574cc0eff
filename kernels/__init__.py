"""Triton kernels of BNGD, installed as ``bngd_triton.kernels``."""

if __name__ == "kernels":  # a checkout's root on sys.path: make way for Hugging Face's `kernels`
    raise ImportError("this folder is bngd_triton.kernels; import it by that name")
