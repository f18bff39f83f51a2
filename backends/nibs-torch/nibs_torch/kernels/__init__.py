"""Fused kernels for GPUs, in Triton. One family a file; each opens with its plan, its shapes, its bytes and flops.

    tile       what all share: the walk over tiles, the products of one, which of its pairs count
    lse        statistics of rows and columns from tiles of logits that are never written
    weights    gradient weights of InfoNCE, written once, in the input's dtype
    sigmoid    loss and gradient weights of Sigmoid from one exponential
    rows       what is done row by row: poison, rounding to TF32, the lift of float16 weights
    product    a matrix product with a float32 accumulator, where the library has none
    tuning     which tile each kind of GPU likes, and how to find out

Beside each kernel stands its plain twin: the same numbers in a few lines of PyTorch, tile for tile, for tests and for
readers. `nibs_torch.fused` launches the kernels. Triton is imported here and nowhere above.
"""
