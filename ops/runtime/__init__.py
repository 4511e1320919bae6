"""What every op is built on: the call, packed documents, custom ops of torch, and the declaration of kernels."""
