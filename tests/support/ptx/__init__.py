"""Execute the PTX that Triton makes, on NumPy and CPU tensors: what a GPU would compute.

`parse` cuts a kernel into blocks, `translate` and `operations` make a Python function of each, in
which a register of all threads is one NumPy vector; `arithmetic`, `memory` and `races` are what
those functions call; `execute` chooses who goes on when; `driver` stands behind Triton's dispatch.
What is not known is refused. It cannot show ptxas's own choices, nor time.
"""
