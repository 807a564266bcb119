"""A GPU's instructions, executed on the CPU: the kernel as it was compiled, without a GPU.

Pallas's interpreter executes what a kernel says; this executes what the compiler made of it (PTX,
and the host's code that makes descriptors of tensors): fragments of the tensor core, `ldmatrix`,
swizzled shared memory and its descriptors, tensor copies, barriers. Of what is asynchronous, tests
choose what happens as early as it may and what as late, and which warp goes first: a missing wait
shows as a wrong result, or as an error.

Not in it: time, caches, and what lies between PTX and the machine's own code (`ptxas`), but for
sums of products that are rounded once (`contract`).
"""
