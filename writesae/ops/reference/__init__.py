"""Reference implementations, token by token: slow, any dtype, differentiable, and the truth the kernels answer to."""
