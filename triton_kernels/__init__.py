"""Triton kernels, one operator a file; installed as `specdec_kernels.triton_kernels`."""

if __name__ != "specdec_kernels.triton_kernels":
    raise ImportError(
        "this folder is the source of specdec_kernels.triton_kernels; "
        "install specdec_kernels and import that"
    )
