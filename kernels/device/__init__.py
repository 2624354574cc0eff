"""Device code, the twin of `bngd_triton.eager`: all that imports Triton when it is imported."""
